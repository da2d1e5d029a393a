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
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_SETTINGS, Packing, make_base
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

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
        (truncate, "a weights file cannot be read"),
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
