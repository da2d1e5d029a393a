"""The LPViT Space in a real browser: an image, both answers, the blocks, bad files."""

import json
import re

import pytest
import torch
from conftest import CHANNELS, paint, run_recipe, served
from PIL import Image
from playwright.sync_api import expect
from transformers import ConvNextImageProcessorPil, ViTConfig, ViTForImageClassification

pytestmark = pytest.mark.slow

SMALL = [
    "--nsamples",
    "12",
    "--curve_samples",
    "8",
    "--rounds",
    "2",
    "--block",
    "8",
    "--seeds",
    "1",
    "--densities",
    "1",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("lpvit")
    paint(root / "images" / "train", 10)
    paint(root / "images" / "test", 4)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**shape, image_size=16, patch_size=4, id2label=dict(enumerate(sorted(CHANNELS))))
    ViTForImageClassification(config).save_pretrained(root / "base")
    ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(root / "base")
    flags = ["--model", root / "base", "--dataset", root / "images", "--output", root / "pruned", "--baselines", "none"]
    run_recipe("lpvit", *SMALL, *flags, "--eval", "accuracy")
    return root / "pruned"


@pytest.fixture(scope="module")
def space(checkpoint):
    with served("lpvit", checkpoint, "--dense", str(checkpoint.parent / "base")) as url:
        yield url


def send(page, file):
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(str(file))


def test_both_models_answer_an_image(page, tmp_path):
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "red.png")
    send(page, tmp_path / "red.png")
    for name in ("dense", "pruned"):
        expect(page.locator(f"#{name}-time")).to_contain_text(re.compile(r"\d ms"), timeout=60000)
        expect(page.locator(f"#{name}")).to_contain_text(re.compile("|".join(CHANNELS)))


def test_blocks_and_costs_are_shown(page, checkpoint):
    report = json.loads((checkpoint / "report.json").read_text())
    expect(page.locator("#facts")).to_contain_text("energy of the pruned layers, modelled")
    row = report["tables"]["Cost of an image"]["rows"][0]
    expect(page.locator("#facts")).to_contain_text(f"{row[0]}: {row[2]:.4g}, dense {row[1]:.4g}")
    expect(page.locator("#masks img")).to_be_visible(timeout=30000)


@pytest.mark.parametrize("content", [b"this is no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_bad_file_is_answered_with_a_sentence(page, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    send(page, tmp_path / "bad.png")
    expect(page.get_by_text("The file is not an image that can be read")).to_be_visible(timeout=30000)


def test_an_image_of_too_many_pixels_is_refused(page, tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    send(page, tmp_path / "large.png")
    expect(page.get_by_text("5000 x 5000 pixels; at most")).to_be_visible(timeout=30000)
