"""packed_linear: a linear layer whose weight is stored as codes of 1 to 8 bits with a scale and a zero per group."""

import ctypes
import functools

import torch
from torch import Tensor

from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import SKINNY, check_floats, define, define_plain, linear_shape, on_gpu, scratch
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
    out = x.new_empty(*x.shape[:-1], d_out)
    zeros_kind = _zeros_kind(zeros)
    if not _skinny(lib, x, [(qweight, scales, zeros, bias, out)], bits, int8):
        rows, result, sizes = x.view(-1, d_in), out.view(x.numel() // d_in, d_out), integers(d_in, scales.shape[1])
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
                level(lib),
                torch.get_num_threads(),
            )
            part = tile[: last - first].T
            if bias is None:
                torch.mm(rows, part, out=result[:, first:last])
            else:
                torch.addmm(bias[first:last], rows, part, out=result[:, first:last])
    return out


def _zeros_kind(zeros: Tensor | None) -> int:
    return 0 if zeros is None else 1 if zeros.dtype == torch.uint8 else 2


def _skinny(lib: ctypes.CDLL, x: Tensor, matrices: list[tuple[Tensor | None, ...]], bits: int, int8: bool) -> bool:
    """Products of a few rows of x straight from the codes, into the last of each (qweight, scales, zeros, bias, out).

    False, and nothing is written, for many rows, or NaN or Inf in x, which have no fixed-point form.
    """
    d_in = x.shape[-1]
    n = x.numel() // d_in
    if n > SKINNY:
        return False
    fields = []
    for qweight, *others in matrices:
        fields += [0 if tensor is None else tensor.data_ptr() for tensor in (qweight, *others)]
        fields.append(len(qweight))
    _, scales, zeros, _, _ = matrices[0]
    return not lib.slimzoo_packed_linear(
        x.data_ptr(),
        (ctypes.c_int64 * len(fields))(*fields),  # struct Matrix of cpu.cpp
        len(matrices),
        n,
        d_in,
        scales.shape[1],
        bits,
        _zeros_kind(zeros),
        1 if int8 else 3 if x.dtype == torch.float32 else 2,
        DTYPES[x.dtype],
        level(lib),
        torch.get_num_threads(),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; the types of the arguments, once said, make a call with plain integers cheap."""
    lib = library("packed_linear")
    if lib is not None:
        sizes = [ctypes.c_int64] * 4  # count, n, d_in, groups
        lib.slimzoo_packed_linear.argtypes = [ctypes.c_void_p] * 2 + sizes + [ctypes.c_int] * 6
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


def _compute_shared(
    x: Tensor,
    qweights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor | None],
    biases: list[Tensor | None],
    bits: int,
    group_size: int,
) -> list[Tensor]:
    lib = _library() if x.device.type == "cpu" and x.numel() else None
    packed = list(zip(qweights, scales, zeros, biases, strict=True))
    if lib is not None:
        outs = [x.new_empty(*x.shape[:-1], len(qweight)) for qweight in qweights]
        if _skinny(lib, x, [(*row, out) for row, out in zip(packed, outs, strict=True)], bits, False):
            return outs
    return [_compute(x, *row, bits, group_size, False) for row in packed]


_shared_op = define_plain(
    "packed_linears",
    "(Tensor x, Tensor[] qweights, Tensor[] scales, Tensor?[] zeros, Tensor?[] biases, int bits, int group_size)"
    " -> Tensor[]",
    _compute_shared,
    lambda x, qweights, *_: [linear_shape(x, len(qweight)) for qweight in qweights],
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
    _check(x, qweight, scales, zeros, bias, bits, group_size)
    return _op(x, qweight, scales, zeros, bias, bits, group_size, int8)


def packed_linears(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], *, bits: int, group_size: int
) -> list[Tensor]:
    """[packed_linear(x, *weight)] of matrices (qweight, scales, zeros, bias) of one format that read the same x, to the bit;
    on a CPU in one call, which prepares x once. For inference: no gradients. Raises: ValueError as packed_linear.
    """
    for weight in weights:
        _check(x, *weight, bits, group_size)
    if len({None if zeros is None else zeros.dtype for _, _, zeros, _ in weights}) > 1:
        raise ValueError("packed_linears: the zeros of all matrices must be of one kind")
    return _shared_op(x, *map(list, zip(*weights, strict=True)), bits, group_size)


def _check(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> None:
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
