"""Compare the models of a report honestly: what is better, what worse, and what cannot be told apart."""

import math

from .format import FIDELITY, baseline_name, format_change, method_name, metric_title
from .measurements import FEWEST


def compare(report: dict, key: str, other: str) -> str:
    """ "better", "worse" or "undecided": how the report's own model is to another, "dense" or a baseline, on a metric.

    Better and worse need two standard errors: of the paired difference (`paired_difference`), on `FEWEST` windows or items
    at least. What was not measured in pairs needs two of both rows' own scatter together (`scatter`), which is far more.
    """
    ours, theirs = report["compressed"][key], row(report, other)[key]
    if pair := paired(report, key, other):
        sign = certain_sign(pair)
    else:
        gain = ours["value"] - theirs["value"]
        close = abs(gain) < 2 * math.hypot(scatter(report, key, ours), scatter(report, key, theirs))
        sign = 0 if close else (gain > 0) - (gain < 0)
    return {0: "undecided", 1: "better", -1: "worse"}[sign if ours["higher_is_better"] else -sign]


def certain_sign(pair: dict | None) -> int:
    """1, -1, or 0 for a paired difference that is nearer to 0 than two of its standard errors, or is of too few."""
    if pair is None or pair["error"] is None or pair["n"] < FEWEST or abs(pair["difference"]) < 2 * pair["error"]:
        return 0
    return (pair["difference"] > 0) - (pair["difference"] < 0)


def paired(report: dict, key: str, other: str) -> dict | None:
    """{"difference", "error", "n"} of the report's own model and another; None if they were not compared in pairs."""
    return report.get("paired", {}).get(other, {}).get(key)


def row(report: dict, name: str) -> dict[str, dict]:
    """{metric: M} of "dense" or a baseline."""
    return report["dense"] if name == "dense" else report["baselines"][name]


def scatter(report: dict, key: str, metric: dict) -> float:
    """How far the value of one row may be from another measurement's: its deviation over seeds or draws, and its standard
    error over windows or items. Infinite where neither is known.

    A mean over seeds no longer tells the standard error over windows or items: it is that of right and wrong answers, or
    for other metrics the dense model's, in proportion.
    """
    dense = report["dense"][key]
    if metric["n_of"] in ("windows", "items"):
        return _item_error(metric, metric) if metric["n"] > 1 else math.inf
    over_models = math.inf if metric["spread"] is None else metric["spread"]
    over_items = _item_error(metric, dense) if dense["n_of"] in ("windows", "items") else 0.0
    return math.hypot(over_models, over_items)


def _item_error(metric: dict, known: dict) -> float:
    """Standard error over the windows or items of `known`, a row measured on them once."""
    if known["n_of"] == "items" and metric["unit"] == "fraction":
        return math.sqrt(metric["value"] * (1 - metric["value"]) / known["n"])
    if known["spread"] is None:
        return math.inf
    return known["spread"] * (metric["value"] / known["value"] if metric["unit"] == "ppl" else 1.0)


def verdicts(report: dict) -> list[str]:
    """One sentence for dense and for each baseline: on what this model is better, worse, or not to be told apart.

    Nothing is nearer to dense than dense itself: on fidelity only baselines are compared.
    """
    name = method_name(report)
    lines = []
    for other in ("dense", *report["baselines"]):
        groups = {"better": [], "worse": [], "undecided": []}
        for key, ours in report["compressed"].items():
            if other != "dense" or key not in FIDELITY:
                change = format_change(ours, row(report, other)[key], paired(report, key, other))
                groups[compare(report, key, other)].append(f"{metric_title(key)} ({change})")
        told = [f"{verdict} on {', '.join(found)}" for verdict, found in groups.items() if found]
        none = "" if groups["better"] or other == "dense" else " No gain over it was measured."
        lines.append(f"{name} against {other}: {'; '.join(told)}.{none}")
    return lines


def speed_verdict(report: dict) -> str:
    """One sentence: where it is faster, where slower, and what is within two deviations of equal."""
    groups = {"faster": [], "slower": [], "undecided (within two standard deviations of equal)": []}
    faster, slower, undecided = groups.values()
    for phase, ratios in report["speed"].items():
        for ratio, m in ratios.items():
            gain = m["value"] - 1
            close = gain == 0 or abs(gain) < 2 * (m["spread"] or 0.0)
            (undecided if close else faster if gain > 0 else slower).append(f"{phase} against {baseline_name(ratio)}")
    told = "; ".join(f"{verdict}: {', '.join(found)}" for verdict, found in groups.items() if found)
    return f"{told[0].upper()}{told[1:]}.{'' if faster else ' No gain in speed was measured.'}"
