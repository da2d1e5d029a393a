"""Packed convolutions and seed-coded layers: they compute with the weight they store, and refuse what cannot be."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.errors import UserError
from zoo.kernels.bitmask_linear import bitmask_expand
from zoo.kernels.bitmask_linear.reference import pack_bitmask, unpack_mask
from zoo.layers.bitmask import BitmaskConv2d
from zoo.layers.packing import FORMATS, pack_layers
from zoo.layers.seeded_bitmask import SeededBitmaskConv2d, SeededBitmaskLinear, seeded_bitmask
from zoo.random_mask import GENERATOR, bernoulli_count, digest, keys, random_mask

SHAPES = {  # of nn.Conv2d, and the image that it is given
    "3x3": ((5, 7, 3), {"padding": 1}, (2, 5, 9, 8)),
    "strided 1x1": ((6, 4, 1), {"stride": 2}, (1, 6, 7, 7)),
    "grouped, dilated": ((8, 6, 3), {"groups": 2, "dilation": 2, "padding": (2, 1), "stride": (1, 3)}, (3, 8, 11, 13)),
    "depth-wise": ((4, 4, 5), {"groups": 4, "padding": "same"}, (2, 4, 6, 6)),
    "7x7": ((3, 9, 7), {"stride": 2, "padding": 3}, (2, 3, 15, 15)),
}


def example(kind: str, shape: str, bias: bool = True, density: float = 0.3):
    """A packed convolution with random contents, and the dense one it stands for, whose second filter is empty."""
    torch.manual_seed(0)
    sizes, geometry, _ = SHAPES[shape]
    dense = nn.Conv2d(*sizes, bias=bias, **geometry)
    rows, columns = dense.weight.flatten(1).shape
    holder = nn.ModuleDict({"conv": nn.Conv2d(*sizes, bias=bias, **geometry)})
    if kind == "bitmask":
        keep = torch.rand(rows, columns) < density
        keep[1] = False
        spec = {"format": "bitmask", "nnz": int(keep.sum())}
    else:
        spec = seeded_spec(rows, columns, round(density * rows * columns))
        keep = unpack_mask(seeded_bitmask(rows, columns, 5, 2, spec["nnz"])[0], columns)
    dense.weight.data *= keep.view(dense.weight.shape)
    pack_layers(holder, {"conv": spec})
    values, mask, row_offsets = pack_bitmask(dense.weight.data.flatten(1), keep)
    tensors = {"values": values}
    tensors |= {"mask": mask, "row_offsets": row_offsets} if kind == "bitmask" else {}
    tensors |= {"bias": dense.bias.data} if bias else {}
    holder["conv"].load_state_dict(tensors)
    holder["conv"].validate("example")
    return holder["conv"], dense


def seeded_spec(rows: int, columns: int, nnz: int, seed: int = 5, layer: int = 2) -> dict:
    sha256 = digest(seeded_bitmask(rows, columns, seed, layer, nnz)[0])
    return {
        "format": "seeded_bitmask",
        "nnz": nnz,
        "seed": seed,
        "layer": layer,
        "generator": GENERATOR,
        "sha256": sha256,
    }


# ---------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("kind", ["bitmask", "seeded_bitmask"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_the_dense_convolution(kind, shape, bias):
    layer, dense = example(kind, shape, bias)
    x = torch.randn(SHAPES[shape][2])
    assert isinstance(layer, nn.Conv2d)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert torch.equal(layer.weight.detach().clone(), dense.weight)
    assert layer.weight.shape == dense.weight.shape


@pytest.mark.parametrize("kind", ["bitmask", "seeded_bitmask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_weight_and_masks_keep_their_type(kind, dtype):
    layer, dense = example(kind, "grouped, dilated")
    layer.to(dtype)
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert types.pop("mask", torch.uint8) == torch.uint8
    assert types.pop("row_offsets", torch.int64) == torch.int64
    assert set(types.values()) == {dtype} == {layer.dtype}
    x = torch.randn(SHAPES["grouped, dilated"][2])
    y = layer(x.to(dtype))
    assert y.dtype == dtype and torch.equal(layer(x), y)
    torch.testing.assert_close(y.float(), dense(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["bitmask", "seeded_bitmask"])
def test_autocast_changes_nothing(kind):
    layer, _ = example(kind, "3x3")
    x = torch.randn(SHAPES["3x3"][2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.forward(x))
        found = layer(x)
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("kind", ["bitmask", "seeded_bitmask"])
def test_gradient_reaches_the_image_and_only_it(kind):
    layer, dense = example(kind, "grouped, dilated")
    images = [torch.randn(SHAPES["grouped, dilated"][2]).requires_grad_() for _ in range(2)]
    images[1].data.copy_(images[0].data)
    for module, x in zip((layer, dense), images, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad)
    assert images[0].grad.abs().sum() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())


def test_compiles_without_graph_break():
    layer, dense = example("seeded_bitmask", "3x3")
    x = torch.randn(SHAPES["3x3"][2])
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), dense(x))


def test_a_layer_made_by_pack_layers_is_a_valid_zero_convolution():
    model = nn.ModuleDict({"a": nn.Conv2d(4, 6, 3, groups=2), "b": nn.Conv2d(3, 5, 1), "fc": nn.Linear(9, 4)})
    specs = {"a": {"format": "bitmask", "nnz": 7}, "b": seeded_spec(5, 3, 15), "fc": seeded_spec(4, 9, 10)}
    pack_layers(model, specs)
    for name in specs:
        model[name].validate(name)
        assert not model[name].dense_weight().any()
    assert model["fc"](torch.ones(2, 9)).tolist() == [[0.0] * 4] * 2
    with torch.device("meta"):
        meta = nn.ModuleDict({"a": nn.Conv2d(4, 6, 3, groups=2), "b": nn.Conv2d(3, 5, 1), "fc": nn.Linear(9, 4)})
    pack_layers(meta, specs)
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "armor", "block_in": 1, "block_out": 1}, "unknown for a convolution; one of bitmask"),
        ({"format": "bitmask", "pattern": [2, 4]}, r"\['nnz'\] are needed"),
        ({"format": "bitmask", "nnz": 10**6}, "from 0 to 216"),
        (seeded_spec(6, 36, 9) | {"generator": "mersenne"}, "generator 'mersenne' is unknown"),
        (seeded_spec(6, 36, 9) | {"nnz": 217}, "nnz up to 216"),
        (seeded_spec(6, 36, 9) | {"seed": -1}, "whole numbers"),
    ],
)
def test_pack_layers_refuses_what_does_not_fit(spec, message):
    with pytest.raises(UserError, match=f"conv: .*{message}"):
        pack_layers(nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)}), {"conv": spec})


def test_pack_layers_refuses_borders_that_are_not_even():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 4, padding="same")})
    with pytest.raises(UserError, match=r"conv: padding 'same' with kernel \(4, 4\)"):
        pack_layers(model, {"conv": {"format": "bitmask", "nnz": 3}})


def test_pack_layers_refuses_borders_that_are_not_zero():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")})
    with pytest.raises(UserError, match="conv: padding_mode 'circular'"):
        pack_layers(model, {"conv": {"format": "bitmask", "nnz": 3}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda layer: layer.mask[0, 0].bitwise_xor_(1), "conv.mask keeps"),
        (lambda layer: layer.row_offsets[-1].add_(1), "conv.row_offsets do not rise"),
        (lambda layer: layer.values[0].fill_(torch.nan), "conv.values holds NaN"),
    ],
)
def test_validate_names_the_damaged_tensor(damage, message):
    layer, _ = example("bitmask", "3x3")
    damage(layer)
    with pytest.raises(UserError, match=message):
        layer.validate("conv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (5, 64), (7, 129)])
def test_expand_equals_the_definition(dtype, shape):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * (torch.rand(shape) < 0.3)).to(dtype)
    values, mask, row_offsets = pack_bitmask(weight)
    assert torch.equal(bitmask_expand(values, mask, row_offsets, shape[1]), weight)
    torch.library.opcheck(torch.ops.slimzoo.bitmask_expand.default, (values, mask, row_offsets, shape[1]))


def test_expand_refuses_what_does_not_fit():
    values, mask, row_offsets = pack_bitmask(torch.ones(3, 9))
    for wrong in ((values.double(), mask, row_offsets, 9), (values, mask, row_offsets, 17), (values, mask, mask, 9)):
        with pytest.raises(ValueError, match="bitmask_expand"):
            bitmask_expand(*wrong)


# ------------------------------------------------------------------------------------------------------ seed-coded masks


def test_every_format_of_convolutions_is_one_of_linears():
    convolutions = {layer_class.format for layer_class in FORMATS if issubclass(layer_class, nn.Conv2d)}
    assert convolutions and convolutions <= {c.format for c in FORMATS if issubclass(c, nn.Linear)}


def test_a_tampered_seed_layer_count_or_digest_is_refused():
    rows, columns = 6, 36
    spec = seeded_spec(rows, columns, 40)
    for change in ({"seed": 6}, {"layer": 3}, {"nnz": 41}, {"sha256": "0" * 64}):
        model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "fc": nn.Linear(36, 6)})
        pack_layers(model, {"conv": spec | change, "fc": spec | change})
        assert isinstance(model["conv"], SeededBitmaskConv2d)
        assert isinstance(model["fc"], SeededBitmaskLinear)
        for name in model:
            with pytest.raises(UserError, match=f"{name}: the mask of seed"):
                model[name].validate(name)
        with pytest.raises(UserError, match="the mask of seed"):
            model["fc"](torch.ones(1, 36))


def test_a_mask_much_larger_than_what_is_stored_is_never_drawn():
    spec = seeded_spec(6, 36, 9)
    for size, nnz in ((2**20, 9), (2**14 + 1, 2**24)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(size, size if nnz > 9 else 64))
        with pytest.raises(UserError, match="drawing that mask would take the memory"):
            pack_layers(model, {"0": spec | {"nnz": nnz}})


def test_seed_coded_layers_store_values_only():
    layer, _ = example("seeded_bitmask", "3x3")
    assert layer.state_dict().keys() == {"values", "bias"}
    stored, _ = example("bitmask", "3x3")
    assert isinstance(stored, BitmaskConv2d)
    assert stored.state_dict().keys() == {"values", "mask", "row_offsets", "bias"}


def test_the_generator_is_frozen():
    """What seed-coded checkpoints rest on; a change of these numbers needs a new name of the generator."""
    assert GENERATOR == "splitmix64-v1"
    assert [hex(key) for key in keys(17, 3, 4)] == [
        "0xac3cb8b6b84a4ba7",
        "0xe35af11d40b549e1",
        "0xafbc611445df6e38",
        "0xf71871905a7660ca",
    ]
    drawn = random_mask(17, 3, 100_003, 5_000)
    assert (
        hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
        == "91eef0a887c1b94e992409101603991fb1f0ea51f5cbebe11bda792da7a72384"
    )


def splitmix64(seed: int, layer: int, index: int) -> int:
    """The generator again, in plain Python integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return mix((mix(mix(seed) ^ layer) + (index + 1) * 0x9E3779B97F4A7C15) % 2**64)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 300), st.data())
def test_masks_are_the_smallest_keys_and_coins_keep_a_prefix_of_the_same_order(seed, layer, count, data):
    wanted = [splitmix64(seed, layer, index) for index in range(count)]
    assert keys(seed, layer, count).tolist() == wanted
    kept = data.draw(st.integers(0, count))
    order = sorted(range(count), key=wanted.__getitem__)
    assert random_mask(seed, layer, count, kept).nonzero().flatten().tolist() == sorted(order[:kept])
    density = data.draw(st.floats(0, 1, exclude_min=True))
    coins = [index for index in range(count) if density == 1 or wanted[index] < density * 2.0**64]
    assert bernoulli_count(seed, layer, count, density) == len(coins)
    assert random_mask(seed, layer, count, len(coins)).nonzero().flatten().tolist() == coins


def test_masks_are_random_two_seeds_and_two_layers_overlap_by_chance():
    count, kept = 40_000, 4_000
    chance, deviation = kept**2 / count, (kept**2 / count) ** 0.5
    drawn = {key: random_mask(*key, count, kept) for key in ((0, 0), (1, 0), (0, 1), (2**62, 0))}
    for mask in drawn.values():
        assert mask.sum() == kept
        by_place = mask.view(100, -1).sum(1).double()  # even along the weight
        assert by_place.std() < 2 * (kept / 100) ** 0.5
    pairs = [(a, b) for a in drawn for b in drawn if a < b]
    for a, b in pairs:
        assert abs(int((drawn[a] & drawn[b]).sum()) - chance) < 4 * deviation
    assert torch.equal(drawn[0, 0], random_mask(0, 0, count, kept))


@pytest.mark.slow
def test_masks_are_alike_in_other_processes_and_thread_counts():
    code = (
        "import sys, json, torch; torch.set_num_threads(int(sys.argv[1]));"
        "from zoo.random_mask import digest, random_mask;"
        "print(json.dumps([digest(random_mask(3, l, 70001, 7000)) for l in range(4)]))"
    )
    wanted = [digest(random_mask(3, layer, 70_001, 7_000)) for layer in range(4)]
    for threads in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-c", code, threads], capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(output) == wanted


def test_impossible_masks_are_refused():
    with pytest.raises(UserError, match="11 weights cannot be kept of 10"):
        random_mask(0, 0, 10, 11)
    with pytest.raises(UserError, match="mask seed -1"):
        random_mask(-1, 0, 10, 3)
