"""What a report of ARMOR shows besides its metrics: quality against the minutes of work on the matrices."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from recipes.common.metrics.metric import over_seeds
from zoo.record.format import format_metric, metric_title


class Point(NamedTuple):
    """A model that the run made: how long its matrices took on one thread each, their facts, its metrics."""

    name: str
    minutes: float
    facts: list[dict]
    metrics: dict[str, dict]


def minutes_evidence(points: list[Point], own: str, iterations: int) -> dict:
    """{"tables", "sweeps"} of a report: all points, and the perplexity of the own method over its iterations."""
    keys = [key for key in points[0].metrics if key.startswith("perplexity/")]
    header = ["", "minutes of one thread", "mean proxy loss", "mean relative output error", *map(metric_title, keys)]
    rows, curve = [], []
    for point in sorted(points, key=lambda point: point.minutes):
        metrics = over_seeds([{key: point.metrics[key] for key in keys}])
        steps = iterations if point.name == own else None
        if point.name.startswith("iterations-"):
            steps = int(point.name.removeprefix("iterations-"))
        name = point.name if steps is None else f"{own}, {steps} iterations"
        means = (mean_fact(point.facts, key) for key in ("loss_final", "output_error"))
        row = [name, f"{point.minutes:.2f}", *means, *(format_metric(metrics[key]) for key in keys)]
        rows.append([f"**{cell}**" for cell in row] if point.name == own else row)
        if steps is not None:
            curve.append({"x": point.minutes, "metrics": metrics})
    table = {"header": header, "rows": rows}
    if len(curve) == 1:
        return {"tables": {"Quality against minutes": table}}
    caption = (
        f"The own points are all of one loop of {iterations} iterations, refit where it stood; a shorter loop, whose rate"
        " falls sooner, may do better than these."
    )
    return {
        "tables": {"Quality against minutes": table | {"caption": caption}},
        "sweeps": {"Perplexity against minutes": {"x": "minutes of one thread", "log": False, "series": {own: curve}}},
    }


CLOSED = 0.5  # of the gap between ARMOR without refit and dense, what the refit is expected to close


def checks_table(found: dict[str, dict[str, dict]], own: str) -> dict:
    """What is expected of perplexity on every text, from the metrics of dense, the own model and what it is held against;
    a check without its models is left out."""
    keys = [key for key in found[own] if key.startswith("perplexity/")]
    value = {name: [metrics[key]["value"] for key in keys] for name, metrics in found.items()}
    plain = "armor-no-refit"
    orders = [("dense", own), (own, "sparsegpt"), (plain, "nowag"), (plain, "wanda")]
    rows = []
    if plain in found:
        shares = [
            (before - after) / (before - dense) if before > dense else 1.0
            for dense, before, after in zip(value["dense"], value[plain], value[own], strict=True)
        ]
        cells = (f"{100 * share:.0f} %, {told(share >= CLOSED)}" for share in shares)
        rows.append([f"the refit closes {100 * CLOSED:.0f} % of the gap to dense", *cells])
    for better, worse in orders:
        if better in found and worse in found:
            pairs = zip(value[better], value[worse], strict=True)
            rows.append([f"{better} below {worse}", *(f"{a:.2f} and {b:.2f}, {told(a < b)}" for a, b in pairs)])
    return {"header": ["expected of perplexity", *(key.partition("/")[2] for key in keys)], "rows": rows}


def told(met: bool) -> str:
    return "met" if met else "**not met**"


def mean_fact(facts: list[dict], key: str) -> str:
    """The mean over matrices, empty where it is not known of them."""
    known = [fact[key] for fact in facts if fact[key] is not None]
    return f"{statistics.fmean(known):.4f}" if known else ""
