"""block_diagonal_linear in Triton: a program owns up to 64 outputs of one block, for up to 64 tokens."""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from ..bitmask_linear.gpu import precision

# Side of the tile of a block and tokens at once, both at most; blocks of 4 to 256 are meant. Not measured on a GPU.
MAX_SIDE, MAX_TOKENS = 64, 64

if is_triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def block_diagonal_kernel(
        x, blocks, bias, y, n_tokens, n, b, SIDE: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr
    ):
        block = tl.program_id(0)
        outputs = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
        tokens = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
        output_fits, token_fits = (outputs < b)[:, None], (tokens < n_tokens)[None, :]
        row = tokens.to(tl.int64)[None, :] * (n * b) + block * b
        total = tl.zeros((SIDE, TOKENS), tl.float32)
        for start in range(0, b, SIDE):
            inputs = start + tl.arange(0, SIDE)
            weight_at = (block * b + outputs)[:, None] * b + inputs
            weight = tl.load(blocks + weight_at, mask=output_fits & (inputs < b), other=0.0)
            x_tile = tl.load(x + row + inputs[:, None], mask=token_fits & (inputs < b)[:, None], other=0.0)
            total = tl.dot(weight.to(tl.float32), x_tile.to(tl.float32), total, input_precision=PRECISION)
        if bias is not None:
            total += tl.load(bias + block * b + outputs, mask=outputs < b, other=0.0).to(tl.float32)[:, None]
        tl.store(y + row + outputs[:, None], total.to(y.dtype.element_ty), mask=output_fits & token_fits)


def block_diagonal_linear_triton(
    x: Tensor, blocks: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """y_ni = sum_j blocks[n, i, j] x_nj + bias_ni in `dtype` (that of x by default), accumulated in fp32.

    x (..., n b), blocks (n, b, b) and bias (n b,) on one GPU; x may be fp32 with half-precision blocks, and is then rounded
    to tf32. Nothing is checked: the public `block_diagonal_linear` does.
    """
    n, b, _ = blocks.shape
    x_rows = x.reshape(-1, n * b).contiguous()
    tokens = len(x_rows)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if tokens:
        side = min(MAX_SIDE, max(16, triton.next_power_of_2(b)))
        token_tile = min(MAX_TOKENS, max(16, triton.next_power_of_2(tokens)))
        grid = (n, triton.cdiv(b, side), triton.cdiv(tokens, token_tile))
        with torch.cuda.device_of(x):  # Triton launches on the current device
            block_diagonal_kernel[grid](x_rows, blocks, bias, y, tokens, n, b, side, token_tile, precision(blocks))
    return y
