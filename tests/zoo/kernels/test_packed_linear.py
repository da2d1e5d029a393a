"""packed_linear against fp64 arithmetic on its own dequantised weight: bits, groups, zeros, dtypes, SIMD levels, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.errors import UserError
from zoo.kernels import libraries
from zoo.kernels.packed_linear import packed_linear
from zoo.kernels.packed_linear.reference import SECTIONS, dequantize, pack_codes, unpack_codes
from zoo.kernels.packed_linear.reference import packed_linear as definition
from zoo.layers.packed_bits import PackedBitsLinear
from zoo.layers.packing import pack_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = libraries.LEVELS[: libraries.library("bitmask_linear").slimzoo_level() + 1]
KINDS = ["none", "integer", "float"]


def weights(d_out, d_in, bits, group, kind, dtype, g):
    """(codes, (qweight, scales, zeros)) of a random weight."""
    codes = torch.randint(0, 2**bits, (d_out, d_in), dtype=torch.uint8, generator=g)
    shape = (d_out, 1 if group == -1 else d_in // group)
    scales = (torch.rand(shape, generator=g) * 0.1 + 0.01).to(dtype)
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=g)
    if kind == "float":
        zeros = (torch.rand(shape, generator=g) * (2**bits - 1)).to(dtype)
    return codes, (pack_codes(codes, bits, group), scales, None if kind == "none" else zeros)


def activations(rows, d_in, dtype, g):
    """Rows whose columns differ by orders of magnitude, as those of language models do."""
    return (torch.randn(rows, d_in, generator=g) * torch.randn(d_in, generator=g).exp()).to(dtype)


def error(y, x, W, bias):
    """Largest |y - exact| relative to sum |x| |W| + |bias|, in units of the result's precision for 16-bit floats."""
    exact = x.double() @ W.T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ W.abs().T + (0 if bias is None else bias.double().abs())
    return ((y.double() - exact).abs() / scale.clamp_min(1e-30)).max().item()


@pytest.mark.parametrize("bits", SECTIONS)
@pytest.mark.parametrize(("d_out", "d_in"), [(192, 576), (576, 1536), (7, 96), (1, 32)])
def test_packing_is_the_identity_at_exactly_b_bits(bits, d_out, d_in):
    codes = torch.randint(0, 2**bits, (d_out, d_in), dtype=torch.uint8)
    packed = pack_codes(codes, bits, 32)
    assert packed.numel() * 8 == d_out * d_in * bits
    assert torch.equal(unpack_codes(packed, bits, 32, d_in), codes)
    assert torch.equal(packed, pack_codes(codes, bits, -1))  # the group has no part in it


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", SECTIONS)
def test_every_level_is_within_the_rounding_of_its_dtype(level, bits, simd):
    simd(level)
    g = torch.Generator().manual_seed(bits)
    for d_out, d_in, group in ((5, 64, 32), (33, 576, 64), (16, 1536, 128), (7, 96, -1), (9, 384, 96)):
        for kind in KINDS:
            for dtype in DTYPES:
                _, packed = weights(d_out, d_in, bits, group, kind, dtype, g)
                W = dequantize(packed[0], packed[1].float(), packed[2], bits, group, d_in).double()
                bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
                for rows in (1, 2, 7, 17, 32, 33):
                    x = activations(rows, d_in, dtype, g)
                    bias = torch.randn(d_out, generator=g).to(dtype) if rows % 2 else None
                    y = packed_linear(x, *packed, bias, bits=bits, group_size=group)
                    assert y.dtype == dtype and y.shape == (rows, d_out)
                    assert error(y, x, W, bias) < bound


@given(
    d_out=st.integers(1, 40),
    chunks=st.integers(1, 12),
    rows=st.integers(0, 40),
    bits=st.sampled_from(list(SECTIONS)),
    kind=st.sampled_from(KINDS),
    whole=st.booleans(),
    level=st.sampled_from(LEVELS),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_any_size_of_numbers(d_out, chunks, rows, bits, kind, whole, level, scale):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMZOO_SIMD", level)
        libraries.level.cache_clear()
        g = torch.Generator().manual_seed(d_out * 100 + chunks)
        d_in, group = 32 * chunks, -1 if whole else 32
        _, packed = weights(d_out, d_in, bits, group, kind, torch.float32, g)
        x = activations(rows, d_in, torch.float32, g) * scale
        W = dequantize(*packed, bits, group, d_in).double()
        y = packed_linear(x, *packed, bits=bits, group_size=group)
        assert y.shape == (rows, d_out)
        assert not rows or error(y, x, W, None) < 1e-5 or (x.abs().max() < 1e-28 and y.abs().max() < 1e-26)
    libraries.level.cache_clear()


@pytest.mark.parametrize("level", LEVELS)
def test_eight_bit_activations_are_within_one_percent(level, simd):
    simd(level)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1024, generator=g)
    for bits in SECTIONS:
        _, packed = weights(64, 1024, bits, 64, "integer", torch.float32, g)
        W = dequantize(*packed, bits, 64, 1024)
        exact, rough = x @ W.T, packed_linear(x, *packed, bits=bits, group_size=64, int8=True)
        off = (rough - exact).norm() / exact.norm()
        assert 1e-5 < off < 1e-2  # it is rounded, and not by more


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_spread_as_in_a_dense_layer(value):
    g = torch.Generator().manual_seed(0)
    _, packed = weights(8, 64, 4, 32, "integer", torch.float32, g)
    x = torch.ones(3, 64)
    x[1, 5] = value
    y = packed_linear(x, *packed, bits=4, group_size=32)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.slow
def test_gradient_compile_and_operator_contracts():
    g = torch.Generator().manual_seed(0)
    _, packed = weights(16, 64, 3, 32, "integer", torch.float32, g)
    x, bias = torch.randn(3, 64, generator=g), torch.randn(16, generator=g)
    op = torch.ops.slimzoo.packed_linear.default
    torch.library.opcheck(op, (x.clone().requires_grad_(), *packed, bias, 3, 32, False))
    leaf, upstream = x.clone().requires_grad_(), torch.randn(3, 16, generator=g)
    packed_linear(leaf, *packed, bias, bits=3, group_size=32).backward(upstream)
    W = dequantize(*packed, 3, 32, 64)
    torch.testing.assert_close(leaf.grad, upstream @ W, atol=1e-5, rtol=1e-5)

    def layer(x):
        return packed_linear(torch.relu(x), *packed, bias, bits=3, group_size=32)

    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(layer(x), definition(torch.relu(x), *packed, bias, bits=3, group_size=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "one of 1, 2, 3, 4, 5, 6, 8"),
        ({"group_size": 48}, "multiple of 32"),
        ({"x": torch.zeros(2, 48)}, "multiple of 32"),
        ({"x": torch.zeros(2, 96)}, "does not fit|multiple of 32"),
        ({"scales": torch.zeros(8, 3)}, r"scales must be \(8, 2\)"),
        ({"zeros": torch.zeros(8, 1, dtype=torch.uint8)}, r"zeros must be \(8, 2\)"),
        ({"zeros": torch.zeros(8, 2, dtype=torch.float16)}, "must be equal"),
        ({"qweight": torch.zeros(8, 32)}, "uint8"),
        ({"bias": torch.zeros(7)}, r"bias must be \(8,\)"),
    ],
)
def test_misfits_are_refused_before_any_pointer_is_taken(change, message):
    _, (qweight, scales, zeros) = weights(8, 64, 4, 32, "integer", torch.float32, torch.Generator())
    given = {"x": torch.zeros(2, 64), "qweight": qweight, "scales": scales, "zeros": zeros, "bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match=message):
        packed_linear(**(given | change))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_packs_loads_and_validates(kind):
    g = torch.Generator().manual_seed(0)
    _, (qweight, scales, zeros) = weights(24, 64, 3, 32, kind, torch.bfloat16, g)
    model = nn.Sequential(nn.Linear(64, 24, dtype=torch.bfloat16))
    pack_layers(model, {"0": {"format": "packed", "bits": 3, "group_size": 32, "zeros": kind}})
    layer = model[0]
    assert isinstance(layer, PackedBitsLinear) and layer.dtype == torch.bfloat16 and layer.bias is not None
    state = {"0.qweight": qweight, "0.scales": scales, "0.bias": torch.randn(24, generator=g).bfloat16()}
    model.load_state_dict(state | ({} if zeros is None else {"0.zeros": zeros}))
    layer.validate("0")
    x = torch.randn(2, 5, 64, generator=g).bfloat16()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias), atol=0.05, rtol=0.02
    )
    layer.scales[3, 1] = float("nan")
    with pytest.raises(UserError, match=r"0\.scales holds NaN"):
        layer.validate("0")
    if kind == "integer":
        layer.scales[3, 1] = 1
        layer.zeros[0, 0] = 8
        with pytest.raises(UserError, match="no code of 3 bits"):
            layer.validate("0")


@pytest.mark.parametrize(
    "spec", [{"bits": 7}, {"group_size": 48}, {"zeros": "some"}, {"bits": None}, {"group_size": 0}], ids=str
)
def test_impossible_formats_name_the_module(spec):
    model = nn.Sequential(nn.Linear(64, 24))
    with pytest.raises(UserError, match="^0: "):
        pack_layers(model, {"0": {"format": "packed", "bits": 4, "group_size": 32, "zeros": "none"} | spec})
