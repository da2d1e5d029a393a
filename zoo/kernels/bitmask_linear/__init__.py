"""bitmask_linear: a linear layer whose weight is stored as one bit per position plus the kept values."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import FLOATS, SKINNY, check_floats, define, define_plain, linear_shape, on_gpu, prove, scratch
from .gpu import bitmask_linear_triton, expand_triton
from .reference import bitmask_linear as bitmask_linear_reference
from .reference import check_bitmask, misfit, unpack_bitmask

TILE_BYTES = 32 << 20  # of expanded weight at a time; smaller tiles cost the dense product more than cache misses do


def _compute(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, row_offsets: Tensor | None) -> Tensor:
    d_out, d_in = len(mask), x.shape[-1]
    lib = library("bitmask_linear") if x.device.type == "cpu" else None
    if lib is None or x.numel() == 0:
        prove_bitmask("bitmask_linear", values, mask, d_in, row_offsets)
        compute = bitmask_linear_triton if on_gpu(x) else bitmask_linear_reference
        return compute(x, values, mask, bias, row_offsets)
    rows = x.view(-1, d_in)
    if len(rows) > SKINNY:
        out = _expanded_product(lib, rows, values, mask, bias, row_offsets)
    else:
        out = x.new_empty(len(rows), d_out)
        wrong = lib.slimzoo_bitmask_linear(
            *map(pointer, (rows, values, mask, row_offsets, bias, out)),
            *integers(len(rows), d_out, d_in, values.numel(), 0 if row_offsets is not None else values.shape[1]),
            DTYPES[x.dtype],
            level(lib),
            torch.get_num_threads(),
        )
        if wrong:
            raise misfit("bitmask_linear")
    return out.view(*x.shape[:-1], d_out)


def prove_bitmask(op: str, values: Tensor, mask: Tensor, d_in: int, row_offsets: Tensor | None) -> None:
    """`check_bitmask`, on a GPU once for the same tensors."""

    def check():
        check_bitmask(op, values, mask, d_in, row_offsets)

    if on_gpu(values):
        prove(check, (mask, row_offsets), (*values.shape, d_in))
    else:
        check()


def _expanded_product(
    lib: ctypes.CDLL, rows: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, row_offsets: Tensor | None
) -> Tensor:
    """rows (n, d_in) W^T + bias for many rows, by the dense GEMM on one expanded tile after the other."""
    out = rows.new_empty(len(rows), len(mask))
    for first, last, tile in expanded_tiles(lib, values, mask, row_offsets, rows.shape[1]):
        if bias is None:
            torch.mm(rows, tile.T, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], rows, tile.T, out=out[:, first:last])
    return out


def expanded_tiles(
    lib: ctypes.CDLL, values: Tensor, mask: Tensor, row_offsets: Tensor | None, d_in: int, multiple: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, rows [first, last) of the dense weight), `multiple` rows at least; a tile is overwritten by the next.

    Expanding writes each weight once and reads 9/16 of that, which n >> 1 multiplications per weight outweigh.
    """
    d_out, item = len(mask), values.element_size()
    tile_rows = max(1, min(d_out, max(1, TILE_BYTES // (d_in * item) // multiple) * multiple))
    tile = scratch("tile", (tile_rows, d_in), values.dtype)
    for first in range(0, d_out, tile_rows):
        last = min(first + tile_rows, d_out)
        _expand_rows(lib, values, mask, row_offsets, tile, first, last)
        yield first, last, tile[: last - first]


def _expand_rows(
    lib: ctypes.CDLL, values: Tensor, mask: Tensor, row_offsets: Tensor | None, out: Tensor, first: int, last: int
) -> None:
    """Writes rows [first, last) of the dense weight into `out`, whose rows are as long."""
    wrong = lib.slimzoo_bitmask_expand(
        *map(pointer, (values, mask, row_offsets, out)),
        *integers(
            first, last, len(mask), out.shape[1], values.numel(), 0 if row_offsets is not None else values.shape[1]
        ),
        DTYPES[values.dtype],
        level(lib),
        torch.get_num_threads(),
    )
    if wrong:
        raise misfit("bitmask_expand")


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
    with row_offsets int64 (d_out + 1,). Raises: ValueError when shapes, dtypes or devices do not fit; UserError when a row
    of the mask does not keep as many weights as it has values, which is checked at every call.
    """
    check_floats("bitmask_linear", x, values=values, bias=bias)
    if not (mask.dtype == torch.uint8 and mask.ndim == 2):
        raise ValueError("bitmask_linear: mask must be uint8 (d_out, ceil(d_in / 8))")
    d_out, width = mask.shape
    if not (x.ndim >= 1 and width == -(-x.shape[-1] // 8)):
        raise ValueError(f"bitmask_linear: x {tuple(x.shape)} does not fit the mask")
    if row_offsets is None:
        if not (values.ndim == 2 and len(values) == d_out):
            raise ValueError("bitmask_linear: 2-D values need a row per output")
    else:
        fits = values.ndim == 1 and row_offsets.dtype == torch.int64 and row_offsets.shape == (d_out + 1,)
        if not (fits):
            raise ValueError("bitmask_linear: 1-D values need row_offsets int64 (d_out + 1,)")
    if not (bias is None or bias.shape == (d_out,)):
        raise ValueError(f"bitmask_linear: bias must be ({d_out},)")
    return _op(x, values, mask, bias, row_offsets)


def _expand(values: Tensor, mask: Tensor, row_offsets: Tensor, d_in: int) -> Tensor:
    lib = library("bitmask_linear") if values.device.type == "cpu" else None
    if lib is None or values.numel() == 0:
        prove_bitmask("bitmask_expand", values, mask, d_in, row_offsets)
        if on_gpu(values):
            return expand_triton(values, mask, d_in, row_offsets, values.dtype)
        return unpack_bitmask(values, mask, d_in, row_offsets)
    out = values.new_empty(len(mask), d_in)
    _expand_rows(lib, values, mask, row_offsets, out, 0, len(mask))
    return out


_expand_op = define_plain(
    "bitmask_expand",
    "(Tensor values, Tensor mask, Tensor row_offsets, int d_in) -> Tensor",
    _expand,
    lambda values, mask, row_offsets, d_in: values.new_empty(mask.shape[0], d_in),
)


def bitmask_expand(values: Tensor, mask: Tensor, row_offsets: Tensor, d_in: int) -> Tensor:
    """The dense weight (d_out, d_in) of an unstructured one, in the dtype of `values`; it carries no gradient.

    Args: values (nnz,) fp32, bf16 or fp16; mask uint8 (d_out, ceil(d_in / 8)); row_offsets int64 (d_out + 1,). Raises:
    ValueError when shapes, dtypes or devices do not fit; UserError as `bitmask_linear`.
    """
    if values.dtype not in FLOATS or values.ndim != 1:
        raise ValueError(
            f"bitmask_expand: values {values.dtype} {tuple(values.shape)}; 1-D fp32, bf16 or fp16 is needed"
        )
    if mask.dtype != torch.uint8 or mask.ndim != 2 or mask.shape[1] != -(-d_in // 8):
        raise ValueError(f"bitmask_expand: mask must be uint8 (d_out, {-(-d_in // 8)})")
    if row_offsets.dtype != torch.int64 or row_offsets.shape != (len(mask) + 1,):
        raise ValueError(f"bitmask_expand: row_offsets must be int64 ({len(mask) + 1},)")
    return _expand_op(values, mask, row_offsets, d_in)
