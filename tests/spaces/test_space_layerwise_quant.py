"""The layer-wise quantisation Space in a real browser: slider, sizes, both answers, bounds."""

import json
import re

import pytest
from conftest import made, served
from playwright.sync_api import expect
from tiny_models import make_base

pytestmark = pytest.mark.slow

SMALL = [
    "--nsamples",
    "8",
    "--seqlen",
    "48",
    "--group_size",
    "32",
    "--eval_windows",
    "2",
    "--eval_seqlen",
    "64",
    "--tasks",
    "none",
    "--curve_points",
    "1",
    "--head_bits",
    "6",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("space") / "base", num_hidden_layers=4)
    return made("layerwise-quant", base, base.parent / "checkpoint", *SMALL, "--baselines", "reversed")


@pytest.fixture(scope="module")
def space(checkpoint):
    with served("layerwise-quant", checkpoint, "--dense", str(checkpoint.parent / "base")) as url:
        yield url


def slide(page, value):
    page.locator("#bits input[type=number]").fill(str(value))
    page.locator("#bits input[type=number]").press("Enter")


def answers(page):
    page.locator("#generate").click()
    for side in ("dense", "packed"):
        expect(page.locator(f"#{side}-figures")).to_contain_text(re.compile(r"\d tokens/s.*MB weights"), timeout=60000)
        expect(page.locator(f"#{side}-text textarea")).not_to_have_value("", timeout=60000)


def test_the_checkpoint_answers_at_its_own_average(page, checkpoint):
    size = json.loads((checkpoint / "report.json").read_text())["size"]["compressed_bytes"]
    expect(page.locator("#facts")).to_contain_text("This is the checkpoint itself")
    expect(page.locator("#facts")).to_contain_text(f"3.50 bits: {size / 1e6:.0f} MB")
    page.locator("#prompt textarea").fill("abc")
    answers(page)
    expect(page.locator("#curve img")).to_be_visible()


def test_any_other_average_is_rounded_on_the_spot(page):
    slide(page, 2.5)
    expect(page.locator("#facts")).to_contain_text("2.50 bits", timeout=20000)
    expect(page.locator("#facts")).to_contain_text("2 of 4 blocks at 2 bits, the others at 3")
    expect(page.locator("#facts")).to_contain_text("rounded to nearest here and now")
    page.locator("#prompt textarea").fill("abc")
    answers(page)


def test_an_empty_prompt_is_answered_with_a_sentence(page):
    page.locator("#prompt textarea").fill("   ")
    page.locator("#generate").click()
    expect(page.get_by_text("The prompt is empty")).to_be_visible(timeout=20000)
