"""Every operation gives the same numbers however its tensors lie in memory, and refuses tensors on two devices.

A new operation joins with one entry of CASES.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, relaid
from torch import Tensor

from zoo.kernels import libraries
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.armor_linear.reference import armor_linear as armor_definition
from zoo.kernels.bitmask_linear import bitmask_expand, bitmask_linear
from zoo.kernels.bitmask_linear.reference import bitmask_linear as bitmask_definition
from zoo.kernels.bitmask_linear.reference import pack_bitmask, unpack_bitmask
from zoo.kernels.block_diagonal_linear import block_diagonal_linear
from zoo.kernels.block_diagonal_linear.reference import block_diagonal_linear as block_diagonal_definition
from zoo.kernels.block_sparse_linear import block_sparse_linear
from zoo.kernels.block_sparse_linear.reference import block_sparse_linear as block_sparse_definition
from zoo.kernels.block_sparse_linear.reference import pack_blocks, unpack_blocks
from zoo.kernels.kv_attention import Part, kv_attention, quantize_channels, quantize_tokens
from zoo.kernels.kv_attention import reference as kv_reference
from zoo.kernels.packed_linear import packed_linear, packed_linears
from zoo.kernels.packed_linear.reference import pack_codes
from zoo.kernels.packed_linear.reference import packed_linear as packed_definition
from zoo.kernels.sparse_conv2d import sparse_conv2d
from zoo.kernels.sparse_conv2d.reference import sparse_conv2d as conv_definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = sorted({"portable", libraries.LEVELS[libraries.level(libraries.library("bitmask_linear"))]})
SIZES = {"rows": 3, "d_out": 36, "dtype": torch.float32}


class Case(NamedTuple):
    run: Callable  # of all tensors by name
    definition: Callable
    tensors: dict[str, Tensor]
    indexing: tuple[str, ...] = ()  # tensors that say where others are read: not any numbers will do


def numbers(*shape, dtype=torch.float32, bound=2):
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def sparse(d_out, d_in, dtype, pattern=True):
    """(values, mask, row_offsets): 2:4, alike in every row, or one that is not regular."""
    weight = numbers(d_out, d_in, dtype=dtype) + 3
    keep = torch.arange(d_in) % 4 % 3 == 1 if pattern else torch.arange(d_out * d_in).view(d_out, d_in) % 7 % 2 == 0
    return pack_bitmask(weight, keep.expand_as(weight) & True, per_row=int(keep.sum()) if pattern else None)


def bitmask(rows, d_out, dtype):
    values, mask, _ = sparse(d_out, 72, dtype)
    tensors = {"x": numbers(rows, 72, dtype=dtype), "values": values, "mask": mask, "bias": numbers(d_out, dtype=dtype)}
    return Case(bitmask_linear, bitmask_definition, tensors)


def ragged(rows, d_out, dtype):
    values, mask, row_offsets = sparse(d_out, 77, dtype, pattern=False)
    tensors = {"x": numbers(rows, 77, dtype=dtype), "values": values, "mask": mask, "bias": numbers(d_out, dtype=dtype)}
    tensors["row_offsets"] = row_offsets
    return Case(bitmask_linear, bitmask_definition, tensors, ("mask", "row_offsets"))


def expand(rows, d_out, dtype):
    values, mask, row_offsets = sparse(d_out, 77, dtype, pattern=False)
    tensors = {"values": values, "mask": mask, "row_offsets": row_offsets}
    run = lambda **t: bitmask_expand(**t, d_in=77)  # noqa: E731
    return Case(
        run, lambda values, mask, row_offsets: unpack_bitmask(values, mask, 77), tensors, ("mask", "row_offsets")
    )


def armor(rows, d_out, dtype):
    values, mask, _ = sparse(d_out, 72, dtype)
    tensors = {
        "x": numbers(rows, 72, dtype=dtype, bound=1),
        "wrap_in": torch.eye(8).roll(1, 0).repeat(9, 1, 1).to(dtype),
    }
    tensors |= {"values": values, "mask": mask, "wrap_out": torch.eye(4).roll(1, 0).repeat(d_out // 4, 1, 1).to(dtype)}
    return Case(armor_linear, armor_definition, tensors | {"bias": numbers(d_out, dtype=dtype)})


def block_diagonal(rows, d_out, dtype):
    tensors = {"x": numbers(rows, d_out, dtype=dtype), "blocks": numbers(d_out // 4, 4, 4, dtype=dtype)}
    return Case(block_diagonal_linear, block_diagonal_definition, tensors | {"bias": numbers(d_out, dtype=dtype)})


def block_sparse(rows, d_out, dtype):
    keep = torch.arange(-(-d_out // 8) * 7).view(-1, 7) % 3 > 0
    tensors = {"x": numbers(rows, 50, dtype=dtype), **pack_blocks(numbers(d_out, 50, dtype=dtype), keep, (8, 8))}
    run, definition = (lambda f: lambda **t: f(**t, d_out=d_out))(block_sparse_linear), block_sparse_definition
    tensors["bias"] = numbers(d_out, dtype=dtype)
    return Case(run, lambda **t: definition(**t, d_out=d_out), tensors, ("crow_indices", "col_indices"))


def blocks_gradient(rows, d_out, dtype):
    case = block_sparse(rows, d_out, dtype)
    tensors = {"grad": numbers(rows, d_out, dtype=dtype), "x": case.tensors["x"]}
    tensors |= {name: case.tensors[name] for name in case.indexing}

    def definition(grad, x, crow_indices, col_indices):
        whole = grad.T.float() @ x.float()
        places = torch.ones(-(-d_out // 8), 7, dtype=torch.bool)
        there = unpack_blocks(torch.ones(len(col_indices), 8, 8), crow_indices, col_indices, d_out, 50)
        everything = pack_blocks(whole * there, places, (8, 8))["blocks"].view(*places.shape, 8, 8)
        rows_of = torch.repeat_interleave(torch.arange(len(places)), crow_indices.diff())
        return everything[rows_of, col_indices.long()].to(x.dtype)

    gradient = torch.ops.slimzoo.block_sparse_linear_gradient.default
    return Case(lambda **t: gradient(*t.values(), 8, 8), definition, tensors, case.indexing)


def packed(rows, d_out, dtype):
    codes = torch.arange(d_out * 96).view(d_out, 96).mul(7).remainder(8).byte()
    tensors = {"x": numbers(rows, 96, dtype=dtype), "qweight": pack_codes(codes, 3, 32)}
    tensors |= {"scales": numbers(d_out, 3, dtype=dtype, bound=1), "zeros": numbers(d_out, 3).abs().byte()}
    tensors["bias"] = numbers(d_out, dtype=dtype)
    options = {"bits": 3, "group_size": 32}
    return Case(lambda **t: packed_linear(**t, **options), lambda **t: packed_definition(**t, **options), tensors)


def packed_together(rows, d_out, dtype):
    tensors, options = packed(rows, d_out, dtype).tensors, {"bits": 3, "group_size": 32}

    def definition(x, **weight):
        return [packed_definition(x, **weight, **options)] * 2

    return Case(lambda x, **weight: packed_linears(x, [tuple(weight.values())] * 2, **options), definition, tensors)


def convolution(rows, d_out, dtype, pattern=False):
    values, mask, row_offsets = pack_bitmask(
        numbers(d_out, 27, dtype=dtype) * (torch.arange(d_out * 27).view(d_out, 27) % 6 == 0)
    )
    tensors = {"x": numbers(rows, 3, 7, 5, dtype=dtype), "values": values, "mask": mask, "row_offsets": row_offsets}
    tensors["bias"] = numbers(d_out, dtype=dtype)
    geometry = {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    run, definition = (lambda f: lambda **t: f(**t, **geometry)), (lambda **t: conv_definition(**t, **geometry))
    return Case(run(sparse_conv2d), definition, tensors, ("mask", "row_offsets"))


def attention(rows, d_out, dtype, by_channel=False):
    """Values with two groups a head, some tokens dense; `d_out` plays no part."""
    rows = max(rows % 5, 1)
    keys, values = (numbers(rows, 2, 35, 32, dtype=dtype) / 2 + shift for shift in (0, 1))
    quantise = quantize_channels if by_channel else quantize_tokens
    k_codes, k_scale, k_minimum = quantise(keys[:, :, :32], 4, 16 if by_channel else -1)
    v_codes, v_scale, v_minimum = quantize_tokens(values[:, :, :32], 2, 16)
    tensors = {"q": numbers(rows, 6, 32, dtype=dtype), "k_codes": k_codes, "k_scale": k_scale, "k_minimum": k_minimum}
    tensors |= {"k_dense": keys[:, :, 32:].clone(), "v_codes": v_codes, "v_scale": v_scale, "v_minimum": v_minimum}
    tensors |= {"v_dense": values[:, :, 32:].clone(), "mask": torch.arange(rows * 35).view(rows, 35) % 3 > 0}

    def parts(q, k_codes, k_scale, k_minimum, k_dense, v_codes, v_scale, v_minimum, v_dense, mask):
        keys, values = Part(k_codes, k_scale, k_minimum, k_dense, 4), Part(v_codes, v_scale, v_minimum, v_dense, 2)
        return (q, keys, values), {"mask": mask, "scaling": 0.3}

    def run(function):
        def call(**tensors):
            arguments, options = parts(**tensors)
            return function(*arguments, **options)

        return call

    return Case(run(kv_attention), run(kv_reference.kv_attention), tensors)


def quantise(function, definition, group):
    def case(rows, d_out, dtype):
        tensors = {"x": numbers(rows, 2, 32, 16, dtype=dtype)}
        return Case(lambda x: function(x, 4, group), lambda x: definition(x, 4, group), tensors)

    return case


CASES = {
    "bitmask_linear, 2:4": bitmask,
    "bitmask_linear, ragged": ragged,
    "bitmask_linear, expanded": expand,
    "armor_linear": armor,
    "block_diagonal_linear": block_diagonal,
    "block_sparse_linear": block_sparse,
    "block_sparse_linear, gradient": blocks_gradient,
    "packed_linear": packed,
    "packed_linear, two at once": packed_together,
    "sparse_conv2d": convolution,
    "kv_attention, keys by token": attention,
    "kv_attention, keys by channel": lambda rows, d_out, dtype: attention(rows, d_out, dtype, by_channel=True),
    "kv_attention, codes by token": quantise(quantize_tokens, kv_reference.quantize_tokens, 8),
    "kv_attention, codes by channel": quantise(quantize_channels, kv_reference.quantize_channels, 8),
}


def same(found, wanted):
    """Equal within a rounding or two of the numbers' dtype; sums of these small integers are exact."""
    if not isinstance(found, Tensor):
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            same(ours, theirs)
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    eps = 4 * torch.finfo(found.dtype).eps if found.is_floating_point() else 0
    torch.testing.assert_close(
        found, wanted, rtol=eps, atol=eps * max(1, float(wanted.abs().max())) if found.numel() else 0
    )


def test_every_operation_is_here():
    assert {name.partition(",")[0] for name in CASES} == set(libraries.operations())


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_numbers_do_not_depend_on_how_tensors_lie_in_memory(name, data):
    draw = data.draw
    case = CASES[name](draw(st.sampled_from([0, 1, 3, 40])), 36, draw(st.sampled_from(DTYPES)))
    how = {key: draw(st.sampled_from(LAYOUTS[:-1] if key in case.indexing else LAYOUTS)) for key in case.tensors}
    tensors = {key: relaid(tensor, how[key]) for key, tensor in case.tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMZOO_SIMD", draw(st.sampled_from(LEVELS)))
        libraries.level.cache_clear()
        found = case.run(**tensors)
    libraries.level.cache_clear()
    same(found, case.definition(**{key: tensor.contiguous() for key, tensor in tensors.items()}))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", [name for name in CASES if "bias" in CASES[name](**SIZES).tensors])
def test_a_bias_may_be_a_column(name, rows, layout):
    case = CASES[name](rows, 36, torch.float32)
    bias = relaid(case.tensors["bias"], layout)
    found = case.run(**case.tensors | {"bias": bias})
    same(found, case.definition(**case.tensors | {"bias": bias.contiguous()}))


@pytest.mark.parametrize("name", CASES)
def test_shapes_on_meta_are_those_of_numbers_and_two_devices_are_refused(name):
    case = CASES[name](**SIZES)
    wanted, found = case.run(**case.tensors), case.run(**{key: t.to("meta") for key, t in case.tensors.items()})
    for ours, theirs in zip(*((out,) if isinstance(out, Tensor) else out for out in (found, wanted)), strict=True):
        assert (ours.shape, ours.dtype, ours.device.type) == (theirs.shape, theirs.dtype, "meta")
        assert ours.stride() == theirs.stride()
    for key in case.tensors if len(case.tensors) > 1 else ():
        with pytest.raises(ValueError, match="device|is on"):
            case.run(**case.tensors | {key: case.tensors[key].to("meta")})


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("name", [name for name in CASES if "linear" in name])
def test_no_outputs(name, rows):
    case = CASES[name](rows, 0, torch.float32)
    same(case.run(**case.tensors), case.definition(**case.tensors))


def test_attention_to_values_by_channel_and_to_no_tokens_goes_through_the_definition():
    q, x = numbers(2, 4, 32) / 4, numbers(2, 2, 32, 32)
    keys, values = (Part(*quantize_channels(x, 4, 16), None, 4) for _ in range(2))
    same(kv_attention(q, keys, values, scaling=0.1), kv_reference.kv_attention(q, keys, values, None, 0.1))
    nothing = Part(*(tensor[:, :, :0] for tensor in quantize_tokens(x, 4)), None, 4)
    assert torch.equal(kv_attention(q, nothing, nothing), torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match="do not fit q"):
        kv_attention(q, *(Part(None, None, None, x[:, :0], 16),) * 2)
