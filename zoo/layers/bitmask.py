"""BitmaskLinear: a linear layer that stores its kept weights and one bit a position (N:M or unstructured)."""

import torch

from ..errors import UserError
from ..kernels.bitmask_linear import bitmask_linear
from ..kernels.bitmask_linear.reference import unpack_bitmask
from .base import REBUILD, PackedLinear, check_mask, check_pattern, valid_mask


class BitmaskLinear(PackedLinear):
    """y = x W^T + bias with a sparse W (out_features, in_features) held as mask and kept values.

    Tensors: `mask` uint8 (out_features, ceil(in_features/8)), bit j of byte k = column 8k+j; `values` in the model's
    dtype, kept weights in column order, row after row: (out_features, in_features*N/M) with a pattern, (nnz,) without;
    then also `row_offsets` int64 (out_features+1,), the position of each row's first value; `bias` (out_features,).

    Args:
        pattern: (N, M), N of every M consecutive inputs are kept; None for unstructured sparsity, which needs nnz.
        nnz: number of kept weights of an unstructured layer.
    Raises: UserError for a pattern that does not fit, or when not exactly one of pattern and nnz is given.
    """

    values_name = "values"

    def __init__(self, in_features, out_features, bias=True, pattern=None, nnz=None, dtype=None, device=None):
        super().__init__(in_features, out_features)
        if (pattern is None) == (nnz is None):
            raise UserError(f"pattern {pattern} and nnz {nnz}: exactly one of them is needed.")
        self.pattern = pattern and check_pattern(in_features, pattern)
        if self.pattern:
            shape = (out_features, in_features * self.pattern[0] // self.pattern[1])
        elif 0 <= nnz <= out_features * in_features:
            shape = (nnz,)
        else:
            raise UserError(f"nnz {nnz}: from 0 to {out_features * in_features} weights can be kept.")
        self.add_tensor("values", shape, dtype, device)
        self.add_tensor("mask", (out_features, -(-in_features // 8)), torch.uint8, device)
        self.register_parameter("row_offsets", None)
        if not self.pattern:
            self.add_tensor("row_offsets", (out_features + 1,), torch.int64, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (out_features,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.values.zero_()
        if self.bias is not None:
            self.bias.zero_()
        if self.pattern:
            self.mask.copy_(valid_mask(self.out_features, self.in_features, self.pattern, self.mask.device))
        else:
            keep_first(self.mask, self.row_offsets, self.values.numel(), self.in_features)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return bitmask_linear(x, self.values, self.mask, self.bias, self.row_offsets)

    def dense_weight(self) -> torch.Tensor:
        """W, (out_features, in_features), in the dtype of `values`."""
        return unpack_bitmask(self.values.detach(), self.mask, self.in_features, self.row_offsets)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if the packed tensors contradict each other or are not finite."""
        self.check_finite(name)
        counts = self.pattern or check_offsets(f"{name}.row_offsets", self.row_offsets, self.values.numel())
        check_mask(f"{name}.mask", self.mask, self.in_features, counts)

    def extra_repr(self) -> str:
        kept = "{}:{}".format(*self.pattern) if self.pattern else f"nnz={self.values.numel()}"
        return f"{super().extra_repr()}, {kept}"


def keep_first(mask: torch.Tensor, row_offsets: torch.Tensor, nnz: int, d_in: int) -> None:
    """Make mask and offsets of an unstructured weight (d_out, d_in) say that its first nnz positions are kept."""
    starts = torch.arange(len(row_offsets), device=mask.device) * d_in
    row_offsets.copy_(starts.clamp(max=nnz))
    first = 8 * torch.arange(mask.shape[1], device=mask.device)
    free = (row_offsets.diff().unsqueeze(1) - first).clamp(0, 8)
    mask.copy_((2**free - 1).to(torch.uint8))


def check_offsets(name: str, row_offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    """The number kept in each row, int64 (d_out,); UserError unless the offsets rise from 0 to nnz."""
    counts = row_offsets.diff()
    if row_offsets[0] != 0 or row_offsets[-1] != nnz or (counts < 0).any():
        raise UserError(f"{name} do not rise from 0 to {nnz}; {REBUILD}.")
    return counts
