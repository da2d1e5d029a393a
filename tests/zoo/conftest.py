"""Fixtures of the tests of kernels."""

import pytest

from zoo.kernels import build


@pytest.fixture
def simd(monkeypatch):
    """choose(name) makes the kernels use that level of SIMD for the rest of the test."""

    def choose(name):
        monkeypatch.setenv("SLIMZOO_SIMD", name)
        build.level.cache_clear()

    yield choose
    monkeypatch.undo()
    build.level.cache_clear()
