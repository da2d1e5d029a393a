"""BitmaskConv2d: a convolution that stores its kept weights and one bit a position."""

import torch

from ..errors import UserError
from ..kernels.bitmask_linear.reference import unpack_bitmask
from ..kernels.sparse_conv2d import sparse_conv2d
from .base import PackedConv2d, check_mask
from .bitmask import check_offsets, keep_first


class BitmaskConv2d(PackedConv2d):
    """y = conv2d(x, W) + bias with a sparse W, held as BitmaskLinear holds the matrix (d_out, d_in) that W is viewed as.

    Tensors: `mask` uint8 (d_out, ceil(d_in/8)), bit j of byte k = column 8k+j; `values` (nnz,) in the model's dtype, kept
    weights in column order, row after row; `row_offsets` int64 (d_out+1,); `bias` (out_channels,) or None.

    Args: as of nn.Conv2d, and nnz, the number of kept weights.
    Raises: UserError for another padding than zeros, and for an impossible nnz.
    """

    values_name = "values"

    def __init__(self, *shape, bias=True, nnz, dtype=None, device=None, **geometry):
        super().__init__(*shape, **geometry)
        d_out, d_in = self.matrix_shape
        if not 0 <= nnz <= d_out * d_in:
            raise UserError(f"nnz {nnz}: from 0 to {d_out * d_in} weights can be kept.")
        self.add_tensor("values", (nnz,), dtype, device)
        self.add_tensor("mask", (d_out, -(-d_in // 8)), torch.uint8, device)
        self.add_tensor("row_offsets", (d_out + 1,), torch.int64, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (d_out,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.values.zero_()
        if self.bias is not None:
            self.bias.zero_()
        keep_first(self.mask, self.row_offsets, self.values.numel(), self.matrix_shape[1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_conv2d(x, self.values, self.mask, self.row_offsets, self.bias, **self.geometry)

    def dense_weight(self) -> torch.Tensor:
        """W, (out_channels, in_channels / groups, kh, kw), in the dtype of `values`."""
        weight = unpack_bitmask(self.values.detach(), self.mask, self.matrix_shape[1], self.row_offsets)
        return weight.view(self.weight_shape)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if the packed tensors contradict each other or are not finite."""
        self.check_finite(name)
        counts = check_offsets(f"{name}.row_offsets", self.row_offsets, self.values.numel())
        check_mask(f"{name}.mask", self.mask, self.matrix_shape[1], counts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nnz={self.values.numel()}"
