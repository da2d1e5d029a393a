"""sparse_conv2d: a 2-D convolution whose weight is stored as one bit per position plus the kept values."""

import ctypes

import torch
from torch import Tensor

from ..bitmask_linear import bitmask_expand
from ..bitmask_linear.reference import misfit
from ..libraries import DTYPES, level, library, pointer
from ..ops import check_floats, define

# Fraction of kept weights up to which the direct product is used on CPUs; above, and elsewhere, the weight is expanded.
DENSEST = 0.25
LARGEST_IMAGE = 2**31  # numbers of a padded one: the kernel's offsets have 32 bits


def _sizes(x: Tensor, mask: Tensor, geometry: list[int]) -> tuple[list[int], tuple[int, int, int, int]]:
    """(sizes as the kernel takes them, shape of the result)."""
    kh, kw, sy, sx, py, px, dy, dx, groups = geometry
    height = (x.shape[2] + 2 * py - dy * (kh - 1) - 1) // sy + 1
    width = (x.shape[3] + 2 * px - dx * (kw - 1) - 1) // sx + 1
    return [*x.shape, len(mask), *geometry], (len(x), len(mask), height, width)


def _unpacked(geometry: list[int]) -> tuple:
    kh, kw, sy, sx, py, px, dy, dx, groups = geometry
    return (kh, kw), (sy, sx), (py, px), (dy, dx), groups


def _expand(values: Tensor, mask: Tensor, row_offsets: Tensor, channels: int, geometry: list[int]) -> Tensor:
    kernel, groups = geometry[:2], geometry[-1]
    weight = bitmask_expand(values, mask, row_offsets, channels // groups * kernel[0] * kernel[1])
    return weight.view(len(mask), channels // groups, *kernel)


def _compute(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    sizes, shape = _sizes(x, mask, geometry)
    positions = len(mask) * x.shape[1] // geometry[-1] * geometry[0] * geometry[1]
    _, _, sy, sx, py, px, _, _, _ = geometry
    padded = x.shape[1] * (x.shape[2] + 2 * py + sy) * (x.shape[3] + 2 * px + sx)
    fits = x.device.type == "cpu" and len(values) <= DENSEST * positions and padded < LARGEST_IMAGE
    lib = library("sparse_conv2d") if fits else None
    if lib is None or x.numel() == 0 or min(shape) < 1:
        weight = _expand(values, mask, row_offsets, x.shape[1], geometry)
        return torch.nn.functional.conv2d(x, weight, bias, *_unpacked(geometry)[1:])
    out = x.new_empty(shape)
    wrong = lib.slimzoo_sparse_conv2d(
        *map(pointer, (x, values, mask, row_offsets, bias, out)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_int64(len(values)),
        DTYPES[x.dtype],
        level(lib),
        torch.get_num_threads(),
    )
    if wrong:
        raise misfit("sparse_conv2d")
    return out


def _gradients(grad, needs, x, values, mask, row_offsets, bias, geometry):
    grads = [None] * 6
    if needs[0]:
        weight = _expand(values, mask, row_offsets, x.shape[1], geometry)
        _, stride, padding, dilation, groups = _unpacked(geometry)
        grads[0] = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding, dilation, groups)
    return grads


_op = define(
    "sparse_conv2d",
    "(Tensor x, Tensor values, Tensor mask, Tensor row_offsets, Tensor? bias, int[] geometry) -> Tensor",
    _compute,
    lambda x, values, mask, row_offsets, bias, geometry: x.new_empty(_sizes(x, mask, geometry)[1]),
    gradients=_gradients,
)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """x (B, in_channels, H, W) -> (B, d_out, H', W'), W in the bitmask format of `reference.py`; differentiable in x.

    Args: x, values (nnz,), bias (d_out,) fp32, bf16 or fp16 alike; mask uint8 (d_out, ceil(d_in / 8)) and row_offsets
    int64 (d_out + 1,), d_in = in_channels / groups * kh * kw; borders are padded with zeros.
    Raises: ValueError when shapes, dtypes or devices do not fit; UserError as `bitmask_linear`.
    """
    check_floats("sparse_conv2d", x, values=values, bias=bias)
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups or mask.ndim != 2 or len(mask) % groups:
        raise ValueError(f"sparse_conv2d: x {tuple(x.shape)}, mask {tuple(mask.shape)} and {groups} groups do not fit")
    d_in = x.shape[1] // groups * kernel[0] * kernel[1]
    if mask.dtype != torch.uint8 or mask.shape[1] != -(-d_in // 8):
        raise ValueError(f"sparse_conv2d: mask must be uint8 ({len(mask)}, {-(-d_in // 8)})")
    if values.ndim != 1 or row_offsets.dtype != torch.int64 or row_offsets.shape != (len(mask) + 1,):
        raise ValueError(f"sparse_conv2d: 1-D values and row_offsets int64 ({len(mask) + 1},) are needed")
    if bias is not None and bias.shape != (len(mask),):
        raise ValueError(f"sparse_conv2d: bias must be ({len(mask)},)")
    if min(*stride, *dilation, *kernel) < 1 or min(padding) < 0:
        raise ValueError("sparse_conv2d: kernel, stride and dilation from 1 on, padding from 0 on are needed")
    return _op(x, values, mask, row_offsets, bias, [*kernel, *stride, *padding, *dilation, groups])
