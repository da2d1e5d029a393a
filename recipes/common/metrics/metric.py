"""A number of a report, and several of them merged.

While a run measures, a metric also holds `raw`: for each model that it is the mean of, one value for every window or item
(of a perplexity the mean negative log-likelihood), so that two models can be compared pair by pair. They leave the report
for measurements.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from torch import Tensor


def metric(
    value: float,
    spread: float | None,
    n: int,
    n_of: str,
    unit: str = "fraction",
    higher_is_better: bool = True,
    raw: Iterable[float] | None = None,
) -> dict:
    """One number of a report: `spread` is a sample standard deviation or a standard error, in the unit of `value`; `raw`
    are the values of its windows or items.
    """
    made = {
        "value": float(value),
        "spread": None if spread is None else float(spread),
        "n": n,
        "n_of": n_of,
        "unit": unit,
        "higher_is_better": higher_is_better,
    }
    return made if raw is None else made | {"raw": [[rounded(x) for x in raw]]}


def rounded(x: float) -> float:
    """To 7 digits; a whole number as an int, which is shorter on file."""
    x = float(f"{x:.7g}")
    return int(x) if x.is_integer() else x


def mean_of(values: Tensor, n_of: str, unit: str = "fraction", higher_is_better: bool = True) -> dict:
    """The mean of `values` (N,), one for each window or item, as a metric with its standard error."""
    values = values.double()
    spread = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else None
    return metric(values.mean().item(), spread, len(values), n_of, unit, higher_is_better, values.tolist())


def over_runs(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """{metric: M} with mean and sample deviation over several models; of a single one, its own."""
    if len(runs) == 1:
        return runs[0]
    merged = _mean(runs, "runs")
    for key, m in merged.items():
        if all("raw" in run[key] for run in runs):
            m["raw"] = [values for run in runs for values in run[key]["raw"]]
    return merged


def over_seeds(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """{metric: M} of one run per seed -> {metric: M} with mean, sample standard deviation and the single values; what was
    raw is left out.

    A single run stays as it is: its n counts windows or items, and its spread is the standard error over those.
    """
    if len(runs) == 1:
        return {key: _without_raw(m) for key, m in runs[0].items()}
    return {key: m | {"values": [run[key]["value"] for run in runs]} for key, m in _mean(runs, "seeds").items()}


def _mean(runs: list[dict[str, dict]], n_of: str) -> dict[str, dict]:
    merged = {}
    for key, first in runs[0].items():
        values = [run[key]["value"] for run in runs]
        numbers = {"value": statistics.fmean(values), "spread": statistics.stdev(values), "n": len(runs), "n_of": n_of}
        merged[key] = _without_raw(first) | numbers
    return merged


def _without_raw(m: dict) -> dict:
    return {key: value for key, value in m.items() if key != "raw"}
