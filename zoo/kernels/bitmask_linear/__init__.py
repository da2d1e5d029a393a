"""bitmask_linear: a linear layer whose weight is stored as one bit per position plus the kept values."""

import torch
from torch import Tensor

from ..ops import check, check_floats, define, linear_shape
from .reference import bitmask_linear as bitmask_linear_reference
from .reference import unpack_bitmask


def _compute(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, row_offsets: Tensor | None) -> Tensor:
    return bitmask_linear_reference(x, values, mask, bias, row_offsets)


_op = define(
    "bitmask_linear",
    "(Tensor x, Tensor values, Tensor mask, Tensor? bias, Tensor? row_offsets) -> Tensor",
    _compute,
    lambda x, values, mask, bias, row_offsets: linear_shape(x, mask.shape[0]),
    lambda x, values, mask, bias, row_offsets: unpack_bitmask(values, mask, x.shape[-1], row_offsets),
)


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, row_offsets: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), W in the bitmask format of `reference.py`; differentiable in x.

    Args: x, values, bias fp32, bf16 or fp16 alike; mask uint8 (d_out, ceil(d_in / 8)); values (d_out, per_row), or (nnz,)
    with row_offsets int64 (d_out + 1,). Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    check_floats("bitmask_linear", x, values=values, bias=bias)
    check(mask.dtype == torch.uint8 and mask.ndim == 2, "bitmask_linear: mask must be uint8 (d_out, ceil(d_in / 8))")
    d_out, width = mask.shape
    check(x.ndim >= 1 and width == -(-x.shape[-1] // 8), f"bitmask_linear: x {tuple(x.shape)} does not fit the mask")
    if row_offsets is None:
        check(values.ndim == 2 and len(values) == d_out, "bitmask_linear: 2-D values need a row per output")
    else:
        fits = values.ndim == 1 and row_offsets.dtype == torch.int64 and row_offsets.shape == (d_out + 1,)
        check(fits, "bitmask_linear: 1-D values need row_offsets int64 (d_out + 1,)")
    check(bias is None or bias.shape == (d_out,), f"bitmask_linear: bias must be ({d_out},)")
    return _op(x, values, mask, bias, row_offsets)
