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
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "zoo", "recipes", "model_cards/*.*"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


SESSION = """
import json, sys
from launching import RECIPES, run
for command in json.loads(sys.argv[1]):
    done = run([*RECIPES, *command])
    print(json.dumps([done.returncode, done.stdout, done.stderr]))
"""


def session(tree, *commands):
    """[exit code, output, errors] of each `python -m recipes` command, given one after the other in the tree."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), str(ROOT / "tests" / "helpers")])
    arguments = [sys.executable, "-c", SESSION, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_recipe_of_the_readme_refuses_trains_packs_reports_and_loads(tree):
    command = ["magnitude", "--dataset", "images", *FLAGS]
    refused, listed, made, verified = session(
        tree,
        [*command, "--density", "2", "--output", "wrong"],
        ["--list"],
        [*command, "--density", "0.3"],
        ["verify", "runs/magnitude"],
    )
    assert refused[0] == 2 and "--density 2.0: a fraction between 0 and 1" in refused[2]
    assert not list(tree.glob("wrong*")) and "magnitude" in listed[1].split()
    assert made[0] == 0, made[2]
    output = tree / "runs" / "magnitude"
    assert made[1].splitlines()[-1] == "runs/magnitude" and (tree / "runs" / "magnitude-dense").is_dir()
    report = json.loads((output / "report.json").read_text())
    kept = sum(row["nnz"] for row in report["layers"]) / sum(row["d_out"] * row["d_in"] for row in report["layers"])
    assert abs(kept - 0.3) < 0.005 and report["compressed"]["accuracy"]["n_of"] == "seeds"
    assert report["size"]["compressed_bytes"] < 0.6 * report["size"]["dense_bytes"]
    assert "The smallest weights of a trained network are gone" in (output / "README.md").read_text()
    assert verified[0] == 0, verified
    loaded = subprocess.run(  # -I: nothing of this tree can be imported
        [sys.executable, "-I", "-c", LOAD, output], capture_output=True, text=True, cwd=tree
    )
    assert loaded.returncode == 0 and loaded.stdout.startswith("BitmaskLinear"), loaded.stderr


@pytest.mark.slow
def test_the_language_recipe_of_the_readme_compresses_reports_and_loads(tree):
    make_base(tree / "base", "llama")
    (tree / "text.txt").write_text("some plain words to calibrate on " * 60)
    flags = ["--model", "base", "--calibration", "text.txt", "--nsamples", "4", "--seqlen", "32", "--tasks", "none"]
    flags += ["--eval_windows", "1", "--eval_seqlen", "64", "--dtype", "float32"]
    steps = session(tree, ["halves", *flags], ["verify", "runs/halves"], ["export", "runs/halves", "dense"])
    for code, out, errors in steps:
        assert code == 0, out + errors
    packed = load_file(tree / "runs" / "halves" / "model.safetensors")
    dense, kept = (load_file(tree / folder / "model.safetensors") for folder in ("base", "dense"))
    name = "model.layers.1.mlp.down_proj"
    offsets, weight, kept = packed[f"{name}.row_offsets"], dense[f"{name}.weight"], kept[f"{name}.weight"]
    assert offsets.diff().tolist() == [weight.shape[1] // 2] * len(weight)
    assert set(packed[f"{name}.values"][: offsets[1]].tolist()) <= set(weight[0].tolist())
    assert (kept != 0).sum() == offsets[-1] and torch.equal(kept[kept != 0], weight.bfloat16()[kept != 0])
