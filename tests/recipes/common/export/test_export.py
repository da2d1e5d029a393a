"""Exports load in stock transformers and give the packed model's logits."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, ResNetConfig, ResNetForImageClassification
from transformers.utils.quantization_config import GgufConfig

from recipes.common.data.base_models import resolve_model
from recipes.common.export import EXPORTS, export_as
from recipes.common.export.compressed_tensors import export_compressed_tensors
from recipes.common.export.dense import export_dense
from recipes.common.export.gguf import export_gguf, pre_tokenizer_name
from zoo.errors import UserError

IDS = torch.tensor([[5, 60, 7, 200, 31, 9, 101, 77]])


def logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(IDS).logits


def packed(tmp_path, family, kind="armor"):
    packing = Packing(make_base(tmp_path / "base", family), kind)
    packing.write(tmp_path / "packed", dtype=torch.float32)
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "armor"), ("qwen2", "2:4"), ("llama", "ragged"), ("gemma3_text", "armor")]
)
def test_dense_export_is_a_stock_folder(tmp_path, family, kind, monkeypatch):
    folder = packed(tmp_path, family, kind)
    monkeypatch.setattr("recipes.common.export.dense.SHARD_BYTES", 50_000)
    export_dense(folder, tmp_path / "dense", dtype="float32")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == family and "auto_map" not in config and "compression_config" not in config
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("Q8_0", 3e-2)])
def test_gguf_gives_the_logits(tmp_path, family, kind, tolerance):
    folder = packed(tmp_path, family)
    export_gguf(folder, tmp_path / "model.gguf", kind)
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    expected = logits(folder)
    assert (back - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("family", "bits"), [("llama", (4, 3)), ("qwen2", (5, 2)), ("llama", (8, 6))])
def test_packed_bits_keep_their_codes_in_gguf(tmp_path, family, bits):
    folder = packed(tmp_path, family, bits)
    export_gguf(folder, tmp_path / "model.gguf", "packed")
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    expected = logits(folder)
    assert (back - expected).norm() < (2e-3 if max(bits) <= 5 else 3e-2) * expected.norm()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}
    assert [types[f"blk.{i}.attn_q.weight"] for i in (0, 1)] == [names[b] for b in bits]
    assert types["token_embd.weight"] == "F16" and types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_1"), (8, "Q8_0")])
def test_a_packed_head_of_tied_embeddings_is_exported(tmp_path, bits, type_name):
    packing = Packing(make_base(tmp_path / "base", "llama"), (4,), head_bits=bits)
    folder = packing.write(tmp_path / "packed")
    expected = logits(folder)
    export_dense(folder, tmp_path / "dense", dtype="float32")
    torch.testing.assert_close(logits(tmp_path / "dense"), expected, atol=1e-4, rtol=1e-4)
    export_gguf(folder, tmp_path / "model.gguf", "packed")
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    assert (back - expected).norm() < (2e-3 if bits == 4 else 3e-2) * expected.norm()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == (type_name, "F16")
    export_compressed_tensors(folder, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert [g["weights"]["num_bits"] for g in groups if "lm_head" in g["targets"]] == [bits]
    assert config["quantization_config"]["ignore"] == [] and config["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "ct" / "model.safetensors")
    codes = unpack_words(weights["lm_head.weight_packed"], bits, 64)
    zeros = unpack_words(weights["lm_head.weight_zero_point"].T, bits, 259).T.repeat_interleave(32, 1)
    w = (codes - zeros) * weights["lm_head.weight_scale"].repeat_interleave(32, 1)
    torch.testing.assert_close(w, packing.dense.lm_head.weight.data)
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights


def unpack_words(words, bits, n):
    """compressed-tensors' packing read bit by bit: code i is at bit i * bits of its row of int32 words."""
    out = torch.zeros(len(words), n, dtype=torch.int64)
    stream = [[(int(word) & 0xFFFFFFFF) >> b & 1 for word in row for b in range(32)] for row in words]
    for r, row in enumerate(stream):
        for i in range(n):
            out[r, i] = sum(row[i * bits + b] << b for b in range(bits))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_hold_the_same_codes(tmp_path, bits):
    folder = packed(tmp_path, "qwen2", (bits, 4))
    export_compressed_tensors(folder, tmp_path / "ct")
    weights = load_file(tmp_path / "ct" / "model.safetensors")
    quantization = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    schemes = {name: group["weights"] for group in quantization["config_groups"].values() for name in group["targets"]}
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        width, layer = schemes[name]["num_bits"], dense.get_submodule(name)
        d_out, d_in = weights[f"{name}.weight_shape"].tolist()
        codes = unpack_words(weights[f"{name}.weight_packed"], width, d_in)
        zeros = unpack_words(weights[f"{name}.weight_zero_point"].T, width, d_out).T
        scales = weights[f"{name}.weight_scale"]
        w = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        torch.testing.assert_close(w, layer.dense_weight())
        assert schemes[name]["group_size"] == 32 and schemes[name]["symmetric"] is False
    assert torch.equal(weights["model.layers.0.self_attn.k_proj.bias"], dense.model.layers[0].self_attn.k_proj.bias)


def test_compressed_tensors_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="packed bits with integer zero points only"):
        export_compressed_tensors(packed(tmp_path, "llama"), tmp_path / "ct")
    packing = Packing(make_base(tmp_path / "base2", "llama"), (4,))
    name = "model.layers.0.self_attn.k_proj"
    spec, _, tensors = packing.pack_bits(packing.dense.get_submodule(name), 8, torch.Generator())
    packing.compression["modules"][name] = spec
    packing.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    packing.write(tmp_path / "mixed")
    with pytest.raises(UserError, match="differ in bits or groups"):
        export_compressed_tensors(tmp_path / "mixed", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_the_real_base_survives_gguf(tmp_path):
    """SmolLM2: grouped queries, tied embeddings, a real tokenizer."""
    base = resolve_model("smollm2-135m-instruct")
    export_gguf(base.path, tmp_path / "model.gguf", "F16")
    dequantize = GgufConfig(dequantize=True)
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=dequantize)
    expected = logits(base.path)
    assert (back - expected).norm() < 2e-3 * expected.norm()
    text = "Tokens: 12, 'quoted'  spaced\n"
    ours = AutoTokenizer.from_pretrained(base.path)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(text).input_ids == ours


def test_exports_by_name_refuse_what_they_cannot_write(tmp_path):
    folder = packed(tmp_path, "llama")
    with pytest.raises(UserError, match="--export onnx: one of dense, gguf-f16"):
        export_as(folder, tmp_path / "out", "onnx")
    export_as(folder, tmp_path / "out", "dense")
    assert torch.allclose(logits(tmp_path / "out"), logits(folder), atol=0.1)  # bfloat16
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "images")
    for kind in EXPORTS.keys() - {"dense"}:
        with pytest.raises(UserError, match=f"--export {kind}: image models export as dense only"):
            export_as(tmp_path / "images", tmp_path / "images-out", kind)
    assert not (tmp_path / "images-out").exists()


def test_refusals_leave_nothing(tmp_path):
    folder = packed(tmp_path, "gemma3_text")
    with pytest.raises(UserError, match="gemma3_text cannot be written as GGUF"):
        export_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="pre-tokenizer Metaspace is unknown"):
        pre_tokenizer_name({"type": "Metaspace"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_dense(folder, tmp_path / "full")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
