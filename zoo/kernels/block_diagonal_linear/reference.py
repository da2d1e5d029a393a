"""Block-diagonal linear layer in plain torch: the definition."""

import torch
from torch import Tensor


def block_diagonal_linear(x: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_ni = sum_j blocks[n, i, j] x_nj + bias_ni: x (..., n b), blocks (n, b, b) -> (..., n b) in the dtype of x."""
    n, b, _ = blocks.shape
    y = torch.einsum("nij,...nj->...ni", blocks.float(), x.float().unflatten(-1, (n, b))).flatten(-2)
    return (y if bias is None else y + bias.float()).to(x.dtype)
