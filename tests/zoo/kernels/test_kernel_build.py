"""Building the kernels: first users at once, odd machines, a damaged cache, and caches that somebody else can write to.

Most tests build `toy`, a library of one function, with the compiler of this machine or one that stands in for another.
"""

import ctypes
import os
import runpy
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.kernels import libraries
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.armor_linear.reference import armor_linear as armor_definition
from zoo.kernels.bitmask_linear.reference import pack_bitmask

TOY = 'extern "C" __attribute__((visibility("default"))) int toy() { return %d; }\n'
COMPILER = libraries.find_compiler()[0]
USE = """
import torch
from zoo.kernels.block_diagonal_linear import block_diagonal_linear
from zoo.kernels.libraries import library
for _ in range(2):
    assert block_diagonal_linear(torch.ones(4), torch.arange(8.0).view(2, 2, 2)).tolist() == [1, 5, 9, 13]
print("compiled" if library("block_diagonal_linear") else "reference")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """load(op) as a new process would: toy and other return 7, broken does not compile. `said` holds the warnings."""
    sources = {"toy/cpu.cpp": TOY % 7, "other/cpu.cpp": TOY % 7, "broken/cpu.cpp": "int toy( {\n"}
    monkeypatch.setattr(libraries, "all_sources", lambda: list(sources))
    monkeypatch.setattr(libraries, "source", sources.__getitem__)
    said = []
    monkeypatch.setattr(libraries.logger, "warning", said.append)
    monkeypatch.setenv("SLIMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", COMPILER)

    def load(op="toy"):
        libraries._warn_once.cache_clear()
        libraries.compiler_key.cache_clear()
        return libraries.library.__wrapped__(op)

    yield SimpleNamespace(load=load, said=said, sources=sources, folder=tmp_path / "cache" / "kernels")
    libraries._warn_once.cache_clear()
    libraries.compiler_key.cache_clear()


def script(path, text):
    """A program in sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def works(lib):
    return lib is not None and lib.toy() == 7


# ------------------------------------------------------------------------------------------------------------ building


@pytest.mark.slow
def test_three_first_users_at_once_build_one_library(tmp_path):
    environment = os.environ | {"SLIMZOO_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", USE], env=environment, **pipes) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out.strip()) == (0, "compiled"), err
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


def test_ahead_of_first_use_and_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_module("zoo.kernels.build", run_name="__main__")
    for op in libraries.operations():
        assert libraries.level(libraries.library(op)) in range(len(libraries.LEVELS))


def test_without_a_compiler_the_reference_runs_with_one_warning(toy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    libraries._warn_once.cache_clear()
    for op in ("toy", "other"):
        assert libraries.library.__wrapped__(op) is None
    assert len(toy.said) == 1
    assert "slimzoo runs compressed layers in plain torch" in toy.said[0] and "install g++" in toy.said[0]


def test_what_was_built_is_used_without_a_compiler_and_after_a_change_of_compilers(toy, monkeypatch, tmp_path):
    assert works(toy.load())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert works(toy.load()) and not toy.said
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", "echo 'error: out of order' >&2; exit 1")))
    assert works(toy.load()) and not toy.said
    toy.sources["toy/cpu.cpp"] = TOY % 8  # that is another library
    assert toy.load() is None
    assert len(toy.said) == 1 and "failed on toy (['error: out of order'])" in toy.said[0]


def test_a_damaged_library_is_built_again(toy):
    assert works(toy.load())
    (path,) = toy.folder.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", whole[:-1] + b"?"):
        path.unlink()  # the one that is loaded stays as it is
        path.write_bytes(damaged)
        assert works(toy.load())
        assert path.read_bytes() == whole


@pytest.mark.parametrize("words", ["ccache {}", "'{folder}/a tool/ccache' {} -O1", "{folder}/a tool/c++", "{}"])
def test_cxx_may_be_several_words_or_a_path_with_spaces(toy, words, tmp_path, monkeypatch):
    script(tmp_path / "bin" / "ccache", 'exec "$@"')
    script(tmp_path / "a tool" / "ccache", 'exec "$@"')
    script(tmp_path / "a tool" / "c++", f'exec {COMPILER} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", words.format(COMPILER, folder=tmp_path))
    assert works(toy.load()) and not toy.said


@pytest.mark.parametrize("words", ["' ", "  ", "'"])
def test_a_cxx_of_no_words_or_without_an_end_names_no_compiler(words, monkeypatch):
    monkeypatch.setenv("CXX", words)
    assert libraries.find_compiler() == (None if words.strip() else (shutil.which("c++") or COMPILER,))


def test_a_kernel_that_cannot_be_built_leaves_the_others_fast(toy):
    assert toy.load("broken") is None
    assert len(toy.said) == 1 and "failed on broken" in toy.said[0]
    assert works(toy.load()) and len(toy.said) == 1


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("missing", ["bitmask_linear", "armor_linear"])
def test_operations_that_share_kernels_do_without(missing, rows, monkeypatch):
    own = libraries.library
    monkeypatch.setattr("zoo.kernels.armor_linear.library", lambda op: None if op == missing else own(op))
    values, mask, _ = pack_bitmask(torch.randn(8, 16), (torch.arange(16) % 4 < 2).expand(8, 16), per_row=8)
    weights = (torch.randn(4, 4, 4), values, mask, torch.randn(2, 4, 4))
    x = torch.randn(rows, 16)
    torch.testing.assert_close(armor_linear(x, *weights), armor_definition(x, *weights), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- machines other than this


def test_apples_compiler_takes_torchs_openmp_or_does_without(toy, tmp_path, monkeypatch):
    """It refuses -fopenmp, and with -Xclang -fopenmp needs a library that it does not have."""
    log = tmp_path / "log"
    lines = [
        f'echo "$*" >> {log}',
        'case "$*" in',
        '*-Xclang*-lomp*) case "$PRESENT" in 1) ;; *) echo "ld: library not found for -lomp" >&2; exit 1;; esac;;',
        "*-fopenmp*) echo \"clang: error: unsupported option '-fopenmp'\" >&2; exit 1;;",
        "esac",
        f"[ $1 = --version ] && exec {COMPILER} --version",
        'last=""; for word in "$@"; do [ "$last" = -o ] && to="$word"; last="$word"; done',
        f'exec {COMPILER} -shared -fPIC -x c++ "$(dirname "$to")/toy/cpu.cpp" -o "$to"',
    ]
    monkeypatch.setattr(libraries, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setenv("CXX", str(script(tmp_path / "clang++", "\n".join(lines))))
    assert works(toy.load())
    assert len(toy.said) == 1 and "on one thread" in toy.said[0]
    calls = [line for line in log.read_text().splitlines() if "-o" in line.split()]
    assert ["-Xclang" in calls[0], "-fopenmp" in calls[1], "-fopenmp" in calls[2]] == [True, True, False]
    assert str(Path(torch.__file__).parent / "lib") in calls[0]
    shutil.rmtree(toy.folder)
    toy.said.clear()
    monkeypatch.setenv("PRESENT", "1")
    assert works(toy.load()) and not toy.said


def test_kernels_compile_without_openmp(tmp_path):
    """The one that asks which thread it is; all others hold pragmas alone."""
    for path in libraries.all_sources():
        assert "omp.h" not in libraries.source(path)
        assert "omp_" not in libraries.source(path) or path in ("simd.hpp", "block_sparse_linear/cpu.cpp")
    for name, text in libraries.texts("block_sparse_linear").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", tmp_path / "block_sparse_linear" / "cpu.cpp"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def windows(monkeypatch, tmp_path):
    """No owners of files, other names; clang++ that builds for this machine whatever it is told, and logs that."""
    monkeypatch.setattr(libraries, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.delenv("CXX")
    log = tmp_path / "log"
    clang = script(
        tmp_path / "clang++",
        f'echo "$*" >> {log}\n[ $1 = --version ] && exec {COMPILER} --version\n'
        'last=""; for word in "$@"; do [ "$last" = -o ] && to="$word"; last="$word"; done\n'
        f'exec {COMPILER} -shared -fPIC "$(dirname "$to")/toy/cpu.cpp" -o "$to"',
    )
    monkeypatch.setattr(shutil, "which", lambda name: str(clang) if name == "clang++" else None)
    return log


def test_windows_builds_a_dll_with_clang(toy, windows):
    assert works(toy.load()) and not toy.said
    assert [path.suffix for path in toy.folder.iterdir()] == [".dll"]
    command = windows.read_text().splitlines()[-1]
    assert "-static" in command and "-fPIC" not in command and "-fopenmp=libiomp5" in command


def test_windows_leaves_a_library_alone_that_another_process_has_loaded(toy, windows, monkeypatch):
    def replace(self, target):
        shutil.copy(self, target)  # the other process came first
        raise PermissionError("Access is denied")

    monkeypatch.setattr(Path, "replace", replace)
    assert works(toy.load()) and not toy.said
    monkeypatch.setattr(Path, "replace", lambda self, target: os.replace("nowhere", target))
    assert works(toy.load())


def test_windows_without_clang_says_what_to_install(toy, windows, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert toy.load() is None
    assert "install clang++)" in toy.said[0]


# ------------------------------------------------------------------------------------------------------------- storing


def homeless(monkeypatch, tmp_path):
    """No variable and no home: Path.home() raises."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("SLIMZOO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_without_a_home_the_kernels_go_to_a_folder_of_ones_own(toy, monkeypatch, tmp_path):
    homeless(monkeypatch, tmp_path)
    assert works(toy.load()) and works(toy.load()) and not toy.said
    folder = tmp_path / "tmp" / f"slimzoo-{os.geteuid()}" / "kernels"
    assert len(list(folder.glob("toy-*.so"))) == 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (folder, folder.parent))
    folder.chmod(0o777)
    assert toy.load() is None
    assert "no folder that nobody else can write to" in toy.said[0]


def test_a_folder_that_cannot_be_written_is_followed_by_the_next(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    own = libraries.compile_library

    def compile_library(compiler, op, folder, stem):
        if "xdg" not in folder.parts:
            raise OSError("Read-only file system")
        return own(compiler, op, folder, stem)

    monkeypatch.setattr(libraries, "compile_library", compile_library)
    assert works(toy.load()) and not toy.said
    assert len(list((tmp_path / "xdg" / "slimzoo" / "kernels").iterdir())) == 1


def test_what_is_made_is_private_whatever_the_umask_is(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMZOO_CACHE", str(tmp_path / "not" / "yet" / "there"))
    before = os.umask(0)
    try:
        assert works(toy.load())
    finally:
        os.umask(before)
    made = [tmp_path / "not", *(tmp_path / "not").rglob("*")]
    assert len(made) == 5
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in made)


def planted(toy, tmp_path):
    """Puts a library in place that would be taken if nobody looked whose it is; loading it leaves a mark."""
    mark = tmp_path / "mark"
    evil = tmp_path / "evil.cpp"
    evil.write_text(
        "#include <cstdio>\n"
        f'__attribute__((constructor)) static void enter() {{ std::fclose(std::fopen("{mark}", "w")); }}\n' + TOY % 666
    )
    toy.folder.mkdir(parents=True)
    subprocess.run([COMPILER, "-shared", "-fPIC", evil, "-o", tmp_path / "evil.so"], check=True)
    content = (tmp_path / "evil.so").read_bytes()
    stem = f"toy-{libraries.source_key('toy')}-{libraries.compiler_key(libraries.find_compiler())}"
    library = toy.folder / f"{stem}-{libraries.digest(content)}.so"
    library.write_bytes(content)
    library.chmod(0o755)
    toy.folder.chmod(0o700)
    return library, mark


def belongs_to_another(monkeypatch, path):
    """As seen by us."""
    looks = {name: getattr(Path, name) for name in ("lstat", "stat")}
    for name, look in looks.items():

        def other(self, look=look, **options):
            found = look(self, **options)
            return SimpleNamespace(st_mode=found.st_mode, st_uid=54321) if self == path else found

        monkeypatch.setattr(Path, name, other)


@pytest.mark.parametrize(
    "how",
    ["folder of another", "folder for all", "folder for a group", "parent for all", "parent of another"]
    + ["library of another", "library for all", "library for a group", "link"],
)
def test_a_planted_library_is_never_loaded(toy, how, tmp_path, monkeypatch):
    library, mark = planted(toy, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    what, _, whose = how.partition(" ")
    path = {"folder": toy.folder, "parent": toy.folder.parent}.get(what, library)
    if what == "link":
        elsewhere = tmp_path / "elsewhere.so"
        library.rename(elsewhere)
        library.symlink_to(elsewhere)
    elif whose == "of another":
        belongs_to_another(monkeypatch, path)
    else:
        path.chmod(0o757 if whose == "for all" else 0o775)
    for compiler in (COMPILER, "no-such-compiler"):
        monkeypatch.setenv("CXX", compiler)
        assert works(toy.load())
        assert not mark.exists()
    elsewhere = list((tmp_path / "own").rglob("toy-*.so"))
    assert len(elsewhere) == (what in ("folder", "parent"))  # a library alone is passed over and built beside
    assert len(toy.said) == (2 if elsewhere else 0)
    assert all(f"SLIMZOO_CACHE={toy.folder.parent}: others may write to" in warning for warning in toy.said)


def test_the_planted_library_would_have_been_loaded(toy, tmp_path):
    _, mark = planted(toy, tmp_path)
    assert toy.load().toy() == 666 and mark.exists()


@pytest.mark.parametrize("mode", [0o1777, 0o775])
def test_a_cache_in_a_folder_with_the_sticky_bit_or_of_a_group_is_ones_own(toy, mode, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    assert works(toy.load()) and not toy.said
    assert len(list(toy.folder.iterdir())) == 1


def test_the_real_kernels_are_stored_privately():
    lib = libraries.library("bitmask_linear")
    assert (
        isinstance(lib, ctypes.CDLL) and libraries.is_private(Path(lib._name)) and libraries.is_whole(Path(lib._name))
    )
