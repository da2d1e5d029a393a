"""kv_attention: attention of one query token to quantised keys and values, read straight from their codes."""

import ctypes
import math

import torch
from torch import Tensor

from ..libraries import DTYPES, integers, level, library, pointer
from ..ops import FLOATS, define_plain, on_gpu
from .gpu import kv_attention_triton
from .reference import WIDTHS, Part, check_width, pack
from .reference import kv_attention as kv_attention_reference
from .reference import quantize_channels as quantize_channels_reference
from .reference import quantize_tokens as quantize_tokens_reference

__all__ = ["Part", "WIDTHS", "fits_kernel", "kv_attention", "pack", "quantize_channels", "quantize_tokens"]
LARGEST_HEAD = 256  # numbers of a head that the kernels take; larger ones go through the reference
LARGEST_BLOCK = 128  # tokens of a block by channel


def fits_kernel(part: Part, head_dim: int) -> bool:
    """Whether the compiled kernels read this part: keys by token have one group a head, blocks are not too large."""
    if head_dim > LARGEST_HEAD:
        return False
    if part.codes is None or part.codes.ndim == 4:
        return True
    return part.codes.shape[-2] * 8 // part.bits <= LARGEST_BLOCK


def _compute(
    q: Tensor,
    k_codes: Tensor | None,
    k_scale: Tensor | None,
    k_minimum: Tensor | None,
    k_dense: Tensor | None,
    k_bits: int,
    v_codes: Tensor | None,
    v_scale: Tensor | None,
    v_minimum: Tensor | None,
    v_dense: Tensor | None,
    v_bits: int,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    keys = Part(k_codes, k_scale, k_minimum, k_dense, k_bits)
    values = Part(v_codes, v_scale, v_minimum, v_dense, v_bits)
    head = q.shape[-1]
    simple = k_codes is None or k_codes.ndim == 5 or k_scale.shape[-1] == 1
    simple = simple and (v_codes is None or v_codes.ndim == 4)
    tokens = sum(tensor.shape[2] for tensor in (k_codes, k_dense) if tensor is not None)
    if simple and fits_kernel(keys, head) and fits_kernel(values, head) and q.numel() and tokens:
        if on_gpu(q):
            return kv_attention_triton(q, keys, values, mask, scaling)
        lib = library("kv_attention") if q.device.type == "cpu" else None
        if lib is not None:
            return _on_cpu(lib, q, keys, values, mask, scaling)
    return kv_attention_reference(q, keys, values, mask, scaling)


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """The tensor and its stride from one (row, head) to the next; all behind that is contiguous."""
    if tensor is None:
        return None, 0
    inner = tensor[0, 0]
    if not inner.is_contiguous() or (len(tensor) > 1 and tensor.stride(0) != tensor.shape[1] * tensor.stride(1)):
        tensor = tensor.contiguous()
    return tensor, tensor.stride(1) if tensor.shape[1] > 1 else inner.numel() if len(tensor) == 1 else tensor.stride(0)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _on_cpu(lib, q: Tensor, keys: Part, values: Part, mask: Tensor | None, scaling: float) -> Tensor:
    rows, heads, head_dim = q.shape
    q = q.contiguous()
    out = q.new_empty(q.shape)
    pointers, numbers = [], []
    for part in (keys, values):
        tensors, strides = zip(*map(_strided, part[:4]), strict=True)
        if strides[1] != strides[2]:  # the kernel takes one for both
            tensors, strides = zip(*map(_strided, map(_whole, part[:4])), strict=True)
        codes, _, _, dense = tensors
        by_channel = codes is not None and codes.ndim == 5
        block = codes.shape[3] * 8 // part.bits if by_channel else 1
        packed = 0 if codes is None else codes.shape[2] * block
        groups = 0 if codes is None or by_channel else part.scale.shape[-1]
        pointers.append(tensors)
        numbers += [part.bits, packed, 0 if dense is None else dense.shape[2], block if by_channel else 0, groups]
        numbers += [strides[0], strides[1], strides[3]]
    kv_heads = next(t for t in pointers[0] if t is not None).shape[1]
    mask = None if mask is None else mask.contiguous()
    lib.slimzoo_kv_attention(
        *map(pointer, (q, *pointers[0], *pointers[1], mask, out)),
        *integers(*numbers, rows, heads, kv_heads, head_dim),
        DTYPES[q.dtype],
        ctypes.c_float(scaling),
        level(lib),
        torch.get_num_threads(),
    )
    return out


_PART = "Tensor? {0}_codes, Tensor? {0}_scale, Tensor? {0}_minimum, Tensor? {0}_dense, int {0}_bits"
_op = define_plain(
    "kv_attention",
    f"(Tensor q, {_PART.format('k')}, {_PART.format('v')}, Tensor? mask, float scaling) -> Tensor",
    _compute,
    lambda q, *_: q.new_empty(q.shape),
    strided=True,  # the cache's tensors are cuts of larger ones, too large to copy for every token
)


def kv_attention(
    q: Tensor, keys: Part, values: Part, *, mask: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """softmax(scaling q K^T) V for one query token a row: q (B, H, D) -> (B, H, D); for inference, no gradients.

    Args: q fp32, bf16 or fp16; keys, values: see `Part`, of equally many tokens S; mask (B, S) bool, False = not attended
    to; scaling: 1 / sqrt(D) by default.
    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    if q.dtype not in FLOATS:
        raise ValueError(f"kv_attention: q is {q.dtype}; fp32, bf16 or fp16 is needed")
    if q.ndim != 3:
        raise ValueError(f"kv_attention: q has shape {tuple(q.shape)}; (B, H, D) is needed")
    tokens = [_check(part, name, q) for part, name in ((keys, "keys"), (values, "values"))]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"kv_attention: {tokens[0][1]} tokens of keys and {tokens[1][1]} of values; as many are needed"
        )
    if mask is not None and not (mask.dtype == torch.bool and mask.shape == (len(q), tokens[0][1])):
        raise ValueError(f"kv_attention: mask must be bool ({len(q)}, {tokens[0][1]})")
    scaling = 1 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    return _op(q, *keys, *values, mask, scaling)


def _check(part: Part, name: str, q: Tensor) -> tuple[int, int]:
    """(heads, tokens) of a part; ValueError if it does not fit its format or q."""
    rows, heads, size = q.shape
    codes, scale, minimum, dense, bits = part
    if codes is None and dense is None:
        raise ValueError(f"kv_attention: {name} have no tokens")
    some = codes if dense is None else dense
    if some.ndim < 4 or (codes is not None and (codes.ndim not in (4, 5) or scale is None or minimum is None)):
        raise ValueError(
            f"kv_attention: {name} need codes of 4 or 5 dimensions with scales and minima, dense ones of 4"
        )
    kv_heads, tokens = some.shape[1], 0
    if len(some) != rows or not kv_heads or heads % kv_heads:
        raise ValueError(f"kv_attention: {name} of shape {tuple(some.shape)} do not fit q {tuple(q.shape)}")
    if codes is not None:
        check_width(bits)
        if codes.ndim == 4:
            tokens, groups = codes.shape[2], scale.shape[-1] if scale.ndim else 0
            wanted = (rows, kv_heads, tokens, size * bits // 8), (rows, kv_heads, tokens, groups)
            whole = size * bits % 8 == 0 and groups and size % groups == 0
        else:
            blocks, block_bytes = codes.shape[2:4]
            tokens, whole = blocks * block_bytes * 8 // bits, True
            wanted = (rows, kv_heads, blocks, block_bytes, size), (rows, kv_heads, blocks, size)
        if not (whole and codes.shape == wanted[0] and scale.shape == minimum.shape == wanted[1]):
            raise ValueError(
                f"kv_attention: {name} of {bits} bits need codes {wanted[0]} and scales {wanted[1]}, not"
                f" {tuple(codes.shape)} and {tuple(scale.shape)}"
            )
        if not (codes.dtype == torch.uint8 and scale.dtype == minimum.dtype == torch.float16):
            raise ValueError(f"kv_attention: {name} need uint8 codes and fp16 scales")
    if dense is not None:
        if not (dense.shape == (rows, kv_heads, dense.shape[2], size) and dense.dtype == q.dtype):
            raise ValueError(f"kv_attention: dense {name} must be ({rows}, {kv_heads}, …, {size}) in {q.dtype}")
        tokens += dense.shape[2]
    return kv_heads, tokens


def quantize_tokens(x: Tensor, bits: int, group_size: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, S, D) -> codes (…, S, D b / 8), scale and minimum (…, S, D / g); see `reference.py`. Compiled on CPUs."""
    return _quantize(x, bits, group_size, quantize_tokens_reference, channels=False)


def quantize_channels(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, S, D) -> codes (…, S / g, g b / 8, D), scale and minimum (…, S / g, D); see `reference.py`."""
    return _quantize(x, bits, group_size, quantize_channels_reference, channels=True)


def _quantize(x: Tensor, bits: int, group_size: int, reference, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
    size, tokens = x.shape[-1], x.shape[-2]
    group = size if group_size == -1 else group_size
    along = tokens if channels else size
    lib = library("kv_attention") if x.device.type == "cpu" and x.dtype in FLOATS else None
    if lib is None or x.numel() == 0 or bits not in WIDTHS or along % group or group * bits % 8:
        return reference(x, bits, group_size)
    x = x.contiguous()
    lead = x.shape[:-2]
    if channels:
        codes = x.new_empty(*lead, tokens // group, group * bits // 8, size, dtype=torch.uint8)
        scale = x.new_empty(*lead, tokens // group, size, dtype=torch.float16)
    else:
        codes = x.new_empty(*lead, tokens, size * bits // 8, dtype=torch.uint8)
        scale = x.new_empty(*lead, tokens, size // group, dtype=torch.float16)
    minimum = torch.empty_like(scale)
    lib.slimzoo_kv_quantize(
        *map(pointer, (x, codes, scale, minimum)),
        *integers(x.numel() // size, size, group),
        bits,
        int(channels),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return codes, scale, minimum
