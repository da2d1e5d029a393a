"""A peer that fails costs its own rows only, and says why."""

import json
import sys

import pytest

from recipes.bench import peers

ANSWERS = "print('noise')\nprint('{\"decode\": 0.5, \"prefill\": 2.0}')\n"
ENDS = {
    "dies": ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n", "ended by SIGILL"),
    "raises": ("raise RuntimeError('no such model')\n", "RuntimeError: no such model"),
    "leaves": ("raise SystemExit(3)\n", "exit code 3"),
    "mumbles": ("print('seconds')\n", "printed no numbers"),
    "is_silent": ("", "printed no numbers"),
    "later": (
        f"import pathlib\nif pathlib.Path('once').exists(): raise OSError('full')\nopen('once', 'w')\n{ANSWERS}",
        "OSError: full",
    ),
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules that end as their names say, instead of measurements; and "answers", which gives numbers."""
    for name, (code, _) in ENDS.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "answers.py").write_text(ANSWERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ENDS)
def test_a_peer_that_fails_does_not_end_the_run(modules, monkeypatch, capsys, name):
    why, rounds = ENDS[name][1], int(name == "later")

    def commands(scratch):
        names = (*peers.PAIRS, *map(peers.COMPILED.format, peers.PAIRS), *peers.PAIRS.values())
        return {kind: [name if kind == "Q4_0" else "answers"] for kind in names}

    monkeypatch.setattr(peers, "commands", commands)
    monkeypatch.setattr(sys, "argv", ["peers", "--rounds", "2", "--output", str(modules / "new" / "peers.json")])
    peers.main()
    rows = json.loads((modules / "new" / "peers.json").read_text())
    assert [row["failed"] for row in rows] == [{"Q4_0": why}] * 3 + [{}] * 3
    assert [len(row["speed_over_llama_cpp"]) for row in rows] == [rounds] * 3 + [2] * 3
    assert rows[0]["tokens_per_second"] == {"packed_4": 2.0} | ({"Q4_0": 2.0} if rounds else {})
    assert rows[5]["tokens_per_second"] == {"packed_8": 256.0, "Q8_0": 256.0}
    lines = capsys.readouterr().out.splitlines()
    tried = [line for line in lines if line.startswith("round ")]
    assert len(tried) == 11 + rounds and sum(why in line for line in tried) == 1  # once it failed it has no turn
    assert sum(f"Q4_0 failed: {why}" in line for line in lines) == 3
