"""The browser of the Spaces' tests. `python tests/helpers/browser.py` gets one if there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MISSING = (
    "no browser: the tests in tests/spaces that open a page are skipped; install Chromium or Chrome, "
    "or run `python -m playwright install --with-deps chromium`"
)


def find() -> str | None:
    """Path of a browser of this system, else of Playwright's own, else None."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def works(path: str | None) -> bool:
    """Whether it starts: Playwright's lacks libraries on some systems."""
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"]
    try:
        return path is not None and subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install() -> bool:
    """Gets Playwright's Chromium, or where its host cannot be reached the distribution's; True if one works."""
    ways = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        ways.append(
            [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", NAMES[0]]]
        )
    for way in ways:
        try:
            done = all(subprocess.run(step, capture_output=True, timeout=600).returncode == 0 for step in way)
        except subprocess.TimeoutExpired:
            continue
        if done and works(find()):
            return True
    return False


if __name__ == "__main__":
    if not works(find()) and not install():
        print(MISSING)
