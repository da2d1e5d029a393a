"""kv_attention and the quantiser of keys and values against their definitions, and the definitions against arithmetic."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import libraries
from zoo.kernels.kv_attention import kv_attention, quantize_channels, quantize_tokens
from zoo.kernels.kv_attention import reference as definition
from zoo.kernels.kv_attention.reference import Part, dequantize, dequantize_channels, dequantize_tokens, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = libraries.LEVELS[: libraries.library("bitmask_linear").slimzoo_level() + 1]
WIDTHS = definition.WIDTHS


def numbers(*shape, dtype=torch.float32, seed=0):
    """Channels that differ by orders of magnitude and have offsets, as keys do."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[-1], generator=g).exp()
    return (torch.randn(*shape, generator=g) * spread + 2 * torch.randn(shape[-1], generator=g)).to(dtype)


def part(x, bits, group, packed, by_channel=False, spare=3):
    """The first `packed` tokens of x quantised, in buffers with spare capacity, the others dense."""
    dense = x[:, :, packed:] if packed < x.shape[2] else None
    if not packed:
        return Part(None, None, None, x, bits)
    tensors = (quantize_channels if by_channel else quantize_tokens)(x[:, :, :packed], bits, group)
    held = []
    for tensor in tensors:
        buffer = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + spare, *tensor.shape[3:]), 77)
        buffer[:, :, : tensor.shape[2]] = tensor
        held.append(buffer[:, :, : tensor.shape[2]])
    return Part(*held, dense, bits)


# ---------------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_codes_take_exactly_their_bits(bits, size, tokens):
    x = numbers(2, 3, tokens, size)
    codes, scale, minimum = quantize_tokens(x, bits)
    assert codes.nbytes == 2 * 3 * tokens * size * bits // 8 and scale.nbytes + minimum.nbytes == 2 * 3 * tokens * 4
    assert codes.dtype == torch.uint8
    grouped = quantize_tokens(x, bits, 16)
    assert grouped[1].nbytes + grouped[2].nbytes == 2 * 3 * tokens * 4 * size // 16
    full = tokens // 32 * 32
    if full:
        codes, scale, minimum = quantize_channels(x[:, :, :full], bits, 32)
        assert codes.nbytes == 2 * 3 * full * size * bits // 8
        assert scale.nbytes + minimum.nbytes == 2 * 3 * (full // 32) * size * 4
    any_codes = torch.randint(0, 2**bits, (32, size), dtype=torch.uint8)
    for dim in (0, 1):
        assert torch.equal(unpack(definition.pack(any_codes, bits, dim), bits, dim), any_codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_is_half_a_step_and_extremes_are_the_outer_codes(bits):
    x = numbers(2, 2, 64, 128, seed=bits)
    for grouped, quantised, back in (
        (x.unflatten(-1, (-1, 32)), quantize_tokens(x, bits, 32), dequantize_tokens),
        (x.unflatten(2, (-1, 32)).transpose(3, 4), quantize_channels(x, bits, 32), dequantize_channels),
    ):
        codes, scale, minimum = quantised
        low, high = grouped.aminmax(dim=-1)
        exact = (high - low) / (2**bits - 1)
        rounding = low.abs() * 2.0**-11 + (2**bits - 1) * exact * 2.0**-11
        error = (back(codes, scale, minimum, bits) - x).abs()
        error = (
            error.unflatten(-1, (-1, 32)) if back is dequantize_tokens else error.unflatten(2, (-1, 32)).transpose(3, 4)
        )
        assert (error <= (exact / 2 * (1 + 2.0**-10) + rounding)[..., None]).all()
        assert codes.dtype == torch.uint8
    plain = torch.rand(1, 1, 40, 64, generator=torch.Generator().manual_seed(1)) - 0.5
    codes = unpack(quantize_tokens(plain, bits)[0], bits, -1)
    at_low, at_high = plain.argmin(-1, keepdim=True), plain.argmax(-1, keepdim=True)
    assert (codes.gather(-1, at_low) == 0).all() and (codes.gather(-1, at_high) == 2**bits - 1).all()


def test_two_bits_by_token_keep_the_zero_point_that_loses_less():
    """Values crowd around 0, which a grid from the smallest to the largest of a group need not hold."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 64, 64, generator=g) * torch.rand(64, generator=g).square()
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 3).half().float()
    grids = {"smallest": low.half().float(), "with zero": ((low.half().float() / scale).round() * scale).half().float()}
    backs = {name: ((x - m) / scale).round().clamp(0, 3) * scale + m for name, m in grids.items()}
    errors = {name: (back - x).square().sum(-1) for name, back in backs.items()}
    found = (dequantize_tokens(*quantize_tokens(x, 2), 2) - x).square().sum(-1)
    assert torch.allclose(found, torch.minimum(errors["smallest"], errors["with zero"]), rtol=1e-3)
    assert found.mean() < 0.85 * errors["smallest"].mean()
    minimum = quantize_tokens(x, 4)[2].squeeze(-1)
    assert torch.equal(minimum.float(), low.squeeze(-1).half().float()), "at 4 bits it is the smallest number"
    keys = quantize_channels(x, 2, 32)[2]
    assert torch.equal(keys, x.unflatten(2, (-1, 32)).amin(3).half()), "and by channel too"


def test_constant_groups_are_exact_and_nothing_overflows():
    x = torch.full((1, 1, 32, 64), -1.5)
    assert torch.equal(dequantize_tokens(*quantize_tokens(x, 2), 2), x)
    assert torch.equal(dequantize_channels(*quantize_channels(x, 4, 32), 4), x)
    huge = torch.tensor([[[[1e6, -1e6] * 32]]])
    assert all(torch.isfinite(tensor).all() for tensor in quantize_tokens(huge, 8)[1:])
    tiny = torch.rand(1, 1, 32, 64) * 1e-9
    assert (dequantize_tokens(*quantize_tokens(tiny, 4), 4) - tiny).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_quantiser_gives_the_codes_of_the_definition(dtype, bits):
    for size, tokens in itertools.product((64, 80, 96, 128), (1, 33, 96)):
        x = numbers(2, 3, tokens, size, dtype=dtype, seed=tokens)
        for group in (-1, 16):
            found, wanted = quantize_tokens(x, bits, group), definition.quantize_tokens(x, bits, group)
            assert all(map(torch.equal, found, wanted))
        full = x[:, :, : tokens // 32 * 32]
        if full.numel():
            assert all(
                map(torch.equal, quantize_channels(full, bits, 32), definition.quantize_channels(full, bits, 32))
            )


# ------------------------------------------------------------------------------------------------------------ attention


def exact(q, keys, values, mask, scaling):
    """Attention in fp64 over the dequantised parts, written as a loop over heads."""
    k, v = dequantize(keys).double(), dequantize(values).double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        scores = scaling * (k[b, h // group] @ q[b, h].double())
        if mask is not None:
            scores[~mask[b]] = -math.inf
        out[b, h] = scores.softmax(-1) @ v[b, h // group]
    return out


def check(q, keys, values, mask, scaling=None):
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    wanted = exact(q, keys, values, mask, scaling)
    found = kv_attention(q, keys, values, mask=mask, scaling=scaling)
    assert found.dtype == q.dtype and found.shape == q.shape
    k, size = dequantize(keys).double(), dequantize(values).double().abs().amax()
    reach = scaling * q.double().abs().amax() * k.abs().sum(-1).amax()  # what an error of q's last bit moves scores by
    allowed = (2.0**-21 if q.dtype == torch.float32 else 2.0**-14) * (1 + reach) * size
    if q.dtype != torch.float32:  # and the result is rounded
        allowed = allowed + wanted.abs() * torch.finfo(q.dtype).eps
    assert ((found.double() - wanted).abs() <= allowed).all(), (found.double() - wanted).abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_bits", "v_bits"), [*itertools.product(WIDTHS, WIDTHS), (16, 4), (8, 16)])
def test_every_pair_both_modes_all_head_ratios(level, dtype, k_bits, v_bits, simd):
    simd(level)
    for (size, ratio), tokens in itertools.product(((64, 3), (128, 4), (96, 1), (80, 8)), (1, 33, 150)):
        seed = size + tokens
        k, v = (numbers(2, 2, tokens, size, dtype=dtype, seed=seed + i) for i in (1, 2))
        q = torch.randn(2, 2 * ratio, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        left_padded = torch.arange(tokens) >= torch.tensor([[0], [min(5, tokens - 1)]])
        k_packed, v_packed = (tokens if bits < 16 else 0 for bits in (k_bits, v_bits))
        check(q, part(k, k_bits, -1, k_packed), part(v, v_bits, -1, v_packed), left_padded if tokens > 1 else None)
        blocks = tokens // 32 * 32
        for group in (32, 16) if size != 80 else (16,):
            keys = part(k, k_bits, 32, blocks if k_bits < 16 else 0, by_channel=True)
            check(q, keys, part(v, v_bits, group, blocks if v_bits < 16 else 0), None)


@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    ratio=st.sampled_from([1, 2, 5, 7, 9]),
    size=st.sampled_from([8, 16, 40, 72, 112, 256]),
    tokens=st.integers(1, 300),
    bits=st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)),
    block=st.sampled_from([0, 8, 24, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(rows, heads, ratio, size, tokens, bits, block, dtype, masked):
    k, v = (numbers(rows, heads, tokens, size, dtype=dtype, seed=i) for i in (tokens, size))
    g = torch.Generator().manual_seed(tokens)
    q = torch.randn(rows, heads * ratio, size, generator=g).to(dtype)
    mask = torch.rand(rows, tokens, generator=g) < 0.5 if masked else None
    if masked:
        mask[:, torch.randint(tokens, (1,), generator=g)] = True
    packed = tokens // block * block if block else tokens
    check(
        q, part(k, bits[0], block or -1, packed, by_channel=bool(block)), part(v, bits[1], 8, packed), mask, scaling=0.2
    )


def test_long_contexts_are_split_and_merged():
    """More tokens than one stretch: the weight sits at the very start, in the middle, or at the end."""
    for place in (0, 2500, 4999):
        k, v = numbers(1, 1, 5000, 64, seed=1), numbers(1, 1, 5000, 64, seed=2)
        q = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3))
        k[0, 0, place] = 20 * q[0, 0]
        check(q, part(k, 8, -1, 5000), part(v, 4, -1, 5000), None)


def test_a_row_that_attends_to_nothing_gives_zeros():
    x = numbers(2, 1, 40, 64)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    found = kv_attention(torch.randn(2, 2, 64), part(x, 4, -1, 40), part(x, 4, -1, 40), mask=mask)
    assert (found[1] == 0).all() and (found[0] != 0).any()


def test_the_number_of_threads_only_moves_roundings():
    x, q = numbers(1, 2, 3000, 64), torch.randn(1, 4, 64)
    keys, values = part(x, 4, -1, 3000), part(x, 2, -1, 3000)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(kv_attention(q, keys, values))
    torch.set_num_threads(threads)
    torch.testing.assert_close(*found, atol=3e-5, rtol=1e-4)


def test_opcheck():
    x, q = numbers(1, 2, 40, 64), torch.randn(1, 4, 64)
    arguments = (q, *part(x, 4, 32, 32, by_channel=True), *part(x, 8, 32, 32), None, 0.1)
    torch.library.opcheck(torch.ops.slimzoo.kv_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 4, 64, dtype=torch.float64)}, "fp32, bf16 or fp16"),
        ({"q": torch.randn(4, 64)}, r"\(B, H, D\) is needed"),
        ({"q": torch.randn(1, 3, 64)}, "do not fit q"),
        ({"q": torch.randn(1, 4, 32)}, "need codes"),
        ({"q": torch.randn(1, 4, 64).bfloat16()}, "dense keys"),
        ({"mask": torch.ones(1, 39, dtype=torch.bool)}, r"mask must be bool \(1, 40\)"),
        ({"mask": torch.ones(1, 40)}, "mask must be bool"),
        ({"keys": Part(None, None, None, None, 4)}, "keys have no tokens"),
        ({"values": part(numbers(1, 2, 41, 64), 8, 32, 32)}, "40 tokens of keys and 41 of values"),
        ({"values": part(numbers(1, 2, 40, 64), 8, 32, 32)._replace(bits=3)}, "3 bits"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x = numbers(1, 2, 40, 64)
    given_ = {"q": torch.randn(1, 4, 64), "keys": part(x, 4, 32, 32, by_channel=True), "values": part(x, 8, 32, 32)}
    given_ |= {"mask": None} | change
    with pytest.raises(ValueError, match=message):
        kv_attention(given_["q"], given_["keys"], given_["values"], mask=given_["mask"])


@pytest.mark.parametrize(
    ("quantise", "shape", "bits", "group", "message"),
    [
        (quantize_tokens, (1, 1, 4, 64), 3, -1, "3 bits: one of 2, 4, 8"),
        (quantize_tokens, (1, 1, 4, 64), 4, 24, "a multiple of 24"),
        (quantize_tokens, (1, 1, 4, 6), 2, -1, "head size 6"),
        (quantize_channels, (1, 1, 33, 64), 4, 32, "33 tokens: whole blocks of 32"),
    ],
)
def test_what_cannot_be_quantised_is_refused(quantise, shape, bits, group, message):
    with pytest.raises(ValueError, match=message):
        quantise(torch.randn(shape), bits, group)
