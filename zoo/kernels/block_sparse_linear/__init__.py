"""block_sparse_linear: a linear layer whose weight is stored as the dense blocks that are kept; all of it can be trained."""

import ctypes

import torch
from torch import Tensor

from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import check_floats, define, define_plain, linear_shape, on_gpu, prove, scratch
from .gpu import block_sparse_linear_triton
from .reference import block_rows, check_blocks, misfit
from .reference import block_sparse_linear as block_sparse_linear_reference

BLOCK_SIZES = range(4, 129, 4)


def _compute(
    x: Tensor, blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None, d_out: int
) -> Tensor:
    nnz, b_r, b_c = blocks.shape
    lib = library("block_sparse_linear") if x.device.type == "cpu" else None
    if lib is None or x.numel() == 0:
        _prove(crow_indices, col_indices, -(-x.shape[-1] // b_c))
        compute = block_sparse_linear_triton if on_gpu(x) else block_sparse_linear_reference
        return compute(x, blocks, crow_indices, col_indices, bias, d_out)
    rows = x.view(-1, x.shape[-1])
    sizes = integers(len(rows), d_out, rows.shape[1], b_r, b_c, nnz)
    how = DTYPES[x.dtype], level(lib), torch.get_num_threads()
    lib.slimzoo_block_sparse_scratch.restype = ctypes.c_int64
    space = scratch("block_sparse", (lib.slimzoo_block_sparse_scratch(*sizes, *how),), torch.float32)
    out = rows.new_empty(len(rows), d_out)
    tensors = map(pointer, (rows, blocks, crow_indices, col_indices, bias, out, space))
    if lib.slimzoo_block_sparse_linear(*tensors, *sizes, *how):
        raise misfit()
    return out.view(*x.shape[:-1], d_out)


def _prove(crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    """`check_blocks`, on a GPU once for the same tensors."""

    def check():
        check_blocks(crow_indices, col_indices, columns)

    if on_gpu(crow_indices):
        prove(check, (crow_indices, col_indices), (columns,))
    else:
        check()


def _compute_blocks_gradient(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, b_r: int, b_c: int
) -> Tensor:
    """grad_blocks[n] = grad[:, rows of n]^T x[:, columns of n] for the kept blocks only, (nnz, b_r, b_c) like x.

    grad (..., d_out), x (..., d_in). Without the C++ kernel it is a product per block-row with the columns that it keeps.
    """
    grad, x = (tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None] for tensor in (grad, x))
    lib = library("block_sparse_linear") if x.device.type == "cpu" else None
    if lib is not None:
        nnz, d_out, d_in = len(col_indices), grad.shape[1], x.shape[1]
        out = torch.zeros(nnz, b_r, b_c)
        lib.slimzoo_block_sparse_gradient_scratch.restype = ctypes.c_int64
        floats = lib.slimzoo_block_sparse_gradient_scratch(*integers(d_out, d_in, b_r, b_c), level(lib))
        space = scratch("block_sparse", (floats,), torch.float32)
        tensors = map(pointer, (grad, x, crow_indices, col_indices, out, space))
        sizes = integers(len(x), d_out, d_in, b_r, b_c, nnz)
        if lib.slimzoo_block_sparse_gradient(*tensors, *sizes, DTYPES[x.dtype], level(lib), torch.get_num_threads()):
            raise misfit()
        return out.to(x.dtype)
    _prove(crow_indices, col_indices, -(-x.shape[1] // b_c))
    rows, columns = -(-grad.shape[1] // b_r), -(-x.shape[1] // b_c)
    grad = torch.nn.functional.pad(grad, (0, rows * b_r - grad.shape[1])).T.reshape(rows, b_r, -1)
    x = torch.nn.functional.pad(x, (0, columns * b_c - x.shape[1])).T.reshape(columns, b_c, -1)
    out = x.new_empty(len(col_indices), b_r, b_c)
    starts = crow_indices.tolist()
    for row, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        kept = x.index_select(0, col_indices[first:last]).flatten(0, 1)  # (kept b_c, tokens)
        out[first:last] = (kept @ grad[row].T).view(-1, b_c, b_r).transpose(1, 2)
    return out


def _transposed(
    blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of W^T, which has `columns` block-rows."""
    order = col_indices.long().argsort(stable=True)
    ends = torch.arange(columns + 1, device=order.device, dtype=col_indices.dtype)
    starts = torch.searchsorted(col_indices[order], ends, out_int32=True)
    rows = block_rows(crow_indices, len(blocks))[order].int()
    return blocks[order].transpose(1, 2).contiguous(), starts, rows


def _gradients(grad, needs, x, blocks, crow_indices, col_indices, bias, d_out):
    grads = [None] * 6
    grad = grad.contiguous()
    if needs[0]:
        d_in = x.shape[-1]
        transposed = _transposed(blocks, crow_indices, col_indices, -(-d_in // blocks.shape[2]))
        grads[0] = _op(grad, *transposed, None, d_in)
    if needs[1]:
        grads[1] = _gradient_op(grad, x, crow_indices, col_indices, *blocks.shape[1:])
    if bias is not None and needs[4]:
        grads[4] = grad.flatten(0, -2).sum(0)
    return grads


_op = define(
    "block_sparse_linear",
    "(Tensor x, Tensor blocks, Tensor crow_indices, Tensor col_indices, Tensor? bias, int d_out) -> Tensor",
    _compute,
    lambda x, blocks, crow_indices, col_indices, bias, d_out: linear_shape(x, d_out),
    gradients=_gradients,
)
_gradient_op = define_plain(
    "block_sparse_linear_gradient",
    "(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int b_r, int b_c) -> Tensor",
    _compute_blocks_gradient,
    lambda grad, x, crow_indices, col_indices, b_r, b_c: x.new_empty(len(col_indices), b_r, b_c),
)


def block_sparse_linear(
    x: Tensor, blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None = None, *, d_out: int
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), W in the format of `reference.py`; differentiable in x, blocks and bias.

    Args: x, blocks (nnz, b_r, b_c) and bias fp32, bf16 or fp16 alike; crow_indices (ceil(d_out / b_r) + 1,) and
    col_indices (nnz,) int32; b_r and b_c multiples of 4 from 4 to 128. d_out and d_in need not be multiples of them.
    Raises: ValueError when shapes, dtypes or devices do not fit; UserError when the indices are not in order or range,
    which is checked at every call.
    """
    check_floats("block_sparse_linear", x, blocks=blocks, bias=bias)
    if not (blocks.ndim == 3 and blocks.shape[1] in BLOCK_SIZES and blocks.shape[2] in BLOCK_SIZES):
        raise ValueError(
            f"block_sparse_linear: blocks are {tuple(blocks.shape)}; (nnz, b_r, b_c) with multiples of 4 from 4 to 128 "
            "are needed"
        )
    nnz, b_r, _ = blocks.shape
    for name, indices, shape in (
        ("crow_indices", crow_indices, (-(-d_out // b_r) + 1,)),
        ("col_indices", col_indices, (nnz,)),
    ):
        if not (indices.dtype == torch.int32 and indices.shape == shape and indices.device == x.device):
            raise ValueError(f"block_sparse_linear: {name} must be int32 {shape} on the device of x")
    if not (x.ndim >= 1):
        raise ValueError("block_sparse_linear: x needs a last dimension, the inputs")
    if not (bias is None or bias.shape == (d_out,)):
        raise ValueError(f"block_sparse_linear: bias must be ({d_out},)")
    return _op(x, blocks, crow_indices, col_indices, bias, d_out)
