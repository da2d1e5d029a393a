"""A Space served on loopback, and a browser to look at it."""

import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browser import MISSING, find
from PIL import Image
from playwright.sync_api import sync_playwright

from zoo.record.hub import assemble_space

ROOT = Path(__file__).parents[2]
CHANNELS = ("red", "green", "blue")  # and classes of the painted images
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@contextmanager
def served(name: str, folder: Path, *arguments: str | Path) -> Iterator[str]:
    """The URL of spaces/<name> as it is published, started offline on the checkpoint `folder`; `arguments` follow it.

    Without `site` our editable install is not seen: the Space has only what it brings.
    """
    space = assemble_space(ROOT / "spaces" / name, folder.parent / "space")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | OFFLINE | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment |= {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    command = [sys.executable, "-S", "app.py", "--checkpoint", *map(str, (folder, *arguments))]
    log = (folder.parent / "log").open("w")
    process = subprocess.Popen(command, cwd=space, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert process.poll() is None, (folder.parent / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def made(recipe: str, base: Path, output: Path, *flags: str) -> Path:
    """A checkpoint made from a tiny language model by the recipe's own command."""
    text = base.parent / "calibration.txt"
    text.write_text("a quick test of how the recipe runs from start to end with some plain words " * 60)
    run_recipe(recipe, "--model", base, "--calibration", text, "--output", output, *flags)
    return output


def run_recipe(recipe: str, *flags: str | Path) -> None:
    """The recipe's own command, offline."""
    command = [sys.executable, "-m", "recipes", recipe, *map(str, flags)]
    process = subprocess.run(command, env=os.environ | OFFLINE, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def paint(folder: Path, count: int) -> None:
    """Images of one bright channel, which names the class."""
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(CHANNELS):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 90, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")


@pytest.fixture(scope="session")
def browser():
    chromium = find() or pytest.skip(MISSING)
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
