"""Compare the models of a report honestly: what is better, what worse, and what cannot be told apart."""

import math

from .format import baseline_name, format_change, method_name, metric_title


def uncertainty(report: dict, key: str, metric: dict) -> float:
    """One standard deviation of what may differ between two models: over seeds, and over the items of a task.

    How windows of text scatter is left out: all models read the same windows and move together.
    """
    over_seeds = metric["spread"] or 0.0 if metric["n_of"] == "seeds" else 0.0
    dense = report["dense"][key]
    if dense["n_of"] != "items":
        return over_seeds
    if metric["unit"] != "fraction":
        return math.hypot(over_seeds, dense["spread"] or 0.0)
    return math.hypot(over_seeds, math.sqrt(metric["value"] * (1 - metric["value"]) / dense["n"]))


def compare(report: dict, key: str, ours: dict, baseline: dict) -> str:
    """ "better", "worse", or "undecided": nearer than two of the pair's combined `uncertainty`, or equal."""
    gain = (ours["value"] - baseline["value"]) * (1 if ours["higher_is_better"] else -1)
    noise = 2 * math.hypot(uncertainty(report, key, ours), uncertainty(report, key, baseline))
    if gain == 0 or abs(gain) < noise:
        return "undecided"
    return "better" if gain > 0 else "worse"


def verdicts(report: dict) -> list[str]:
    """One sentence for dense and for each baseline: on what this model is better, worse, or not to be told apart."""
    name = method_name(report)
    lines = []
    for baseline, metrics in {"dense": report["dense"], **report["baselines"]}.items():
        groups = {"better": [], "worse": [], "undecided": []}
        for key, ours in report["compressed"].items():
            groups[compare(report, key, ours, metrics[key])].append(
                f"{metric_title(key)} ({format_change(ours, metrics[key])})"
            )
        told = [f"{verdict} on {', '.join(found)}" for verdict, found in groups.items() if found]
        none = "" if groups["better"] or baseline == "dense" else " No gain over it was measured."
        lines.append(f"{name} against {baseline}: {'; '.join(told)}.{none}")
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
