"""The peak memory of a process, here and as other systems tell it."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil

import recipes
import zoo
from recipes.common.metrics import memory


def test_the_peak_is_what_is_held_or_was():
    held = np.ones(2**26, dtype=np.uint8)
    resident = psutil.Process().memory_info().rss
    assert held.nbytes < resident <= 1.05 * memory.peak_rss_bytes() < psutil.virtual_memory().total


def test_windows_and_macos_tell_bytes(monkeypatch):
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform="win32"))
    peak = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: peak)
    monkeypatch.setitem(sys.modules, "resource", None)  # an import of it fails
    assert memory.peak_rss_bytes() == 123
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=456))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(memory, "Path", lambda name: Path("/nowhere"))
    for platform, wanted in (("darwin", 456), ("freebsd", 456 * 1024)):
        monkeypatch.setattr(memory, "sys", SimpleNamespace(platform=platform))
        assert memory.peak_rss_bytes() == wanted


def test_nothing_is_imported_at_load_that_windows_lacks():
    lacking = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
    for root in (Path(zoo.__file__).parent, Path(recipes.__file__).parent):
        for file in root.rglob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not lacking & set(names), file
