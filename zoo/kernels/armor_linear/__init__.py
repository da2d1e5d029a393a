"""armor_linear: ARMOR's whole layer, block-diagonal x N:M x block-diagonal, in one operation."""

import torch
from torch import Tensor

from ..bitmask_linear.reference import unpack_bitmask
from ..ops import check, check_floats, define, linear_shape
from .reference import armor_linear as armor_linear_reference


def _dense(x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None) -> Tensor:
    d_out, d_in = len(mask), x.shape[-1]
    core = unpack_bitmask(values, mask, d_in).float()
    core = torch.bmm(wrap_out.float(), core.view(*wrap_out.shape[:2], d_in)).view(d_out, *wrap_in.shape[:2])
    return torch.einsum("onj,njk->onk", core, wrap_in.float()).reshape(d_out, d_in)


_op = define(
    "armor_linear",
    "(Tensor x, Tensor wrap_in, Tensor values, Tensor mask, Tensor wrap_out, Tensor? bias) -> Tensor",
    armor_linear_reference,
    lambda x, wrap_in, values, mask, wrap_out, bias: linear_shape(x, mask.shape[0]),
    _dense,
)


def armor_linear(
    x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> A'(S(B' x)) + bias (..., d_out); arguments as in `reference.py`, differentiable in x.

    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    check_floats("armor_linear", x, wrap_in=wrap_in, values=values, wrap_out=wrap_out, bias=bias)
    check(mask.dtype == torch.uint8 and mask.ndim == 2, "armor_linear: mask must be uint8 (d_out, ceil(d_in / 8))")
    check(values.ndim == 2 and len(values) == len(mask), "armor_linear: values must be (d_out, kept per row)")
    for name, blocks in (("wrap_in", wrap_in), ("wrap_out", wrap_out)):
        check(blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2], f"armor_linear: {name} must be (n, b, b)")
    d_in, d_out = wrap_in.shape[0] * wrap_in.shape[1], wrap_out.shape[0] * wrap_out.shape[1]
    check(x.ndim >= 1 and x.shape[-1] == d_in, f"armor_linear: x {tuple(x.shape)} must end in {d_in}")
    check(mask.shape == (d_out, -(-d_in // 8)), f"armor_linear: mask {tuple(mask.shape)} does not fit {d_out}x{d_in}")
    check(bias is None or bias.shape == (d_out,), f"armor_linear: bias must be ({d_out},)")
    return _op(x, wrap_in, values, mask, wrap_out, bias)
