"""armor_linear in Triton: u = B'x once, then one kernel in which a row tile is a block of A', so A'(S u) needs no trip.

Bytes of a (d_out, d_in) layer in bf16 for a handful of tokens: d_out d_in (1 + 1/8) for S, 2 b (d_in + d_out) for the
wrappers; u (fp32) is written and read once more per row tile, from cache.
"""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from ..bitmask_linear.gpu import MAX_TOKENS, bitmask_linear_triton, kept_in_row, tile
from ..block_diagonal_linear.gpu import block_diagonal_linear_triton

# Rows of a tile = b_out: bytes of values per row in a tile at half density, warps. Chosen for the shapes of `TILES` so
# that nothing spills on sm_80 and sm_90; not measured on a GPU.
FUSED_TILES = {16: (256, 4), 32: (128, 4), 64: (64, 4), 128: (32, 8)}

if is_triton_available():
    import triton.language as tl
    from triton import jit

    from ..bitmask_linear.gpu import sparse_product, store_rows

    @jit
    def armor_linear_kernel(
        u, values, mask, wrap_out, bias, y, n_tokens, d_out, d_in, per_row, HALF: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        inside = tl.arange(0, ROWS)
        block = tl.program_id(0)
        rows = block * ROWS + inside
        tokens = tl.arange(0, TOKENS)
        v = sparse_product(
            u, values, mask, None, rows, tokens, n_tokens, d_out, d_in, per_row, HALF, COLS, STAGES, PRECISION
        )
        wrapper = tl.load(wrap_out + (rows[:, None] * ROWS + inside)).to(tl.float32)
        if TOKENS == 1:
            total = tl.sum(wrapper * v.reshape(1, ROWS), 1)[:, None]
        else:
            total = tl.dot(wrapper, v, input_precision=PRECISION)
        store_rows(y, total, bias, rows, tokens, n_tokens, d_out)


def armor_linear_triton(
    x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (..., d_in) -> A'(S(B' x)) + bias (..., d_out) in the dtype of x.

    Arguments as in `reference.py`, on one GPU. Up to MAX_TOKENS tokens all that passes between the products is fp32; with
    more, dense GEMMs take over, and it has the dtype of x. Nothing is checked: the public `armor_linear` does.
    """
    d_out, d_in = mask.shape[0], x.shape[-1]
    tokens = x.numel() // d_in
    between = torch.float32 if tokens <= MAX_TOKENS else x.dtype
    u = block_diagonal_linear_triton(x, wrap_in, dtype=between)
    b_out = wrap_out.shape[1]
    if tokens > MAX_TOKENS or b_out not in FUSED_TILES:
        v = bitmask_linear_triton(u, values, mask)
        return block_diagonal_linear_triton(v, wrap_out, bias, dtype=x.dtype)
    y = x.new_empty(*x.shape[:-1], d_out)
    if tokens:
        value_bytes, warps = FUSED_TILES[b_out]
        columns = 2 * value_bytes // values.element_size()
        options = tile(tokens, values) | {"ROWS": b_out, "COLS": columns, "num_warps": warps}
        per_row = kept_in_row(values)
        half = d_in % 4 == 0 and 2 * per_row == d_in
        with torch.cuda.device_of(x):  # Triton launches on the current device
            armor_linear_kernel[(d_out // b_out,)](
                u, values, mask, wrap_out, bias, y, tokens, d_out, d_in, per_row, half, **options
            )
    return y
