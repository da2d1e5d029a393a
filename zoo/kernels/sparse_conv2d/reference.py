"""A 2-D convolution with a bitmask weight in plain torch: the definition that the kernel is tested on.

The weight (d_out, in_channels / groups, kh, kw) is stored as bitmask_linear's reference stores the matrix
(d_out, in_channels / groups * kh * kw) that it is viewed as.
"""

import torch
from torch import Tensor

from ..bitmask_linear.reference import unpack_bitmask


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """x (B, in_channels, H, W) -> (B, d_out, H', W') in the dtype of x, accumulated in fp32."""
    channels = x.shape[1] // groups
    weight = unpack_bitmask(values, mask, channels * kernel[0] * kernel[1], row_offsets)
    weight = weight.view(len(mask), channels, *kernel).float()
    bias = None if bias is None else bias.float()
    return torch.nn.functional.conv2d(x.float(), weight, bias, stride, padding, dilation, groups).to(x.dtype)
