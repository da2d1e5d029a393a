"""armor_linear: ARMOR's whole layer, block-diagonal x N:M x block-diagonal, in one operation."""

import ctypes

import torch
from torch import Tensor

from ..bitmask_linear import expanded_tiles, prove_bitmask
from ..bitmask_linear.reference import misfit, unpack_bitmask
from ..block_diagonal_linear import block_diagonal_product
from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import SKINNY, check_floats, define, linear_shape, on_gpu, scratch
from .gpu import armor_linear_triton
from .reference import armor_linear as armor_linear_reference


def _compute(x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None) -> Tensor:
    d_out, d_in = len(mask), x.shape[-1]
    many = x.numel() > SKINNY * d_in
    lib = library("bitmask_linear" if many else "armor_linear") if x.device.type == "cpu" else None
    if lib is None or x.numel() == 0:
        prove_bitmask("armor_linear", values, mask, d_in, None)
        compute = armor_linear_triton if on_gpu(x) else armor_linear_reference
        return compute(x, wrap_in, values, mask, wrap_out, bias)
    rows = x.view(-1, d_in)
    if many:  # the wrappers act on the activations: 2 (b_in d_in + b_out d_out) FLOP per row of x
        out = _expanded_product(lib, rows, wrap_in, values, mask, wrap_out)
        out = out if bias is None else out.add_(bias)
    else:
        out = x.new_empty(len(rows), d_out)
        wrong = lib.slimzoo_armor_linear(
            *map(pointer, (rows, wrap_in, values, mask, wrap_out, bias, out)),
            *integers(len(rows), d_out, d_in, wrap_out.shape[1], wrap_in.shape[1], values.shape[1]),
            DTYPES[x.dtype],
            level(lib),
            torch.get_num_threads(),
        )
        if wrong:
            raise misfit("armor_linear")
    return out.view(*x.shape[:-1], d_out)


def _expanded_product(
    lib: ctypes.CDLL, rows: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor
) -> Tensor:
    """A'(S(B' x)) for many rows (n, d_in): tile by tile, so that S(B' x) is still in cache when A' reads it."""
    n, d_in = rows.shape
    b = wrap_out.shape[1]
    u = block_diagonal_product(rows, wrap_in, scratch("wrapped", (n, d_in), rows.dtype))
    out = rows.new_empty(n, len(mask))
    for first, last, tile in expanded_tiles(lib, values, mask, None, d_in, multiple=b):
        v = torch.mm(u, tile.T, out=scratch("product", (n, last - first), rows.dtype))
        block_diagonal_product(v, wrap_out[first // b : last // b], out[:, first:last])
    return out


def _dense(x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None) -> Tensor:
    d_out, d_in = len(mask), x.shape[-1]
    core = unpack_bitmask(values, mask, d_in).float()
    core = torch.bmm(wrap_out.float(), core.view(*wrap_out.shape[:2], d_in)).view(d_out, *wrap_in.shape[:2])
    return torch.einsum("onj,njk->onk", core, wrap_in.float()).reshape(d_out, d_in)


_op = define(
    "armor_linear",
    "(Tensor x, Tensor wrap_in, Tensor values, Tensor mask, Tensor wrap_out, Tensor? bias) -> Tensor",
    _compute,
    lambda x, wrap_in, values, mask, wrap_out, bias: linear_shape(x, mask.shape[0]),
    _dense,
)


def armor_linear(
    x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> A'(S(B' x)) + bias (..., d_out); arguments as in `reference.py`, differentiable in x.

    Raises: ValueError when shapes, dtypes or devices do not fit; UserError as `bitmask_linear`.
    """
    check_floats("armor_linear", x, wrap_in=wrap_in, values=values, wrap_out=wrap_out, bias=bias)
    if not (mask.dtype == torch.uint8 and mask.ndim == 2):
        raise ValueError("armor_linear: mask must be uint8 (d_out, ceil(d_in / 8))")
    if not (values.ndim == 2 and len(values) == len(mask)):
        raise ValueError("armor_linear: values must be (d_out, kept per row)")
    for name, blocks in (("wrap_in", wrap_in), ("wrap_out", wrap_out)):
        if not (blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]):
            raise ValueError(f"armor_linear: {name} must be (n, b, b)")
    d_in, d_out = wrap_in.shape[0] * wrap_in.shape[1], wrap_out.shape[0] * wrap_out.shape[1]
    if not (x.ndim >= 1 and x.shape[-1] == d_in):
        raise ValueError(f"armor_linear: x {tuple(x.shape)} must end in {d_in}")
    if not (mask.shape == (d_out, -(-d_in // 8))):
        raise ValueError(f"armor_linear: mask {tuple(mask.shape)} does not fit {d_out}x{d_in}")
    if not (bias is None or bias.shape == (d_out,)):
        raise ValueError(f"armor_linear: bias must be ({d_out},)")
    return _op(x, wrap_in, values, mask, wrap_out, bias)
