"""Building the kernels: concurrent first use, no compiler, a damaged cache."""

import os
import subprocess
import sys

USE = """
import torch
from zoo.kernels.bitmask_linear import bitmask_linear
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.build import library
values, mask, _ = pack_bitmask(torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 4]]), per_row=2)
for _ in range(2):
    assert bitmask_linear(torch.ones(1, 4), values, mask).tolist() == [[3, 7]]
print("compiled" if library("bitmask_linear") else "reference")
"""


def start(cache, **variables):
    environment = os.environ | {"SLIMZOO_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", USE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


def test_three_first_users_at_once_build_one_library(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert [finish(process)[0] for process in processes] == ["compiled"] * 3
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    out, err = finish(start(tmp_path, CXX="no-such-compiler"))
    assert out == "reference"
    assert err.count("slimzoo runs compressed layers in plain torch") == 1 and "install g++" in err


def test_a_damaged_library_is_built_again(tmp_path):
    finish(start(tmp_path))
    (library,) = tmp_path.iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[:1000])
    assert finish(start(tmp_path))[0] == "compiled"
    assert len(library.read_bytes()) == len(whole)
