"""The ARMOR Space in a real browser: it starts offline on a local checkpoint, streams both answers and bounds its input."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "zoo"))
from example_report import write_run  # noqa: E402


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The Space's URL, serving a tiny checkpoint with a full report."""
    folder = tmp_path_factory.mktemp("space") / "checkpoint"
    write_run(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    dense = folder.parent / f"base-{folder.name}"
    command = [sys.executable, "spaces/armor/app.py", "--checkpoint", str(folder), "--dense", str(dense)]
    log = (folder.parent / "log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (folder.parent / "log").read_text()
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "the test needs a Chromium browser: install Debian's package chromium"
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, space):
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.goto(space)
    yield page
    page.close()


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
