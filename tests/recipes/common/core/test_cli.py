"""What a user may type and feed: a seeded fuzz of the command line, and the odd folders and files that were found.

Whatever is typed, the exit code is 0 or 2; of a refusal nothing is left on disk and one sentence is said. SLIMZOO_LONG=1
tries many more lines, and carries those that are not refused out to the end.
"""

import json
import os
import random
import re
import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import get_origin

import datasets
import huggingface_hub
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import make_base
from transformers import ConvNextImageProcessorPil, ViTConfig, ViTForImageClassification

from recipes.common.core import cli
from recipes.common.core.cli import main, recipe_class, recipe_names
from recipes.common.core.flags import kind, types_of
from recipes.common.core.run import begin
from recipes.common.data import texts
from recipes.common.domains import classification, language
from recipes.common.export import EXPORTS

LONG = os.environ.get("SLIMZOO_LONG") == "1"
LINES = 240 if LONG else 36
LANGUAGE = [
    *("--model", "{root}/base", "--calibration", "{root}/plain.txt", "--nsamples", "4", "--seqlen", "48"),
    *("--eval_windows", "1", "--eval_seqlen", "64", "--tasks", "none"),
]
IMAGES = ["--dataset", "{root}/images", "--epochs", "1", "--batch_size", "16", "--seeds", "1", "--eval", "accuracy"]
TINY = {
    "armor": [*LANGUAGE, "--block", "16", "--iters", "2", "--baselines", "wanda"],
    "kvtuner": [
        *(*LANGUAGE, "--nsamples", "2", "--calib_samples", "2", "--retrieval_items", "0", "--speed_tokens", "0"),
        *("--evals", "24", "--population", "8", "--baselines", "none"),
    ],
    "layerwise-quant": [*LANGUAGE, "--group_size", "32", "--curve_points", "0", "--baselines", "none"],
    "lpvit": [
        *(*IMAGES, "--model", "{root}/vit", "--block", "8", "--nsamples", "8", "--curve_samples", "8", "--rounds", "1"),
        *("--warmup_epochs", "0", "--densities", "1", "--baselines", "none"),
    ],
    "precropping": [*IMAGES, "--model", "resnet-8", "--baselines", "none"],
    "random-pruning": [
        *(*IMAGES, "--model", "resnet-8-8", "--image_size", "16", "--density", "0.2", "--baselines", "none"),
        *("--more_models", "none", "--more_densities", "0"),
    ],
}
NUMBERS = ["-1", "0", "1", "2", "3", "0.5", "1e30", "nan", "inf", "many", "", str(10**30), "1_0"]
WORDS = [
    "",
    "x",
    "(",
    "[",
    "none",
    "no/such",
    "x" * 300,
    "a\0b",
    "é",
    "-",
    "../x",
    "a b",
    "{root}",
    "{root}/plain.txt",
    "*",
]
NAMES = {"tasks": ["none", "", "a\0b", "step_inference"]}  # others are looked up among lm-eval's, which takes a while
FED = {  # what flags that take files and folders are fed
    "model": [
        "{root}/no-tokenizer",
        "{root}/no-architectures",
        "{root}/vit",
        "{root}/images",
        "resnet-99",
        "resnet-8-99999",
    ],
    "calibration": [
        "{root}/nul.txt",
        "{root}/chats.jsonl",
        "{root}/table.csv",
        "{root}",
        "{root}/odd.json",
        "{root}/short.txt",
    ],
    "dataset": ["{root}/broken", "{root}/base", "{root}/one-class", "{root}/plain.txt"],
    "config": ["{root}/list.yaml", "{root}/plain.txt", "{root}/twice.yaml", "{root}", "{root}/good.yaml"],
    "include": ["layers.0", "nothing", "(a+)+$"],
    "load_table": ["{root}/list.yaml", "{root}/good.yaml", "{root}/odd.json"],
    "energy_table": ["{root}/list.yaml", "{root}/odd.json"],
    "importance": ["{root}/odd.json", "{root}/scores.json", "depth", "sensitivity"],
    "device": ["banana", "cuda", "cuda:99", "mps", "meta", "cpu", "CPU"],
    "push_to_hub": ["notarepo", "a/b/c", "org/na me"],
    "output": ["x" * 300, "x" * 130, "{root}/plain.txt/below", "", "/proc/none"],
    "export": ["dense", "onnx", "gguf-f16", "compressed-tensors"],
    "objective": ["kl", "os:getcwd", "no:where", "builtins:len", "ppl"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models, images and texts, and odd ones beside them."""
    root = tmp_path_factory.mktemp("root")
    (root / "plain.txt").write_text("a quick test of what the command line does with some plain words " * 400)
    (root / "short.txt").write_text("short")
    (root / "nul.txt").write_bytes(b"\0" * 5000)
    (root / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    (root / "table.csv").write_text("text,id\n" + "".join(f"some words of row {i},{i}\n" for i in range(200)))
    (root / "odd.json").write_text('{"layers": [[4, NaN]], "0": {"nbits_key": 1e400}}')
    (root / "scores.json").write_text("[1, 2]")
    (root / "list.yaml").write_text("- 1")
    (root / "twice.yaml").write_text("seed: 1\nseed: 2")
    (root / "good.yaml").write_text("seed: 1")
    base = make_base(root / "base", "llama", num_hidden_layers=2, head_dim=32)
    for name in ("no-tokenizer", "no-architectures"):
        shutil.copytree(base, root / name)
    for file in (root / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    edit_config(root / "no-architectures", architectures=None)
    torch.manual_seed(0)
    draw_images(root / "images")
    draw_images(root / "broken")
    file = next((root / "broken" / "train").rglob("7.png"))
    file.write_bytes(file.read_bytes()[:70])
    draw_images(root / "one-class", ["red"])
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**shape, image_size=16, patch_size=8, id2label={0: "green", 1: "red"})
    ViTForImageClassification(config).save_pretrained(root / "vit")
    ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(root / "vit")
    return root


def draw_images(folder: Path, names=("green", "red")) -> None:
    for split, count in (("train", 16), ("validation", 4), ("test", 6)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
                pixels[..., names.index(name)] = 200
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@cache
def beginning(name: str) -> texts.Text:
    return texts._text(name, "1", None, texts.load_text(name).text[:20_000])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No Hub, whose absence takes a minute to show, and of the held-out texts the beginnings."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(name: str, **options) -> texts.Text:
        return beginning(name) if name in ("A", "B", "C") else texts.load_text(name, **options)

    monkeypatch.setattr(language, "load_text", load)


def attempt(arguments: list[str], folder: Path, capsys) -> str:
    """What the command says of its refusal, empty if it is none; fails for anything that a user should not see."""
    before = sorted(folder.rglob("*"))
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 2, arguments
        said = capsys.readouterr().err.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert said[-1:] == errors and said[-1].endswith(".") and len(said[-1]) < 700, (arguments, said)
        assert sorted(folder.rglob("*")) == before, (arguments, "something was left")
        return said[-1]
    except BaseException as error:
        raise AssertionError(arguments, capsys.readouterr().err[-300:]) from error
    capsys.readouterr()
    return ""


def line(draw: random.Random) -> list[str]:
    """A command that works but for one to three flags."""
    name = draw.choice(recipe_names())
    cls, arguments = recipe_class(name), []
    flags = [f.name for f in fields(cls) if f.name != "output"] + ["config"]
    for flag in draw.sample(flags, draw.choice([1, 1, 2, 3])):
        hint = types_of(cls).get(flag, str)
        pool = NAMES.get(flag) or [*FED.get(flag, []), *(NUMBERS if kind(hint) in (int, float) else WORDS)]
        pool += [str(choice) for f in fields(cls) if f.name == flag for choice in f.metadata.get("choices", [])]
        count = draw.choice([0, 1, 1, 2]) if get_origin(hint) is list else 1
        values = [] if kind(hint) is bool else [draw.choice(pool) for _ in range(count)]
        arguments += [f"--{flag}", *values]
    output = draw.choice(FED["output"]) if draw.random() < 0.1 else "out"
    return [name, *TINY[name], *arguments, "--output", output]


@pytest.mark.parametrize("number", range(LINES))
def test_any_command_line_is_carried_out_or_refused_in_a_sentence(root, tmp_path, capsys, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    for domain in (language.Language, classification.Classification):
        monkeypatch.setattr(domain, "speed", lambda *_: {})  # of all that a run does this takes longest
    if not LONG:
        monkeypatch.setattr(cli, "execute", lambda recipe: None if begin(recipe) else None)
    attempt([part.replace("{root}", str(root)) for part in line(random.Random(number))], tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_the_lines_that_are_varied_are_accepted(root, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "execute", lambda recipe: None if begin(recipe) else None)
    assert attempt([name, *(part.replace("{root}", str(root)) for part in TINY[name])], tmp_path, capsys) == ""


# -------------------------------------------------------------------------------------------------- odd base models


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def empty_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.write_text("{}")


def tokenizer_of_another(folder):
    edit_config(folder, vocab_size=100, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-8].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_head(folder):
    edit_config(folder, tie_word_embeddings=False)


def no_architectures(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def another_head(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])


def no_attention(folder):
    edit_config(folder, num_attention_heads=0)


def odd_sizes(folder):
    edit_config(folder, hidden_size=-64)


@pytest.mark.parametrize("name", ["armor", "kvtuner", "layerwise-quant"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_tokenizer, "holds no tokenizer that can be read|its tokenizer knows no words"),
        (empty_tokenizer, "holds no tokenizer that can be read|its tokenizer knows no words"),
        (tokenizer_of_another, r"its tokenizer gives the token \d+, the model knows 100"),
        (wrong_shape, r"up_proj.weight.*\[88, 64\].*\[96, 64\]"),
        (no_head, "lm_head.weight is missing"),
        (no_architectures, "names no architectures"),
        (another_head, "LlamaForSequenceClassification"),
        (no_attention, "config.json"),
        (odd_sizes, "config.json"),
    ],
)
def test_an_odd_base_model_is_refused_before_any_work(root, tmp_path, capsys, monkeypatch, name, damage, says):
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    damage(base)
    monkeypatch.chdir(tmp_path)
    line = [part.replace("{root}/base", str(base)).replace("{root}", str(root)) for part in [name, *TINY[name]]]
    said = attempt(line, tmp_path, capsys)
    assert re.search(says, said), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--dataset", "{root}/broken"], "cannot be decoded"),
        (["--dataset", "{root}/one-class"], "class labels"),
        (["--image_size", "1000000"], "--image_size 1000000: a whole number from 1 to 1,024"),
        (["--model", "resnet-20-99999"], "no such depth or width"),
        (["--model", "resnet-600002"], "no such depth or width"),
        (["--model", "mobilenet-v2-999"], "no such depth or width"),
        (["--warmup_epochs", "99"], "--warmup_epochs 99.0: fewer than --epochs 1 are needed"),
        (["--lr", "1e30"], "--lr 1e+30"),
        (["--revision", "main"], "--revision main: of --model resnet-8"),
    ],
)
@pytest.mark.parametrize("name", ["precropping", "random-pruning"])
def test_odd_images_and_networks_are_refused_before_any_work(root, tmp_path, capsys, monkeypatch, name, changes, says):
    monkeypatch.chdir(tmp_path)
    said = attempt([part.replace("{root}", str(root)) for part in [name, *TINY[name], *changes]], tmp_path, capsys)
    assert says in said


@pytest.mark.slow
def test_lpvit_refuses_them_too(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "vit", tmp_path / "vit")
    tensors = load_file(tmp_path / "vit" / "model.safetensors")
    tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    line = [part.replace("{root}", str(root)) for part in ["lpvit", *TINY["lpvit"]]]
    assert "cannot be decoded" in attempt([*line, "--dataset", str(root / "broken")], tmp_path, capsys)
    assert "classifier.weight is missing" in attempt([*line, "--model", str(tmp_path / "vit")], tmp_path, capsys)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", ["Mystery"]])
def test_an_export_of_a_folder_of_no_known_architecture_is_refused(root, tmp_path, capsys, kind, architectures):
    shutil.copytree(root / "base", tmp_path / "base")
    edit_config(tmp_path / "base", architectures=architectures)
    said = attempt(["export", str(tmp_path / "base"), str(tmp_path / "out"), "--format", kind], tmp_path, capsys)
    assert said.startswith(f"error: {tmp_path / 'base'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precropping", "random-pruning", "lpvit"])
def test_too_little_memory_is_told_before_any_is_taken(root, tmp_path, capsys, monkeypatch, name):
    def taken(*_):
        raise AssertionError("a step was tried")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    monkeypatch.setattr(torch.Tensor, "backward", taken)
    said = attempt([part.replace("{root}", str(root)) for part in [name, *TINY[name]]], tmp_path, capsys)
    assert "GiB of memory are needed, 0.5 GiB are free" in said
