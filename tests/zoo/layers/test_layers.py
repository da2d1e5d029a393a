"""Packed layers: they compute with the weight they store, stand in for nn.Linear, and refuse what cannot be."""

import pytest
import torch
from torch import nn

from zoo.errors import UserError
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.layers.armor import ArmorLinear
from zoo.layers.bitmask import BitmaskLinear
from zoo.layers.packing import pack_layers

KINDS = ("armor", "armor-4:8", "2:4", "1:4", "ragged")


def example(kind: str, d_in: int = 40, d_out: int = 24, bias: bool = True, seed: int = 0):
    """A layer with random contents, fp32, and the dense weight it stands for, computed with torch alone."""
    generator = torch.Generator().manual_seed(seed)
    n, m = {"armor-4:8": (4, 8), "1:4": (1, 4)}.get(kind, (2, 4))
    scores = torch.rand(d_out, d_in // m, m, generator=generator)
    mask = torch.zeros_like(scores).scatter_(-1, scores.topk(n).indices, 1).flatten(1).bool()
    if kind == "ragged":
        mask = torch.rand(d_out, d_in, generator=generator) < 0.3
        mask[3] = False
    weight = torch.randn(d_out, d_in, generator=generator) * mask
    values, packed_mask, offsets = pack_bitmask(weight, mask, per_row=None if kind == "ragged" else d_in * n // m)
    if kind.startswith("armor"):
        layer = ArmorLinear(d_in, d_out, bias, block_in=8, block_out=6, pattern=(n, m))
        tensors = {"core_values": values, "core_mask": packed_mask}
        tensors["wrap_in"] = torch.randn(d_in // 8, 8, 8, generator=generator)
        tensors["wrap_out"] = torch.randn(d_out // 6, 6, 6, generator=generator)
        weight = torch.block_diag(*tensors["wrap_out"]) @ weight @ torch.block_diag(*tensors["wrap_in"])
    elif kind == "ragged":
        layer = BitmaskLinear(d_in, d_out, bias=bias, nnz=len(values))
        tensors = {"values": values, "mask": packed_mask, "row_offsets": offsets}
    else:
        layer = BitmaskLinear(d_in, d_out, bias=bias, pattern=(n, m))
        tensors = {"values": values, "mask": packed_mask}
    if bias:
        tensors["bias"] = torch.randn(d_out, generator=generator)
    layer.load_state_dict(tensors)
    layer.validate("example")
    return layer, weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 5, 40), (0, 40)])
def test_forward_equals_the_dense_weight(kind, bias, shape):
    layer, weight = example(kind, bias=bias)
    x = torch.randn(shape)
    wanted = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5 * weight.abs().sum(1).max().item())
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_weight_and_masks_keep_their_type(kind, dtype):
    layer, weight = example(kind, d_in=104)  # 13 bytes a row
    layer.to(dtype)
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert types.pop("core_mask" if kind.startswith("armor") else "mask") == torch.uint8
    assert types.pop("row_offsets", torch.int64) == torch.int64
    assert set(types.values()) == {dtype} == {layer.dtype}
    x = torch.randn(7, 104).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    wanted = nn.functional.linear(x.float(), weight, layer.bias.float())
    assert nn.functional.cosine_similarity(y.float(), wanted).min() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    layer, _ = example(kind)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = layer(x), layer(x.bfloat16())
    assert torch.equal(found, layer(x))
    assert torch.equal(rounded, layer(x.bfloat16().float()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_input_and_only_it(kind):
    layer, weight = example(kind)
    x = torch.randn(3, 2, 40, requires_grad=True)
    upstream = torch.randn(3, 2, 24)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-4, atol=1e-4)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("kind", ["armor", "2:4", "ragged"])
def test_compiles_without_graph_break(kind):
    layer, _ = example(kind)
    x = torch.randn(5, 40)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_weight_is_a_view_that_costs_nothing_until_read_and_cannot_be_written(monkeypatch):
    layer, weight = example("armor")
    reads = []
    compute = ArmorLinear.dense_weight
    monkeypatch.setattr(ArmorLinear, "dense_weight", lambda self: reads.append(1) or compute(self))
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (24, 40)
    assert (layer.weight.dtype, layer.weight.device) == (torch.float32, torch.device("cpu"))
    layer(torch.randn(1, 40))
    assert not reads
    torch.testing.assert_close(layer.weight @ torch.eye(40), weight, rtol=1e-5, atol=1e-5)
    assert len(reads) == 1
    for write in (
        lambda: layer.weight.add_(1),
        lambda: nn.init.zeros_(layer.weight),
        lambda: setattr(layer.weight, "data", torch.zeros(24, 40)),
    ):
        with pytest.raises(UserError, match="cannot be changed"):
            write()
    with pytest.raises(UserError, match="cannot be changed"):
        layer.weight.data += 1


@pytest.mark.parametrize(
    "layer",
    [
        ArmorLinear(24, 10, False, block_in=4, block_out=5),
        BitmaskLinear(36, 5, pattern=(3, 6)),
        BitmaskLinear(13, 6, nnz=0),
        BitmaskLinear(13, 6, nnz=31),
        BitmaskLinear(13, 6, nnz=78),
    ],
    ids=repr,
)
def test_a_fresh_layer_is_a_valid_zero_matrix(layer):
    layer.validate("fresh")
    assert torch.equal(layer.dense_weight(), torch.zeros(layer.out_features, layer.in_features))
    assert torch.equal(layer(torch.randn(2, layer.in_features)), torch.zeros(2, layer.out_features))


def set_at(name, index, value):
    def damage(layer):
        getattr(layer, name)[index] = value

    return damage


def flip(name, index, bit):
    def damage(layer):
        getattr(layer, name)[index] ^= bit

    return damage


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("armor", flip("core_mask", (5, 2), 0b10000), r"up\.core_mask keeps (1|3) weights where 2 of 4 .*row 5, .* 20"),
        ("armor-4:8", flip("core_mask", (0, 0), 1), r"up\.core_mask keeps (3|5) weights where 4 of 8 .*row 0, .* 0"),
        ("2:4", flip("mask", (23, 4), 0b1000), r"up\.mask keeps (1|3) weights where 2 of 4 .*row 23, .* 32"),
        ("ragged", flip("mask", (3, 1), 1), r"up\.mask keeps 1 weights where 0 of 40 .*row 3"),
        ("ragged", set_at("row_offsets", 0, 1), r"up\.row_offsets do not rise from 0"),
        ("ragged", set_at("row_offsets", 24, 10**6), r"up\.row_offsets do not rise"),
        ("ragged", set_at("row_offsets", 5, 10**6), r"up\.row_offsets do not rise"),
        ("armor", set_at("wrap_in", (0, 1, 1), float("nan")), r"up\.wrap_in holds NaN or Inf"),
        ("armor", set_at("wrap_out", (1, 2, 3), float("-inf")), r"up\.wrap_out holds NaN or Inf"),
        ("2:4", set_at("values", (1, 1), float("inf")), r"up\.values holds NaN or Inf"),
        ("1:4", set_at("bias", 1, float("nan")), r"up\.bias holds NaN or Inf"),
    ],
)
def test_validate_names_the_damaged_tensor(kind, damage, message):
    layer, _ = example(kind)
    damage(layer)
    with pytest.raises(UserError, match=f"^{message}.*damaged, download or build"):
        layer.validate("up")


def test_validate_sees_padding_bits():
    layer, _ = example("2:4", d_in=36)
    layer.mask[7, 4] |= 0b10000
    with pytest.raises(UserError, match=r"^up\.mask has bits set beyond column 35"):
        layer.validate("up")


def test_validate_covers_every_row_of_a_large_mask():
    layer = BitmaskLinear(8192, 4100, pattern=(2, 4))  # more rows than are unpacked at a time
    layer.validate("up")
    layer.mask[4099, 1023] = 0b01110011
    with pytest.raises(UserError, match="keeps 3 weights where 2 of 4 .*row 4099, from column 8188"):
        layer.validate("up")


class Block(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.up = nn.Linear(16, 24, bias=False, device=device, dtype=torch.bfloat16)
        self.inner = nn.Sequential(nn.Linear(24, 16, device=device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pack_layers_builds_like_for_like(device):
    model = Block(device).eval()
    armor = {"format": "armor", "block_in": 4, "block_out": 8, "pattern": [2, 4]}
    pack_layers(model, {"up": armor, "inner.0": {"format": "bitmask", "nnz": 7}})
    assert type(model.up) is ArmorLinear and type(model.inner[0]) is BitmaskLinear
    assert model.up.bias is None and model.inner[0].bias is not None
    assert model.up.core_values.dtype == torch.bfloat16 and model.inner[0].values.dtype == torch.float32
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert not model.up.training and model.up.wrap_out.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("down", {"format": "armor"}, "module down of the compression config is not a dense layer"),
        ("inner", {"format": "armor"}, "module inner of the compression config is not a dense layer"),
        ("up", {"format": "int3"}, "up: weight format 'int3' is unknown for a linear layer; one of armor, bitmask"),
        ("up", {"block_in": 4}, "up: weight format None is unknown"),
        ("up", {"format": "armor", "block_in": 4}, "up: format armor with keys .*block_out"),
        ("up", {"format": "bitmask", "pattern": [2, 4], "group": 1}, "up: format bitmask with keys .*group"),
        ("up", {"format": "armor", "block_in": 5, "block_out": 8}, "up: block_in 5 does not divide 16"),
        ("up", {"format": "armor", "block_in": 4, "block_out": 0}, "up: block_out 0 does not divide 24"),
        ("up", {"format": "armor", "block_in": "4", "block_out": 8}, "up: "),
        ("up", {"format": "bitmask", "pattern": [4, 4]}, "up: pattern 4:4 is impossible for 16 inputs"),
        ("up", {"format": "bitmask", "pattern": [2, 5]}, "up: pattern 2:5 is impossible for 16 inputs"),
        ("up", {"format": "bitmask", "pattern": [2]}, "up: "),
        ("up", {"format": "bitmask"}, "up: pattern None and nnz None: exactly one"),
        ("up", {"format": "bitmask", "nnz": 1000}, "up: nnz 1000: from 0 to 384"),
    ],
)
def test_pack_layers_refuses_what_does_not_fit(name, spec, message):
    with pytest.raises(UserError, match=f"^{message}"):
        pack_layers(Block(), {name: spec})


def test_pack_layers_refuses_to_pack_twice():
    model = Block()
    pack_layers(model, {"up": {"format": "bitmask", "nnz": 3}})
    with pytest.raises(UserError, match="up .*not a dense layer"):
        pack_layers(model, {"up": {"format": "bitmask", "nnz": 3}})
