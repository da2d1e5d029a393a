"""Layers that store their kept weights and one bit a position: linear (N:M or unstructured) and convolution."""

import torch

from ..errors import UserError
from ..kernels.bitmask_linear import bitmask_linear
from ..kernels.bitmask_linear.reference import unpack_bitmask
from ..kernels.sparse_conv2d import sparse_conv2d
from .base import REBUILD, PackedConv2d, PackedLinear, check_mask, check_pattern, valid_mask


class Bitmask:
    """Mixed in before a packed class: the weight as a matrix (d_out, d_in) is held as mask and kept values.

    Tensors: `mask` uint8 (d_out, ceil(d_in/8)), bit j of byte k = column 8k+j; `values` in the model's dtype, kept weights
    in column order, row after row: (d_out, d_in*N/M) with a pattern, (nnz,) without; then also `row_offsets` int64
    (d_out+1,), the position of each row's first value; `bias` (d_out,) or None.

    Args:
        pattern: (N, M), N of every M consecutive inputs are kept; None for unstructured sparsity, which needs nnz.
        nnz: number of kept weights of an unstructured layer.
    Raises: UserError for a pattern that does not fit, or when not exactly one of pattern and nnz is given.
    """

    format = "bitmask"
    values_name = "values"

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Of the kept weights and one bit a position; without a pattern also 8 bytes for each row's offset and the end."""
        d_out, d_in = row["d_out"], row["d_in"]
        mask = d_out * -(-d_in // 8)
        if "nnz" in row:
            return row["nnz"] * itemsize + mask + 8 * (d_out + 1)
        n, m = row["pattern"]
        return d_out * d_in * n // m * itemsize + mask

    @staticmethod
    def dense_shape(spec: dict, parts: dict[str, torch.Tensor]) -> tuple[int, int] | None:
        """Without a pattern the columns are not known, as rows of the mask are padded to whole bytes."""
        if "pattern" not in spec:
            return None
        n, m = spec["pattern"]
        rows, kept = parts["values"].shape
        return rows, kept * m // n

    def __init__(self, *shape, bias=True, pattern=None, nnz=None, dtype=None, device=None, **geometry):
        super().__init__(*shape, **geometry)
        d_out, d_in = self.matrix_shape
        if (pattern is None) == (nnz is None):
            raise UserError(f"pattern {pattern} and nnz {nnz}: exactly one of them is needed.")
        self.pattern = None if pattern is None else check_pattern(d_in, pattern)
        if not self.pattern and not 0 <= nnz <= d_out * d_in:
            raise UserError(f"nnz {nnz}: from 0 to {d_out * d_in} weights can be kept.")
        kept = (d_out, d_in * self.pattern[0] // self.pattern[1]) if self.pattern else (nnz,)
        self.add_tensor("values", kept, dtype, device)
        self.add_tensor("mask", (d_out, -(-d_in // 8)), torch.uint8, device)
        self.register_parameter("row_offsets", None)
        if not self.pattern:
            self.add_tensor("row_offsets", (d_out + 1,), torch.int64, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (d_out,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        d_out, d_in = self.matrix_shape
        self.values.zero_()
        if self.bias is not None:
            self.bias.zero_()
        if self.pattern:
            self.mask.copy_(valid_mask(d_out, d_in, self.pattern, self.mask.device))
            return
        nnz = self.values.numel()  # the first positions
        starts = torch.arange(d_out + 1, device=self.mask.device) * d_in
        self.row_offsets.copy_(starts.clamp(max=nnz))
        first = 8 * torch.arange(self.mask.shape[1], device=self.mask.device)
        free = (self.row_offsets.diff().unsqueeze(1) - first).clamp(0, 8)
        self.mask.copy_((2**free - 1).to(torch.uint8))

    def dense_weight(self) -> torch.Tensor:
        """W, of `weight_shape`, in the dtype of `values`."""
        weight = unpack_bitmask(self.values.detach(), self.mask, self.matrix_shape[1], self.row_offsets)
        return weight.view(self.weight_shape)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if the packed tensors contradict each other or are not finite."""
        self.check_finite(name)
        counts = self.pattern
        if counts is None:
            counts, nnz = self.row_offsets.diff(), self.values.numel()
            if self.row_offsets[0] != 0 or self.row_offsets[-1] != nnz or (counts < 0).any():
                raise UserError(f"{name}.row_offsets do not rise from 0 to {nnz}; {REBUILD}.")
        check_mask(f"{name}.mask", self.mask, self.matrix_shape[1], counts)

    def extra_repr(self) -> str:
        kept = "{}:{}".format(*self.pattern) if self.pattern else f"nnz={self.values.numel()}"
        return f"{super().extra_repr()}, {kept}"


class BitmaskLinear(Bitmask, PackedLinear):
    """y = x W^T + bias with a sparse W."""

    keys = {"pattern?": [int], "nnz?": int}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return bitmask_linear(x, self.values, self.mask, self.bias, self.row_offsets)


class BitmaskConv2d(Bitmask, PackedConv2d):
    """y = conv2d(x, W) + bias with a sparse W, unstructured."""

    keys = {"nnz": int}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_conv2d(x, self.values, self.mask, self.row_offsets, self.bias, **self.geometry)
