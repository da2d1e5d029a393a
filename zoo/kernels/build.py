"""Compiles the C++ kernels once per machine and loads them; without a compiler the torch reference runs instead.

One shared library per operation, in $SLIMZOO_CACHE (default: $XDG_CACHE_HOME/slimzoo or ~/.cache/slimzoo), named by the
hash of sources, compiler and flags. `python -m zoo.kernels.build` builds all of them ahead of first use.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from .sources import all_sources, source

logger = logging.get_logger(__name__)

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")  # in the order of enum Level


@functools.cache
def library(op: str) -> ctypes.CDLL | None:
    """The compiled kernels of `op` ("bitmask_linear", …), built at the first call; None when they cannot be built.

    Safe under concurrent first use: every process compiles into a file of its own and renames it into place.
    """
    compiler = find_compiler()
    if compiler is None:
        _warn_slow("no C++ compiler was found (set $CXX or install g++ or clang++)")
        return None
    texts = {path: source(path) for path in all_sources() if path == f"{op}/cpu.cpp" or path.endswith(".hpp")}
    key = hashlib.sha256(repr((sorted(texts.items()), compiler_version(compiler), FLAGS)).encode()).hexdigest()[:16]
    path = cache_folder() / f"{op}-{key}.so"
    try:
        if not is_whole(path):
            compile_library(compiler, texts, op, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        _warn_slow(f"{compiler} failed ({error.stderr.strip().splitlines()[:1]})")
    except OSError as error:
        _warn_slow(f"the kernels cannot be stored or loaded ({error})")
    return None


def is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of the rest: loading one that was cut short would kill the process."""
    content = path.read_bytes() if path.exists() else b""
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


def compile_library(compiler: str, texts: dict[str, str], op: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        for name, text in texts.items():
            file = Path(scratch, name)
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        built = Path(scratch, "kernels.so")
        command = [compiler, *FLAGS, f"-I{scratch}", str(Path(scratch, op, "cpu.cpp")), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(path)


def find_compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, candidates) if found), None)


@functools.cache
def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SLIMZOO_CACHE") or Path(base, "slimzoo"))


@functools.cache
def level() -> int:
    """The SIMD level in use, an index of LEVELS: the best of this machine, or $SLIMZOO_SIMD if that is lower."""
    best = library("bitmask_linear").slimzoo_level()
    wanted = os.environ.get("SLIMZOO_SIMD")
    if wanted and wanted not in LEVELS:
        raise ValueError(f"SLIMZOO_SIMD={wanted}: one of {', '.join(LEVELS)} is needed")
    return min(best, LEVELS.index(wanted)) if wanted else best


@functools.cache
def _warn_slow(reason: str) -> None:
    logger.warning(f"slimzoo runs compressed layers in plain torch, slower than dense: {reason}.")


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor, or null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype

if __name__ == "__main__":
    for path in all_sources():
        if path.endswith("/cpu.cpp"):
            library(path.partition("/")[0])
