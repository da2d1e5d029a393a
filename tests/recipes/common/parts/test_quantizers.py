"""RTN, HQQ and GPTQ: error bounds, monotony in bits, and GPTQ against a slow loop that inverts the Hessian anew."""

import pytest
import torch

from recipes.common.parts.pruners import LayerStats
from recipes.common.parts.quantizers import GPTQ_DAMPING, gptq, hqq, rtn, strong_gptq
from zoo.errors import UserError
from zoo.kernels.packed_linear.reference import dequantize, pack_codes

BITS = [2, 3, 4, 8]


def problem(d_out=24, d_in=192, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=g) / d_in**0.5
    x = torch.randn(1024, d_in, generator=g) @ (mix + torch.eye(d_in)) * torch.rand(d_in, generator=g).add(0.1).pow(2)
    H = x.T @ x / len(x)
    return torch.randn(d_out, d_in, generator=g), LayerStats(H, H.diagonal().clone(), len(x))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 96, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rtn_is_within_half_a_step_and_falls_with_the_bits(group, symmetric, dtype):
    weight, _ = problem()
    weight[3] = weight[3].abs() + 2  # one-sided rows
    weight[4] = 0
    last = float("inf")
    for bits in BITS:
        q = rtn(weight, bits, group, symmetric, dtype)
        assert int(q.codes.max()) < 2**bits and torch.equal(q.scales, q.scales.to(dtype).float())
        assert (q.zeros is None) == symmetric
        half = q.scales.repeat_interleave(weight.shape[1] // q.scales.shape[1], 1) / 2
        slack = 1e-5 if dtype == torch.float32 else 2 ** (bits - 7)  # a rounded step ends short of the extremes
        off = (q.dequantize() - weight).abs()
        assert (off <= half * (1 + 2 * slack + (1 if not symmetric else 0)) + 1e-6).all()
        inside = off <= half * (1 + 1e-4) + 1e-6
        assert inside.float().mean() > (0.99 if dtype == torch.float32 else 0.9)
        assert (q.dequantize()[4] == 0).all()
        error = off.square().mean()
        assert error < last
        last = error
        packed = pack_codes(q.codes, bits, group)
        stored = dequantize(packed, q.scales, q.zeros, bits, group, weight.shape[1])
        assert torch.equal(stored, q.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_hqq_is_never_worse_than_its_start_in_its_own_measure(bits):
    weight, _ = problem()
    weight = weight * (1 + 5 * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.02))
    q = hqq(weight, bits, 64, False, torch.bfloat16)
    start = hqq_start(weight, bits)
    error, before = (q.dequantize() - weight).abs().mean(), (start - weight).abs().mean()
    assert error < before if bits < 8 else error <= before
    assert torch.equal(q.zeros, q.zeros.bfloat16().float())


def hqq_start(weight, bits):
    """Float zeros at the minimum of each group: where HQQ begins."""
    grouped = weight.view(len(weight), -1, 64)
    low, high = grouped.amin(-1, keepdim=True).clamp_max(0), grouped.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).bfloat16().float()
    zero = (-low / scale).bfloat16().float()
    return (((grouped / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).flatten(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 96, -1])
def test_gptq_with_uncorrelated_inputs_is_rtn(group, symmetric):
    weight, _ = problem()
    identity = LayerStats(torch.eye(192), torch.ones(192), 1)
    ours = gptq(weight, identity, 3, group, symmetric, torch.bfloat16)
    plain = rtn(weight, 3, group, symmetric, torch.bfloat16)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scales, plain.scales)


def slow_gptq(weight, H, bits, group):
    """Optimal brain quantisation in the order of columns, fp64: the inverse of what remains, computed anew each time."""
    W, d_in = weight.double().clone(), weight.shape[1]
    H = H.double() + GPTQ_DAMPING * H.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    out = torch.zeros_like(W)
    for i in range(d_in):
        if i % group == 0:
            part = W[:, i : i + group]
            low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
        out[:, i] = scale * ((W[:, i] / scale + zero).round().clamp(0, 2**bits - 1) - zero)
        inverse = torch.linalg.inv(H[i:, i:])
        W[:, i:] -= torch.outer((W[:, i] - out[:, i]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [32, 96])  # 96 crosses the chunks of 128 columns
def test_gptq_is_the_slow_loop(bits, group):
    weight, stats = problem()
    ours = gptq(weight, stats, bits, group, False, torch.float32).dequantize()
    exact = slow_gptq(weight, stats.hessian, bits, group).float()

    def loss(q):
        delta = q - weight
        return torch.sum(delta @ stats.hessian * delta).item()

    assert loss(ours) == pytest.approx(loss(exact), rel=0.01)
    assert torch.isclose(ours, exact, atol=1e-3).float().mean() > 0.95  # a code at a tie may fall to the other side
    assert loss(ours) < 0.8 * loss(rtn(weight, bits, group, False, torch.float32).dequantize())


def test_gptq_ignores_inputs_that_are_always_zero():
    weight, stats = problem()
    H = stats.hessian.clone()
    H[:, 7] = H[7, :] = 0
    q = gptq(weight, LayerStats(H, H.diagonal().clone(), stats.tokens), 4, 64, False, torch.float32)
    assert q.dequantize().isfinite().all() and q.dequantize()[:, 7].abs().max() < 1e-6


def test_a_group_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="--group-size 80: it does not divide 192 inputs"):
        rtn(torch.zeros(2, 192), 4, 80, False, torch.float32)
    with pytest.raises(UserError, match="--symmetric"):
        hqq(torch.zeros(2, 192), 4, 64, True, torch.float32)


def loss(q, weight, stats):
    delta = q.dequantize() - weight
    return torch.sum(delta @ stats.hessian * delta).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_in_the_order_of_the_inputs_keeps_the_stored_groups(group, symmetric):
    """Static groups: codes, scales and zeros are those of the format; with inputs alike it is the plain order."""
    weight, stats = problem()
    q = gptq(weight, stats, 3, group, symmetric, torch.bfloat16, act_order=True)
    plain = rtn(weight, 3, group, symmetric, torch.bfloat16)
    assert torch.equal(q.scales, plain.scales)
    assert (q.zeros is None) == symmetric and (symmetric or torch.equal(q.zeros, plain.zeros))
    stored = dequantize(pack_codes(q.codes, 3, group), q.scales, q.zeros, 3, group, weight.shape[1])
    assert torch.equal(stored, q.dequantize())
    alike = LayerStats(torch.eye(192), torch.ones(192), 1)
    assert torch.equal(gptq(weight, alike, 3, group, symmetric, torch.bfloat16, act_order=True).codes, plain.codes)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_at_full_strength_loses_less(bits):
    """Where a few inputs are much larger than the others, as in language models; the mean of five problems."""
    plain, strong = 0.0, 0.0
    for seed in range(5):
        weight, stats = problem(seed=seed)
        options = bits, 32, False, torch.float32
        plain += loss(gptq(weight, stats, *options), weight, stats)
        found = loss(strong_gptq(weight, stats, *options), weight, stats)
        both = [loss(gptq(weight, stats, *options, search=s, act_order=True), weight, stats) for s in (False, True)]
        assert found == min(both)
        strong += found
    assert strong < 0.75 * plain


def test_dead_inputs_come_last_in_the_order():
    weight, stats = problem()
    H = stats.hessian.clone()
    H[:, 7] = H[7, :] = 0
    q = gptq(weight, LayerStats(H, H.diagonal().clone(), 9), 4, 64, False, torch.float32, search=True, act_order=True)
    assert q.dequantize().isfinite().all() and q.dequantize()[:, 7].abs().max() < 1e-6
