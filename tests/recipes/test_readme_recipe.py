"""What the README says of writing a recipe is true: its own text, put into a copy of this tree, trains, packs and loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_base

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--model",
    "resnet-8-4",
    "--epochs",
    "1",
    "--batch_size",
    "16",
    "--lr",
    "0.05",
    "--seeds",
    "2",
    "--attacked",
    "4",
]
LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from PIL import Image
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
pixels = AutoImageProcessor.from_pretrained(sys.argv[1])(Image.new("RGB", (16, 16)), return_tensors="pt").pixel_values
with torch.no_grad():
    assert model(pixels).logits.isfinite().all()
assert "zoo" not in sys.modules
layer = model.get_submodule("classifier.1")
print(type(layer).__name__, layer.values.numel())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the project needs to run, and in it the recipe and the card that the README shows."""
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "zoo", "recipes", "model_cards/*.*"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if (ROOT / name).is_file() and not name.endswith(("report.json", ".png")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    section = (ROOT / "README.md").read_text().partition("## Write a recipe")[2]
    codes = re.findall(r"```python\n(.*?)```", section, re.S)
    (card,) = re.findall(r"```markdown\n(.*?)```", section, re.S)
    for name, code in zip(("magnitude", "halves"), codes, strict=True):
        assert len(code.splitlines()) < 60
        (folder / "recipes" / f"{name}.py").write_text(code)
    (folder / "model_cards" / "magnitude.md").write_text(card)
    card = card.replace("image-classification", "text-generation").replace("$density", "a half")
    (folder / "model_cards" / "halves.md").write_text(card.replace("$epochs epochs", "once"))
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, colour in enumerate(((200, 60, 60), (60, 60, 200))):
            place = folder / "images" / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-50, 50, (16, 16, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


def run(tree, *arguments, path=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"PYTHONPATH": str(tree)} if path else {}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)


def test_the_recipe_of_the_readme_trains_packs_reports_and_loads(tree):
    made = run(tree, "-m", "recipes", "magnitude", "--dataset", "images", "--density", "0.3", *FLAGS)
    assert made.returncode == 0, made.stderr
    output = tree / "runs" / "magnitude"
    assert made.stdout.splitlines()[-1] == "runs/magnitude" and (tree / "runs" / "magnitude-dense").is_dir()
    report = json.loads((output / "report.json").read_text())
    kept = sum(row["nnz"] for row in report["layers"]) / sum(row["d_out"] * row["d_in"] for row in report["layers"])
    assert abs(kept - 0.3) < 0.005 and report["compressed"]["accuracy"]["n_of"] == "seeds"
    assert report["size"]["compressed_bytes"] < 0.6 * report["size"]["dense_bytes"]
    assert "The smallest weights of a trained network are gone" in (output / "README.md").read_text()
    verified = run(tree, "-m", "recipes", "verify", "runs/magnitude")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    loaded = run(tree, "-I", "-c", LOAD, str(output), path=False)  # -I: nothing of this tree can be imported
    assert loaded.returncode == 0 and loaded.stdout.startswith("BitmaskLinear"), loaded.stderr


def test_the_language_recipe_of_the_readme_compresses_reports_and_loads(tree):
    make_base(tree / "base", "llama")
    (tree / "text.txt").write_text("some plain words to calibrate on " * 60)
    flags = ["--model", "base", "--calibration", "text.txt", "--nsamples", "4", "--seqlen", "32", "--tasks", "none"]
    made = run(
        tree, "-m", "recipes", "halves", *flags, "--eval_windows", "1", "--eval_seqlen", "64", "--dtype", "float32"
    )
    assert made.returncode == 0, made.stderr
    output = tree / "runs" / "halves"
    packed, dense = load_file(output / "model.safetensors"), load_file(tree / "base" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    offsets, weight = packed[f"{name}.row_offsets"], dense[f"{name}.weight"]
    assert offsets.diff().tolist() == [weight.shape[1] // 2] * len(weight)
    assert set(packed[f"{name}.values"][: offsets[1]].tolist()) <= set(weight[0].tolist())
    verified = run(tree, "-m", "recipes", "verify", "runs/halves")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    exported = run(tree, "-m", "recipes", "export", "runs/halves", "dense")
    assert exported.returncode == 0, exported.stderr
    kept = load_file(tree / "dense" / "model.safetensors")[f"{name}.weight"]
    assert (kept != 0).sum() == offsets[-1] and torch.equal(kept[kept != 0], weight.bfloat16()[kept != 0])


def test_its_wrong_flags_are_refused_before_any_work(tree):
    refused = run(
        tree, "-m", "recipes", "magnitude", "--dataset", "images", "--density", "2", "--output", "wrong", *FLAGS
    )
    assert refused.returncode == 2 and "--density 2.0: a fraction between 0 and 1" in refused.stderr
    assert not list(tree.glob("wrong*"))
    card = tree / "model_cards" / "magnitude.md"
    card.rename(card.with_suffix(".aside"))
    refused = run(tree, "-m", "recipes", "magnitude", "--dataset", "images", "--output", "wrong", *FLAGS)
    card.with_suffix(".aside").rename(card)
    assert refused.returncode == 2 and "the card needs a file that says what magnitude does" in refused.stderr
    assert not list(tree.glob("wrong*"))
    assert "magnitude" in run(tree, "-m", "recipes", "--list").stdout.split()
