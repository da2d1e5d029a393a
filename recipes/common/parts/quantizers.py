"""Quantisers of one weight matrix: round-to-nearest, HQQ, GPTQ and AWQ, to codes of b bits.

w ~ scale (code - zero), a scale and a zero for each group of g inputs of an output row. Scales, and zeros that are not
integers, are rounded to the dtype that the checkpoint stores *before* codes are computed, so storing loses nothing.
Sources: RTN as in Quanto; HQQ: Badri and Shaji 2023; GPTQ: arXiv 2210.17323; AWQ: arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.common.parts.pruners import LayerStats, inverse_cholesky, sanitize
from zoo.errors import UserError

HQQ_P, HQQ_BETA, HQQ_KAPPA, HQQ_STEPS = 0.7, 10.0, 1.01, 20
GPTQ_CHUNK = 128  # columns whose updates are applied to the rest at once
GPTQ_DAMPING = 0.05  # of the mean diagonal of H
SEARCH = tuple(1 - step / 100 for step in range(80))  # shares of a group's range that RTN's search tries
SEARCH_POWER = 2.4
AWQ_GRID = 20
CLIPS = tuple(1 - step / 20 for step in range(11))  # the same of AWQ's search, and of GPTQ's by the output's error
GPTQ_TOKENS = 20  # calibration tokens per input feature below which GPTQ may lose to rounding


@dataclass
class Quantized:
    """codes uint8 (d_out, d_in) below 2^bits; scales fp32 (d_out, d_in / g), values of the stored dtype; zeros like the
    scales, uint8 or fp32, or None for 2^(bits - 1)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    def dequantize(self) -> Tensor:
        """(d_out, d_in) fp32."""
        zero = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros.float().unsqueeze(-1)
        codes = self.codes.float().view(*self.scales.shape, -1)
        return (self.scales.unsqueeze(-1) * (codes - zero)).flatten(1)


def groups_of(weight: Tensor, group_size: int) -> Tensor:
    """weight (d_out, d_in) -> (d_out, d_in / g, g), a view; -1 is the whole row."""
    d_in = weight.shape[1]
    group = d_in if group_size == -1 else group_size
    if group < 1 or d_in % group:
        raise UserError(f"--group-size {group_size}: it does not divide {d_in} inputs; 32, 64, 96, 128 or -1 may.")
    return weight.view(len(weight), -1, group)


def min_max(
    grouped: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, shrink: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) (…,) of groups (…, g) whose range reaches from the smallest to the largest weight and holds 0.

    Asymmetric: zero is an integer code, uint8. Symmetric: zero is 2^(bits - 1) and the largest magnitude the last code.
    Of a group of equal weights the scale is their magnitude, which is then a code away from 0 and loses nothing.
    """
    top = 2**bits - 1
    low, high = shrink * grouped.amin(-1).clamp_max(0), shrink * grouped.amax(-1).clamp_min(0)
    scale = (high - low) / top
    if symmetric:
        scale = torch.maximum(-low / 2 ** (bits - 1), high / max(2 ** (bits - 1) - 1, 1))
    scale = torch.where(grouped.amin(-1) == grouped.amax(-1), high - low, scale).to(dtype).float()
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
    if symmetric:
        return scale, None
    return scale, (-low / scale).round().clamp(0, top).to(torch.uint8)


def search_range(
    grouped: Tensor,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    weights: Tensor | float = 1.0,
    power: float = SEARCH_POWER,
    shrinks: tuple[float, ...] = SEARCH,
) -> tuple[Tensor, Tensor | None]:
    """Like `min_max`, with each group's range shrunk by the factor of the least sum of weights |w - w_hat|^power."""
    scale, zero = min_max(grouped, bits, symmetric, dtype)
    best = torch.full_like(scale, torch.inf)
    for shrink in shrinks:
        new_scale, new_zero = min_max(grouped, bits, symmetric, dtype, shrink)
        z = 2.0 ** (bits - 1) if new_zero is None else new_zero.float().unsqueeze(-1)
        w_hat = new_scale.unsqueeze(-1) * (to_codes(grouped, new_scale, z, bits).float() - z)
        error = (weights * (grouped - w_hat).abs_() ** power).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, new_scale, scale)
        zero = None if zero is None else torch.where(better, new_zero, zero)
    return scale, zero


def to_codes(grouped: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """The nearest codes, uint8, of groups (…, g); zero (…,) or (…, 1) or a number."""
    if isinstance(zero, Tensor) and zero.ndim < grouped.ndim:
        zero = zero.float().unsqueeze(-1)
    return (grouped / scale.unsqueeze(-1) + zero).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def rtn(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, search: bool = False
) -> Quantized:
    """Round to nearest between the extremes of each group, or in a searched range. weight (d_out, d_in) fp32."""
    grouped = groups_of(weight, group_size)
    scale, zero = (search_range if search else min_max)(grouped, bits, symmetric, dtype)
    codes = to_codes(grouped, scale, 2.0 ** (bits - 1) if zero is None else zero, bits)
    return Quantized(codes.flatten(1), scale, zero, bits)


def hqq(weight: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> Quantized:
    """Half-quadratic quantisation: zeros, not integers, that minimise sum |w - w_hat|^p, p = 0.7; data-free.

    Alternates e = shrink(w - w_hat) and z = mean(code - (w - e) / scale). Of the zeros seen the best is kept, by
    mean |w - w_hat|; the weights are measured in their standard deviation, which the fixed beta assumes.
    """
    if symmetric:
        raise UserError("--backend hqq finds zeros, which --symmetric has not; use one of the two.")
    grouped = groups_of(weight, group_size)
    deviation = weight.std().clamp_min(1e-12)
    scale, _ = min_max(grouped, bits, False, dtype)
    normal, step = grouped / deviation, (scale / deviation).unsqueeze(-1)
    zero = (-grouped.amin(-1).clamp_max(0) / scale).to(dtype).float()
    beta, best, best_error = HQQ_BETA, None, None
    for _ in range(HQQ_STEPS):
        codes = to_codes(grouped, scale, zero, bits).float()
        residual = normal - step * (codes - zero.unsqueeze(-1))
        error = residual.abs().mean(-1)
        if best is None:
            best, best_error = zero, error
        better = error < best_error
        best, best_error = torch.where(better, zero, best), torch.where(better, error, best_error)
        magnitude = residual.abs()
        e = residual.sign() * (magnitude - magnitude.clamp_min(1e-8) ** (HQQ_P - 1) / beta).clamp_min(0)
        zero = (codes - (normal - e) / step).mean(-1).to(dtype).float()
        beta *= HQQ_KAPPA
    return Quantized(to_codes(grouped, scale, best, bits).flatten(1), scale, best, bits)


def gptq(
    weight: Tensor,
    stats: LayerStats,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    search: bool = False,
    act_order: bool = False,
) -> Quantized:
    """GPTQ: column by column, each error moved onto the columns that follow by the inverse of H = mean x x^T.

    e = (w - q) / U_ii and w[:, j:] -= e U[i, j:], U the upper Cholesky factor of (H + damping)^-1. A group's scale is
    computed when its first column is reached, from the weights as updated until then. act_order: the inputs of largest
    second moment come first; groups stay those of the stored order, so their scales are computed beforehand, from the
    weights as they were ("static groups"). search: ranges by `search_range`, squares weighted by the second moments.
    Inputs that are always 0 have weight 0. With H = I it equals round-to-nearest.
    Raises: UserError when H has no factor even with heavy damping.
    """
    d_out, d_in = weight.shape
    group = d_in if group_size == -1 else group_size
    moment = stats.hessian.diagonal()
    dead = moment == 0
    weight = torch.where(dead, 0.0, weight)
    order = moment.argsort(descending=True, stable=True) if act_order else torch.arange(d_in)
    H = stats.hessian[order][:, order]
    H.diagonal()[dead[order]] = 1
    U = inverse_cholesky(H, GPTQ_DAMPING)
    columns = weight.T[order]  # (d_in, d_out): a column of W is a contiguous row here, in the order of work
    codes = torch.empty(d_in, d_out, dtype=torch.uint8)
    scales = torch.empty(d_out, d_in // group)
    zeros = torch.empty(d_out, d_in // group, dtype=torch.uint8)

    def set_range(grouped: Tensor, groups: slice) -> None:
        """The scales of some groups (d_out, groups, g)."""
        options = bits, symmetric, dtype
        if search:
            importance = moment.clamp_min(1e-30).view(-1, group)[groups]
            scale, zero = search_range(grouped, *options, importance, 2.0, CLIPS)
        else:
            scale, zero = min_max(grouped, *options)
        scales[:, groups], zeros[:, groups] = scale, 2 ** (bits - 1) if zero is None else zero

    grouped = groups_of(weight, group_size)
    if act_order:
        set_range(grouped, slice(None))
    for start in range(0, d_in, GPTQ_CHUNK):
        end = min(start + GPTQ_CHUNK, d_in)
        errors = torch.zeros(end - start, d_out)
        for i in range(start, end):
            place = order[i].item() // group
            if not act_order and i % group == 0:
                # a group that reaches beyond this chunk sees the updates that its later columns still miss
                seen = columns[i : i + group].clone()
                if i + group > end:
                    seen[end - i :] -= U[start:i, end : i + group].T @ errors[: i - start]
                set_range(seen.T[:, None], slice(place, place + 1))
            scale, zero = scales[:, place], zeros[:, place].float()
            w = columns[i]
            code = (w / scale + zero).round().clamp(0, 2**bits - 1)
            codes[order[i]] = code.to(torch.uint8)
            error = (w - scale * (code - zero)) / U[i, i]
            columns[i + 1 : end].addr_(U[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        columns[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return Quantized(codes.T.contiguous(), scales, None if symmetric else zeros, bits)


def strong_gptq(
    weight: Tensor, stats: LayerStats, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> Quantized:
    """GPTQ with act-order, its ranges searched or from the extremes, whichever loses less of the output: a searched range
    leaves no room for the errors that columns take over, which tells at 4 bits and more.
    """
    options = weight, stats, bits, group_size, symmetric, dtype
    found = (gptq(*options, search=search, act_order=True) for search in (False, True))
    return min(found, key=lambda q: output_loss(q.dequantize() - weight, stats))


def awq_scales(
    weights: list[Tensor],
    stats: LayerStats,
    d: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    to_inputs: Callable[[Tensor], Tensor] = lambda s: s,
) -> Tensor:
    """AWQ: scales s for the linears of one input, by the errors tr((W_hat - W) H (W_hat - W)^T) of their outputs together.

    W_hat = Q(W diag(s)) diag(1/s) with s = d^(alpha / 2), alpha of a grid on 0..1; d is the mean of x^2.
    weights: (d_out, d_in) fp32 each. d, and the result: (d_in,), or fewer channels that to_inputs spreads over d_in.
    """

    def error(s: Tensor) -> float:
        s = to_inputs(s)
        return sum(
            output_loss(rtn(weight * s, bits, group_size, symmetric, dtype).dequantize() / s - weight, stats)
            for weight in weights
        )

    d = sanitize(d)
    powers = (d ** (step / (AWQ_GRID - 1) / 2) for step in range(AWQ_GRID))
    return min((s / (s.max() * s.min()).sqrt() for s in powers), key=error)


def awq(
    weight: Tensor,
    stats: LayerStats,
    columns: Tensor,
    rows: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> Quantized:
    """Round-to-nearest of diag(1/rows) W diag(columns), as `folding.py` stores it: W (d_out, d_in) fp32.

    Each group's range is clipped to x1 … x0.5 by its part of the error of the output, as far as the diagonal of H shows
    it; if the whole error is larger then, no group's is.
    """
    scaled = weight * columns / rows[:, None]
    plain = rtn(scaled, bits, group_size, symmetric, dtype)
    grouped = groups_of(scaled, group_size)
    importance = groups_of((sanitize(stats.second_moment) / columns.square())[None], group_size)
    scale, zero = search_range(grouped, bits, symmetric, dtype, importance, 2.0, CLIPS)
    codes = to_codes(grouped, scale, 2.0 ** (bits - 1) if zero is None else zero, bits)
    clipped = Quantized(codes.flatten(1), scale, zero, bits)
    return min((plain, clipped), key=lambda q: output_loss(q.dequantize() * rows[:, None] / columns - weight, stats))


def output_loss(delta: Tensor, stats: LayerStats) -> float:
    """tr(delta H delta^T): the mean squared error of a linear's output whose weight is off by delta (d_out, d_in)."""
    return torch.sum(delta @ stats.hessian * delta).item()
