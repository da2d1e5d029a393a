"""The KVTuner Space in a real browser: both caches answer, their bytes grow, what is too long gets a sentence."""

import re

import pytest
from conftest import made, served
from playwright.sync_api import expect
from tiny_models import make_base

pytestmark = pytest.mark.slow

SMALL = [
    "--nsamples",
    "2",
    "--calib_samples",
    "2",
    "--seqlen",
    "48",
    "--eval_windows",
    "1",
    "--eval_seqlen",
    "64",
    "--retrieval_items",
    "0",
    "--evals",
    "16",
]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("space") / "base", head_dim=32, max_position_embeddings=512)
    more = ["--population", "8", "--speed_tokens", "0", "--baselines", "KV4"]
    folder = made("kvtuner", base, base.parent / "checkpoint", *SMALL, *more)
    with served("kvtuner", folder) as url:
        yield url


def megabytes(page, side):
    figures = page.locator(f"#{side}-figures").inner_text()
    return float(re.search(r"([\d.]+) MB cache", figures).group(1))


def test_both_caches_answer_and_the_packed_one_is_smaller(page):
    page.locator("#document textarea").fill("a long document " * 25)
    page.locator("#question textarea, #question input").first.fill("what is it")
    page.locator("#ask").click()
    for side in ("dense", "tuned"):
        expect(page.locator(f"#{side}-figures")).to_contain_text(re.compile(r"\d tokens/s.*MB cache"), timeout=60000)
    expect(page.locator("#growth img")).to_be_visible(timeout=60000)
    assert megabytes(page, "tuned") < 0.6 * megabytes(page, "dense")


def test_a_document_over_the_models_limit_gets_a_sentence(page):
    page.locator("#document textarea").fill("a long document " * 60)
    page.locator("#ask").click()
    expect(page.get_by_text(re.compile(r"tokens; the model reads 512"))).to_be_visible(timeout=20000)


def test_an_empty_question_gets_a_sentence(page):
    page.locator("#question textarea, #question input").first.fill("  ")
    page.locator("#ask").click()
    expect(page.get_by_text("The question is empty")).to_be_visible(timeout=20000)
