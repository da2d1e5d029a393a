"""Taking turns: what is compared runs once in every round, and medians over the rounds become rows.

A busy machine slows all alike so. Weights rotate through copies that together exceed the last-level cache, and no two of
a round read the same copy. `fraction_of_bound` is bytes / read bandwidth / time, with the bandwidth of a sum over 128 MiB
that takes its turn among the others; a kernel that reads better than the sum exceeds 1.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CACHE_BYTES = 128 << 20  # more than any last-level cache the copies could hide in
READ_BYTES = 128 << 20


def copies_of(size: int) -> int:
    """So many copies of `size` bytes exceed the cache; two at least."""
    return max(2, -(-CACHE_BYTES // size))


def rounds(runs: dict[str, Callable[[int], object]], repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each run, and the bytes per second that all threads together read from memory meanwhile.

    Every round calls all runs, each with the round's number as its argument, and one sum over READ_BYTES.
    """
    data = torch.ones(READ_BYTES // 4)
    runs = runs | {"memory": lambda _: data.sum()}
    for run in runs.values():
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians, READ_BYTES / medians.pop("memory")


def rows_of(
    sizes: dict[str, int], d_out: int, d_in: int, batch: int, seconds: dict[str, float], bandwidth: float
) -> list[dict]:
    """The rows of the operations in `sizes` (bytes read); all others that were timed are their peers."""
    peers = [name for name in seconds if name not in sizes]
    return [
        {
            "op": op,
            "shape": [d_out, d_in],
            "dtype": "bfloat16",
            "batch": batch,
            "seconds": seconds[op],
            "bytes": size,
            "read_bandwidth": bandwidth,
            "fraction_of_bound": size / bandwidth / seconds[op],
            "ratio_to": {peer: seconds[peer] / seconds[op] for peer in peers},
        }
        for op, size in sizes.items()
    ]


def run_apart(module: str, *flags: object) -> dict:
    """What `python -m module flags` prints last, as JSON: a measurement in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, flags)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(path)
