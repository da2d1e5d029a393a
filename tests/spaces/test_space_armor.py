"""The ARMOR Space in a real browser: it starts offline on a local checkpoint, streams both answers and bounds its input."""

import re

import pytest
from conftest import served
from example_report import write_run
from playwright.sync_api import expect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The Space's URL, serving a tiny checkpoint with a full report."""
    folder = tmp_path_factory.mktemp("space") / "checkpoint"
    write_run(folder)
    with served("armor", folder, "--dense", str(folder.parent / f"base-{folder.name}")) as url:
        yield url


def test_both_models_answer_side_by_side(page):
    page.locator("#prompt textarea").fill("abc")
    page.locator("#generate").click()
    for side in ("dense", "armor"):
        expect(page.locator(f"#{side}-figures")).to_contain_text(re.compile(r"\d tokens/s.*MB weights"), timeout=60000)
        expect(page.locator(f"#{side}-text textarea")).not_to_have_value("", timeout=60000)
    expect(page.locator("img").first).to_be_visible()


def test_an_empty_prompt_is_answered_with_a_sentence(page):
    page.locator("#prompt textarea").fill("   ")
    page.locator("#generate").click()
    expect(page.get_by_text("The prompt is empty")).to_be_visible(timeout=20000)


def test_the_prompt_cannot_be_longer_than_its_bound(page):
    assert page.locator("#prompt textarea").get_attribute("maxlength") == "2000"


def test_an_emptied_seed_is_answered_with_a_sentence(page):
    page.get_by_role("button", name="Options").click()
    page.locator("#seed input").fill("")
    page.locator("#generate").click()
    expect(page.get_by_text("Seed: a whole number from 0 to 4294967295 is needed.")).to_be_visible(timeout=20000)
