"""What a report of KVTuner shows besides its metrics: bytes of the caches, sensitive layers, and what the search saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from recipes.kvtuner.genetic import Point, pareto_front
from recipes.kvtuner.searching import best_uniform
from recipes.kvtuner.tables import (
    CacheFormat,
    Pair,
    Table,
    bytes_per_token,
    effective_bits,
    equivalent_bits,
    pair_name,
)
from zoo.record.format import format_time

if TYPE_CHECKING:
    from recipes.kvtuner.state import Tuned

LOSSES = {"kl": "KL to the 16-bit model, nats a token"}  # what an objective is, where its name does not say it


def cache_findings(
    found: Tuned,
    models: dict[str, tuple[Table, CacheFormat]],
    kls: dict[str, float],
    *,
    menu: Sequence[Pair],
    objective: str,
    kv_heads: int,
    head_dim: int,
) -> dict:
    """{"tables", "figures", "footprint", "settings"} of a report: the table, how it was found, and what caches take.

    Args:
        found: what the search found. models: the recipe's own first. kls: on held-out text, by model.
    """
    table, form = next(iter(models.values()))
    dense = bytes_per_token(((16, 16),) * len(table), form, kv_heads, head_dim)
    taken = {name: bytes_per_token(*model, kv_heads, head_dim) for name, model in models.items()}
    layers = [list(pair) for pair in table]
    return {
        "tables": {
            "KV cache": cache_table(models, taken, dense, kls, head_dim),
            **({"Best found at each budget": budget_table(found)} if found.held_out else {}),
            "Sensitivity of the layers": error_table(found, menu),
        },
        "figures": {"cache_bits": bits_figure(table), "cache_front": front_figure(found, table, menu, objective)},
        "footprint": {"what": "KV cache", "unit": "bytes a token", "dense": dense, "models": taken},
        "settings": {"kv_cache_quantization": {**asdict(form), "layers": layers}},
    }


def cache_table(
    models: dict[str, tuple[Table, CacheFormat]],
    taken: dict[str, int],
    dense: int,
    kls: dict[str, float],
    head_dim: int,
) -> dict:
    """What every cache takes, with and without its scales, and how far predictions move."""
    rows = [["16-bit cache", "16.00", "16.00", f"{dense:,}", "", ""]]
    for name, (table, form) in models.items():
        bits = (f"{equivalent_bits(table):.2f}", f"{effective_bits(table, form, head_dim):.2f}")
        rows.append([name, *bits, f"{taken[name]:,}", f"{100 * taken[name] / dense:.1f} %", f"{kls[name]:.4f}"])
    rows[1] = [f"**{cell}**" for cell in rows[1]]
    header = ["", "bits", "bits with scales", "bytes a token", "of 16 bits", "KL on held-out calibration text"]
    return {"header": header, "rows": rows, "section": "sizes"}


def budget_table(found: Tuned) -> dict:
    """The best table found within each number of bits beside the best uniform one, by KL on windows not searched on."""
    rows = []
    for limit, (table, *_) in sorted((limit, kept) for limit, kept in found.picks.items() if kept):
        rows.append([f"{limit:g}", *described(table, found.held_out)])
        uniform = best_uniform(found.archive, limit)
        rows[-1] += described(uniform[0], found.held_out) if uniform else ["none", "", ""]
    header = ["bits allowed", "found", "its bits", "its KL", "best uniform", "its bits", "its KL"]
    return {"header": header, "rows": rows}


def described(table: Table, held_out: dict[Table, float]) -> list[str]:
    """What a table is called, its bits, and its KL."""
    name = pair_name(table[0]) if len(set(table)) == 1 else "mixed"
    return [name, f"{equivalent_bits(table):.2f}", f"{held_out[table]:.4f}"]


def same_tables(models: dict[str, tuple[Table, CacheFormat]], own: str) -> list[str]:
    """The baselines that have the own table and format; uniform ones by their name, whether they were measured or not."""
    table, form = models[own]
    uniform = [pair_name(table[0])] if len(set(table)) == 1 else []
    return list(dict.fromkeys([*uniform, *(name for name, m in models.items() if name != own and m == (table, form))]))


def error_table(found: Tuned, menu: Sequence[Pair]) -> dict:
    """How sensitive the layers are to each pair of widths, and how they were grouped."""
    rows = []
    for pair in menu:
        errors = [layer[pair] for layer in found.errors]
        order = sorted(range(len(errors)), key=errors.__getitem__)
        ends = (f"{errors[layer]:.3f} (layer {layer})" for layer in (order[-1], order[0]))
        rows.append([pair_name(pair), f"{sum(errors) / len(errors):.3f}", *ends])
    groups = "; ".join(", ".join(map(str, group.layers)) for group in found.groups)
    took = f"{len(found.archive)} tables were evaluated in {format_time(found.seconds)}."
    return {
        "header": ["keys and values at", "mean error of attention's output", "most sensitive layer", "least"],
        "rows": rows,
        "caption": f"Layers that share a pair: {groups}. {took}",
    }


def bits_figure(table: Table) -> dict:
    keys, values = (list(widths) for widths in zip(*table, strict=True))
    panel = {"log": "z", "cells": {"keys": keys, "values": values}, "shades": [1, 32]}
    return {"title": "Bits of every layer", "x": "layer", "panels": [panel]}


def front_figure(found: Tuned, table: Table, menu: Sequence[Pair], objective: str) -> dict:
    """Loss against mean bits: every table evaluated, the front, the uniform tables by name, and the bits of `table`."""
    points = list(found.archive.values())
    best = [points[place] for place in pareto_front(points)]
    uniform = [found.archive[(pair,) * len(table)] for pair in menu]
    series = [
        {"name": "evaluated", "style": "dots", **places(points)},
        {"name": "front", "style": "step", **places(best)},
        {"name": "uniform", "style": "points", **places(uniform), "notes": list(map(pair_name, menu))},
        {"name": "chosen", "style": "vertical", "x": [equivalent_bits(table)]},
    ]
    log = {"log": "y"} if min(points)[0] > 0 else {}
    axes = {"x": "mean bits of keys and values, scales not counted", "y": LOSSES.get(objective, objective)}
    return {"title": "Loss against bits", **axes, "panels": [{**log, "series": series}]}


def places(points: Sequence[Point]) -> dict:
    """Points (loss, bits) as a figure has them."""
    losses, bits = zip(*points, strict=True)
    return {"x": list(bits), "y": list(losses)}
