"""The plots of a report and of the leaderboard: drawn from reports only, PNG, readable without colour."""

from __future__ import annotations

import math
import re
from pathlib import Path

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator

from zoo.record.card import layer_types
from zoo.record.format import method_name, metric_title, slug

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vPX*"
INK = "#555555"
WIDTH = 7.2  # inches
BACKGROUND = {  # styles of a described figure's series: the grey ones, and those with a colour and marker of their own
    "dots": {"linestyle": "", "marker": ".", "markersize": 3, "alpha": 0.4},
    "guide": {"linestyle": ":", "linewidth": 1},
}
DRAWN = {
    "line": {},
    "step": {"drawstyle": "steps-post"},
    "points": {"linestyle": "", "markersize": 5},
}


def draw(report: dict, folder: Path) -> list[Path]:
    """Draws what the card of `report` links, into folder/plots; returns the files."""
    plots = Path(folder) / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn = [quality_size(report, plots / "quality_size.png")]
    if layer_types(report):
        drawn.append(proxy_loss(report, plots / "proxy_loss.png"))
    for title, swept in report.get("sweeps", {}).items():
        drawn.append(sweep(title, swept, plots / f"sweep-{slug(title)}.png"))
    drawn += [described(figure, plots / f"{stem}.png") for stem, figure in report.get("figures", {}).items()]
    return drawn


def proxy_loss(report: dict, path: Path) -> Path:
    """Loss of every matrix before and after, one panel a matrix type, over depth."""
    types = layer_types(report)
    columns = min(4, len(types))
    rows = math.ceil(len(types) / columns)
    figure = Figure(figsize=(WIDTH, 1.2 + 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (name, layers) in zip(axes.flat, types.items(), strict=False):
        depth = [layer_index(row["name"], place) for place, row in enumerate(layers)]
        for key, label, marker, style in (
            ("loss_init", "start", "s", "--"),
            ("loss_final", "end", "o", "-"),
        ):
            losses = [row[key] for row in layers]
            colour = COLOURS[key == "loss_init"]
            axis.plot(depth, losses, style, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
        axis.set_title(name, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        plain(axis)
    if all(row["loss_final"] > 0 for layers in types.values() for row in layers):
        axes.flat[0].set_yscale("log")
    for place in range(len(types), axes.size):  # the panel above an empty place shows the block numbers
        axes.flat[place].axis("off")
        axes.flat[place - columns].tick_params(labelbottom=True)
    figure.supxlabel("block", fontsize=9)
    figure.supylabel("proxy loss", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def quality_size(report: dict, path: Path) -> Path:
    """Each perplexity (or, without any, each metric) against the bytes of the weights, or the report's footprint.

    Baselines whose size the report does not give are lines across.
    """
    dense = report["dense"]
    keys = [key for key, m in dense.items() if m["unit"] == "ppl" and m["n_of"] == "windows"] or list(dense)[:3]
    size, own = report["size"], method_name(report)  # ours is drawn over those that it nearly equals
    bytes_of = {"dense": size["dense_bytes"], own: size["compressed_bytes"]} | size.get("baselines", {})
    unit, label = 1e6, "weights, MB"
    if footprint := report.get("footprint"):
        bytes_of = {"dense": footprint["dense"]} | footprint["models"]
        unit = 1e3 if "bytes" in footprint["unit"] else 1
        label = f"{footprint['what']}, {footprint['unit'].replace('bytes', 'kB')}"
    models = {"dense": report["dense"], own: report["compressed"], **report["baselines"]}
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(keys), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=True):
        for place, (name, metrics) in enumerate(models.items()):
            colour, metric = COLOURS[place % len(COLOURS)], metrics[key]
            if name in bytes_of:
                marker = MARKERS[place % len(MARKERS)]
                spread = metric["spread"] if metric["n_of"] == "seeds" else None
                style = {"fmt": marker, "color": colour, "label": name, "zorder": 3 if name == own else 2}
                axis.errorbar(bytes_of[name] / unit, metric["value"], spread, **style)
            else:
                style = ("--", ":", "-.")[place % 3]
                axis.axhline(metric["value"], linestyle=style, linewidth=1, color=colour, label=name)
        values = [metrics[key]["value"] for metrics in models.values()]
        if min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
        axis.set_title(metric_title(key), fontsize=9)
        axis.set_xlim(0, 1.06 * max(bytes_of.values()) / unit)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        plain(axis)
    figure.supxlabel(label, fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return save(figure, path)


def sweep(title: str, swept: dict, path: Path) -> Path:
    """The first metric of every series over the quantity that was varied, with its spread over seeds."""
    key = next(iter(next(iter(swept["series"].values()))[0]["metrics"]))
    series = []
    for name, points in swept["series"].items():
        metrics = [point["metrics"][key] for point in points]
        places = {"x": [point["x"] for point in points], "y": [metric["value"] for metric in metrics]}
        error = [m["spread"] or 0.0 if m["n_of"] in ("runs", "seeds") else 0.0 for m in metrics]
        series.append({"name": name, "style": "line", **places, "error": error})
    panel = {"title": title, "log": "x" if swept["log"] else "", "series": series}
    return described({"x": swept["x"], "y": metric_title(key), "panels": [panel]}, path)


def described(description: dict, path: Path) -> Path:
    """A figure as FIGURE in zoo/record/schema.py describes it."""
    panels = description["panels"]
    columns = min(description.get("columns", 3), len(panels))
    rows = math.ceil(len(panels) / columns)
    high = 1.3 if columns == 1 < rows else 2.6
    heights = [0.25 * len(panel["cells"]) if "cells" in panel else high for panel in panels]
    heights = [max(heights[row * columns : (row + 1) * columns]) for row in range(rows)]
    width = max(WIDTH, *(0.27 * len(cells) for panel in panels for cells in panel.get("cells", {}).values()), 0)
    figure = Figure(figsize=(width, 0.8 + sum(heights)), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=columns == 1, squeeze=False, height_ratios=heights)
    for axis, panel in zip(axes.flat, panels, strict=False):
        (draw_cells if "cells" in panel else draw_series)(axis, panel)
        axis.set_title(panel.get("title", ""), fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    first, x, y = axes.flat[0], description.get("x", ""), description.get("y", "")
    handles, names = first.get_legend_handles_labels()
    named = dict(zip(names, handles, strict=True))  # lines before error bars: back into the order of the series
    handles = [named[series["name"]] for series in panels[0].get("series", ()) if series.get("name") in named]
    legend = {"handles": handles, "frameon": False, "fontsize": 8}
    if len(panels) == 1:
        first.set_xlabel(x, fontsize=9)
        first.set_ylabel(y, fontsize=9)
        if handles:
            first.legend(**legend)
    else:
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
        if handles:
            figure.legend(**legend, loc="outside upper center", ncols=4)
    return save(figure, path)


def draw_series(axis, panel: dict) -> None:
    """Curves, points and vertical lines; those in the background take no colour."""
    log = panel.get("log", "")
    coloured = 0
    for series in panel["series"]:
        x, y, label = series["x"], series.get("y"), series.get("name")
        if series["style"] in BACKGROUND:
            axis.plot(x, y, color=INK, label=label, **BACKGROUND[series["style"]])
            continue
        colour, marker = COLOURS[coloured % len(COLOURS)], MARKERS[coloured % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1 if coloured else 2}
        style |= DRAWN.get(series["style"], {})
        coloured += 1
        if series["style"] == "vertical":
            for place in x:
                axis.axvline(place, color=colour, linestyle="--", linewidth=1, label=label)
            continue
        axis.errorbar(x, y, series.get("error"), capsize=2, label=label, **style)
        for a, b, is_open in zip(x, y, series.get("open", ()), strict=False):
            if is_open:
                axis.plot(a, b, **style, markerfacecolor="white", zorder=3)
        for a, b, note in zip(x, y, series.get("notes", ()), strict=False):
            axis.annotate(note, (a, b), (4, 4), textcoords="offset points", fontsize=7)
    if "x" in log:
        axis.set_xscale("log")
    elif all(isinstance(place, int) for series in panel["series"] for place in series["x"]):
        axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    if "y" in log:
        axis.set_yscale("log")
    plain(axis)


def draw_cells(axis, panel: dict) -> None:
    """A heat map, its numbers written into the cells."""
    shade = (LogNorm if "z" in panel.get("log", "") else Normalize)(*panel["shades"])
    rows = list(panel["cells"].values())
    axis.imshow(rows, cmap="Blues", norm=shade, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            ink = "white" if shade(value) > 0.5 else "black"
            axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_yticks(range(len(rows)), panel["cells"])
    axis.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 15)))
    axis.tick_params(labelsize=8, color=INK)


def leaderboard(rows: list[dict], path: Path, fingerprint: str) -> Path:
    """Quality kept against size kept, a point for each checkpoint of the zoo and one for dense.

    rows: [{"name", "size": fraction of the dense bytes, "quality": fraction of the dense quality}].
    fingerprint: kept in the file, so that an old plot can be told (`read_fingerprint`).
    """
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(1, 1, "k*", markersize=10, label="dense")
    for place, row in enumerate(rows):
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        axis.plot(row["size"], row["quality"], linestyle="", markersize=8, label=row["name"], **style)
    axis.axhline(1, color=INK, linewidth=0.5)
    axis.set_xlim(0, max([1.05, *(1.05 * row["size"] for row in rows)]))
    axis.set_xlabel("size of the weights, as a fraction of dense")
    axis.set_ylabel("quality, as a fraction of dense")
    plain(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path, {"Description": fingerprint})


def read_fingerprint(path: Path) -> str | None:
    """The fingerprint of a leaderboard plot; None without one."""
    from PIL import Image  # matplotlib needs it too

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Description")


def layer_index(name: str, default: int) -> int:
    """12 for 'model.layers.12.mlp.up_proj'; `default` for a name without a number."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else default


def plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, color="#DDDDDD")
    axis.tick_params(labelsize=8, color=INK)


def save(figure, path: Path, metadata: dict | None = None) -> Path:
    """Writes the PNG whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", dpi=130, metadata=metadata)
    partial.replace(path)
    return path
