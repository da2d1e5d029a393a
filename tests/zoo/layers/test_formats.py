"""What every weight format says of itself holds, and a new one needs nothing but its class and its place in the list."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from torch import nn
from transformers import AutoModelForCausalLM

from zoo.checkpoint import write_checkpoint
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.block_sparse_linear.reference import pack_blocks
from zoo.kernels.packed_linear.reference import dequantize, pack_codes
from zoo.layers import packing
from zoo.layers.base import PackedLinear
from zoo.layers.packing import FORMATS, dense_weight, format_keys, pack_layers, row_bytes
from zoo.layers.seeded_bitmask import seeded_bitmask
from zoo.random_mask import GENERATOR, digest
from zoo.record.verify import check_layers


def kept(d_out, d_in, keep):
    return torch.where(keep, torch.randn(d_out, d_in), 0.0)


def pattern(d_out, d_in):
    keep = torch.arange(d_in).expand(d_out, -1) % 4 % 3 == 0
    weight = kept(d_out, d_in, keep)
    values, mask, _ = pack_bitmask(weight, keep, per_row=d_in // 2)
    return {"format": "bitmask", "pattern": [2, 4]}, {"values": values, "mask": mask}, weight


def armor(d_out, d_in):
    _, core, weight = pattern(d_out, d_in)
    parts = {"core_values": core["values"], "core_mask": core["mask"]}
    parts |= {"wrap_out": torch.randn(d_out // 3, 3, 3), "wrap_in": torch.randn(d_in // 4, 4, 4)}
    weight = torch.block_diag(*parts["wrap_out"]) @ weight @ torch.block_diag(*parts["wrap_in"])
    return {"format": "armor", "block_out": 3, "block_in": 4, "pattern": [2, 4]}, parts, weight


def ragged(d_out, d_in):
    keep = torch.rand(d_out, d_in) < 0.3
    weight = kept(d_out, d_in, keep)
    parts = dict(zip(("values", "mask", "row_offsets"), pack_bitmask(weight, keep), strict=True))
    return {"format": "bitmask", "nnz": int(keep.sum())}, parts, weight


def seeded(d_out, d_in):
    nnz = d_out * d_in // 3
    mask, offsets = seeded_bitmask(d_out, d_in, 5, 2, nnz)
    spec = {"format": "seeded_bitmask", "nnz": nnz, "seed": 5, "layer": 2, "generator": GENERATOR}
    values = torch.randn(nnz)
    return spec | {"sha256": digest(mask)}, {"values": values}, dense_of_mask(values, mask, offsets, d_in)


def dense_of_mask(values, mask, offsets, d_in):
    """Bit by bit, as the docstring of the format says."""
    weight, place = torch.zeros(len(mask), d_in), 0
    for row in range(len(mask)):
        for column in range(d_in):
            if int(mask[row, column // 8]) >> column % 8 & 1:
                weight[row, column] = values[place]
                place += 1
        assert place == offsets[row + 1]
    return weight


def blocks(d_out, d_in):
    keep = torch.rand(-(-d_out // 8), -(-d_in // 4)) < 0.5
    weight = torch.randn(d_out, d_in)
    parts = pack_blocks(weight, keep, (8, 4))
    spec = {"format": "block_sparse", "block": [8, 4], "blocks": len(parts["blocks"])}
    return spec, parts, weight * keep.repeat_interleave(8, 0).repeat_interleave(4, 1)[:d_out, :d_in]


def bits(zeros):
    def pack(d_out, d_in):
        shape = (d_out, d_in // 32)
        codes = torch.randint(0, 8, (d_out, d_in), dtype=torch.uint8)
        parts = {"qweight": pack_codes(codes, 3, 32), "scales": torch.rand(shape)}
        if zeros != "none":
            parts["zeros"] = torch.full(shape, 3, dtype=torch.uint8) if zeros == "integer" else torch.rand(shape)
        spec = {"format": "packed", "bits": 3, "group_size": 32, "zeros": zeros}
        return spec, parts, dequantize(parts["qweight"], parts["scales"], parts.get("zeros"), 3, 32, d_in)

    return pack


FORMS = {  # how it is packed, a shape that it fits, whether the tensors tell that shape
    "armor": (armor, (21, 36), True),
    "pattern": (pattern, (21, 36), True),
    "ragged": (ragged, (5, 13), False),
    "seeded": (seeded, (5, 13), False),
    "blocks": (blocks, (19, 30), False),
    "integer zeros": (bits("integer"), (7, 96), True),
    "float zeros": (bits("float"), (7, 96), True),
    "no zeros": (bits("none"), (7, 96), True),
}


def form(kind):
    torch.manual_seed(0)
    pack, shape, _ = FORMS[kind]
    return *pack(*shape), shape


def test_every_format_is_tried_here():
    assert {form(kind)[0]["format"] for kind in FORMS} == {layer_class.format for layer_class in FORMATS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMS)
def test_bytes_are_those_of_the_tensors(kind, dtype):
    spec, parts, _, (d_out, d_in) = form(kind)
    stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in parts.items()}
    wanted = sum(tensor.nbytes for tensor in stored.values())
    assert row_bytes({"name": "up", **spec, "d_out": d_out, "d_in": d_in}, dtype.itemsize) == wanted


@pytest.mark.parametrize("kind", FORMS)
def test_the_dense_weight_comes_back(kind):
    spec, parts, weight, shape = form(kind)
    torch.testing.assert_close(dense_weight("up", spec, parts, shape), weight, rtol=1e-5, atol=1e-5)
    if FORMS[kind][2]:
        assert torch.equal(dense_weight("up", spec, parts), dense_weight("up", spec, parts, shape))
    else:
        with pytest.raises(UserError, match=f"up: tensors of format {spec['format']} do not tell the weight's shape"):
            dense_weight("up", spec, parts)


@pytest.mark.parametrize("kind", ["ragged", "seeded"])
def test_the_dense_weight_of_a_convolution_has_its_shape(kind):
    torch.manual_seed(0)
    spec, parts, weight = FORMS[kind][0](6, 18)
    assert torch.equal(dense_weight("conv", spec, parts, (6, 2, 3, 3)), weight.view(6, 2, 3, 3))


def test_a_dense_weight_is_refused_in_one_sentence():
    spec, parts, _, shape = form("armor")
    half = {key: parts[key] for key in list(parts)[1:]}
    bad = parts | {"core_mask": torch.zeros_like(parts["core_mask"])}
    for message, *arguments in (
        ("up: .*core_values", spec, half, shape),
        ("up: .*size mismatch", spec, parts, (21, 40)),
        ("up.core_mask keeps 0", spec, bad, shape),
        ("up: weight format 'int3' is unknown for a linear layer", spec | {"format": "int3"}, parts, shape),
    ):
        with pytest.raises(UserError, match=message) as error:
            dense_weight("up", *arguments)
        assert "\n" not in str(error.value)


def test_keys_of_all_formats_agree():
    known = format_keys()
    for layer_class in FORMATS:
        for key, kind in layer_class.keys.items():
            assert known[f"{key.removesuffix('?')}?"] == kind, layer_class
    assert all(key.endswith("?") for key in known) and known["pattern?"] == [int] and known["zeros?"] is str


def test_a_row_of_an_unknown_format_is_refused():
    with pytest.raises(UserError, match="up: weight format 'int3' is unknown for a layer; one of armor, bitmask"):
        row_bytes({"name": "up", "format": "int3", "d_out": 4, "d_in": 4}, 2)


# ---------------------------------------------------------------------------------------------------- a format of one's own


class RoundedLinear(PackedLinear):
    """W = scale codes: int8 codes (d_out, d_in) and one scale (1,) of the model's dtype."""

    format = "rounded"
    keys = {"levels": int, "note?": str}
    values_name = "scale"

    @staticmethod
    def bytes_of(row, itemsize):
        return row["d_out"] * row["d_in"] + itemsize

    @staticmethod
    def dense_shape(spec, parts):
        return tuple(parts["codes"].shape)

    def __init__(self, in_features, out_features, bias=True, *, levels, note="", dtype=None, device=None):
        super().__init__(in_features, out_features)
        self.levels = levels
        self.add_tensor("codes", (out_features, in_features), torch.int8, device)
        self.add_tensor("scale", (1,), dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (out_features,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self):
        for tensor in self.parameters():
            tensor.zero_()

    def product(self, x):
        return nn.functional.linear(x, self.dense_weight(), self.bias)

    def dense_weight(self):
        return self.codes.detach() * self.scale.detach()

    def validate(self, name):
        self.check_finite(name)
        if self.codes.numel() and int(self.codes.abs().max()) > self.levels:
            raise UserError(f"{name}.codes hold more than {self.levels} levels.")


def test_a_new_format_packs_writes_loads_verifies_and_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "FORMATS", [*FORMATS, RoundedLinear])
    base = make_base(tmp_path / "base", "qwen2")  # with biases
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    spec, modules, tensors, rows = {"format": "rounded", "levels": 100}, {}, {}, []
    for name, linear in dense.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            name, scale = f"model.layers.{name}", linear.weight.detach().abs().max().bfloat16().float() / 100
            codes = (linear.weight.detach() / scale).round().clamp(-100, 100).to(torch.int8)
            linear.weight.data = codes * scale
            modules[name], tensors[f"{name}.codes"], tensors[f"{name}.scale"] = spec, codes, scale.view(1)
            rows.append({"name": name, **spec, "d_out": linear.out_features, "d_in": linear.in_features})
    folder = write_checkpoint(
        tmp_path / "rounded",
        base=base,
        compression={"format_version": 1, "modules": modules},
        tensors=tensors.items(),
        dtype=torch.float32,
        extra_files={},
    )
    loaded, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[3, 1, 4, 1, 5]])
    assert all(isinstance(loaded.get_submodule(name), RoundedLinear) for name in modules)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert list(check_layers(folder, {"layers": rows})) == []
    smaller = [row | {"d_out": row["d_out"] // 2} for row in rows[:1]]
    assert "size mismatch" in next(check_layers(folder, {"layers": smaller}))
    back = dict(open_folder(folder).dense_tensors())
    assert back.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-7)
    state = load_file(folder / "model.safetensors")
    stored = sum(tensor.nbytes for name, tensor in state.items() if name in tensors)
    assert stored == sum(row_bytes(row, 4) for row in rows)
    with pytest.raises(UserError, match=r"up: format rounded with keys \[\]: \['levels'\] are needed and \['note'\]"):
        pack_layers(nn.ModuleDict({"up": nn.Linear(4, 4)}), {"up": {"format": "rounded"}})
    assert {"levels?": int, "note?": str}.items() <= format_keys().items()
    state[f"{rows[0]['name']}.codes"][0, 0] = 127
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert next(check_layers(folder, {"layers": rows})) == f"{rows[0]['name']}.codes hold more than 100 levels."


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["armor", "2:4", "ragged", (3, 8)])
def test_a_folder_gives_the_dense_model_back(tmp_path, kind):
    made = Packing(make_base(tmp_path / "base"), kind)
    folder = open_folder(made.write(tmp_path / "slim"))
    found, wanted = dict(folder.dense_tensors()), made.dense.state_dict()
    assert found.keys() == wanted.keys() - {"lm_head.weight"}  # tied
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
