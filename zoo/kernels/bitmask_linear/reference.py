"""The bitmask format and the linear layer on it, in plain torch: the definition that every other version is tested on.

A weight (d_out, d_in) is stored as `mask` uint8 (d_out, ceil(d_in / 8)), bit j of byte k of row i saying that column
8k + j is kept (padding bits are 0), and `values`, the kept weights in column order, row after row: 2-D (d_out, per_row)
when every row keeps equally many (N:M), else 1-D (nnz,) with `row_offsets` int64 (d_out + 1,).
"""

import torch
from torch import Tensor

from ...errors import UserError
from ..ops import damaged


def unpack_mask(mask: Tensor, d_in: int) -> Tensor:
    """uint8 (d_out, ceil(d_in / 8)) -> bool (d_out, d_in)."""
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten(-2)[..., :d_in].bool()


def pack_bitmask(
    weight: Tensor, mask: Tensor | None = None, per_row: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packs a dense weight (d_out, d_in), keeping where `mask` (bool, same shape; default: non-zero entries).

    Returns (values, mask bytes, row_offsets); with `per_row` every row must keep that many, values are 2-D and
    row_offsets is None. Raises ValueError when a row keeps another number.
    """
    d_out, d_in = weight.shape
    keep = weight != 0 if mask is None else mask
    bits = torch.nn.functional.pad(keep, (0, -d_in % 8)).view(d_out, -(-d_in // 8), 8)
    powers = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=weight.device)
    packed = (bits * powers).sum(-1, dtype=torch.uint8)
    counts = keep.sum(1)
    if per_row is None:
        return weight[keep], packed, torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if (counts != per_row).any():
        raise ValueError(f"every row must keep {per_row} weights; a row keeps {counts[counts != per_row][0].item()}")
    return weight[keep].view(d_out, per_row), packed, None


def unpack_bitmask(values: Tensor, mask: Tensor, d_in: int, row_offsets: Tensor | None = None) -> Tensor:
    """The dense weight (d_out, d_in) in the dtype of `values`. `row_offsets` is implied by the mask."""
    keep = unpack_mask(mask, d_in)
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def check_bitmask(op: str, values: Tensor, mask: Tensor, d_in: int, row_offsets: Tensor | None) -> None:
    """Raises UserError, naming the operation, unless every row of the mask keeps as many columns as it has values, none of
    them beyond d_in. What the compiled kernels check by themselves, for all other ways to compute."""
    pairs = (mask & 0x55) + (mask >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    kept = ((fours & 0x0F) + (fours >> 4)).sum(1)
    if row_offsets is None:
        fits = kept == values.shape[1]
    else:
        ends = (row_offsets[:1] == 0) & (row_offsets[-1:] == len(values))
        fits = torch.cat([kept == row_offsets.diff(), ends])
    if d_in % 8:
        fits = torch.cat([fits, mask[:, -1] >> d_in % 8 == 0])
    if not fits.all():
        raise misfit(op)


def misfit(op: str) -> UserError:
    """The error of `check_bitmask`."""
    return damaged(
        op, "each row of the mask must keep as many columns as it has values, and none beyond the last column"
    )


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, row_offsets: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), accumulated in fp32, in the dtype of x."""
    weight = unpack_bitmask(values, mask, x.shape[-1], row_offsets)
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
