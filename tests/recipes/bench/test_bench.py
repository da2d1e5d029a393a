"""The benchmark on small shapes: runs take turns, and every part writes the rows that its readers expect."""

import importlib
import json
import sys

import pytest

from recipes.bench import attention, kernels, models, pictures, rounds

MAIN = importlib.import_module("recipes.bench.__main__")
ROW = {"op", "shape", "dtype", "batch", "seconds", "ratio_to"}
KERNEL = ROW | {"bytes", "read_bandwidth", "fraction_of_bound"}


def test_runs_take_turns_after_a_warm_up(monkeypatch):
    monkeypatch.setattr(rounds, "READ_BYTES", 1 << 16)
    calls = []
    runs = {name: lambda index, name=name: calls.append((name, index)) for name in "ab"}
    seconds, bandwidth = rounds.rounds(runs, 3)
    assert calls == [(name, index) for index in (0, 0, 1, 2) for name in "ab"]
    assert list(seconds) == ["a", "b"] and bandwidth > 0
    (row,) = rounds.rows_of({"a": 100}, 2, 3, 1, {"a": 2.0, "b": 3.0}, 50.0)
    assert row["ratio_to"] == {"b": 1.5} and row["fraction_of_bound"] == 1


@pytest.fixture
def small(monkeypatch):
    for module, name, value in (
        (rounds, "READ_BYTES", 1 << 16),
        (rounds, "CACHE_BYTES", 1 << 14),
        (kernels, "SHAPES", [(128, 128)]),
        (kernels, "VIT_SHAPES", [(128, 64)]),
        (kernels, "VIT_TOKENS", (3,)),
        (attention, "HEADS", (2, 2, 64)),
        (attention, "BATCHES", [(1, 64)]),
        (pictures, "MODELS", (("DeiT-S", 64, 2),)),
        (pictures, "IMAGES", 1),
    ):
        monkeypatch.setattr(module, name, value)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    for name, value in (sizes | {"num_attention_heads": 2, "num_key_value_heads": 1}).items():
        monkeypatch.setattr(models.ONE_B, name, value)

    def in_this_process(module: str, what: str, kind: str, *_) -> dict:
        return models.run_model(kind, 2, 1, compiled=False) if what == "--model" else models.run_cache(kind, 64, 2)

    monkeypatch.setattr(models, "run_apart", in_this_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "ops", "keys"),
    [
        ("linear", {"bitmask_linear", "armor_linear", "packed_linear 3 bits", "packed_linear 8 bits, int8 x"}, KERNEL),
        ("block_sparse", {"block_sparse_linear 32 bfloat16", "DeiT-S block_sparse 32"}, KERNEL),
        ("attention", {"kv_attention KV4", "kv_attention KIVI 2"}, KERNEL),
        ("caches", {"1 B model, cache 16 bits", "1 B model, cache KV4"}, ROW | {"peak_rss_bytes"}),
        ("model", {"1 B model, armor, decode"}, KERNEL | {"tokens_per_second", "peak_rss_bytes"}),
    ],
)
def test_every_part_has_its_rows(small, monkeypatch, tmp_path, capsys, part, ops, keys):
    output = tmp_path / "new" / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--only", part, "--output", str(output)])
    MAIN.main()
    rows = json.loads(output.read_text())
    assert ops <= {row["op"] for row in rows}
    for row in rows:
        assert row.keys() == keys and row["seconds"] > 0 and all(ratio > 0 for ratio in row["ratio_to"].values())
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 3  # the processor, the head of the table, the file
