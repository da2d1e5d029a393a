"""packed_linear: a linear layer whose weight is stored as codes of 1 to 8 bits with a scale and a zero per group."""

import ctypes
import functools

import torch
from torch import Tensor

from ..build import DTYPES, integers, level, library, pointer
from ..ops import SKINNY, check_floats, define, linear_shape, on_gpu, scratch
from .gpu import packed_linear_triton
from .reference import check_format, dequantize
from .reference import packed_linear as packed_linear_reference

TILE_BYTES = 32 << 20  # of dequantised weight at a time, as in bitmask_linear


def _compute(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    int8: bool,
) -> Tensor:
    if on_gpu(x):
        return packed_linear_triton(x, qweight, scales, zeros, bias, bits)
    lib = _library() if x.device.type == "cpu" else None
    if lib is None or x.numel() == 0:
        return packed_linear_reference(x, qweight, scales, zeros, bias, bits=bits, group_size=group_size)
    d_out, d_in = len(qweight), x.shape[-1]
    x, qweight, scales = x.contiguous(), qweight.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    zeros_kind = 0 if zeros is None else 1 if zeros.dtype == torch.uint8 else 2
    out = x.new_empty(*x.shape[:-1], d_out)
    digits = 1 if int8 else 3 if x.dtype == torch.float32 else 2
    n = x.numel() // d_in
    skinny = n <= SKINNY
    if skinny:
        skinny = not lib.slimzoo_packed_linear(
            x.data_ptr(),
            qweight.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            n,
            d_out,
            d_in,
            scales.shape[1],
            bits,
            zeros_kind,
            digits,
            DTYPES[x.dtype],
            level(),
            torch.get_num_threads(),
        )
    if not skinny:  # many rows, or NaN or Inf in x, which have no fixed-point form
        rows, result, sizes = x.view(-1, d_in), out.view(-1, d_out), integers(d_in, scales.shape[1])
        tile_rows = max(1, min(d_out, TILE_BYTES // (d_in * x.element_size())))
        tile = scratch("tile", (tile_rows, d_in), x.dtype)
        for first in range(0, d_out, tile_rows):
            last = min(first + tile_rows, d_out)
            lib.slimzoo_packed_expand(
                *map(pointer, (qweight, scales, zeros, tile)),
                *integers(first, last),
                *sizes,
                bits,
                zeros_kind,
                DTYPES[x.dtype],
                level(),
                torch.get_num_threads(),
            )
            part = tile[: last - first].T
            if bias is None:
                torch.mm(rows, part, out=result[:, first:last])
            else:
                torch.addmm(bias[first:last], rows, part, out=result[:, first:last])
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; the types of the arguments, once said, make a call with plain integers cheap."""
    lib = library("packed_linear")
    if lib is not None:
        sizes = [ctypes.c_int64] * 4  # n, d_out, d_in, groups
        lib.slimzoo_packed_linear.argtypes = [ctypes.c_void_p] * 6 + sizes + [ctypes.c_int] * 6
    return lib


_op = define(
    "packed_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, bool int8) -> Tensor",
    _compute,
    lambda x, qweight, *_: linear_shape(x, qweight.shape[0]),
    lambda x, qweight, scales, zeros, bias, bits, group_size, int8: dequantize(
        qweight, scales, zeros, bits, group_size, x.shape[-1]
    ),
)


def packed_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    int8: bool = False,
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), W in the packed-bits format of `reference.py`; differentiable in x.

    Args: x, scales (d_out, d_in / g), float zeros and bias fp32, bf16 or fp16 alike; qweight uint8 (d_out, d_in bits / 8);
    zeros like scales or uint8, None for 2^(bits - 1); bits 1, 2, 3, 4, 5, 6 or 8; group_size a multiple of 32 that divides
    d_in, or -1 for a whole row; int8: up to SKINNY rows of x are rounded to 8 bits per chunk of 32 inputs, which is
    faster; otherwise x keeps at least the precision of its dtype relative to the largest input of a chunk.
    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    floats = {"scales": scales, "bias": bias}
    if zeros is not None and zeros.dtype != torch.uint8:
        floats["zeros"] = zeros
    check_floats("packed_linear", x, **floats)
    if not (qweight.dtype == torch.uint8 and qweight.ndim == 2):
        raise ValueError("packed_linear: qweight must be uint8 (d_out, d_in bits / 8)")
    d_out, width = qweight.shape
    d_in = x.shape[-1] if x.ndim else 0
    check_format(d_in, bits, group_size)
    if not (width * 8 == d_in * bits):
        raise ValueError(f"packed_linear: x {tuple(x.shape)} does not fit qweight {tuple(qweight.shape)}")
    groups = 1 if group_size == -1 else d_in // group_size
    if not (scales.shape == (d_out, groups)):
        raise ValueError(f"packed_linear: scales must be ({d_out}, {groups})")
    if not (zeros is None or zeros.shape == scales.shape):
        raise ValueError(f"packed_linear: zeros must be ({d_out}, {groups})")
    if not (bias is None or bias.shape == (d_out,)):
        raise ValueError(f"packed_linear: bias must be ({d_out},)")
    return _op(x, qweight, scales, zeros, bias, bits, group_size, int8)
