"""A number of a report, and several of them merged."""

from __future__ import annotations

import statistics


def metric(
    value: float, spread: float | None, n: int, n_of: str, unit: str = "fraction", higher_is_better: bool = True
) -> dict:
    """One number of a report: `spread` is a sample standard deviation or a standard error, in the unit of `value`."""
    return {
        "value": float(value),
        "spread": None if spread is None else float(spread),
        "n": n,
        "n_of": n_of,
        "unit": unit,
        "higher_is_better": higher_is_better,
    }


def over_runs(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """{metric: M} with mean and sample deviation over several models; of a single one, its own."""
    return runs[0] if len(runs) == 1 else _mean(runs, "runs")


def over_seeds(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """{metric: M} of one run per seed -> {metric: M} with mean, sample standard deviation and the single values.

    A single run stays as it is: its n counts windows or items, and its spread is the standard error over those.
    """
    if len(runs) == 1:
        return runs[0]
    return {key: m | {"values": [run[key]["value"] for run in runs]} for key, m in _mean(runs, "seeds").items()}


def _mean(runs: list[dict[str, dict]], n_of: str) -> dict[str, dict]:
    merged = {}
    for key, first in runs[0].items():
        values = [run[key]["value"] for run in runs]
        numbers = {"value": statistics.fmean(values), "spread": statistics.stdev(values), "n": len(runs), "n_of": n_of}
        merged[key] = first | numbers
    return merged
