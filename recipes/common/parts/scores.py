"""Scores of single weights at initialisation: SNIP, GraSP, SynFlow. The largest scores are kept, over all layers.

A score is a tensor of the shape of its weight, under the weight's name in the model. Scored are the weights of all
convolutions and linear layers, never biases or norms. Models are copied: theirs stay as they are, running statistics
of normalization included. A batch is {"pixel_values": (B, C, H, W) normalised, "labels": (B,)}.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from zoo.errors import UserError

BOUNDED = (nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.ELU, nn.Tanh)  # nn.ReLU6 is an nn.Hardtanh
GRASP_EPSILON = 1e-10


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: weight} of every convolution and linear layer; a weight that two layers share comes once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(module.weight is other for other in found.values()):
            found[f"{name}.weight"] = module.weight
    return found


def snip_scores(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """|w * dL/dw|: how much the loss would move if the weight went (Lee et al. 2019). In train mode.

    L is the mean cross-entropy of a batch; gradients are summed over the batches.
    """
    model = copy.deepcopy(model).train()
    weights = prunable_weights(model)
    gradient = _summed(torch.autograd.grad(_loss(model, batch), list(weights.values())) for batch in batches)
    return {name: (weight.detach() * g).abs() for (name, weight), g in zip(weights.items(), gradient, strict=True)}


def grasp_scores(
    model: nn.Module, halves: Iterable[dict[str, Tensor]], temperature: float = 200.0
) -> dict[str, Tensor]:
    """w * H g / |sum|: how much the gradient's norm would fall if the weight went, to first order (Wang et al. 2020).

    g = sum_b dL_b/dw and H g = sum_b d<g, dL_b/dw>/dw with g held fixed, where L is the cross-entropy of logits over
    the temperature. The paper scores -w * H g and removes the largest; ours has the other sign, so that the largest
    are kept as everywhere. In train mode; layers without a second derivative count as H g = 0.

    Args:
        halves: batches that together are the sample; the paper's are two.
    """
    model, halves = copy.deepcopy(model).train(), list(halves)
    weights = prunable_weights(model)
    parameters = list(weights.values())

    def gradient(half, **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_loss(model, half, temperature), parameters, **options)

    g = _summed(gradient(half) for half in halves)

    def product(half) -> tuple[Tensor, ...]:
        inner = sum((a * b).sum() for a, b in zip(g, gradient(half, create_graph=True), strict=True))
        return torch.autograd.grad(inner, parameters, materialize_grads=True)

    scores = [p.detach() * h for p, h in zip(parameters, _summed(map(product, halves)), strict=True)]
    total = abs(sum(score.sum().item() for score in scores)) + GRASP_EPSILON
    return {name: score / total for name, score in zip(weights, scores, strict=True)}


def synflow_scores(
    model: nn.Module,
    pixel_shape: tuple[int, int, int],
    masks: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """|dR/dw * w| of R = the sum of the logits for an image of ones, with |weights| (Tanaka et al. 2020). No data.

    Normalization passes its input (mean 0, variance 1, scale 1, shift 0) and bounded activations become ReLU, which
    lets what is positive pass: ReLU6 would clip nearly everything and leave nearly every score at 0.

    Args:
        pixel_shape: (C, H, W).
        masks: {name: bool}, weights that are kept; others count as 0.
        dtype: R grows with depth beyond float32 (about e^130 in a ResNet-34, whose limit is e^88.7).
    Raises: UserError if R is not finite.
    """
    return _synflow_pass(_synflow_copy(model, dtype), pixel_shape, masks or {})


def synflow_masks(
    model: nn.Module, pixel_shape: tuple[int, int, int], density: float, rounds: int = 100
) -> dict[str, Tensor]:
    """{name: bool, True = kept} of SynFlow: in round k of T the best int(N D^(k/T)) stay, scored under the masks so far.

    Raises: UserError if R is not finite, or 0 at the end: then a layer that nothing bypasses is empty.
    """
    model = _synflow_copy(model, torch.float64)
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    masks: dict[str, Tensor] = {}
    for k in tqdm(range(1, rounds + 1), desc="SynFlow", unit="round", leave=False):
        masks = top_masks(_synflow_pass(model, pixel_shape, masks), int(total * density ** (k / rounds)))
    _refuse_collapse(_synflow_pass(model, pixel_shape, masks), density)
    return masks


def check_flow(model: nn.Module, masks: dict[str, Tensor], pixel_shape: tuple[int, int, int], density: float) -> None:
    """Raises: UserError if the masks cut every path from the pixels to the labels (layer collapse)."""
    _refuse_collapse(synflow_scores(model, pixel_shape, masks), density)


def top_masks(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """{name: bool} of the `count` largest scores over all layers; ties with the first one left out are left out too."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    if not flat.isfinite().all():
        raise UserError("scores at initialisation are not finite: check the model's weights, or score another way.")
    if count >= flat.numel():
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = flat.kthvalue(flat.numel() - count).values
    return {name: score > threshold for name, score in scores.items()}


def keep_fractions(scores: dict[str, Tensor], density: float) -> dict[str, float]:
    """{name: p_l}, the fraction of each weight that is among the best int(D N) of all."""
    masks = top_masks(scores, int(density * sum(score.numel() for score in scores.values())))
    return {name: mask.double().mean().item() for name, mask in masks.items()}


def _loss(model: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    return F.cross_entropy(_logits(model, batch["pixel_values"]) / temperature, batch["labels"])


def _logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    output = model(pixel_values)
    return output if isinstance(output, Tensor) else output.logits


def _summed(gradients: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [sum(parts) for parts in zip(*gradients, strict=True)]


def _synflow_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with |weights|, |biases|, normalization at its start and activations that pass what is positive."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, BOUNDED) or type(module).__module__ == "transformers.activations":
            model.set_submodule(name, nn.ReLU())
    for parameter in model.parameters():
        parameter.abs_()
    return model


def _synflow_pass(model: nn.Module, pixel_shape: tuple[int, int, int], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    masked = {name: w * masks[name] if name in masks else w.clone() for name, w in weights.items()}
    for w in masked.values():
        w.requires_grad_(True)
    ones = torch.ones(1, *pixel_shape, dtype=next(iter(masked.values())).dtype)
    output = torch.func.functional_call(model, masked, (ones,))
    flow = (output if isinstance(output, Tensor) else output.logits).sum()
    if not flow.isfinite():
        raise UserError(
            f"SynFlow's flow through the model is {flow.item()} in {ones.dtype}: it grows with depth, and"
            f" {torch.finfo(ones.dtype).max:.1g} is the limit; score with snip, or use synexp, which has no limit."
        )
    gradients = torch.autograd.grad(flow, list(masked.values()))
    scores = {name: (g * w.detach()).abs() for (name, w), g in zip(masked.items(), gradients, strict=True)}
    if not all(score.isfinite().all() for score in scores.values()):
        raise UserError(f"SynFlow's scores overflow in {ones.dtype}: float64, snip or synexp is needed.")
    return scores


def _refuse_collapse(scores: dict[str, Tensor], density: float) -> None:
    if not any(score.any() for score in scores.values()):
        raise UserError(
            f"density {density}: a layer that nothing bypasses has lost all its weights; keep more, or use synexp."
        )
