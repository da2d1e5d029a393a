"""Pruning of blocks of weights: their grid, what the removal of each changes on calibration images, and least squares after.

A weight is a matrix W (d_out, d_in), that of a convolution (d_out, d_in*kh*kw), cut into a grid (R, C) of blocks b_r x b_c,
R = ceil(d_out / b_r), C = ceil(d_in / b_c); the last ones may be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from zoo.errors import UserError
from zoo.kernels.block_sparse_linear.reference import pack_blocks
from zoo.models import FAMILIES

CHUNK = 8  # images whose weight gradients exist at the same time
DAMPING = 0.01  # of the mean diagonal of X^T X, in the least squares

Block = tuple[int, int]


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear or convolution layer as a matrix (d_out, d_in*kh*kw): a view."""
    return layer.weight.flatten(1)


def tokens(layer: nn.Module, x: Tensor, images: int) -> Tensor:
    """A layer's input as rows of its matrix product, image by image: (images, tokens, d_in), whatever its windows."""
    if isinstance(layer, nn.Conv2d):
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    return x.reshape(images, -1, x.shape[-1])


# --------------------------------------------------------------------------------------------------------------- blocks


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """(R, C) of a weight of this shape."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_sums(values: Tensor, block: Block) -> Tensor:
    """(..., d_out, d_in) -> (..., R, C), the sum over each block."""
    rows, columns = grid(values.shape[-2:], block)
    padding = (0, columns * block[1] - values.shape[-1], 0, rows * block[0] - values.shape[-2])
    if any(padding):
        values = F.pad(values, padding)
    return values.unflatten(-1, (columns, block[1])).unflatten(-3, (rows, block[0])).sum((-3, -1))


def block_sizes(shape: tuple[int, int], block: Block) -> Tensor:
    """int64 (R, C): weights in each block."""
    return block_sums(torch.ones(shape), block).long()


def spread_blocks(keep: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """bool (R, C) -> bool (d_out, d_in)."""
    return keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


# ----------------------------------------------------------------------------------------------- calibration statistics


def block_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    layers: dict[str, nn.Module],
    block: Block,
    target: str = "out",
    probes: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """{layer: S (N, R, C)}, where a row sums G_n^T X_n * W over each block: the slope of a scalar along W, image by image.

    X_n (tokens, d_in) is the layer's input, G_n (tokens, d_out) the gradient at its output. The scalar is, by `target`,
    "out": logits . v with v ~ N(0, I), drawn `probes` times, one row each; "ce": the cross-entropy of the logits with
    their own argmax. The weight gradients of at most CHUNK images exist at a time, and only their block sums stay.

    Args:
        batches: pixels (images, 3, height, width); the draw of v depends on `seed` and the order of the images alone.
    Raises: UserError naming the layer whose gradient is not finite or does not exist.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(seed)

    def scalars(logits: Tensor) -> Iterator[Tensor]:
        if target == "ce":
            yield F.cross_entropy(logits, logits.argmax(-1), reduction="sum")
            return
        shape = (probes, logits.shape[-1])
        directions = torch.stack([torch.randn(shape, generator=generator) for _ in logits])  # whatever the batches
        yield from (logits[:, None] * directions.to(logits)).sum((0, 2))

    def add(name: str, x: Tensor, g: Tensor) -> None:
        weight = matrix(layers[name]).detach()
        for part, gradient in zip(x.split(CHUNK), g.split(CHUNK), strict=True):
            found[name].append(block_sums(torch.einsum("bto,bti->boi", gradient, part) * weight, block).cpu())

    _backpropagate(model, batches, layers, scalars, add)
    return {name: torch.cat(rows) for name, rows in found.items()}


def mean_gradients(model: nn.Module, batches: Iterable[Tensor], layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """{layer: g (d_out, d_in)}: the gradient of mean(logits^2), averaged over the images before anything is squared."""
    sums = {name: torch.zeros_like(matrix(layer)) for name, layer in layers.items()}
    images = 0

    def scalars(logits: Tensor) -> Iterator[Tensor]:
        nonlocal images
        images += len(logits)
        yield logits.square().mean(-1).sum()

    def add(name: str, x: Tensor, g: Tensor) -> None:
        sums[name].addmm_(g.flatten(0, 1).T, x.flatten(0, 1))

    _backpropagate(model, batches, layers, scalars, add)
    return {name: total / images for name, total in sums.items()}


def _backpropagate(
    model: nn.Module,
    batches: Iterable[Tensor],
    layers: dict[str, nn.Module],
    scalars: Callable[[Tensor], Iterator[Tensor]],
    add: Callable[[str, Tensor, Tensor], None],
) -> None:
    """add(layer, X (images, tokens, d_in), G (images, tokens, d_out)) for every batch and every scalar of its logits."""
    model.eval()  # no dropped paths, no dropout
    device = next(model.parameters()).device
    for pixels in batches:
        with captured(layers) as seen:
            pixels = pixels.to(device).requires_grad_()  # so that every layer has a gradient, frozen or not
            logits = model(pixel_values=pixels).logits.float()
            names = [name for name in layers if name in seen]
            for scalar in scalars(logits):
                outputs = [seen[name][1] for name in names]
                gradients = torch.autograd.grad(scalar, outputs, retain_graph=True, allow_unused=True)
                for name, g in zip(names, gradients, strict=True):
                    if g is None:
                        raise UserError(f"{name} does not reach the logits; leave it out with --exclude.")
                    if not g.isfinite().all():
                        raise UserError(f"{name}: its gradients on the calibration images hold NaN or Inf.")
                    x = tokens(layers[name], seen[name][0].detach(), len(pixels))
                    g = g.flatten(2).transpose(1, 2) if isinstance(layers[name], nn.Conv2d) else g
                    add(name, x, g.reshape(len(pixels), -1, g.shape[-1]))


@contextmanager
def captured(layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{layer: (its input, its output)} of the last forward pass, in the order in which the layers ran."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------ order and curve


def magnitude_scores(weight: Tensor, block: Block) -> Tensor:
    """(R, C): mean |W| of each block."""
    return block_sums(weight.abs(), block) / block_sizes(weight.shape, block).to(weight)


def taylor_scores(weight: Tensor, gradient: Tensor, block: Block) -> Tensor:
    """(R, C): mean |W * g| of each block."""
    return magnitude_scores(weight * gradient, block)


def fisher_scores(statistics: Tensor) -> Tensor:
    """(R, C): phi = mean_n S_n^2."""
    return statistics.square().mean(0)


def removal_order(scores: Tensor) -> Tensor:
    """int64 (R*C,): the blocks, counted row by row, from the least to the most important; of equals the first goes first."""
    return scores.flatten().argsort(stable=True)


def distortion_curve(statistics: Tensor, order: Tensor) -> Tensor:
    """float64 (R*C + 1,): delta(k) = mean_n c_n(k)^2 / 2, c_n(k) the sum of S_n over the first k blocks; never falling.

    With S of target "out" it is half the mean squared change of the logits, to second order; with a single row S, the
    block sums of g * W, it is (g . Delta)^2 / 2.
    """
    sums = statistics.flatten(1)[:, order].double().cumsum(1)
    return F.pad(sums.square().mean(0) / 2, (1, 0)).cummax(0).values


# ------------------------------------------------------------------------------------------------------- reconstruction


class _Reached(Exception):
    """The layer whose input was wanted has been reached: the rest of the model need not run."""


@torch.no_grad()
def layer_inputs(model: nn.Module, layer: nn.Module, pixels: Tensor) -> Tensor:
    """The input rows (images*tokens, d_in) of one layer."""
    rows = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(tokens(layer, inputs[0], len(pixels)).flatten(0, 1))
        raise _Reached

    handle = layer.register_forward_pre_hook(keep)
    try:
        model(pixel_values=pixels.to(next(model.parameters()).device))
    except _Reached:
        pass
    finally:
        handle.remove()
    return rows[0]


def waves(model: nn.Module, layers: dict[str, nn.Module], pixels: Tensor) -> list[list[str]]:
    """The layers in the order in which they run, those with the very same input (query, key, value) together."""
    with torch.no_grad(), captured(layers) as seen:
        model(pixel_values=pixels.to(next(model.parameters()).device))
        groups: dict[int, list[str]] = {}
        for name, (x, _) in seen.items():
            groups.setdefault(x.data_ptr(), []).append(name)  # all inputs are alive, so no address comes twice
    return list(groups.values())


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    masks: dict[str, Tensor],
    batches: list[Tensor],
    block_rows: int,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[str, tuple[float, float]]:
    """Refit the kept weights of `model`, in place, layer by layer as they run, so that outputs are those of `dense` again.

    For each block-row p with kept inputs c:  min over W_p,c of |X_c W^T - Y_p|^2 + mu |W - W_old|^2, where X are the
    inputs from the model as refitted so far, Y = X_dense W_dense^T, and mu = DAMPING * mean diag(X^T X). The rows of a
    block-row share one factorisation, which is what blocks make cheap. Biases stay, and so do the zeros.

    Args:
        model: pruned, of the same class as `dense`.
        masks: {layer: bool (d_out, d_in)}, equal in all of the `block_rows` rows of a block-row.
        batches: pixels of the calibration images, read once for every group of layers that share an input.
        advance: told how many layers are finished.
    Returns: {layer: |X W^T - Y|^2 / |Y|^2 on the calibration images, before and after}; it never rises.
    """
    errors = {}
    layers, originals = ({name: m.get_submodule(name) for name in masks} for m in (model, dense))
    for names in waves(model, layers, batches[0][:1]):
        gram, cross, dense_gram = 0, 0, 0  # X^T X, X^T X_dense, X_dense^T X_dense, in fp64
        for pixels in batches:
            x = layer_inputs(model, layers[names[0]], pixels).double()
            y = layer_inputs(dense, originals[names[0]], pixels).double()
            gram, cross, dense_gram = gram + x.T @ x, cross + x.T @ y, dense_gram + y.T @ y
        for name in names:
            original, weight = matrix(originals[name]).double(), matrix(layers[name])
            target, mask = cross @ original.T, masks[name].to(weight.device)  # target = X^T Y, (d_in, d_out)
            size = ((original @ dense_gram) * original).sum().item()  # |Y|^2
            before = weight.double()
            after = _least_squares(before, gram, target, mask, block_rows)
            errors[name] = tuple(_relative_error(w, gram, target, size) for w in (before, after))
            weight.copy_(after)
        advance(len(names))
    return errors


def _least_squares(weight: Tensor, gram: Tensor, target: Tensor, mask: Tensor, block_rows: int) -> Tensor:
    """The solution for one layer: weight (d_out, d_in) pruned, gram (d_in, d_in), target (d_in, d_out), all float64."""
    mu = DAMPING * gram.diagonal().mean()
    result = torch.zeros_like(weight)
    for start in range(0, len(weight), block_rows):
        rows, kept = slice(start, start + block_rows), mask[start].nonzero().squeeze(1)
        if not len(kept) or mu == 0:  # an empty block-row, or inputs that are all zero
            result[rows] = weight[rows]
            continue
        H = gram[kept][:, kept]
        old = weight[rows][:, kept]
        factor = torch.linalg.cholesky(H + mu * torch.eye(len(kept), dtype=H.dtype, device=H.device))
        change = torch.cholesky_solve(target[kept][:, rows] - H @ old.T, factor)  # 0 where nothing was pruned
        result[rows.start : rows.stop, kept] = old + change.T
    return result


def _relative_error(weight: Tensor, gram: Tensor, target: Tensor, size: float) -> float:
    """|X W^T - Y|^2 / |Y|^2 from the moments; 0 where all outputs are 0."""
    error = ((weight @ gram) * weight).sum().item() - 2 * (weight.T * target).sum().item() + size
    return max(error, 0.0) / size if size else 0.0


# -------------------------------------------------------------------------------------------------- counting and packing


@torch.no_grad()
def count_macs(model: nn.Module, pixels: Tensor, masks: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-adds for one image (1, 3, H, W): of all linears and convolutions, and of attention's own products.

    Returns: {"linear_dense", "linear", "pruned_dense", "pruned", "attention"}; "pruned" counts the layers with a mask
    (d_out, d_in), "linear" all of them, with one addition a bias and token, as the code counts; kept weights only.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with captured(layers) as seen, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=pixels.to(model.device))
    counts = dict.fromkeys(("linear_dense", "linear", "pruned_dense", "pruned"), 0)
    for name, (x, _) in seen.items():
        times, weight = tokens(layers[name], x, 1).shape[1], matrix(layers[name])
        kept = int(masks[name].sum()) if name in masks else weight.numel()
        bias = 0 if layers[name].bias is None else len(weight)
        counts["linear_dense"] += times * (weight.numel() + bias)
        counts["linear"] += times * (kept + bias)
        if name in masks:
            counts["pruned_dense"] += times * weight.numel()
            counts["pruned"] += times * kept
    products = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)  # without flash kernels: all of attention
    return counts | {"attention": products // 2}


def pack_model(model: PreTrainedModel, keeps: dict[str, Tensor], block: Block, about: dict) -> PreTrainedModel:
    """The model of our own class that stores only the blocks to keep, bool (R, C), of each linear; all else is copied.

    about: what `compression_config` says besides "modules". Convolutions stay as they are, with their zeros.
    """
    state, modules = model.state_dict(), {}
    for name, keep in keeps.items():
        if isinstance(model.get_submodule(name), nn.Conv2d):
            continue
        packed = pack_blocks(state.pop(f"{name}.weight"), keep, block)
        state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
        modules[name] = {"format": "block_sparse", "block": list(block), "blocks": int(keep.sum())}
    model_class = next(head for _, head in FAMILIES.values() if issubclass(head, type(model)))
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    compression = {"format_version": 1, **about, "modules": modules}
    packed_model = model_class(model_class.config_class.from_dict(settings | {"compression_config": compression}))
    packed_model.load_state_dict(state)
    return packed_model.eval()
