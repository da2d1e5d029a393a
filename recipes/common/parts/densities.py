"""How many weights each layer keeps: layer-wise densities d_l that spend one budget, sum_l d_l n_l = D N.

Layer l has a weight of shape s_l, (out, in / groups, kh, kw) or (out, in), with n_l entries; N = sum n_l, D the global
density. Every rule below is exact: it returns the budget that it was given, or says the least that it needs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import UserError

FORMULAS = ("uniform", "uniform_plus", "er", "erk", "erk_plus", "balanced")  # need shapes only
SCORED = ("snip", "grasp")  # need data: pai_scores.py
RATIOS = FORMULAS + SCORED
LAST_LAYER = 0.2  # uniform_plus keeps at least this much of the classifier


@dataclass(frozen=True)
class Layer:
    """A weight that can be pruned; `macs` multiplications read it for one image when it is dense."""

    shape: tuple[int, ...]
    macs: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def prunable_layers(model: nn.Module, pixel_values: Tensor, exclude: str = "") -> dict[str, Layer]:
    """{name of the weight: layer} of every convolution and linear layer that runs, in the order in which they do.

    Biases, norms and embeddings are never in it. Raises: UserError when nothing is left.

    Args:
        pixel_values: (1, C, H, W), any image of the size that the model is for.
        exclude: a regular expression; weights whose name it matches anywhere are left out, and out of the budget.
    """
    found: dict[str, Layer] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_, __, output: Tensor) -> None:
            channels = module.weight.shape[0]
            found.setdefault(
                name, Layer(tuple(module.weight.shape), module.weight.numel() * output.numel() // channels)
            )

        hooks.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not (exclude and re.search(exclude, f"{name}.weight")):
            watch(f"{name}.weight", module)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=pixel_values)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(f"--exclude {exclude!r}: no convolution or linear layer is left to prune.")
    return found


def layer_densities(
    shapes: dict[str, tuple[int, ...]], density: float, ratio: str, fc_density: float = 1.0
) -> dict[str, float]:
    """{layer: d_l in (0, 1]} by one of FORMULAS; sum d_l n_l = D N.

    Args:
        shapes: of the weights, the first layer first and the classifier last.
        density: D in (0, 1].
        fc_density: density of the classifier under erk_plus.
    Raises: UserError for an unknown ratio, and for a budget that the rule cannot meet, with the least that it can.
    """
    if not 0 < density <= 1:
        raise UserError(f"--density {density}: a fraction above 0 and at most 1 is needed.")
    if ratio not in FORMULAS:
        raise UserError(f"--ratio {ratio}: one of {', '.join(RATIOS)} is needed.")
    if ratio == "uniform":
        return dict.fromkeys(shapes, float(density))
    if ratio == "balanced":
        return balanced(shapes, density)
    if ratio == "uniform_plus":
        first, last = ends(shapes, ratio)
        return with_fixed(shapes, density, {first: 1.0, last: max(density, LAST_LAYER)}, ratio, uniform)
    if ratio == "erk_plus":
        if not 0 < fc_density <= 1:
            raise UserError(f"--fc_density {fc_density}: a fraction above 0 and at most 1 is needed.")
        return with_fixed(shapes, density, {ends(shapes, ratio)[1]: fc_density}, ratio, erk)
    return erk(shapes, density, kernel=ratio == "erk")


def uniform(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    return dict.fromkeys(shapes, density)


def erk(shapes: dict[str, tuple[int, ...]], density: float, kernel: bool = True) -> dict[str, float]:
    """d_l = eps raw_l, or 1 where that passes 1; raw_l = sum(s_l) / prod(s_l) (ERK), or of (out, in) alone (ER).

    Layers whose density would pass 1 become dense, those of the largest raw_l first, and eps spends what is left:
    eps = (D sum_{l free} n_l - (1 - D) sum_{l dense} n_l) / sum_{l free} raw_l n_l.
    """
    used = {name: shape if kernel else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in used.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    free, scale = set(shapes), 0.0
    while free:
        budget = math.fsum(sizes[name] * (density if name in free else density - 1) for name in shapes)
        scale = budget / math.fsum(raw[name] * sizes[name] for name in free)
        largest = max(raw[name] for name in free)
        if scale * largest <= 1:
            break
        free -= {name for name in free if raw[name] == largest}
    return {name: scale * raw[name] if name in free else 1.0 for name in shapes}


def balanced(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """As many weights for every layer, d_l = min(1, lambda / n_l) (Gadhikar et al. 2023); small layers become dense."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget, free, share = density * sum(sizes.values()), sorted(sizes, key=sizes.get), 0.0
    while free:
        share = budget / len(free)
        if sizes[free[0]] > share:
            break
        budget -= sizes[free.pop(0)]
    return {name: share / sizes[name] if name in free else 1.0 for name in shapes}


def ends(shapes: dict[str, tuple[int, ...]], ratio: str) -> tuple[str, str]:
    """The first and the last layer."""
    if len(shapes) < 3:
        raise UserError(f"--ratio {ratio}: 3 prunable layers at least are needed, there are {len(shapes)}.")
    names = list(shapes)
    return names[0], names[-1]


def with_fixed(shapes, density: float, fixed: dict[str, float], ratio: str, rule) -> dict[str, float]:
    """Some densities given, `rule` on all other layers with what the budget then leaves."""
    rest = {name: shape for name, shape in shapes.items() if name not in fixed}
    total, free = (sum(map(math.prod, some.values())) for some in (shapes, rest))
    spent = math.fsum(math.prod(shapes[name]) * value for name, value in fixed.items())
    left = (density * total - spent) / free
    if left <= 0:
        raise UserError(
            f"--density {density}: --ratio {ratio} spends {spent / total:.4g} on {' and '.join(fixed)}; more is needed."
        )
    if left > 1 + 1e-12:
        raise UserError(
            f"--density {density}: with --ratio {ratio} at most {(free + spent) / total:.4g} can be kept; raise"
            " --fc_density."
        )
    found = fixed | rule(rest, min(left, 1.0))
    return {name: found[name] for name in shapes}


def layer_counts(densities: dict[str, float], sizes: dict[str, int]) -> dict[str, int]:
    """{layer: k_l}, how many weights it keeps: the largest remainders round up, so that sum k_l = round(sum d_l n_l).

    No layer keeps none, since nothing would pass it: where d_l n_l < 1, one weight is taken from the largest layer.
    Raises: UserError if there are more layers than weights to keep.
    """
    wanted = {name: densities[name] * sizes[name] for name in sizes}
    total = round(math.fsum(wanted.values()))
    if total < len(sizes):
        raise UserError(
            f"--density: {total} weights for {len(sizes)} layers are too few; at least"
            f" {len(sizes) / sum(sizes.values()):.2g} is needed."
        )
    counts = {name: min(sizes[name], max(1, math.floor(value + 1e-9))) for name, value in wanted.items()}
    by_remainder = sorted(sizes, key=lambda name: counts[name] - wanted[name])  # stable: earlier layers first
    for name in by_remainder:
        if sum(counts.values()) < total and counts[name] < sizes[name]:
            counts[name] += 1
    while sum(counts.values()) > total:
        counts[max(counts, key=counts.get)] -= 1
    return counts


def mac_ratio(densities: dict[str, float], layers: dict[str, Layer]) -> float:
    """Multiplications of the sparse layers over those of the dense ones: the bound on what sparse kernels can win."""
    return math.fsum(densities[name] * layer.macs for name, layer in layers.items()) / sum(
        layer.macs for layer in layers.values()
    )
