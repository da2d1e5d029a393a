"""kv_attention in plain torch, and the format of quantised keys and values: the definition that the kernels are tested
against.

A group of numbers x is stored as codes of b bits with a scale s and a minimum m, both fp16:
    m = min x, s = (max x - min x) / (2^b - 1), code = clamp(round((x - m) / s), 0, 2^b - 1), x ~ code s + m
(KVTuner, arXiv 2502.04420, but with the float minimum, as in KIVI's kernels). By token and at 2 bits m may be the nearest
multiple of s instead, so that 0 is on the grid (an "integer zero point"): each group takes what has clearly the smaller
sum of squared errors. On SmolLM2 that takes 14 % off the error of attention's output for values and 13 % for keys; of keys
by channel it would add 4 %. Codes are computed against the rounded m and s. Bytes hold 8 / b codes, planar: with n
numbers along the packed axis, byte i has the codes of numbers i, i + n b / 8, i + 2 n b / 8, … from the low bits up, so
that unpacking shifts and masks but moves nothing.

By token (`quantize_tokens`; values, and keys in per-token mode): a group is g numbers of one token and head, g = -1 the
whole head; codes (…, S, D b / 8), packed along D; scale and minimum (…, S, D / g).
By channel (`quantize_channels`; KIVI's keys): a group is one channel of a block of g tokens; codes (…, S / g, g b / 8, D),
packed along the tokens of a block; scale and minimum (…, S / g, D).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = (2, 4, 8)
LARGEST = torch.finfo(torch.float16).max


class Part(NamedTuple):
    """The keys, or the values, of a layer: older tokens packed, newer ones dense; either may be missing.

    codes uint8, by token (B, Hkv, S1, D b / 8) or by channel (B, Hkv, S1 / g, g b / 8, D); scale, minimum fp16 as above;
    dense (B, Hkv, S2, D) in the query's dtype.
    """

    codes: Tensor | None
    scale: Tensor | None
    minimum: Tensor | None
    dense: Tensor | None
    bits: int


def check_width(bits: int) -> None:
    """Raises ValueError for a width that does not exist."""
    if bits not in WIDTHS:
        raise ValueError(f"{bits} bits: one of {', '.join(map(str, WIDTHS))} is needed for a quantised KV cache")


CLEARLY = 1 - 1e-9  # a tie is no gain, in whatever order errors are summed


def quantize(x: Tensor, bits: int, dim: int, with_zero: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (unpacked, uint8) of x, and scale and minimum (fp16, without the axis `dim`), a group along `dim`.

    with_zero: the minimum may be a multiple of the scale, where that loses less.
    """
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    minimum = low.clamp(-LARGEST, LARGEST).half()
    scale = ((high - low) / (2**bits - 1)).clamp_max(LARGEST).half()
    scale = torch.where(scale > 0, scale, 1)  # a constant group, or one whose range is below fp16's smallest number

    def codes(minimum: Tensor) -> Tensor:
        return ((x - minimum.float()) / scale.float()).round().clamp_(0, 2**bits - 1).nan_to_num_(0).to(torch.uint8)

    def error(minimum: Tensor) -> Tensor:
        off = codes(minimum).double() * scale.double() + minimum.double() - x.double()
        return off.square_().sum(dim, keepdim=True)

    if with_zero:
        multiple = ((minimum.float() / scale.float()).round() * scale.float()).clamp(-LARGEST, LARGEST).half()
        minimum = torch.where(error(multiple) < CLEARLY * error(minimum), multiple, minimum)
    return codes(minimum), scale.squeeze(dim), minimum.squeeze(dim)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Planar bytes along `dim`, whose size is a multiple of 8 / bits."""
    planes = codes.chunk(8 // bits, dim)
    packed = planes[0].clone()
    for place, plane in enumerate(planes[1:], 1):
        packed |= plane << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of planar bytes along `dim`, uint8."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim)


def quantize_tokens(x: Tensor, bits: int, group_size: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, S, D) -> codes (…, S, D b / 8), scale and minimum (…, S, D / g).

    Raises: ValueError if D is not a multiple of g and 8 / bits.
    """
    check_width(bits)
    size = x.shape[-1]
    group = size if group_size == -1 else group_size
    if size % group or size * bits % 8:
        raise ValueError(f"head size {size}: a multiple of {math.lcm(group, 8 // bits)} is needed")
    codes, scale, minimum = quantize(x.unflatten(-1, (-1, group)), bits, -1, with_zero=bits == 2)
    return pack(codes.flatten(-2), bits, -1), scale, minimum


def dequantize_tokens(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The numbers (…, S, D) of `quantize_tokens`, fp32."""
    groups = unpack(codes, bits, -1).unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None].float() + minimum[..., None].float()).flatten(-2)


def quantize_channels(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, S, D) -> codes (…, S / g, g b / 8, D), scale and minimum (…, S / g, D).

    Raises: ValueError if S is not a multiple of g, or g not of 8 / bits.
    """
    check_width(bits)
    if x.shape[-2] % group_size or group_size * bits % 8:
        raise ValueError(f"{x.shape[-2]} tokens: whole blocks of {group_size}, a multiple of {8 // bits}, are needed")
    codes, scale, minimum = quantize(x.unflatten(-2, (-1, group_size)), bits, -2)
    return pack(codes, bits, -2), scale, minimum


def dequantize_channels(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The numbers (…, S, D) of `quantize_channels`, fp32."""
    return (unpack(codes, bits, -2) * scale.unsqueeze(-2).float() + minimum.unsqueeze(-2).float()).flatten(-3, -2)


def dequantize(part: Part) -> Tensor:
    """All tokens of a part (B, Hkv, S, D), fp32; of an unquantised one its dtype."""
    if part.codes is None:
        return part.dense
    by_token = part.codes.ndim == 4
    packed = (dequantize_tokens if by_token else dequantize_channels)(*part[:3], part.bits)
    return packed if part.dense is None else torch.cat([packed, part.dense.float()], -2)


def kv_attention(q: Tensor, keys: Part, values: Part, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q K^T + mask) V in fp32, for one query token a row: q (B, H, D) -> (B, H, D) in q's dtype.

    Query head h attends to key head h // (H / Hkv). mask (B, S) bool, False = not attended to; a row of which nothing is
    attended to gives 0.
    """
    k, v = dequantize(keys).float(), dequantize(values).float()
    grouped = q.float().unflatten(1, (k.shape[1], -1)) * scaling  # (B, Hkv, H / Hkv, D)
    scores = grouped @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0) if mask is not None else torch.softmax(scores, -1)
    return (weights @ v).flatten(1, 2).to(q.dtype)
