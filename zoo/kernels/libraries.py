"""Compiles the C++ kernels once per machine and loads them; what cannot be compiled runs as the torch reference instead.

One shared library per operation, `<operation>-<sources>-<compiler>-<content>`, three digests, in the first of
`private_folders` that it can be stored in and loaded from; a library that is there is taken, where there is no compiler also
another compiler's. `python -m zoo.kernels.build` builds all of them ahead of first use.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from .sources import all_sources, source

logger = logging.get_logger(__name__)

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")  # in the order of enum Level
OPENMP = ("openmp", "-lomp", "-lgomp", "iomp5", "-Xclang")  # what is in a compiler's complaint that it is missing
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype


@functools.cache
def library(op: str) -> ctypes.CDLL | None:
    """The compiled kernels of `op` ("bitmask_linear", …), built at the first call; None when they cannot be built.

    Safe under concurrent first use: every process compiles into a file of its own and renames it into place.
    """
    compiler, stem = find_compiler(), f"{op}-{source_key(op)}"
    reason = "no folder that nobody else can write to was found for the kernels (name one in $SLIMZOO_CACHE)"
    if compiler is None:
        reason = f"no C++ compiler was found (set $CXX or install {' or '.join(compilers()[-2:])})"
    else:
        exact = f"{stem}-{compiler_key(compiler)}"
        for folder in private_folders():
            try:
                return stored(folder, exact) or ctypes.CDLL(str(compile_library(compiler, op, folder, exact)))
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(compiler)} failed on {op} ({error.stderr.strip().splitlines()[:1]})"
                break
            except OSError as error:  # full, not writable or mounted so that nothing in it runs: the next one
                reason = f"the kernels cannot be stored or loaded ({error})"
    found = next(filter(None, (stored(folder, stem) for folder in private_folders())), None)
    if found is None:
        _warn_slow(reason)
    return found


@functools.cache
def level(lib: ctypes.CDLL) -> int:
    """The SIMD level in use, an index of LEVELS: the best of this machine, or $SLIMZOO_SIMD if that is lower."""
    best = lib.slimzoo_level()
    wanted = os.environ.get("SLIMZOO_SIMD")
    if wanted and wanted not in LEVELS:
        raise ValueError(f"SLIMZOO_SIMD={wanted}: one of {', '.join(LEVELS)} is needed")
    return min(best, LEVELS.index(wanted)) if wanted else best


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor, or null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


# ------------------------------------------------------------------------------------------------------------ building


def operations() -> list[str]:
    """The operations that have C++ kernels."""
    return [path.partition("/")[0] for path in all_sources() if path.endswith("/cpu.cpp")]


def texts(op: str) -> dict[str, str]:
    """What `op` is compiled from: path -> text."""
    return {path: source(path) for path in all_sources() if path == f"{op}/cpu.cpp" or path.endswith(".hpp")}


def compile_library(compiler: tuple[str, ...], op: str, folder: Path, stem: str) -> Path:
    """Builds `op` and renames it into `folder`. Raises: CalledProcessError, with what the compiler said; OSError."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, text in texts(op).items():
            file = Path(scratch, name)
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        built = Path(scratch, f"built{suffix()}")
        command = [*compiler, *flags(), f"-I{scratch}", str(Path(scratch, op, "cpu.cpp")), "-o", str(built)]
        for threads in thread_flags():
            done = subprocess.run([*command, *threads], capture_output=True, text=True, errors="replace")
            if done.returncode == 0 or not any(word in done.stderr for word in OPENMP):
                break
        done.check_returncode()
        if not threads:
            _warn_once(f"slimzoo's kernels run on one thread: {' '.join(compiler)} has no OpenMP.")
        built.chmod(0o700)
        path = folder / f"{stem}-{digest(built.read_bytes())}{suffix()}"
        try:
            built.replace(path)
        except PermissionError:  # Windows: another process has built and loaded the same library
            if not path.exists():
                raise
        return path


def flags() -> tuple[str, ...]:
    """What every compiler gets. A DLL brings along what is not on each Windows machine; there is no -fPIC there."""
    return ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-static" if sys.platform == "win32" else "-fPIC")


def thread_flags() -> list[tuple[str, ...]]:
    """What asks for OpenMP, to be tried one after the other; the last, nothing, makes kernels for one thread.

    Apple's compiler comes without OpenMP's library, and two such libraries of LLVM end a process, on Windows too: there
    the one that torch has loaded is taken.
    """
    libraries = Path(torch.__file__).parent / "lib"
    if sys.platform == "win32":
        return [("-fopenmp=libiomp5", f"-L{libraries}"), ()]
    of_torch = ("-Xclang", "-fopenmp", f"-L{libraries}", "-lomp", f"-Wl,-rpath,{libraries}")
    return [*([of_torch] if sys.platform == "darwin" else []), ("-fopenmp",), ()]


def find_compiler() -> tuple[str, ...] | None:
    """The command that compiles: $CXX, which may be several words ("ccache g++"), or else the first compiler there is."""
    if named := os.environ.get("CXX", "").strip():
        commands = [[named]]  # a path may hold spaces
        with contextlib.suppress(ValueError):  # quotes without an end
            commands.append(shlex.split(named, posix=os.name != "nt"))
    else:
        commands = [[name] for name in compilers()]
    return next(((found, *words) for name, *words in commands if (found := shutil.which(name))), None)


def compilers() -> tuple[str, ...]:
    """Names to look for. On Windows g++ keeps vectors on a stack that may be misaligned for them."""
    return ("clang++",) if sys.platform == "win32" else ("c++", "g++", "clang++")


@functools.cache
def compiler_key(compiler: tuple[str, ...]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    return digest(repr((compiler, version)).encode())


def source_key(op: str) -> str:
    return digest(repr((sorted(texts(op).items()), flags(), thread_flags(), sys.platform, platform.machine())).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def suffix() -> str:
    return ".dll" if sys.platform == "win32" else ".so"


# ------------------------------------------------------------------------------------------------------------- storing


def stored(folder: Path, stem: str) -> ctypes.CDLL | None:
    """A library that was built before, loaded, if there is one that is whole and that nobody else could have put there."""
    for path in sorted(folder.glob(f"{stem}-*{suffix()}")):
        if is_private(path) and is_whole(path):
            with contextlib.suppress(OSError):  # built for another C library
                return ctypes.CDLL(str(path))
    return None


def is_whole(path: Path) -> bool:
    """Whether a library is what its name says: loading one that was cut short would kill the process."""
    return path.stem.endswith(digest(path.read_bytes()))


def private_folders() -> Iterator[Path]:
    """The folders for libraries that can be trusted, made if they are not there, first choice first: `kernels` in
    $SLIMZOO_CACHE, $XDG_CACHE_HOME/slimzoo or ~/.cache/slimzoo, and what is left where there is no home."""
    bases = [os.environ.get("SLIMZOO_CACHE"), os.environ.get("XDG_CACHE_HOME"), None]
    with contextlib.suppress(RuntimeError):
        bases[2] = Path.home() / ".cache"
    bases.append(tempfile.gettempdir())
    user = f"slimzoo-{os.geteuid()}" if hasattr(os, "geteuid") else "slimzoo"
    for base, inner in zip(bases, ("", "slimzoo", "slimzoo", user), strict=True):
        if not base:
            continue
        with contextlib.suppress(OSError):
            folder = Path(base, inner, "kernels").resolve()
            _make(folder)
            if is_private(folder):
                yield folder
            elif base == bases[0]:
                _warn_once(f"SLIMZOO_CACHE={base}: others may write to {folder}, so slimzoo's kernels go elsewhere.")


def _make(folder: Path) -> None:
    """Makes a folder, and those above it, for this user alone, whatever the umask is."""
    if not folder.parent.exists():
        _make(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def is_private(path: Path) -> bool:
    """Whether nobody but this user and root can write a file or folder, or put another in its place (a link is refused).

    What is loaded runs with all of the user's rights. On Windows, which has no owners of this kind, everything counts as
    private: a profile's folders are.
    """
    if not hasattr(os, "geteuid"):
        return True
    trusted = {0, os.geteuid()}
    own = path.lstat()
    if stat.S_ISLNK(own.st_mode) or own.st_uid not in trusted or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    trusted.add(os.stat("/").st_uid)  # root, under the name that it has in a container
    above = [parent.stat() for parent in path.parents]
    return all(s.st_uid in trusted and (not s.st_mode & stat.S_IWOTH or s.st_mode & stat.S_ISVTX) for s in above)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_slow(reason: str) -> None:
    _warn_once(f"slimzoo runs compressed layers in plain torch, slower than dense: {reason}.")
