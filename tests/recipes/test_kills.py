"""Runs that are killed, again and again, are finished by --resume alone, to the same bits: a few named moments of two
recipes; with SLIMZOO_LONG=1 many drawn ones of all (a quarter of an hour)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ENVIRONMENT

KILLING = Path(__file__).resolve().parents[1] / "helpers" / "killing.py"
LONG = ["--long"] if os.environ.get("SLIMZOO_LONG") == "1" else []


@pytest.mark.slow
def test_killed_runs_are_finished_by_resume(tmp_path):
    command, environment = (
        [sys.executable, str(KILLING), str(tmp_path), *LONG],
        {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    process = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert int(process.stdout.splitlines()[-1].split()[0]) >= (40 if LONG else 14)
