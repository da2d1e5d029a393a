"""block_diagonal_linear: many small dense blocks along the diagonal, ARMOR's wrappers."""

import torch
from torch import Tensor

from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import SKINNY, check_floats, define, on_gpu
from .gpu import block_diagonal_linear_triton
from .reference import block_diagonal_linear as block_diagonal_linear_reference


def _compute(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    if on_gpu(x):
        return block_diagonal_linear_triton(x, blocks, bias)
    lib = library("block_diagonal_linear") if x.device.type == "cpu" else None
    if lib is None or x.numel() == 0:
        return block_diagonal_linear_reference(x, blocks, bias)
    n, b, _ = blocks.shape
    rows = x.view(-1, n * b)
    if len(rows) > SKINNY:
        out = block_diagonal_product(rows, blocks, torch.empty_like(rows))
        out = out if bias is None else out.add_(bias)
    else:
        out = torch.empty_like(rows)
        lib.slimzoo_block_diagonal_linear(
            *map(pointer, (rows, blocks, bias, out)),
            *integers(len(rows), n, b),
            DTYPES[x.dtype],
            level(lib),
            torch.get_num_threads(),
        )
    return out.view(x.shape)


def block_diagonal_product(rows: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """Writes the product for many rows (r, n b), without bias, into `out` of the same shape, and returns it."""
    n, b, _ = blocks.shape
    by_block = rows.view(-1, n, b).transpose(0, 1)  # (n, r, b)
    torch.bmm(by_block, blocks.transpose(1, 2), out=out.view(-1, n, b).transpose(0, 1))
    return out


def _dense(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    n, b, _ = blocks.shape
    dense = blocks.new_zeros(n, b, n, b)
    dense.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return dense.view(n * b, n * b)


_op = define(
    "block_diagonal_linear",
    "(Tensor x, Tensor blocks, Tensor? bias) -> Tensor",
    _compute,
    lambda x, blocks, bias: x.new_empty(x.shape),
    _dense,
)


def block_diagonal_linear(x: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n b), blocks (n, b, b), bias (n b,) -> (..., n b): y_ni = sum_j blocks[n, i, j] x_nj + bias_ni.

    fp32, bf16 or fp16 alike; differentiable in x. Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    check_floats("block_diagonal_linear", x, blocks=blocks, bias=bias)
    if not (blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]):
        raise ValueError("block_diagonal_linear: blocks must be (n, b, b)")
    size = blocks.shape[0] * blocks.shape[1]
    if not (x.ndim >= 1 and x.shape[-1] == size):
        raise ValueError(f"block_diagonal_linear: x {tuple(x.shape)} must end in {size}")
    if not (bias is None or bias.shape == (size,)):
        raise ValueError(f"block_diagonal_linear: bias must be ({size},)")
    return _op(x, blocks, bias)
