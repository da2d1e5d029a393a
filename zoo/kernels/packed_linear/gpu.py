"""packed_linear in Triton: codes are unpacked and scaled in registers (the format is in `reference.py`).

Up to MAX_TOKENS tokens one kernel multiplies as it unpacks: b / 8 bytes per weight and the scales, where a dense layer
reads 2. Beyond, a kernel writes the dense weight once and the dense GEMM reads it, as in bitmask_linear. A byte is loaded
once for each code it holds, from cache after the first time: lanes then need no exchange of codes. Not run on a GPU yet.
"""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from ..bitmask_linear.gpu import precision
from .reference import SECTIONS

MAX_TOKENS = 64  # in one tile; more go through the dense weight
TILES = {1: (16, 128, 4), 16: (32, 128, 4), MAX_TOKENS: (32, 128, 4)}  # tokens up to the key: rows, columns, warps
NONE, INTEGER, FLOAT = 0, 1, 2  # kinds of zeros, as in cpu.cpp

if is_triton_available():
    import triton
    import triton.language as tl

    from ..bitmask_linear.gpu import add_product, store_rows

    @triton.jit
    def unpack_section(section, row_bytes, rows, at, fits, WIDTH: tl.constexpr):
        """Codes int32 (ROWS, COLS) of the columns `at`: 4 bytes hold 32 / WIDTH of them, column j in byte j % 4."""
        COUNT: tl.constexpr = 32 // WIDTH
        byte_at = at // COUNT * 4 + at % 4
        byte = tl.load(section + rows * row_bytes + byte_at[None, :], mask=fits, other=0)
        return (byte.to(tl.int32) >> (at % COUNT // 4 * WIDTH)[None, :]) & ((1 << WIDTH) - 1)

    @triton.jit
    def dense_tile(
        qweight, scales, zeros, rows, column, d_out, d_in, group,
        BITS: tl.constexpr, LOW: tl.constexpr, ZEROS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        """Columns [column, column + COLS) of `rows` of the weight, fp32 (ROWS, COLS); 0 outside."""
        at = column + tl.arange(0, COLS)
        row = rows.to(tl.int64)[:, None]
        fits = (rows < d_out)[:, None] & (at < d_in)[None, :]
        row_bytes = d_in * BITS // 8
        code = unpack_section(qweight, row_bytes, row, at, fits, LOW)
        if BITS > LOW:
            code |= unpack_section(qweight + d_in * LOW // 8, row_bytes, row, at, fits, BITS - LOW) << LOW
        group_at = row * (d_in // group) + (at // group)[None, :]
        scale = tl.load(scales + group_at, mask=fits, other=0.0).to(tl.float32)
        zero = 2.0 ** (BITS - 1) if ZEROS == 0 else tl.load(zeros + group_at, mask=fits, other=0).to(tl.float32)
        return (code.to(tl.float32) - zero) * scale

    @triton.jit
    def packed_linear_kernel(
        x, qweight, scales, zeros, bias, y, n_tokens, d_out, d_in, group,
        BITS: tl.constexpr, LOW: tl.constexpr, ZEROS: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tokens = tl.arange(0, TOKENS)
        total = tl.zeros((ROWS, COLS if TOKENS == 1 else TOKENS), tl.float32)
        for column in range(0, d_in, COLS):
            w = dense_tile(qweight, scales, zeros, rows, column, d_out, d_in, group, BITS, LOW, ZEROS, COLS)
            total = add_product(total, w, x, column, tokens, n_tokens, d_in, PRECISION)
        if TOKENS == 1:
            total = tl.sum(total, 1)[:, None]
        store_rows(y, total, bias, rows, tokens, n_tokens, d_out)

    @triton.jit
    def dequantize_kernel(
        qweight, scales, zeros, dense, d_out, d_in, group,
        BITS: tl.constexpr, LOW: tl.constexpr, ZEROS: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLS
        w = dense_tile(qweight, scales, zeros, rows, column, d_out, d_in, group, BITS, LOW, ZEROS, COLS)
        at = column + tl.arange(0, COLS)
        fits = (rows < d_out)[:, None] & (at < d_in)[None, :]
        tl.store(dense + rows.to(tl.int64)[:, None] * d_in + at[None, :], w.to(dense.dtype.element_ty), mask=fits)


def packed_linear_triton(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out); arguments as in `reference.py`, on one GPU, weights contiguous."""
    d_out, d_in = len(qweight), x.shape[-1]
    rows = x.reshape(-1, d_in).contiguous()
    tokens = len(rows)
    y = x.new_empty(*x.shape[:-1], d_out)
    if not y.numel():
        return y
    kind = NONE if zeros is None else INTEGER if zeros.dtype == torch.uint8 else FLOAT
    format_ = {"BITS": bits, "LOW": SECTIONS[bits][0], "ZEROS": kind}
    group = d_in // scales.shape[1]
    weight = (qweight, scales, zeros)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if tokens > MAX_TOKENS:
            dense = torch.empty(d_out, d_in, dtype=x.dtype, device=x.device)
            grid = (triton.cdiv(d_out, 16), triton.cdiv(d_in, 128))
            dequantize_kernel[grid](*weight, dense, d_out, d_in, group, **format_, ROWS=16, COLS=128, num_warps=4)
            return torch.nn.functional.linear(x, dense, bias)
        limit = next(limit for limit in TILES if tokens <= limit)
        tile_rows, columns, warps = TILES[limit]
        packed_linear_kernel[(triton.cdiv(d_out, tile_rows),)](
            rows, *weight, bias, y, tokens, d_out, d_in, group, **format_, ROWS=tile_rows, COLS=columns, TOKENS=limit,
            PRECISION=precision(scales), num_warps=warps,
        )  # fmt: skip
    return y
