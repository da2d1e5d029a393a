"""What a report of layer-wise quantisation shows besides its metrics: the ranking of the blocks, quality against bits."""

from __future__ import annotations

from zoo.record.format import format_metric, metric_title


def importance_evidence(scores: dict[str, dict[int, float]], bits: dict[int, int], stability: float) -> dict:
    """{"figures": …} of a report: every score over the blocks, those of the high width filled.

    Args:
        scores: {name: {block: score}}. bits: {block: width}.
        stability: Kendall's tau of LIM between two halves of the calibration text.
    """
    blocks, widths = sorted(bits), sorted(set(bits.values()))
    lowered = (
        f"with {low} bits: {', '.join(str(block) for block in blocks if bits[block] == low)}"
        for low in widths[:-1] or widths
    )
    tau = f"Kendall's tau of LIM between two halves of the calibration text: {stability:.2f}."
    filled = {"style": "points", "x": blocks, "open": [bits[block] < widths[-1] for block in blocks]}
    figure = {
        "title": "Importance of the blocks",
        "caption": f"Blocks {'; '.join(lowered)}. {tau}",
        "x": f"block; filled: {widths[-1]} bits, open: fewer",
        "columns": 1,
        "panels": [
            {"title": name, "series": [filled | {"y": [values[block] for block in blocks]}]}
            for name, values in scores.items()
        ],
    }
    return {"figures": {"importance": figure}}


def curve_evidence(curves: dict[str, list[dict]]) -> dict:
    """{"tables": …, "figures": …} of a report: each metric by average bits, for every order of lowering the blocks.

    curves: {order: [{"bits": average, "metrics": {name: M}}]}, from all blocks at the highest width to all at the lowest.
    """
    metrics = next(iter(curves.values()))[0]["metrics"]
    figure = {
        "title": "Quality against average bits",
        "x": "average bits of the quantised weights",
        "panels": [curve_panel(curves, key) for key in metrics],
    }
    return {"tables": dict(curve_table(curves, key) for key in metrics), "figures": {"curves": figure}}


def curve_table(curves: dict[str, list[dict]], key: str) -> tuple[str, dict]:
    """(title, table) of one metric, a row an order."""
    bits = sorted({point["bits"] for points in curves.values() for point in points}, reverse=True)
    title, rows = f"{metric_title(key)} by average bits, order", []
    for order, points in curves.items():
        shown = {point["bits"]: format_metric(point["metrics"][key]) for point in points}
        rows.append([order, *(shown.get(b, "") for b in bits)])
    return title, {"header": [title, *(f"{b:.2f}" for b in bits)], "rows": rows}


def curve_panel(curves: dict[str, list[dict]], key: str) -> dict:
    """One metric, a line an order, and the straight line between the ends that all orders share."""
    series = []
    for order, points in curves.items():
        found = [point["metrics"][key] for point in points]
        places = {"x": [point["bits"] for point in points], "y": [metric["value"] for metric in found]}
        error = [m["spread"] or 0.0 if m["n_of"] in ("runs", "seeds") else 0.0 for m in found]
        series.append({"name": order, "style": "line", **places, **({"error": error} if any(error) else {})})
    series.append({"style": "guide", **{axis: [places[axis][0], places[axis][-1]] for axis in ("x", "y")}})
    shown = [y for line in series for y in line["y"]]
    log = {"log": "y"} if 0 < 5 * min(shown) < max(shown) else {}
    return {"title": metric_title(key), **log, "series": series}
