"""kv_attention in Triton: codes are unpacked in registers, every byte is read once for all query heads of a key head.

One program takes a stretch of tokens of one (row, key head) and keeps a running maximum, sum and result in fp32; the
stretches are merged afterwards. Products run in fp32 (tf32x3 where tensor cores take it), since codes times scales have
more bits than a 16-bit float. Not run on a GPU yet.
"""

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from .reference import Part

TOKENS = 64  # in one tile
WARPS = 4
TARGET_PROGRAMS = 512  # stretches are made short enough for so many programs, to fill a GPU at batch 1
LEAST_TOKENS = 256  # in a stretch

if is_triton_available():
    import triton
    import triton.language as tl

    @triton.jit
    def load_part(
        codes, scale, minimum, dense, pair, t, d, packed, tokens, size,
        codes_stride, scale_stride, dense_stride, group,
        BITS: tl.constexpr, BY_CHANNEL: tl.constexpr, HAS_DENSE: tl.constexpr,
    ):  # fmt: skip
        """Tokens t (T,), numbers d (D,) of one (row, head), fp32 (T, D); 0 outside. group: tokens of a block, or numbers."""
        inside = (d < size)[None, :]
        x = tl.zeros((t.shape[0], d.shape[0]), tl.float32)
        if BITS < 16:
            fits = (t < packed)[:, None] & inside
            if BY_CHANNEL:
                rows = group * BITS // 8
                block, within = t // group, t % group
                byte_at = ((block * rows + within % rows) * size)[:, None] + d[None, :]
                shift = (within // rows * BITS)[:, None]
                scale_at = (block * size)[:, None] + d[None, :]
            else:
                width = size * BITS // 8
                byte_at = (t * width)[:, None] + (d % width)[None, :]
                shift = (d // width * BITS)[None, :]
                scale_at = (t * (size // group))[:, None] + (d // group)[None, :]
            byte = tl.load(codes + pair * codes_stride + byte_at, mask=fits, other=0).to(tl.int32)
            code = ((byte >> shift) & ((1 << BITS) - 1)).to(tl.float32)
            s = tl.load(scale + pair * scale_stride + scale_at, mask=fits, other=0.0).to(tl.float32)
            m = tl.load(minimum + pair * scale_stride + scale_at, mask=fits, other=0.0).to(tl.float32)
            x = code * s + m
        if HAS_DENSE:
            there = ((t >= packed) & (t < tokens))[:, None] & inside
            at = ((t - packed) * size)[:, None] + d[None, :]
            x += tl.load(dense + pair * dense_stride + at, mask=there, other=0.0).to(tl.float32)
        return x

    @triton.jit
    def kv_attention_kernel(
        q, k_codes, k_scale, k_minimum, k_dense, v_codes, v_scale, v_minimum, v_dense, mask, out, peaks, totals,
        k_packed, v_packed, tokens, stretch, heads, kv_heads, size, scaling,
        k_codes_stride, k_scale_stride, k_dense_stride, k_group, v_codes_stride, v_scale_stride, v_dense_stride, v_group,
        K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_BY_CHANNEL: tl.constexpr,
        K_DENSE: tl.constexpr, V_DENSE: tl.constexpr, MASKED: tl.constexpr,
        HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        ratio = heads // kv_heads
        h, d = tl.arange(0, HEADS), tl.arange(0, SIZE)
        head_fits = (h < ratio)[:, None] & (d < size)[None, :]
        at = (pair * ratio + h)[:, None] * size + d[None, :]
        query = tl.load(q + at, mask=head_fits, other=0.0).to(tl.float32) * scaling
        peak = tl.full((HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        result = tl.zeros((HEADS, SIZE), tl.float32)
        last = tl.minimum(tokens, (split + 1) * stretch)
        for first in range(split * stretch, last, TILE):
            t = first + tl.arange(0, TILE)
            k = load_part(
                k_codes, k_scale, k_minimum, k_dense, pair, t, d, k_packed, tokens, size,
                k_codes_stride, k_scale_stride, k_dense_stride, k_group, K_BITS, K_BY_CHANNEL, K_DENSE,
            )  # fmt: skip
            shown = t < last
            if MASKED:
                shown = shown & (tl.load(mask + pair // kv_heads * tokens + t, mask=shown, other=0) != 0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee")
            score = tl.where(shown[None, :], score, -float("inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing to attend to yet
            weight = tl.exp(score - base[:, None])
            shrink = tl.exp(peak - base)
            v = load_part(
                v_codes, v_scale, v_minimum, v_dense, pair, t, d, v_packed, tokens, size,
                v_codes_stride, v_scale_stride, v_dense_stride, v_group, V_BITS, False, V_DENSE,
            )  # fmt: skip
            result = result * shrink[:, None] + tl.dot(weight, v, input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            peak = higher
        splits = tl.num_programs(1)
        to = ((pair * ratio + h) * splits + split).to(tl.int64)
        tl.store(out + to[:, None] * size + d[None, :], result, mask=head_fits)
        tl.store(peaks + to, peak, mask=h < ratio)
        tl.store(totals + to, total, mask=h < ratio)


def _arguments(part: Part) -> tuple[Part, int, list[int], bool, bool]:
    """(contiguous part, packed tokens, [codes, scale and dense stride, group], by channel, has dense tokens)."""
    whole = [None if tensor is None else tensor.contiguous() for tensor in part[:4]]
    codes, scale, _, dense = whole
    by_channel = codes is not None and codes.ndim == 5
    group = packed = 1
    if codes is None:
        packed = 0
    elif by_channel:
        group = codes.shape[3] * 8 // part.bits
        packed = codes.shape[2] * group
    else:
        group, packed = codes.shape[3] * 8 // part.bits // scale.shape[-1], codes.shape[2]
    strides = [0 if tensor is None else tensor[0, 0].numel() for tensor in (codes, scale, dense)]
    return Part(*whole, part.bits if packed else 16), packed, [*strides, group], by_channel, dense is not None


def kv_attention_triton(q: Tensor, keys: Part, values: Part, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q K^T) V: q (B, H, D) -> (B, H, D); arguments as in `reference.py`, on one GPU."""
    rows, heads, size = q.shape
    keys, k_packed, k_strides, k_by_channel, k_dense = _arguments(keys)
    values, v_packed, v_strides, _, v_dense = _arguments(values)
    kv_heads = next(tensor for tensor in keys[:4] if tensor is not None).shape[1]
    tokens = k_packed + (keys.dense.shape[2] if k_dense else 0)
    splits = max(1, min(TARGET_PROGRAMS // (rows * kv_heads), tokens // LEAST_TOKENS))
    stretch = triton.cdiv(triton.cdiv(tokens, splits), TOKENS) * TOKENS
    splits = triton.cdiv(tokens, stretch)
    out = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=q.device)
    peaks, totals = (torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device) for _ in range(2))
    shown = None if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kv_attention_kernel[(rows * kv_heads, splits)](
            q.contiguous(), *keys[:4], *values[:4], shown, out, peaks, totals,
            k_packed, v_packed, tokens, stretch, heads, kv_heads, size, scaling, *k_strides, *v_strides,
            K_BITS=keys.bits, V_BITS=values.bits, K_BY_CHANNEL=k_by_channel, K_DENSE=k_dense, V_DENSE=v_dense,
            MASKED=mask is not None, HEADS=max(16, triton.next_power_of_2(heads // kv_heads)),
            SIZE=max(16, triton.next_power_of_2(size)), TILE=TOKENS, num_warps=WARPS,
        )  # fmt: skip
    share = torch.exp(peaks - peaks.amax(-1, keepdim=True)).nan_to_num(0)  # NaN: nothing is attended to
    total = (share * totals).sum(-1, keepdim=True)
    return ((share[..., None] * out).sum(2) / total.clamp_min(torch.finfo(torch.float32).tiny)).to(q.dtype)
