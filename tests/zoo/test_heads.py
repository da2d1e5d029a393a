"""The output head: tied, its own whatever the config says, or packed; and other numbers of tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM

from zoo.checkpoint import ties_head
from zoo.errors import UserError
from zoo.folder import open_folder

TOKENS = torch.arange(1, 60).view(1, -1)


def with_head(folder, head):
    """A base model whose config ties its head, with a head of its own in the file."""
    base = make_base(folder, "llama")
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return with_head(tmp_path_factory.mktemp("own") / "base", lambda table: table.flip(0).contiguous())


@pytest.fixture(scope="module")
def packed_head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return Packing(make_base(folder / "base", "llama"), (4,), head_bits=8).write(folder / "out")


def test_a_head_is_tied_as_from_pretrained_decides(own, tmp_path):
    assert ties_head(open_folder(make_base(tmp_path / "tied", "llama")))
    assert ties_head(open_folder(with_head(tmp_path / "copy", torch.clone)))
    assert not ties_head(open_folder(own))
    assert not ties_head(open_folder(make_base(tmp_path / "untied", "qwen2")))


def test_a_head_of_its_own_stays_in_the_checkpoint_whose_config_says_so(own, tmp_path):
    packing = Packing(own, "2:4")
    output = packing.write(tmp_path / "out")
    assert not json.loads((output / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), logits(packing.dense))
    tied = Packing(make_base(tmp_path / "base", "llama"), "2:4").write(tmp_path / "tied")
    sizes = [open_folder(folder).sizes() for folder in (output, tied)]
    table = 259 * 64
    assert sizes[0]["parameters"] - sizes[1]["parameters"] == table
    assert sizes[0]["compressed_bytes"] - sizes[1]["compressed_bytes"] == 4 * table


def test_a_packed_head_of_its_own_is_compared_with_a_dense_model_that_has_one(own, tmp_path):
    packing = Packing(own, (4,), head_bits=8)
    output = packing.write(tmp_path / "out")
    assert "untied_head" not in json.loads((output / "config.json").read_text())["compression_config"]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), logits(packing.dense))
    assert open_folder(output).sizes()["parameters"] == sum(p.numel() for p in packing.dense.parameters())


@pytest.mark.parametrize("change", [{"new_num_tokens": 300}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 64}])
def test_a_packed_head_keeps_its_number_of_tokens(packed_head, change):
    model = AutoModelForCausalLM.from_pretrained(packed_head)
    with pytest.raises(UserError, match="the output head is packed, so the vocabulary stays at 259 tokens"):
        model.resize_token_embeddings(**change)
    assert logits(model).shape[-1] == 259


def test_no_change_of_a_packed_head_is_none(packed_head, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_head)
    before = logits(model)
    assert model.resize_token_embeddings().num_embeddings == model.resize_token_embeddings(259).num_embeddings == 259
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied, and not
def test_a_dense_head_grows_with_the_vocabulary_and_loads_again(family, tmp_path):
    output = Packing(make_base(tmp_path / "base", family), "2:4").write(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(output)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
