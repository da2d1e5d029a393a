"""What the layer-wise quantisation paper (arXiv 2406.17415) claims, held against one run's own measurements."""

from __future__ import annotations

from itertools import pairwise

from zoo.record.compare import certain_sign
from zoo.record.format import format_metric, metric_title
from zoo.record.measurements import paired_difference

CLOSE = 0.1  # how far above the all-high model a perplexity may be and still count as close
HEADER = ["the paper claims", "measured here", "seen"]


def claims_table(
    curves: dict[str, list[dict]],
    own: str,
    mixture: dict[str, dict],
    baselines: dict[str, dict[str, dict]],
    backend: str,
) -> dict:
    """A table of the report: each claim, what was measured of the first metric, and whether it was seen.

    curves: as in the report; own: the order of the checkpoint; mixture: metrics of that order's mixture of candidates at
    the checkpoint's average; baselines: {name: metrics} of models of about its bytes that drop blocks or weights instead.
    """
    key = next(iter(curves[own][0]["metrics"]))
    close = f"{metric_title(key)} within {100 * CLOSE:.0f} %"
    rows = [
        [
            f"(a) quality stays close (here: {close}) until 25 to 50 % of blocks are lowered in order, 5 to 10 % at random",
            *close_claim(curves, own, key),
        ],
        ["(d) larger models profit more", "one model", "not judged"],
    ]
    if "random" in curves:
        name = f"(b) importance helps on top of a quantiser that adapts itself (here: {backend})"
        rows.insert(1, [name, *importance_claim(curves[own], curves["random"], own, key)])
    if baselines:
        rows.insert(-1, ["(c) fewer bits beat fewer weights at equal bytes", *size_claim(mixture, baselines, own, key)])
    return {"header": HEADER, "rows": rows}


def close_claim(curves: dict[str, list[dict]], own: str, key: str) -> list[str]:
    shares = {name: close_share(points, key) for name, points in curves.items()}
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    if "random" not in shares:
        return [told, "not judged: no random order was measured"]
    if shares[own] >= 0.25 and shares["random"] <= 0.1:
        return [told, "yes"]
    return [told, "in part: further than at random" if shares[own] > shares["random"] else "no"]


def close_share(points: list[dict], key: str) -> float:
    """The share of blocks, on the line between the points, that are lowered when the metric stops being close."""
    bound = (1 + CLOSE) * points[0]["metrics"][key]["value"]
    for before, after in pairwise(points):
        a, b = (point["metrics"][key]["value"] for point in (before, after))
        if b > bound:
            lowered = before["lowered"] + (bound - a) / (b - a) * (after["lowered"] - before["lowered"])
            return lowered / points[-1]["lowered"]
    return 1.0


def importance_claim(ours: list[dict], chance: list[dict], own: str, key: str) -> list[str]:
    """At every point of the curve but its ends, which all orders share: is the order surely better than chance?"""
    told, better, inner = [], 0, list(zip(ours, chance, strict=True))[1:-1]
    for point, random in inner:
        a, b = point["metrics"][key], random["metrics"][key]
        better += surely_lower(a, b)
        told.append(f"{format_metric(a)} against {format_metric(b)} at {point['bits']:.2f} bits")
    verdict = "yes" if better == len(inner) else f"at {better} of {len(inner)} points" if better else "no"
    return [f"{own} against random: {'; '.join(told)}", verdict]


def surely_lower(a: dict, b: dict) -> bool:
    """Whether one measured metric is below another by two standard errors of their difference, window by window."""
    return certain_sign(paired_difference([a["raw"]], [b["raw"]])) < 0


def size_claim(mixture: dict[str, dict], baselines: dict[str, dict[str, dict]], own: str, key: str) -> list[str]:
    shown = {own: mixture[key]} | {name: metrics[key] for name, metrics in baselines.items()}
    beaten = [name for name in baselines if surely_lower(mixture[key], shown[name])]
    told = ", ".join(f"{name} {format_metric(metric)}" for name, metric in shown.items())
    return [told, "yes" if len(beaten) == len(baselines) else f"against {beaten[0]} only" if beaten else "no"]
