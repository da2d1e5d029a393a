"""Exports load in stock transformers and give the packed model's logits."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
from tiny_models import Packing, make_base

from recipes.common.base_models import resolve_model
from recipes.common.export import export_dense, export_gguf, pre_tokenizer_name
from zoo.errors import UserError

IDS = torch.tensor([[5, 60, 7, 200, 31, 9, 101, 77]])


def logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(IDS).logits


def packed(tmp_path, family, kind="armor"):
    packing = Packing(make_base(tmp_path / "base", family), kind)
    packing.write(tmp_path / "packed", dtype=torch.float32)
    return tmp_path / "packed"


@pytest.mark.parametrize(("family", "kind"), [("llama", "armor"), ("qwen2", "2:4"), ("gemma3_text", "armor")])
def test_dense_export_is_a_stock_folder(tmp_path, family, kind, monkeypatch):
    folder = packed(tmp_path, family, kind)
    monkeypatch.setattr("recipes.common.export.SHARD_BYTES", 50_000)
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
