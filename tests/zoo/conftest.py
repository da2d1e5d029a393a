"""Fixtures of the tests of kernels."""

import pytest

from zoo.kernels import libraries


@pytest.fixture
def simd(monkeypatch):
    """choose(name) makes the kernels use that level of SIMD for the rest of the test."""

    def choose(name):
        monkeypatch.setenv("SLIMZOO_SIMD", name)
        libraries.level.cache_clear()

    yield choose
    monkeypatch.undo()
    libraries.level.cache_clear()
