"""The Space of random-pruning and precropping in a real browser: an image, both pairs of answers, bad files, plots."""

import re

import pytest
from conftest import paint, run_recipe, served
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

SMALL = ["--image_size", "16", "--epochs", "1", "--batch_size", "16", "--seeds", "1", "--eval", "accuracy"]
FLAGS = {
    "random-pruning": ["--model", "resnet-8-4", "--density", "0.3", "--more_densities", "0", "--more_models", "none"],
    "precropping": ["--model", "resnet-8-8"],
}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    root = tmp_path_factory.mktemp("pruning")
    paint(root / "images" / "train", 20)
    paint(root / "images" / "test", 6)
    folders = []
    for recipe, flags in FLAGS.items():
        folders.append(root / recipe)
        flags = [*flags, "--dataset", root / "images", "--output", folders[-1], "--baselines", "none"]
        run_recipe(recipe, *SMALL, *flags)
    with served("pruning-at-init", *folders) as url:
        yield url


def send(page, file):
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(str(file))


def test_both_pairs_answer_an_image(page, tmp_path):
    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "red.png")
    send(page, tmp_path / "red.png")
    for recipe in FLAGS:
        for name in ("dense", recipe):
            expect(page.locator(f"#{recipe}-{name}-time")).to_contain_text(re.compile(r"\d ms"), timeout=60000)
            expect(page.locator(f"#{recipe}-{name}")).to_contain_text("red")


def test_architecture_and_report_are_shown(page):
    for recipe in FLAGS:
        page.get_by_role("tab", name=recipe).click()
        expect(page.locator(f"#{recipe}-facts")).to_contain_text("accuracy")
        expect(page.locator(f"#{recipe}-architecture img")).to_be_visible(timeout=30000)


@pytest.mark.parametrize("content", [b"this is no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_bad_file_is_answered_with_a_sentence(page, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    send(page, tmp_path / "bad.png")
    expect(page.get_by_text("The file is not an image that can be read")).to_be_visible(timeout=30000)
