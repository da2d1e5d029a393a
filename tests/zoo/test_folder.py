"""The reader of checkpoint folders: packed and stock ones, of language models and of image classifiers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import Packing, make_base
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
)

from zoo.checkpoint import save_checkpoint
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.models import slim_class_for


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    return Packing(base, "2:4").write(tmp_path_factory.mktemp("packed") / "slim", dtype=torch.bfloat16)


def tiny_resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes)).eval()


def packed_resnet(folder):
    """The tiny ResNet with half of every convolution gone, and the dense model that it amounts to."""
    dense, modules, tensors = tiny_resnet(), {}, {}
    for name, conv in dense.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.data *= torch.rand(conv.weight.shape) < 0.5
            matrix = conv.weight.data.flatten(1)
            parts = dict(zip(("values", "mask", "row_offsets"), pack_bitmask(matrix), strict=True))
            modules[name] = {"format": "bitmask", "nnz": len(parts["values"])}
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    model_class = slim_class_for("resnet", "AutoModelForImageClassification")
    compression = {"format_version": 1, "modules": modules}
    settings = {
        key: value for key, value in dense.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    model = model_class(model_class.config_class.from_dict(settings | {"compression_config": compression}))
    state = {key: value for key, value in dense.state_dict().items() if key.rpartition(".")[0] not in modules}
    model.load_state_dict(state | tensors)
    return save_checkpoint(folder, model, extra_files={}), dense


def test_a_packed_folder_says_what_it_holds(base, packed):
    folder = open_folder(str(packed))
    assert folder.auto_class == "AutoModelForCausalLM" and folder.files == [packed / "model.safetensors"]
    assert folder.config["model_type"] == "slim_llama" and folder.compression["method"] == "2:4"
    assert len(folder.modules) == 14 and all(spec["format"] == "bitmask" for spec in folder.modules.values())
    name = next(iter(folder.modules))
    assert folder.parts(name).keys() == {"values", "mask"}
    assert folder.tensors.dtype(f"{name}.mask") is torch.uint8
    assert folder.tensors.shape(f"{name}.values") == list(folder.tensors[f"{name}.values"].shape)
    stored = dict(folder.stored_tensors())
    assert stored[f"{name}.weight"].keys() == {"values", "mask"} and f"{name}.values" not in stored
    stock = folder.stock_config()
    assert (stock["model_type"], stock["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not stock.keys() & {"auto_map", "compression_config"}


def test_a_stock_folder_is_its_own_dense_model(base):
    folder = open_folder(base)
    assert folder.compression == folder.modules == {} and folder.auto_class == "AutoModelForCausalLM"
    numbers = sum(folder.tensors[name].numel() for name in folder.tensors)
    assert folder.sizes() == {
        "parameters": numbers,
        "dense_bytes": 4 * numbers,
        "nonzero": numbers,
        "compressed_bytes": 4 * numbers,
    }
    dense = dict(folder.dense_tensors())
    assert dense.keys() == set(folder.tensors) and all(torch.equal(dense[key], folder.tensors[key]) for key in dense)


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_stock_folder_of_fewer_blocks_is_read_as_it_is(tmp_path, dropped):
    base = make_base(tmp_path / "base", num_hidden_layers=3 - dropped)
    assert len({name.split(".")[2] for name in open_folder(base).tensors if ".layers." in name}) == 3 - dropped
    assert open_folder(base).empty_model.config.num_hidden_layers == 3 - dropped


def test_statistics_of_a_stock_image_model_are_stored_but_no_parameters(tmp_path):
    model = tiny_resnet()
    model.save_pretrained(tmp_path / "stock")
    folder, parameters = open_folder(tmp_path / "stock"), sum(p.numel() for p in model.parameters())
    assert folder.auto_class == "AutoModelForImageClassification" and folder.modules == {}
    sizes, buffers = folder.sizes(), list(model.buffers())
    assert sizes["parameters"] == parameters
    assert sizes["dense_bytes"] == sizes["compressed_bytes"] == 4 * parameters + sum(b.nbytes for b in buffers)
    assert sizes["nonzero"] == parameters + sum(b.numel() for b in buffers if b.is_floating_point())


def test_a_model_with_two_heads_has_an_auto_class(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes)).save_pretrained(tmp_path / "deit")
    folder = open_folder(tmp_path / "deit")
    assert folder.auto_class == "AutoModelForImageClassification"
    assert type(folder.empty_model) is DeiTForImageClassificationWithTeacher


def test_unstructured_convolutions_come_back_in_their_shape(tmp_path):
    path, dense = packed_resnet(tmp_path / "slim")
    folder = open_folder(path)
    assert folder.auto_class == "AutoModelForImageClassification" and folder.modules
    found, wanted = dict(folder.dense_tensors()), dense.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert folder.sizes()["parameters"] == sum(p.numel() for p in dense.parameters())
    AutoModelForImageClassification.from_pretrained(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "holds no readable config.json .it is no mapping"),
        (
            lambda folder: (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
            "config.json does not describe a model of its type",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}'),
            r"models of \['BertForMaskedLM'\] are unknown; one of AutoModelForCausalLM",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 9), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda folder: save_file(
                {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2)}, folder / "model.safetensors"
            ),
            "a is of type F64; F32, BF16, F16",
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path, change, message):
    folder = make_base(tmp_path / "base")
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        model = open_folder(folder)
        assert model.auto_class
        model.sizes()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_tensors_are_read_by_name_only(base):
    tensors = open_folder(base).tensors
    with pytest.raises(KeyError):
        tensors["model.nowhere.weight"]
    assert "model.nowhere.weight" not in tensors and tensors.get("model.nowhere.weight") is None


@pytest.mark.slow
def test_importing_zoo_loads_neither_card_nor_yaml_nor_gguf():
    """transformers imports yaml for itself: none of our modules may."""
    script = (
        "import sys, json, zoo\n"
        "ours = {name: sorted(vars(module)) for name, module in sys.modules.items() if name.split('.')[0] == 'zoo'}\n"
        "print(json.dumps([ours, 'gguf' in sys.modules, 'recipes' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours, gguf, recipes = json.loads(done.stdout)
    assert not gguf and not recipes and "zoo.record.card" not in ours
    assert {"zoo.registry", "zoo.record.schema", "zoo.record.format"} <= ours.keys()
    assert [name for name, names in ours.items() if "yaml" in names] == []


def test_a_new_head_of_another_size_is_started_as_in_transformers(tmp_path):
    path, _ = packed_resnet(tmp_path / "slim")
    with pytest.raises(
        UserError, match=r"classifier\.1\.bias has shape \(3,\) instead of \(5,\).*=True starts it anew"
    ):
        AutoModelForImageClassification.from_pretrained(path, num_labels=5)
    found = AutoModelForImageClassification.from_pretrained(path, num_labels=5, ignore_mismatched_sizes=True)
    assert found.classifier[1].weight.shape == (5, 12) and found.classifier[1].weight.isfinite().all()
    same = AutoModelForImageClassification.from_pretrained(path)
    assert torch.equal(found.resnet(torch.ones(1, 3, 8, 8))[0], same.resnet(torch.ones(1, 3, 8, 8))[0])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_channels": 3 * 10**6}))
    with pytest.raises(UserError, match="has shape"):  # the rest must fit all the same
        AutoModelForImageClassification.from_pretrained(path, num_labels=5, ignore_mismatched_sizes=True)
