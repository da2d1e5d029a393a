"""bitmask_linear in Triton: the packed weight is read once and expanded in registers (the format is in `reference.py`).

Up to MAX_TOKENS tokens one kernel multiplies as it expands: bytes per weight position at half density in bf16 are 1 for
values + 1/8 for the mask, a dense layer reads 2. Beyond, a kernel writes the dense weight (2 more bytes) and the dense
GEMM reads it (2 more): 5 1/8 bytes once, instead of expanding anew for every 64 tokens. At 64 tokens the 128 flop per
position roughly balance 1 1/8 bytes on tf32 tensor cores (A100: 156 Tflop/s, 1.5 TB/s, so 117 flop in the time of
1 1/8 bytes); with more, arithmetic is the bound, where the vendor's GEMM on bf16 operands is twice as fast as tf32.

Products are taken in fp32: bf16 and fp16 weights are exact in tf32, and so is x where it has their dtype, so tensor cores
lose nothing; fp32 weights use three tf32 products (tf32x3). Sums are fp32 throughout.
"""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

MAX_TOKENS = 64  # in one tile; more go through the dense weight

# Tokens up to the key: rows and bytes of values in a tile at half density, warps, stages of the load pipeline. Chosen for
# 576x576 .. 11008x4096 so that nothing spills on sm_80 and sm_90 and a 4096-row layer gives every SM a tile; not measured
# on a GPU.
TILES = {1: (16, 256, 4, 3), 16: (32, 128, 2, 4), MAX_TOKENS: (64, 64, 4, 3)}
EXPAND_TILE = (16, 256, 4)  # rows, columns, warps

if is_triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def expand_2_of_4(values, mask, rows, column, d_out, d_in, COLS: tl.constexpr):
        """Columns [column, column + COLS) of `rows`, fp32 (ROWS, COLS), when each nibble of the mask keeps two.

        The values of a nibble then start at half its column: addresses do not depend on the mask, loads are wide and
        can run ahead, and which value goes where is selected in registers. Also returns where a nibble does not keep two.
        """
        width = (d_in + 7) // 8
        row = rows.to(tl.int64)[:, None]
        row_fits = (rows < d_out)[:, None]
        byte_at = column // 8 + tl.arange(0, COLS // 8)
        byte = tl.load(mask + row * width + byte_at, mask=row_fits & (byte_at < width), other=0).to(tl.int32)
        group = tl.join(byte & 15, byte >> 4).reshape(rows.shape[0], COLS // 4)
        value_at = column // 2 + tl.arange(0, COLS // 2)
        pairs = tl.load(values + row * (d_in // 2) + value_at, mask=row_fits & (value_at < d_in // 2), other=0.0)
        first, second = tl.split(pairs.to(tl.float32).reshape(rows.shape[0], COLS // 4, 2))
        w0 = tl.where((group & 1) != 0, first, 0.0)
        w1 = tl.where((group & 2) != 0, tl.where((group & 1) != 0, second, first), 0.0)
        w2 = tl.where((group & 4) != 0, tl.where((group & 8) != 0, first, second), 0.0)
        w3 = tl.where((group & 8) != 0, second, 0.0)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], COLS)
        group_fits = row_fits & (column // 4 + tl.arange(0, COLS // 4) < d_in // 4)
        return w, group_fits & ((0x1668 >> group) & 1 == 0)  # bits of 0x1668: the six nibbles with two bits set

    @triton.jit
    def expand_any(values, mask, start, rows, column, d_out, d_in, COLS: tl.constexpr):
        """Columns [column, column + COLS) of `rows`, fp32 (ROWS, COLS), for any mask.

        start: int64 (ROWS,), where the values of these columns begin in each row. Also returns where they end.
        """
        byte_at = column // 8 + tl.arange(0, COLS // 8)
        width = (d_in + 7) // 8
        byte_fits = (rows < d_out)[:, None] & (byte_at < width)
        byte = tl.load(mask + rows.to(tl.int64)[:, None] * width + byte_at, mask=byte_fits, other=0).to(tl.uint32)
        # One bit per nibble; times 0x1111_1110, nibble j holds the number of bits below j.
        spread = (byte | (byte << 12)) & 0x000F000F
        spread = (spread | (spread << 6)) & 0x03030303
        below = ((spread | (spread << 3)) & 0x11111111) * 0x11111110
        count = ((below >> 28) + (byte >> 7)).to(tl.int32)
        upto = tl.cumsum(count, 1)
        first = start[:, None] + (upto - count)
        bit = tl.arange(0, 8)
        address = first[:, :, None] + ((below[:, :, None] >> (4 * bit)) & 15).to(tl.int32)
        kept = ((byte[:, :, None] >> bit) & 1) != 0
        w = tl.load(values + address, mask=kept, other=0.0).to(tl.float32)
        return w.reshape(rows.shape[0], COLS), start + tl.sum(count, 1)

    @triton.jit
    def row_starts(row_offsets, rows, d_out, per_row):
        """int64 (ROWS,): where each row's values begin."""
        if row_offsets is None:
            return rows.to(tl.int64) * per_row
        else:
            return tl.load(row_offsets + rows, mask=rows < d_out, other=0)

    @triton.jit
    def add_product(total, w, x, column, tokens, n_tokens, d_in, precision: tl.constexpr):
        """total + w x^T over the columns of w (ROWS, COLS); for one token column by column, to be summed at the end."""
        at = column + tl.arange(0, w.shape[1])
        if tokens.shape[0] == 1:
            return total + w * tl.load(x + at, mask=at < d_in, other=0.0).to(tl.float32)[None, :]
        else:
            fits = (at < d_in)[:, None] & (tokens < n_tokens)[None, :]
            x_tile = tl.load(x + tokens.to(tl.int64)[None, :] * d_in + at[:, None], mask=fits, other=0.0)
            return tl.dot(w, x_tile.to(tl.float32), total, input_precision=precision)

    @triton.jit
    def sparse_product(
        x, values, mask, row_offsets, rows, tokens, n_tokens, d_out, d_in, per_row,
        HALF: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        """W x^T for `rows` of W and `tokens` of x, fp32 (ROWS, TOKENS).

        HALF: every row keeps half of its columns, which is most likely 2:4, but a shape cannot tell. So it is taken for
        2:4, every nibble is checked on the way, and the rare tile that was taken wrongly is done again.
        """
        ROWS: tl.constexpr = rows.shape[0]
        TOKENS: tl.constexpr = tokens.shape[0]
        total = tl.zeros((ROWS, COLS if TOKENS == 1 else TOKENS), tl.float32)
        by_count = True
        if HALF:
            wrong = tl.zeros((ROWS, COLS // 4), tl.int1)
            for column in tl.range(0, d_in, COLS, num_stages=STAGES):
                w, not_two = expand_2_of_4(values, mask, rows, column, d_out, d_in, COLS)
                wrong |= not_two
                total = add_product(total, w, x, column, tokens, n_tokens, d_in, precision)
            by_count = tl.max(tl.max(wrong.to(tl.int32), 1), 0) != 0
        if by_count:
            total = tl.zeros_like(total)
            start = row_starts(row_offsets, rows, d_out, per_row)
            for column in tl.range(0, d_in, COLS, num_stages=STAGES):
                w, start = expand_any(values, mask, start, rows, column, d_out, d_in, COLS)
                total = add_product(total, w, x, column, tokens, n_tokens, d_in, precision)
        if TOKENS == 1:
            total = tl.sum(total, 1)[:, None]
        return total

    @triton.jit
    def store_rows(y, total, bias, rows, tokens, n_tokens, d_out):
        """y[tokens, rows] = (total (ROWS, TOKENS) + bias)^T."""
        row_fits = rows < d_out
        if bias is not None:
            total += tl.load(bias + rows, mask=row_fits, other=0.0).to(tl.float32)[:, None]
        fits = row_fits[:, None] & (tokens < n_tokens)[None, :]
        tl.store(y + tokens.to(tl.int64)[None, :] * d_out + rows[:, None], total.to(y.dtype.element_ty), mask=fits)

    @triton.jit
    def bitmask_linear_kernel(
        x, values, mask, row_offsets, bias, y, n_tokens, d_out, d_in, per_row, HALF: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tokens = tl.arange(0, TOKENS)
        total = sparse_product(
            x, values, mask, row_offsets, rows, tokens, n_tokens, d_out, d_in, per_row, HALF, COLS, STAGES, PRECISION
        )
        store_rows(y, total, bias, rows, tokens, n_tokens, d_out)

    @triton.jit
    def expand_kernel(values, mask, row_offsets, dense, d_out, d_in, per_row, ROWS: tl.constexpr, COLS: tl.constexpr):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        start = row_starts(row_offsets, rows, d_out, per_row)
        for column in range(0, d_in, COLS):
            w, start = expand_any(values, mask, start, rows, column, d_out, d_in, COLS)
            at = column + tl.arange(0, COLS)
            fits = (rows < d_out)[:, None] & (at < d_in)
            tl.store(dense + rows.to(tl.int64)[:, None] * d_in + at, w.to(dense.dtype.element_ty), mask=fits)


def tile(tokens: int, values: Tensor) -> dict[str, int | str]:
    """The tile for a number of tokens <= MAX_TOKENS, as the kernels' keyword arguments."""
    limit = next(limit for limit in TILES if tokens <= limit)
    rows, value_bytes, warps, stages = TILES[limit]
    return {
        "ROWS": rows,
        "COLS": 2 * value_bytes // values.element_size(),
        "TOKENS": limit,
        "STAGES": stages,
        "PRECISION": precision(values),
        "num_warps": warps,
        "num_stages": stages,
    }


def precision(weights: Tensor) -> str:
    """Triton's input_precision for fp32 tiles made from these weights: tf32 holds bf16 and fp16 exactly."""
    return "tf32x3" if weights.dtype == torch.float32 else "tf32"


def kept_in_row(values: Tensor) -> int:
    """Values per row in the 2-D layout; 0, which the kernels then do not read, in the ragged one."""
    return values.shape[1] if values.ndim == 2 else 0


def expand_triton(values: Tensor, mask: Tensor, d_in: int, row_offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The dense weight (d_out, d_in) in `dtype`."""
    rows, columns, warps = EXPAND_TILE
    d_out = mask.shape[0]
    dense = torch.empty(d_out, d_in, dtype=dtype, device=values.device)
    grid = (triton.cdiv(d_out, rows),)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        expand_kernel[grid](
            values, mask, row_offsets, dense, d_out, d_in, kept_in_row(values), rows, columns, num_warps=warps
        )
    return dense


def bitmask_linear_triton(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, row_offsets: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out) in the dtype of x, accumulated in fp32.

    Arguments as in `reference.py`, on one GPU, weights contiguous; x may be fp32 with half-precision weights, and is then
    rounded to tf32 for more than one token. Nothing is checked: the public `bitmask_linear` does.
    """
    d_out, d_in = mask.shape[0], x.shape[-1]
    x_rows = x.reshape(-1, d_in).contiguous()
    tokens = len(x_rows)
    if tokens > MAX_TOKENS:
        return torch.nn.functional.linear(x, expand_triton(values, mask, d_in, row_offsets, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], d_out)
    if y.numel():
        per_row = kept_in_row(values)
        half = row_offsets is None and d_in % 4 == 0 and 2 * per_row == d_in
        options = tile(tokens, values)
        grid = (triton.cdiv(d_out, options["ROWS"]),)
        with torch.cuda.device_of(x):
            bitmask_linear_kernel[grid](
                x_rows, values, mask, row_offsets, bias, y, tokens, d_out, d_in, per_row, half, **options
            )
    return y
