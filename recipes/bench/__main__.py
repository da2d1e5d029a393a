"""Kernels and whole models against dense ones, in one run. `make bench`, or

python -m recipes.bench [--quick] [--only PART] [--output runs/bench.json]

How each is measured: `recipes/bench/rounds.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.bench.attention import bench_attention
from recipes.bench.kernels import bench_block_sparse, bench_linear
from recipes.bench.models import bench_caches, bench_model
from recipes.bench.pictures import bench_vit
from recipes.bench.rounds import write_rows
from zoo.kernels.libraries import LEVELS, level, library

PARTS = {
    "linear": [bench_linear],
    "block_sparse": [bench_block_sparse, bench_vit],
    "attention": [bench_attention],
    "caches": [bench_caches],
    "model": [bench_model],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: figures are rough")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    flags = parser.parse_args()
    lib = library("bitmask_linear")
    print(f"{torch.get_num_threads()} threads, {LEVELS[level(lib)] if lib else 'plain torch'}")
    print(f"{'op':32}{'shape':>14}{'batch':>7}{'GB/s':>7}{'of bound':>10}   speed against its peers")
    rows = []
    for part in [flags.only] if flags.only else PARTS:
        for bench in PARTS[part]:
            for row in bench(flags.quick):
                print(line(row))
                rows.append(row)
    write_rows(rows, flags.output)


def line(row: dict) -> str:
    """A row as it is printed; whole models add their tokens per second and peak memory."""
    shape = "x".join(map(str, row["shape"]))
    read = f"{row['read_bandwidth'] / 1e9:.1f}" if "read_bandwidth" in row else ""
    bound = f"{100 * row['fraction_of_bound']:.0f} %" if "fraction_of_bound" in row else ""
    figures = [f"{ratio:.2f}x {peer}" for peer, ratio in row["ratio_to"].items()]
    if "peak_rss_bytes" in row:
        peak = row["peak_rss_bytes"]
        peaks = peak if isinstance(peak, dict) else {"": peak}
        figures.append(f"{row['batch'] / row['seconds']:.1f} tokens/s")
        figures.append("peak memory " + ", ".join(f"{p / 2**30:.2f} GiB {kind}".rstrip() for kind, p in peaks.items()))
    return f"{row['op']:32}{shape:>14}{row['batch']:>7}{read:>7}{bound:>10}   {'  '.join(figures)}"


if __name__ == "__main__":
    main()
