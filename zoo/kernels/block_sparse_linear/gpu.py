"""block_sparse_linear in Triton (the format is in `reference.py`): a program makes a tile of tokens of one block-row.

It walks the kept columns of the block-row with one tl.dot a block, so that the work is the density times the dense
work, and adds the bias at the end. Blocks whose sides are no powers of two are padded in registers. Neighbouring programs
share the block-row, so its weights stay in the second-level cache while x streams. Not run on a GPU yet.
"""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from ..bitmask_linear.gpu import precision

TILES = {16: 4, 64: 4, 128: 8}  # tokens of a tile for up to so many tokens (the last also for more): warps
SHARED_BYTES = 96 << 10  # for the tiles of all stages: a program need not be alone on an A100
MAX_STAGES = 3

if is_triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def block_sparse_linear_kernel(
        x, blocks, crow_indices, col_indices, bias, y, n_tokens, d_out, d_in, B_R: tl.constexpr, B_C: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
        WIDEN: tl.constexpr,
    ):  # fmt: skip
        block_row = tl.program_id(1)
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        inside, column = tl.arange(0, ROWS), tl.arange(0, COLS)
        x_rows = x + tokens.to(tl.int64)[:, None] * d_in
        block_at = inside[None, :] * B_C + column[:, None]  # (COLS, ROWS): the block transposed
        block_fits = (inside < B_R)[None, :] & (column < B_C)[:, None]
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        first = tl.load(crow_indices + block_row).to(tl.int64)
        last = tl.load(crow_indices + block_row + 1).to(tl.int64)
        for n in tl.range(first, last, num_stages=STAGES):
            at = tl.load(col_indices + n) * B_C + column
            fits = (tokens < n_tokens)[:, None] & ((column < B_C) & (at < d_in))[None, :]
            x_tile = tl.load(x_rows + at[None, :], mask=fits, other=0.0)
            w = tl.load(blocks + n * (B_R * B_C) + block_at, mask=block_fits, other=0.0)
            if WIDEN:
                x_tile, w = x_tile.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x_tile, w, total, input_precision=PRECISION)
        rows = block_row * B_R + inside
        row_fits = (inside < B_R) & (rows < d_out)
        if bias is not None:
            total += tl.load(bias + rows, mask=row_fits, other=0.0).to(tl.float32)[None, :]
        y_at = y + tokens.to(tl.int64)[:, None] * d_out + rows[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=(tokens < n_tokens)[:, None] & row_fits[None, :])


def tile(tokens: int, blocks: Tensor) -> dict[str, int | str]:
    """The tile for a number of tokens and blocks (nnz, b_r, b_c), as the kernel's keyword arguments."""
    _, b_r, b_c = blocks.shape
    rows, columns = (max(16, 1 << (size - 1).bit_length()) for size in (b_r, b_c))
    largest = max(TILES) if rows * columns <= 64 * 64 else 64
    limit = next(limit for limit in TILES if tokens <= limit or limit == largest)
    stages = SHARED_BYTES // ((limit + rows) * columns * blocks.element_size())
    stages = max(1, min(MAX_STAGES, stages))
    return {
        "B_R": b_r,
        "B_C": b_c,
        "ROWS": rows,
        "COLS": columns,
        "TOKENS": limit,
        "STAGES": stages,
        "PRECISION": precision(blocks),
        "WIDEN": triton.knobs.runtime.interpret,  # the interpreter's tl.dot takes bf16 for integers
        "num_warps": TILES[limit],
        "num_stages": stages,
    }


def block_sparse_linear_triton(
    x: Tensor, blocks: Tensor, crow_indices: Tensor, col_indices: Tensor, bias: Tensor | None, d_out: int
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out); arguments as in `reference.py`, on one GPU."""
    d_in = x.shape[-1]
    x_rows = x.reshape(-1, d_in).contiguous()
    tokens = len(x_rows)
    y = x.new_empty(*x.shape[:-1], d_out)
    if y.numel():
        options = tile(tokens, blocks)
        grid = (triton.cdiv(tokens, options["TOKENS"]), len(crow_indices) - 1)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            block_sparse_linear_kernel[grid](
                x_rows, blocks.contiguous(), crow_indices.contiguous(), col_indices.contiguous(), bias, y, tokens, d_out,
                d_in, **options,
            )  # fmt: skip
    return y
