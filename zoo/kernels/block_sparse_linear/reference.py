"""The block-sparse format and the linear layer on it, in plain torch: the definition that other versions are tested on.

A weight (d_out, d_in) is cut into a grid (R, C) of blocks b_r x b_c, R = ceil(d_out / b_r), C = ceil(d_in / b_c), and
the kept ones are stored as torch's BSR: `blocks` (nnz, b_r, b_c), block-row after block-row, `crow_indices` int32
(R + 1,), where each block-row begins, and `col_indices` int32 (nnz,), their block-columns, ascending in a block-row.
What a last block has beyond d_out or d_in is stored too and counts as zero.
"""

import torch
from torch import Tensor

from ...errors import UserError
from ..ops import damaged


def pack_blocks(weight: Tensor, keep: Tensor, block: tuple[int, int]) -> dict[str, Tensor]:
    """{"blocks", "crow_indices", "col_indices"} of a dense weight (d_out, d_in), its blocks kept where `keep` bool (R, C).

    Raises ValueError when `keep` is not of the grid's shape.
    """
    (d_out, d_in), (b_r, b_c) = weight.shape, block
    grid = (-(-d_out // b_r), -(-d_in // b_c))
    if keep.shape != grid:
        raise ValueError(f"keep is {tuple(keep.shape)}; {grid} blocks of {b_r}x{b_c} make up {d_out}x{d_in}")
    padded = torch.nn.functional.pad(weight, (0, grid[1] * b_c - d_in, 0, grid[0] * b_r - d_out))
    tiles = padded.view(grid[0], b_r, grid[1], b_c).transpose(1, 2)
    return {
        "blocks": tiles[keep],
        "crow_indices": torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int(),
        "col_indices": keep.nonzero()[:, 1].int(),
    }


def block_rows(crow_indices: Tensor, nnz: int) -> Tensor:
    """int64 (nnz,): the block-row of every block."""
    return torch.searchsorted(crow_indices.long(), torch.arange(nnz, device=crow_indices.device), right=True) - 1


def check_blocks(crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    """Raises UserError unless the indices are those of blocks in a grid of so many columns: what the compiled kernels check
    by themselves, for all other ways to compute."""
    nnz = len(col_indices)
    rises = (crow_indices[0] == 0) & (crow_indices[-1] == nnz) & (crow_indices.diff() >= 0).all()
    inside = (col_indices >= 0) & (col_indices < columns)
    places = block_rows(crow_indices, nnz) * columns + col_indices
    if not (rises & inside.all() & (places.diff() > 0).all()):
        raise misfit()


def misfit() -> UserError:
    """The error of `check_blocks`."""
    return damaged(
        "block_sparse_linear",
        "crow_indices must rise from 0 to nnz, col_indices be block-columns of x that ascend in every block-row",
    )


def unpack_blocks(blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, d_out: int, d_in: int) -> Tensor:
    """The dense weight (d_out, d_in) in the dtype of `blocks`."""
    nnz, b_r, b_c = blocks.shape
    rows, columns = len(crow_indices) - 1, -(-d_in // b_c)
    tiles = blocks.new_zeros(rows, columns, b_r, b_c)
    tiles[block_rows(crow_indices, nnz), col_indices.long()] = blocks
    return tiles.transpose(1, 2).reshape(rows * b_r, columns * b_c)[:d_out, :d_in]


def block_sparse_linear(
    x: Tensor, blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None, d_out: int
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), accumulated in fp32, in the dtype of x."""
    weight = unpack_blocks(blocks, crow_indices, col_indices, d_out, x.shape[-1])
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
