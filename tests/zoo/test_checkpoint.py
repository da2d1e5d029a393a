"""Checkpoint folders, with slimzoo installed: what is written, what from_pretrained gives back, what is refused."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_SETTINGS, Packing, make_base
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import zoo
from zoo.errors import UserError
from zoo.folder import atomic_folder, open_folder
from zoo.layers.base import PackedLinear
from zoo.models import slim_class_for

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


@pytest.fixture(scope="module")
def packing(tmp_path_factory) -> Packing:
    return Packing(make_base(tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def checkpoint(packing, tmp_path_factory) -> Path:
    return packing.write(tmp_path_factory.mktemp("checkpoint") / "tiny-armor")


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def assert_same_logits(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "armor") for family in FAMILY_SETTINGS] + [("llama", "2:4"), ("qwen2", "ragged"), ("qwen3", (3, 8))],
)
def test_logits_equal_the_dense_model(family, kind, tmp_path):
    packing = Packing(make_base(tmp_path / "base", family), kind)
    folder = packing.write(tmp_path / "slim")
    model = load(folder)
    assert type(model) is slim_class_for(family) and model.config.model_type == f"slim_{family}"
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == 14 and (family != "qwen2" or sum(layer.bias is not None for layer in packed) == 6)
    assert_same_logits(logits(model), logits(packing.dense))
    assert_same_logits(logits(model, IDS[:, :1]), logits(packing.dense, IDS[:, :1]))
    half = logits(load(folder, dtype=torch.bfloat16)).float()
    assert torch.nn.functional.cosine_similarity(half, logits(packing.dense), dim=-1).min() > 0.999
    base = AutoModel.from_pretrained(folder)  # what engines that bring their own head use
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    found, wanted = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(packing.base)
    assert type(found) is type(wanted)
    assert found("Grüße, world 123").input_ids == wanted("Grüße, world 123").input_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_casts_floats_only(checkpoint, dtype):
    model = load(checkpoint, dtype=dtype)
    assert model.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.uint8 if name.endswith("core_mask") else dtype), name
    assert logits(model).dtype == dtype


def test_written_dtype_is_the_loaded_one(packing, tmp_path):
    folder = packing.write(tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.uint8}
    assert load(folder).dtype == torch.bfloat16


def test_sizes_on_record_are_those_on_disk(packing, tmp_path):
    folder = packing.write(tmp_path / "half", dtype=torch.bfloat16)
    dense = sum(parameter.numel() for parameter in packing.dense.parameters())
    core = wrappers = linear = 0
    for module in packing.dense.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            linear += module.weight.numel()
            core += module.weight.numel() // 2
            wrappers += 16 * module.in_features + 8 * module.out_features  # blocks of 16 and 8
    sizes = open_folder(folder).sizes()
    wanted = dense - linear + core + wrappers
    assert sizes == {
        "parameters": dense,
        "dense_bytes": 2 * dense,
        "nonzero": wanted,
        "compressed_bytes": 2 * wanted + linear // 8,
    }
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == sizes["compressed_bytes"] + header
    assert open_folder(folder).compression == packing.compression


def tensor_bytes(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
        for file in files
        for name, tensor in load_file(file).items()
    }


def test_save_load_save_keeps_every_byte(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path / "again")
    assert tensor_bytes(tmp_path / "again") == tensor_bytes(checkpoint)
    code = {path.name: path.read_text() for path in checkpoint.glob("*.py")}
    assert code and code == {path.name: path.read_text() for path in (tmp_path / "again").glob("*.py")}
    assert AutoConfig.from_pretrained(tmp_path / "again").auto_map == AutoConfig.from_pretrained(checkpoint).auto_map
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(checkpoint)))


def test_shards_hold_what_one_file_holds(packing, checkpoint, tmp_path):
    folder = packing.write(tmp_path / "shards", max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    for file in files:
        with safe_open(file, "pt") as tensors:
            sizes = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 40_000 or len(sizes) == 1
    assert tensor_bytes(folder) == tensor_bytes(checkpoint)
    assert torch.equal(logits(load(folder)), logits(load(checkpoint)))


def test_ties_stay_as_in_the_base(tmp_path):
    for tied in (True, False):
        packing = Packing(make_base(tmp_path / f"base-{tied}", tie_word_embeddings=tied))
        folder = packing.write(tmp_path / f"slim-{tied}")
        assert ("lm_head.weight" in tensor_bytes(folder)) is not tied
        model = load(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert_same_logits(logits(model), logits(packing.dense))


def test_tensors_may_take_the_place_of_the_bases(packing, tmp_path):
    norm = torch.linspace(0.5, 2, 64)
    folder = packing.write(tmp_path / "slim", tensors=[*packing.tensors.items(), ("model.norm.weight", norm)])
    before, after = load(packing.write(tmp_path / "plain")).state_dict(), load(folder).state_dict()
    assert torch.equal(after["model.norm.weight"], norm)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"model.norm.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])  # tied, untied, tied by default
def test_a_packed_head_is_a_matrix_of_its_own(family, tmp_path):
    """The table stays, sizes compare with the dense model as it was."""
    base = make_base(tmp_path / "base", family)
    packing, dense = Packing(base, (4,), head_bits=6), AutoModelForCausalLM.from_pretrained(base)
    tied = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert tied is (family != "qwen2")
    folder = packing.write(tmp_path / "slim")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["compression_config"].get("untied_head", False) is tied
    model = load(folder)
    assert_same_logits(logits(model), logits(packing.dense))
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    sizes = open_folder(folder).sizes()
    assert sizes["parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    assert sizes["compressed_bytes"] == sum(len(data) for _, _, data in tensor_bytes(folder).values())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    AutoModel.from_pretrained(folder)  # without its head


def test_generates_what_the_dense_model_generates(packing, checkpoint):
    model = load(checkpoint)
    for settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        tokens = []
        for candidate in (model, packing.dense):
            torch.manual_seed(0)
            tokens.append(candidate.generate(IDS, max_new_tokens=8, **settings))
        assert torch.equal(*tokens), settings


def test_left_padding_changes_nothing(checkpoint):
    model = load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    texts = ["Hi", "a longer prompt"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8)[:, batch.input_ids.shape[1] :]
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        assert torch.equal(model.generate(**alone, max_new_tokens=8)[0, alone.input_ids.shape[1] :], row)


def test_device_maps(checkpoint, tmp_path):
    reference = logits(load(checkpoint))
    assert torch.equal(logits(load(checkpoint, device_map="auto")), reference)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = load(checkpoint, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in offloaded.model.layers[1].mlp.up_proj.parameters())
    assert torch.equal(logits(offloaded), reference)


@pytest.mark.slow
def test_compiles_without_graph_break(checkpoint):
    model = load(checkpoint)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_logits(logits(compiled), logits(model))


@pytest.mark.parametrize("autocast", [False, True])
def test_lora_trains_on_top_and_comes_back(checkpoint, tmp_path, autocast):
    torch.manual_seed(0)
    model = get_peft_model(load(checkpoint), LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all("lora_" in name for name in trained)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)
    model.eval().save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    assert not torch.allclose(wanted, logits(load(checkpoint)), atol=1e-2)
    assert torch.equal(logits(PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")), wanted)
    assert torch.equal(logits(load(tmp_path / "adapter")), wanted)  # the adapter's folder names its base
    with pytest.raises(UserError, match="adapter cannot be merged"):
        model.merge_and_unload()


# What is refused when loading


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_config(change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config["compression_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors cannot be read \(.*\); the file is damaged"),
        (
            edit_tensors(lambda t: t[f"{UP}.core_mask"][4, 2].bitwise_xor_(1)),
            rf"{UP}\.core_mask keeps . weights where 2",
        ),
        (edit_tensors(lambda t: t[f"{UP}.core_values"][4, 2].fill_(torch.nan)), rf"{UP}\.core_values holds NaN"),
        (edit_tensors(lambda t: t.pop(f"{UP}.wrap_in")), rf"tensor {UP}\.wrap_in is missing; the file is damaged"),
        (edit_tensors(lambda t: t.pop("model.norm.weight")), r"tensor model\.norm\.weight is missing; the file"),
        (edit_tensors(lambda t: t.pop("model.embed_tokens.weight")), r"tensor .*weight is missing"),
        (
            edit_tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(96, 64)})),
            rf"tensor {UP}\.weight is unknown; the file",
        ),
        (
            edit_config(lambda c: c["modules"][UP].update(block_in=32)),
            rf"tensor {UP}\.wrap_in has shape \(4, 16, 16\) instead of \(2, 32, 32\); the file",
        ),
        (edit_config(lambda c: c["modules"][UP].update(block_in=48)), f"{UP}: block_in 48 does not divide 64"),
        (
            edit_config(lambda c: c["modules"][UP].update(pattern=[1, 4])),
            rf"tensor {UP}\.core_values has shape \(96, 32\) instead of \(96, 16\)",
        ),
        (edit_config(lambda c: c["modules"].pop(UP)), rf"tensor {UP}\.weight is missing and 4 more tensors are wrong"),
        (edit_config(lambda c: c["modules"][UP].update(format="armour")), f"{UP}: weight format 'armour' is unknown"),
        (edit_config(lambda c: c.update(format_version=2)), "format_version 2 is unknown, 1 is needed"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(checkpoint, tmp_path, damage, message):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        load(folder, ignore_mismatched_sizes=True, output_loading_info=True)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    """A checkpoint whose layers store where each row begins."""
    folder = tmp_path_factory.mktemp("ragged")
    return Packing(make_base(folder / "base", "qwen2"), "ragged").write(folder / "slim")


def placed_on_disk(offload: Path) -> dict:
    """Arguments with which the second layer is read from its file at every forward."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return {"device_map": {**places, "model.layers.1": "disk"}, "offload_folder": offload}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit_tensors(lambda t: t[f"{UP}.row_offsets"][1:].fill_(2**40)),
            rf"{UP}\.row_offsets do not rise from 0 to \d+;",
        ),
        (
            edit_tensors(lambda t: t[f"{UP}.row_offsets"][1:].fill_(-1)),
            rf"{UP}\.row_offsets do not rise from 0 to \d+;",
        ),
        (
            edit_tensors(lambda t: t[f"{UP}.mask"].fill_(255)),
            rf"{UP}\.mask keeps 64 weights where \d+ of 64 are needed",
        ),
        (edit_tensors(lambda t: t[f"{UP}.values"][7].fill_(torch.nan)), rf"{UP}\.values holds NaN or Inf"),
        (
            edit_tensors(lambda t: t["model.layers.1.input_layernorm.weight"][3].fill_(torch.inf)),
            r"model\.layers\.1\.input_layernorm\.weight holds NaN or Inf; the file",
        ),
        (edit_tensors(lambda t: t["model.norm.weight"][3].fill_(torch.nan)), r"model\.norm\.weight holds NaN or Inf"),
    ],
)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_numbers_are_checked_wherever_they_are_put(ragged, tmp_path, damage, message, place):
    folder = shutil.copytree(ragged, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder, **(placed_on_disk(tmp_path / "offload") if place == "disk" else {}))


def test_numbers_that_a_narrower_type_cannot_hold_are_refused(ragged, tmp_path):
    folder = shutil.copytree(ragged, tmp_path / "large")
    edit_tensors(lambda t: t[f"{UP}.values"][7].fill_(1e6))(folder)
    load(folder, dtype=torch.bfloat16)
    for places in ({}, placed_on_disk(tmp_path / "offload")):
        with pytest.raises(UserError, match=rf"{UP}\.values holds NaN or Inf"):
            load(folder, dtype=torch.float16, **places)


def as_type(name, dtype):
    return edit_tensors(lambda t: t.update({name: t[name].to(dtype)}))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("values", torch.int8, "int8 instead of float32 or bfloat16 or float16"),  # would load as zeros
        ("values", torch.float64, "is of type F64; F32, BF16, F16"),
        ("mask", torch.int32, "int32 instead of uint8"),
        ("mask", torch.float32, "float32 instead of uint8"),
        ("row_offsets", torch.int32, "int32 instead of int64"),
        ("row_offsets", torch.float32, "float32 instead of int64"),
    ],
)
def test_a_stored_type_that_the_format_does_not_declare_is_refused(ragged, tmp_path, name, dtype, message):
    folder = shutil.copytree(ragged, tmp_path / "damaged")
    as_type(f"{UP}.{name}", dtype)(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert f"{UP}.{name}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 10**7, r"embed_tokens\.weight has shape \(259, 64\) instead of \(10000000, 64\)"),
        ("vocab_size", 2**40, "gives vocab_size 1099511627776: finite numbers up to 2147483647"),
        ("num_hidden_layers", 9000, "describes 9000 blocks, there are only"),
        ("num_hidden_layers", 2**31 - 1, "describes 2147483647 blocks: 10000 at most"),
        ("intermediate_size", 2**31 - 64, "has shape"),
        ("hidden_size", -64, "gives hidden_size -64: 1 or more is needed"),
        ("hidden_size", None, "does not describe a model of its type .*hidden_size"),
        ("rms_norm_eps", float("nan"), "gives rms_norm_eps nan: finite numbers"),
        ("rms_norm_eps", 1e30, "gives rms_norm_eps"),
        ("dtype", 3, "gives dtype 3: float32, bfloat16 or float16 is needed"),
        ("dtype", "int8", "gives dtype 'int8': float32"),
        ("num_labels", 10**9, "describes 1000000000 labels: 1000000 at most"),
        ("hidden_act", "sillu", "no model can be built from config.json .*sillu"),
        ("transformers_weights", "adapter_model.bin", "names transformers_weights: the weights"),
        ("quantization_config", {"quant_method": "gptq"}, "names quantization_config: the weights"),
        ("attn_implementation", "some/kernel", "gives attn_implementation 'some/kernel': the name of one"),
        ("_attn_implementation", {"": "some/kernel"}, "gives _attn_implementation 'some/kernel'"),
    ],
)
def test_settings_that_the_files_do_not_bear_out_are_refused_before_memory_is_taken(
    checkpoint, tmp_path, key, value, message
):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def module(**changes):
    return edit_config(lambda c: c["modules"][UP].update(changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(lambda c: c.update(modules=None)), "compression_config.modules is None: a mapping"),
        (edit_config(lambda c: c.update(modules=["a"])), r"compression_config.modules is \['a'\]: a mapping"),
        (edit_config(lambda c: c["modules"].update({UP: "armor"})), f"{UP}: 'armor' is no weight format: a mapping"),
        (module(format=[]), rf"{UP}: weight format \[\] is unknown for a linear layer; one of armor"),
        (module(format={}), rf"{UP}: weight format \{{\}} is unknown"),
        (module(block_in="16"), f"{UP}: format armor with block_in '16': int is needed"),
        (module(block_in=True), f"{UP}: format armor with block_in True: int is needed"),
        (module(block_in=0), f"{UP}: block_in 0 does not divide 64"),
        (module(pattern=4), f"{UP}: format armor with pattern 4: a list of int is needed"),
        (module(pattern=[]), rf"{UP}: pattern \[\] is impossible for 64 inputs"),
        (module(pattern=[2]), f"{UP}: pattern 2 is impossible for 64 inputs: N:M, N < M"),
        (module(pattern=[2, 4, 8]), f"{UP}: pattern 2:4:8 is impossible"),
        (module(pattern=[2, "4"]), f"{UP}: format armor with pattern .*: a list of int"),
        (edit_config(lambda c: c.update(format_version="1")), "format_version '1' is unknown, 1 is needed"),
        (edit_config(lambda c: c.update(untied_head="no")), "untied_head is 'no': true or false is needed"),
    ],
)
def test_an_odd_compression_config_is_refused_in_one_sentence(checkpoint, tmp_path, damage, message):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    for read in (load, lambda folder: open_folder(folder).sizes()):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_nothing_but_the_folders_own_safetensors_is_read(packing, checkpoint, tmp_path):
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")

    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "unpickled",))

    torch.save(Planted(), pickled / "pytorch_model.bin")
    load(pickled)
    load(pickled, use_safetensors=False)
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors; pytorch_model\.bin could run code"):
        load(pickled)
    assert not (tmp_path / "unpickled").exists()

    outside = packing.write(tmp_path / "outside", max_shard_bytes=10**5)
    index = json.loads((outside / "model.safetensors.index.json").read_text())
    moved = next(iter(index["weight_map"].values()))
    shutil.move(outside / moved, tmp_path / "secret.safetensors")
    places = {k: v if v != moved else "../secret.safetensors" for k, v in index["weight_map"].items()}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": places}))
    with pytest.raises(UserError, match=r"names '\.\./secret\.safetensors', which is not a file of the folder"):
        load(outside)

    state = shutil.copytree(checkpoint, tmp_path / "state")
    (state / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="of a training state: a folder with the model's weights is needed"):
        load(state)


def test_links_out_of_the_base_are_not_copied(packing, tmp_path):
    base = shutil.copytree(packing.base, tmp_path / "base")
    (tmp_path / "secret").write_text("key")
    (base / "LICENSE").symlink_to(tmp_path / "secret")

    def never():
        raise AssertionError("the work has begun")
        yield

    with pytest.raises(UserError, match="LICENSE is a link to .*secret: put the file itself there"):
        packing.write(tmp_path / "out", base=base, tensors=never())
    with pytest.raises(UserError, match="LICENSE is a link to"):
        (tmp_path / "copy").mkdir()
        open_folder(base).carry_files(tmp_path / "copy")
    (base / "LICENSE").unlink()
    (base / "terms").write_text("free")
    (base / "LICENSE").symlink_to("terms")  # within the folder
    assert (packing.write(tmp_path / "out", base=base) / "LICENSE").read_text() == "free"


def as_repository(folder: Path, cache: Path, name: str) -> str:
    """Put a folder into a Hub cache, as a download leaves it: a snapshot of links to blobs."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        shutil.copy(file, home / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return snapshot


@pytest.mark.slow
def test_a_repository_is_checked_like_a_folder(packing, checkpoint, tmp_path):
    shards = packing.write(tmp_path / "shards", max_shard_bytes=10**5)
    as_repository(checkpoint, tmp_path / "cache", "us/whole")
    snapshot = as_repository(shards, tmp_path / "cache", "us/shards")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for name in ("us/whole", "us/shards"):
        assert torch.equal(logits(load(name, **where)), logits(load(checkpoint)))
    with pytest.raises(OSError):
        load("us/nowhere", **where)
    assert len(open_folder(snapshot).carried_files()) > 1  # its links are within the repository
    (snapshot / "config.json").write_text(
        (snapshot / "config.json").read_text().replace('"vocab_size": 259', '"vocab_size": 260')
    )
    with pytest.raises(UserError, match=r"us/shards: tensor .*has shape \(259, 64\) instead of \(260, 64\)"):
        load("us/shards", **where)


def test_a_state_dict_is_checked_like_files(checkpoint):
    model_class, tensors = slim_class_for("llama"), load_file(checkpoint / "model.safetensors")
    config = AutoConfig.from_pretrained(checkpoint)
    model = model_class.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(logits(model), logits(load(checkpoint)))
    tensors.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is missing"):
        model_class.from_pretrained(None, config=config, state_dict=tensors)


def test_transformers_own_report_is_not_needed(checkpoint, tmp_path, monkeypatch):
    """What it does while loading is private to it, and a newer one may do without."""

    def finalize(model, load_config, loading_info):
        model._move_missing_keys_from_meta_to_device(set(), None, None, None)
        model.tie_weights(recompute_mapping=False)
        return loading_info

    monkeypatch.setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(finalize))
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    load(folder)
    edit_tensors(lambda t: t.pop("model.norm.weight"))(folder)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is missing"):
        load(folder)


def test_threads_may_load_at_once(checkpoint):
    ties, wanted = PreTrainedModel.tie_weights, logits(load(checkpoint))
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load, [checkpoint] * 8, timeout=120))
    assert all(torch.equal(logits(model), wanted) for model in models)
    assert PreTrainedModel.tie_weights is ties


def test_the_head_is_not_trained_as_a_whole_while_it_is_packed(tmp_path):
    base = make_base(tmp_path / "base")
    model = load(Packing(base, (4,), head_bits=6).write(tmp_path / "slim"))
    with pytest.raises(UserError, match="modules_to_save would: leave it out"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_damage_is_seen_below_an_adapter_too(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    edit_tensors(lambda t: t.pop("model.norm.weight"))(folder)
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        load(tmp_path / "adapter")


def test_a_missing_shard_is_refused(packing, tmp_path):
    folder = packing.write(tmp_path / "shards", max_shard_bytes=40_000)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises((UserError, OSError)):
        load(folder)


# What is refused when writing, and that nothing stays behind


def assert_refused(packing, tmp_path, message, output="out", **changes):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        packing.write(tmp_path / output, **changes)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def changed(packing, **tensors):
    return {**packing.tensors, **tensors}.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda p: {"tensors": list(p.tensors.items())[1:]}, "packed tensor .* is missing, 1 in all"),
        (lambda p: {"tensors": []}, "packed tensor .* is missing, 56 in all"),
        (lambda p: {"tensors": [*p.tensors.items()] * 2}, "is unknown or comes twice"),
        (lambda p: {"tensors": changed(p, **{"lm_head.extra": torch.zeros(2)})}, "lm_head.extra is unknown"),
        (
            lambda p: {"tensors": changed(p, **{f"{UP}.wrap_in": torch.zeros(2, 32, 32)})},
            rf"{UP}\.wrap_in has shape \(2, 32, 32\), \(4, 16, 16\) is needed",
        ),
        (
            lambda p: {"tensors": changed(p, **{f"{UP}.core_mask": torch.zeros(96, 8)})},
            "dtype torch.float32, torch.uint8",
        ),
        (lambda p: {"tensors": changed(p, **{f"{UP}.wrap_in": torch.full((4, 16, 16), torch.inf)})}, "NaN or Inf"),
        (
            lambda p: {
                "tensors": changed(p, **{f"{UP}.wrap_in": torch.full((4, 16, 16), 1e6)}),
                "dtype": torch.float16,
            },
            "NaN or Inf in torch.float16",
        ),
        (lambda p: {"dtype": torch.int8}, "dtype torch.int8: torch.float32, torch.bfloat16 or"),
        (lambda p: {"compression": {"method": "armor", "modules": {}}}, "modules is empty"),
        (
            lambda p: {"compression": {"modules": {"model.layers.7.mlp.up_proj": {"format": "bitmask", "nnz": 1}}}},
            "module model.layers.7.mlp.up_proj of the compression config is not",
        ),
        (lambda p: {"extra_files": {"../report.json": ""}}, "extra file '../report.json': a plain file name"),
        (lambda p: {"base": p.base / "nowhere"}, "holds no readable config.json"),
    ],
)
def test_impossible_requests_leave_nothing_behind(packing, tmp_path, changes, message):
    assert_refused(packing, tmp_path, message, **changes(packing))


def edited_base(packing, folder, config=None, remove=(), files=None):
    """A copy of the base with other config entries, without some files, with other files."""
    shutil.copytree(packing.base, folder)
    settings = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in remove:
        (folder / name).unlink()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"config": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported: one of gemma, .*llama, mistral"),
        ({"config": {"model_type": "slim_llama"}}, "model_type 'slim_llama' is not supported"),
        ({"config": {"quantization_config": {"quant_method": "gptq"}}}, "is quantized already"),
        ({"config": {"hidden_size": "wide"}}, "config.json does not describe a model"),
        ({"files": {"config.json": b"{"}}, "holds no readable config.json"),
        ({"remove": ["model.safetensors"], "files": {"pytorch_model.bin": b""}}, "only read from safetensors"),
        ({"files": {"model.safetensors": b"\x00" * 7}}, "model.safetensors cannot be read"),
        (
            {
                "remove": ["model.safetensors"],
                "files": {"model.safetensors.index.json": b'{"weight_map": {"a": "../../secret.safetensors"}}'},
            },
            r"names '\.\./\.\./secret\.safetensors', which is not a file of the folder",
        ),
        (
            {"remove": ["model.safetensors"], "files": {"model.safetensors.index.json": b"[]"}},
            "is not an index of weights files",
        ),
        ({"config": {"num_hidden_layers": 3}}, r"lacks the tensor model\.layers\.2\..* a complete llama model"),
        ({"config": {"hidden_size": 128}}, "has shape .* is needed"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(packing, tmp_path, base, message):
    folder = edited_base(packing, tmp_path / "base", **base)
    assert_refused(packing, tmp_path, message, base=folder)


def test_old_rope_settings_of_a_base_are_understood(packing, tmp_path):
    settings = json.loads((packing.base / "config.json").read_text())
    settings.pop("rope_parameters")
    folder = edited_base(packing, tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({**settings, "rope_theta": 500.0, "torch_dtype": "float16"}))
    model = load(packing.write(tmp_path / "slim", base=folder))
    assert model.config.rope_parameters["rope_theta"] == 500.0 and model.dtype == torch.float32


def test_existing_and_unwritable_outputs_are_refused(packing, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert_refused(packing, tmp_path, "full exists already: name another folder", output="full")
    assert_refused(packing, tmp_path, "notes.txt exists already", output="full/notes.txt")
    assert_refused(packing, tmp_path, r"cannot be written \(Not a directory\)", output="full/notes.txt/sub/out")
    with pytest.raises(UserError, match="cannot be written"):
        packing.write(Path("/proc/slim"))
    (tmp_path / "empty").mkdir()
    load(packing.write(tmp_path / "empty"))


def test_a_failure_while_streaming_leaves_nothing(packing, tmp_path):
    def breaks():
        yield from list(packing.tensors.items())[:20]
        assert any(tmp_path.iterdir())  # something is being written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.write(tmp_path / "out", tensors=breaks())
    assert not any(tmp_path.iterdir())


def test_tensors_are_streamed_one_by_one(packing, tmp_path):
    living = []

    def stream():
        for name, tensor in packing.tensors.items():
            tensor = tensor.clone()
            living.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert sum(reference() is not None for reference in living) <= 1

    packing.write(tmp_path / "out", tensors=stream())
    assert len(living) == len(packing.tensors)


def test_a_full_disk_is_noticed_before_and_while_writing(packing, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(packing, tmp_path, r"the disk is full, at least [\d,]{7,} bytes are needed and 1,000 are free")
    monkeypatch.undo()

    def full():
        yield from list(packing.tensors.items())[:20]
        with open("/dev/full", "w") as device:
            device.write("x")

    assert_refused(packing, tmp_path, "the disk is full, at least .* bytes are needed and", tensors=full())


@pytest.mark.slow
def test_leftovers_of_a_killed_run_are_removed_and_running_ones_kept(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from zoo.folder import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "writing\n"
        (leftover,) = tmp_path.iterdir()
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
            assert leftover.exists()
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == [leftover]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("y")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/whole"]


# The bundled code


def test_bundle_is_flat_and_holds_only_what_the_model_needs(checkpoint):
    names = {path.stem for path in checkpoint.glob("*.py")}
    assert {"slimzoo_models_llama", "slimzoo_layers_armor", "slimzoo_kernels_bitmask_linear", "slimzoo_bundle"} <= names
    assert all(name.startswith("slimzoo_") for name in names)
    assert not any(other in name for name in names for other in ("qwen", "gemma", "checkpoint", "registry"))
    source = Path(zoo.__file__).parent / "layers" / "armor.py"
    before, after = source.read_text().split("\n"), (checkpoint / "slimzoo_layers_armor.py").read_text().split("\n")
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert ("from ..errors import UserError", "from .slimzoo_errors import UserError") in differing
    assert all(old.startswith("from .") and new.startswith("from .slimzoo_") for old, new in differing)


def copied_bundler(folder: Path, line: str):
    """The bundler of a copy of the package, called folder.name, in which layers/armor.py has one more line."""
    package = sys.modules[folder.name] = types.ModuleType(folder.name)  # its __init__ would register classes
    package.__path__ = [str(shutil.copytree(Path(zoo.__file__).parent, folder / "zoo"))]
    with (folder / "zoo" / "layers" / "armor.py").open("a") as file:
        file.write(f"\n{line}\n")
    return importlib.import_module(f"{folder.name}.bundle")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import yaml", "layers.armor imports yaml"),
        ("def f():\n    import yaml", "layers.armor imports yaml"),
        ("from . import bitmask", "layers.armor, line .*: only `from .module import name`"),
        ("from ....outside import x", "layers.armor, line .*: only `from .module import name`"),
        ('text = """\nfrom .elsewhere import x\n"""', "layers.armor has text that transformers mistakes for an import"),
    ],
)
def test_bundle_refuses_what_would_not_load_elsewhere(tmp_path, line, message):
    bundler = copied_bundler(tmp_path, line)
    with pytest.raises(ImportError, match=message):
        bundler.write_bundle(tmp_path, f"{tmp_path.name}.models.llama")


def test_bundle_allows_guarded_imports(tmp_path):
    bundler = copied_bundler(tmp_path, "try:\n    import yaml\nexcept ImportError:\n    yaml = None")
    assert bundler.write_bundle(tmp_path, f"{tmp_path.name}.models.llama")


def test_bundle_carries_every_kernel_source(checkpoint):
    spec = importlib.util.spec_from_file_location("carried", checkpoint / "slimzoo_kernels_sources.py")
    carried = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(carried)
    kernels = Path(zoo.__file__).parent / "kernels"
    wanted = {path.relative_to(kernels).as_posix(): path.read_text() for path in kernels.rglob("*.[ch]pp")}
    assert wanted and wanted == {path: carried.source(path) for path in carried.all_sources()}
