"""Bring an old report up to date. What is here is frozen: it says what a version was, and what the next one made of it."""

from ..errors import UserError
from .format import format_metric, format_time, method_name, metric_title

RENAMED = {"rivals": "baselines"}  # words on cards of version 1


def upgrade(report: dict) -> dict:
    """A report of an earlier version in the current one, with the same numbers; any other is returned as it is.

    Raises: UserError for an old report that is broken.
    """
    if not isinstance(report, dict):
        return report
    try:
        if report.get("schema_version") == 1:
            report = first_to_second(report)
        if report.get("schema_version") == 2:
            report = second_to_third(report)
        return report
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"a broken report of schema_version 1 ({type(error).__name__}: {error}): make the checkpoint again."
        ) from None


def second_to_third(report: dict) -> dict:
    """Values of single windows and items were not kept: no `paired`, and no measurements.json."""
    return report | {"schema_version": 3}


def first_to_second(report: dict) -> dict:
    """`curves`, `importance` and `cache` of single papers become tables, figures, a footprint and settings."""
    tables, figures, more = {}, {}, {}
    if curves := report.get("curves"):
        tables |= curve_tables(curves, report["compressed"])
        figures["curves"] = curve_figure(curves, report["compressed"])
    if importance := report.get("importance"):
        figures["importance"] = importance_figure(importance)
    if cache := report.get("cache"):
        tables |= {"KV cache": cache_table(cache, method_name(report)), "Sensitivity of the layers": error_table(cache)}
        figures |= {"cache_bits": bits_figure(cache), "cache_front": front_figure(cache, method_name(report))}
        models = {name: row["bytes_per_token"] for name, row in cache["models"].items()}
        dense = cache["dense_bytes_per_token"]
        more["footprint"] = {"what": "KV cache", "unit": "bytes a token", "dense": dense, "models": models}
        form = {key: cache[key] for key in ("mode", "group_size", "residual_length", "layers")}
        more["settings"] = {"kv_cache_quantization": form}
    tables |= report.get("tables", {})
    found = {name: part for name, part in {"tables": tables, "figures": figures}.items() if part}
    kept = {key: value for key, value in report.items() if key not in ("curves", "importance", "cache")}
    return kept | {"schema_version": 2} | found | more


def curve_tables(curves: dict, metrics: dict) -> dict:
    bits = sorted({point["bits"] for points in curves.values() for point in points}, reverse=True)
    tables = {}
    for key in metrics:
        title, rows = f"{metric_title(key)} by average bits, order", []
        for order, points in curves.items():
            shown = {point["bits"]: format_metric(point["metrics"][key]) for point in points}
            rows.append([order, *(shown.get(b, "") for b in bits)])
        tables[title] = {"header": [title, *(f"{b:.2f}" for b in bits)], "rows": rows}
    return tables


def curve_figure(curves: dict, metrics: dict) -> dict:
    panels = []
    for key in metrics:
        series = []
        for order, points in curves.items():
            found = [point["metrics"][key] for point in points]
            values = {"x": [point["bits"] for point in points], "y": [metric["value"] for metric in found]}
            error = [metric["spread"] or 0.0 if metric["n_of"] in ("runs", "seeds") else 0.0 for metric in found]
            series.append({"name": order, "style": "line", **values, **({"error": error} if any(error) else {})})
        series.append({"style": "guide", **{axis: [values[axis][0], values[axis][-1]] for axis in ("x", "y")}})
        shown = [y for one in series for y in one["y"]]
        log = {"log": "y"} if 0 < 5 * min(shown) < max(shown) else {}
        panels.append({"title": metric_title(key), **log, "series": series})
    return {"title": "Quality against average bits", "x": "average bits of the quantised weights", "panels": panels}


def importance_figure(importance: dict) -> dict:
    blocks = importance["blocks"]
    widths = sorted({block["bits"] for block in blocks})
    lowered = []
    for bits in widths[:-1] or widths:
        lowered.append(f"with {bits} bits: {', '.join(str(b['index']) for b in blocks if b['bits'] == bits)}")
    caption = f"Blocks {'; '.join(lowered)}."
    if "stability" in importance:
        tau = importance["stability"]
        caption += f" Kendall's tau of LIM between two halves of the calibration text: {tau:.2f}."
    places = {"x": [block["index"] for block in blocks], "open": [block["bits"] < widths[-1] for block in blocks]}
    panels = [
        {"title": name, "series": [{"style": "points", **places, "y": [block["scores"][name] for block in blocks]}]}
        for name in blocks[0]["scores"]
    ]
    label = f"block; filled: {widths[-1]} bits, open: fewer"
    return {"title": "Importance of the blocks", "caption": caption, "x": label, "columns": 1, "panels": panels}


def cache_table(cache: dict, own: str) -> dict:
    dense = cache["dense_bytes_per_token"]
    rows = [["16-bit cache", "16.00", "16.00", f"{dense:,}", "", ""]]
    for name, row in cache["models"].items():
        cells = [name, f"{row['equivalent_bits']:.2f}", f"{row['effective_bits']:.2f}", f"{row['bytes_per_token']:,}"]
        cells += [f"{100 * row['bytes_per_token'] / dense:.1f} %", f"{row['kl']:.4f}"]
        rows.append([f"**{cell}**" for cell in cells] if name == own else cells)
    header = ["", "bits", "bits with scales", "bytes a token", "of 16 bits", "KL on held-out calibration text"]
    return {"header": header, "rows": rows, "section": "sizes"}


def error_table(cache: dict) -> dict:
    rows = []
    for name, errors in cache["errors"].items():
        order = sorted(range(len(errors)), key=errors.__getitem__)
        ends = (f"{errors[layer]:.3f} (layer {layer})" for layer in (order[-1], order[0]))
        rows.append([name, f"{sum(errors) / len(errors):.3f}", *ends])
    groups = "; ".join(", ".join(map(str, group["layers"])) for group in cache["groups"])
    took = f"{len(cache['searched'])} tables were evaluated in {format_time(cache['seconds'])}."
    return {
        "header": ["keys and values at", "mean error of attention's output", "most sensitive layer", "least"],
        "rows": rows,
        "caption": f"Layers that share a pair: {groups}. {took}",
    }


def bits_figure(cache: dict) -> dict:
    keys, values = (list(widths) for widths in zip(*cache["layers"], strict=True))
    panel = {"log": "z", "cells": {"keys": keys, "values": values}, "shades": [1, 32]}
    return {"title": "Bits of every layer", "x": "layer", "panels": [panel]}


def front_figure(cache: dict, own: str) -> dict:
    def places(points) -> dict:
        return {"x": [point["bits"] for point in points], "y": [point["loss"] for point in points]}

    uniform = {**places(cache["uniform"].values()), "notes": list(cache["uniform"])}
    series = [
        {"name": "evaluated", "style": "dots", **places(cache["searched"])},
        {"name": "front", "style": "step", **places(cache["front"])},
        {"name": "uniform", "style": "points", **uniform},
        {"name": "chosen", "style": "vertical", "x": [cache["models"][own]["equivalent_bits"]]},
    ]
    log = {"log": "y"} if min(point["loss"] for point in cache["searched"]) > 0 else {}
    objective = {"kl": "KL to the 16-bit model, nats a token"}.get(cache["objective"], cache["objective"])
    axes = {"x": "mean bits of keys and values, scales not counted", "y": objective}
    return {"title": "Loss against bits", **axes, "panels": [{**log, "series": series}]}
