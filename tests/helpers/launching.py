"""How the tests start the command line: in this process where that is all the same, in new ones where it is not."""

import contextlib
import io
import os
import subprocess
import sys

import torch

from recipes.common.core.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
RECIPES = [sys.executable, "-m", "recipes"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `accelerate launch` starts one, whatever is asked, without a GPU


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What `command` gives: its exit code and what it says; `python -m recipes ...` without the seconds of a new start."""
    if command[:3] != RECIPES:
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    torch.set_num_threads(1)  # as ENVIRONMENT has it, so that both ways give the same weights
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(command[3:])
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
