"""ARMOR's layer y = A'(S(B' x)) + bias in plain torch: the definition (arXiv 2510.05528)."""

from torch import Tensor

from ..bitmask_linear.reference import bitmask_linear
from ..block_diagonal_linear.reference import block_diagonal_linear


def armor_linear(
    x: Tensor, wrap_in: Tensor, values: Tensor, mask: Tensor, wrap_out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (..., d_in), B' = wrap_in (d_in/b_in, b_in, b_in), S = (values, mask), A' = wrap_out (d_out/b_out, b_out, b_out).

    All three products accumulate in fp32, and so are what passes between them; the result has the dtype of x.
    """
    u = block_diagonal_linear(x.float(), wrap_in)
    return block_diagonal_linear(bitmask_linear(u, values, mask), wrap_out, bias).to(x.dtype)
