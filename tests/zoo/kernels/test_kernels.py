"""The C++ kernels against their definitions: every SIMD level of this machine, dtypes, shapes, edges, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import libraries
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.armor_linear.reference import armor_linear as armor_definition
from zoo.kernels.bitmask_linear import bitmask_linear
from zoo.kernels.bitmask_linear.reference import bitmask_linear as bitmask_definition
from zoo.kernels.bitmask_linear.reference import pack_bitmask, unpack_bitmask, unpack_mask
from zoo.kernels.block_diagonal_linear import block_diagonal_linear
from zoo.kernels.block_diagonal_linear.reference import block_diagonal_linear as block_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEST = libraries.library("bitmask_linear").slimzoo_level()
LEVELS = libraries.LEVELS[: BEST + 1]
ROWS = [0, 1, 3, 8, 17, 32, 33]  # none, decode, batches, more than the vectors of a pass, the last skinny one, prefill


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("SLIMZOO_SIMD", request.param)
    libraries.level.cache_clear()
    yield request.param
    libraries.level.cache_clear()


def close(ours, definition, x, dtype, terms):
    """Within the rounding of `terms` products summed in fp32 in another order, and of one rounding of the result.

    With bf16 the kernels also round what passes between ARMOR's products, which is one more rounding per term.
    """
    eps = torch.finfo(dtype).eps
    scale = definition.float().square().mean().sqrt().item() if definition.numel() else 0.0
    sums = terms**0.5 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.float(), definition.float(), atol=4 * (eps + sums) * (scale + 1e-3), rtol=4 * eps)
    assert ours.dtype == x.dtype and ours.shape == definition.shape


def keep_2_of_4(d_out, d_in, generator):
    scores = torch.rand(d_out, d_in // 4, 4, generator=generator)
    return (scores.argsort(-1).argsort(-1) < 2).view(d_out, d_in)


def example(rows, d_out, d_in, dtype, density=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=g).to(dtype)
    if density is None:
        packed = pack_bitmask(weight, keep_2_of_4(d_out, d_in, g), per_row=d_in // 2)
    else:
        keep = torch.rand(d_out, d_in, generator=g) < density
        keep[d_out // 2] = False  # a row without weights
        packed = pack_bitmask(weight, keep)
    return torch.randn(rows, d_in, generator=g).to(dtype), packed, torch.randn(d_out, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("d_out", "d_in"), [(64, 256), (33, 68), (5, 4), (130, 100)])
def test_bitmask_linear_2_of_4(level, dtype, rows, d_out, d_in):
    x, (values, mask, _), bias = example(rows, d_out, d_in, dtype)
    for b in (None, bias):
        close(bitmask_linear(x, values, mask, b), bitmask_definition(x, values, mask, b), x, dtype, d_in)


@given(
    rows=st.sampled_from(ROWS),
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(LEVELS),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_bitmask_linear_unstructured(rows, d_out, d_in, density, dtype, name, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMZOO_SIMD", name)
        libraries.level.cache_clear()
        x, (values, mask, offsets), bias = example(rows, d_out, d_in, dtype, density, seed)
        ours = bitmask_linear(x, values, mask, bias, offsets)
        close(ours, bitmask_definition(x, values, mask, bias, offsets), x, dtype, d_in)
    libraries.level.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "b"), [(1, 1), (3, 5), (4, 16), (2, 64)])
def test_block_diagonal_linear(level, dtype, rows, n, b):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n * b, generator=g).to(dtype)
    blocks = torch.randn(n, b, b, generator=g).to(dtype)
    bias = torch.randn(n * b, generator=g).to(dtype)
    close(block_diagonal_linear(x, blocks, bias), block_definition(x, blocks, bias), x, dtype, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("d_out", "d_in", "b_out", "b_in"), [(128, 192, 64, 64), (48, 96, 16, 8), (20, 36, 5, 4)])
def test_armor_linear(level, dtype, rows, d_out, d_in, b_out, b_in):
    x, (values, mask, _), bias = example(rows, d_out, d_in, dtype)
    g = torch.Generator().manual_seed(1)
    wrap_in = (torch.randn(d_in // b_in, b_in, b_in, generator=g) / b_in**0.5).to(dtype)
    wrap_out = (torch.randn(d_out // b_out, b_out, b_out, generator=g) / b_out**0.5).to(dtype)
    ours = armor_linear(x, wrap_in, values, mask, wrap_out, bias)
    definition = armor_definition(x, wrap_in, values, mask, wrap_out, bias)
    close(ours, definition, x, dtype, d_in)
    dense = torch.block_diag(*wrap_out.double()) @ unpack_bitmask(values.double(), mask, d_in)
    exact = x.double() @ (dense @ torch.block_diag(*wrap_in.double())).T + bias.double()
    close(ours, exact.to(dtype), x, dtype, d_in)


@pytest.mark.parametrize("rows", [2, 20])
def test_views_leading_dimensions_and_what_lies_around(level, rows):
    """Misaligned and strided views give the same numbers, and nothing beside the result is written."""
    _, (values, mask, _), bias = example(1, 33, 68, torch.float32)
    big = torch.randn(2 * rows, 71)
    x = big[::2, 3:]  # neither contiguous nor aligned
    shifted = torch.cat([torch.zeros(1), values.flatten()])[1:].view_as(values)  # 4 bytes off
    expected = bitmask_definition(x, values, mask, bias)
    close(bitmask_linear(x, shifted, mask, bias), expected, x, torch.float32, 68)
    close(bitmask_linear(x[0], values, mask, bias), expected[0], x, torch.float32, 68)
    close(
        bitmask_linear(x.view(2, -1, 68) if x.is_contiguous() else x[None], values, mask),
        expected[None] - bias,
        x,
        torch.float32,
        68,
    )


def test_packing_is_the_identity_and_bits_are_little_endian():
    weight = torch.tensor([[0.0, 2.0, 0, 0, 0, 0, 0, 3.0, 4.0, 0]])
    values, mask, offsets = pack_bitmask(weight)
    assert mask.tolist() == [[0b10000010, 0b1]] and values.tolist() == [2, 3, 4] and offsets.tolist() == [0, 3]
    assert torch.equal(unpack_bitmask(values, mask, 10, offsets), weight)
    assert torch.equal(unpack_mask(mask, 10), weight != 0)
    with pytest.raises(ValueError, match="every row must keep 4"):
        pack_bitmask(weight, per_row=4)


@pytest.mark.slow
def test_gradient_by_x_and_operator_contracts():
    x, (values, mask, _), bias = example(3, 16, 32, torch.float32)
    wrap_in, wrap_out = torch.randn(4, 8, 8), torch.randn(2, 8, 8)
    calls = [
        (bitmask_linear, (values, mask, bias), torch.ops.slimzoo.bitmask_linear, (values, mask, bias, None)),
        (block_diagonal_linear, (wrap_in, None), torch.ops.slimzoo.block_diagonal_linear, (wrap_in, None)),
        (armor_linear, (wrap_in, values, mask, wrap_out, bias), torch.ops.slimzoo.armor_linear, None),
    ]
    for function, weights, op, op_weights in calls:
        op_weights = op_weights or weights
        torch.library.opcheck(op.default, (x.clone().requires_grad_(), *op_weights))
        dense = function(torch.eye(32), *weights[:-1], None).T
        leaf = x.clone().requires_grad_()
        upstream = torch.randn(3, len(dense))
        function(leaf, *weights).backward(upstream)
        torch.testing.assert_close(leaf.grad, upstream @ dense, atol=1e-4, rtol=1e-4)


def test_compiles_without_a_graph_break():
    x, (values, mask, _), bias = example(3, 16, 32, torch.float32)
    wrap_in, wrap_out = torch.randn(4, 8, 8), torch.randn(2, 8, 8)

    def layers(x):
        return armor_linear(torch.relu(x), wrap_in, values, mask, wrap_out, bias) + bitmask_linear(x, values, mask)

    torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), layers(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24)}, "does not fit the mask"),
        ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "fp32, bf16 or fp16 is needed"),
        ({"values": torch.zeros(16, 16, dtype=torch.float16)}, "must be equal"),
        ({"values": torch.zeros(15, 16)}, "a row per output"),
        ({"mask": torch.zeros(16, 4, dtype=torch.int32)}, "mask must be uint8"),
        ({"bias": torch.zeros(15)}, r"bias must be \(16,\)"),
        ({"row_offsets": torch.zeros(17, dtype=torch.int64)}, "1-D values"),
    ],
)
def test_misfits_are_refused_before_any_pointer_is_taken(change, message):
    x, (values, mask, _), bias = example(2, 16, 32, torch.float32)
    arguments = {"x": x, "values": values, "mask": mask, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        bitmask_linear(**arguments)
