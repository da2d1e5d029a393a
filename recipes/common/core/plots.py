"""The plots of a report and of the leaderboard: drawn from reports only, PNG, readable without colour."""

from __future__ import annotations

import math
import re
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator

from zoo.record.card import layer_types, method_name, metric_title, slug

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vPX*"
INK = "#555555"
WIDTH = 7.2  # inches


def draw(report: dict, folder: Path) -> list[Path]:
    """Draws what the card of `report` links, into folder/plots; returns the files."""
    plots = Path(folder) / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn = [quality_size(report, plots / "quality_size.png")]
    if layer_types(report):
        drawn.append(proxy_loss(report, plots / "proxy_loss.png"))
    if report.get("curves"):
        drawn.append(curves(report, plots / "curves.png"))
    if report.get("importance"):
        drawn.append(importance(report, plots / "importance.png"))
    for title, swept in report.get("sweeps", {}).items():
        drawn.append(sweep(title, swept, plots / f"sweep-{slug(title)}.png"))
    if report.get("cache"):
        drawn += [cache_bits(report, plots / "cache_bits.png"), cache_front(report, plots / "cache_front.png")]
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
    """Each perplexity (or, without any, each metric) against the bytes of the weights, for every model measured.

    Baselines whose size the report does not give are lines across.
    """
    dense = report["dense"]
    keys = [key for key, m in dense.items() if m["unit"] == "ppl" and m["n_of"] == "windows"] or list(dense)[:3]
    size, own = report["size"], method_name(report)  # ours is drawn over those that it nearly equals
    bytes_of = {"dense": size["dense_bytes"], own: size["compressed_bytes"]} | size.get("baselines", {})
    unit, label = 1e6, "weights, MB"
    if cache := report.get("cache"):
        bytes_of = {name: row["bytes_per_token"] for name, row in cache["models"].items()}
        bytes_of["dense"] = cache["dense_bytes_per_token"]
        unit, label = 1e3, "KV cache, kB a token"
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


def curves(report: dict, path: Path) -> Path:
    """Every metric against the average bits, a line for each order of blocks; straight between the ends is dotted."""
    lines = report["curves"]
    keys = list(report["compressed"])
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for place, (order, points) in enumerate(lines.items()):
            bits, metrics = [p["bits"] for p in points], [p["metrics"][key] for p in points]
            values = [m["value"] for m in metrics]
            spread = [m["spread"] or 0.0 if m["n_of"] in ("runs", "seeds") else 0.0 for m in metrics]
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            axis.errorbar(bits, values, spread, linewidth=2 if place == 0 else 1, label=order, **style)
        ends = [points[0], points[-1]]
        axis.plot([p["bits"] for p in ends], [p["metrics"][key]["value"] for p in ends], ":", color=INK, linewidth=1)
        shown = [point["metrics"][key]["value"] for points in lines.values() for point in points]
        if min(shown) > 0 and max(shown) > 5 * min(shown):
            axis.set_yscale("log")
        axis.set_title(metric_title(key), fontsize=9)
        plain(axis)
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    figure.supxlabel("average bits of the quantised weights", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return save(figure, path)


def sweep(title: str, swept: dict, path: Path) -> Path:
    """The first metric of every series over the quantity that was varied, with its spread over seeds."""
    key = next(iter(next(iter(swept["series"].values()))[0]["metrics"]))
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    for place, (name, points) in enumerate(swept["series"].items()):
        metrics = [point["metrics"][key] for point in points]
        spread = [m["spread"] or 0.0 if m["n_of"] in ("runs", "seeds") else 0.0 for m in metrics]
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
        axis.errorbar(
            [point["x"] for point in points],
            [m["value"] for m in metrics],
            spread,
            linewidth=2 if place == 0 else 1,
            capsize=2,
            label=name,
            **style,
        )
    if swept["log"]:
        axis.set_xscale("log")
    axis.set_xlabel(swept["x"], fontsize=9)
    axis.set_ylabel(metric_title(key), fontsize=9)
    axis.set_title(title, fontsize=9)
    plain(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def importance(report: dict, path: Path) -> Path:
    """Each score of the blocks over depth, one panel a score; filled points have the high width."""
    blocks = report["importance"]["blocks"]
    names = list(blocks[0]["scores"])
    high = max(block["bits"] for block in blocks)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.3 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        for block in blocks:
            fill = COLOURS[0] if block["bits"] == high else "none"
            axis.plot(block["index"], block["scores"][name], "o", markerfacecolor=fill, color=COLOURS[0], markersize=5)
        axis.set_title(name, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        plain(axis)
    figure.supxlabel(f"block; filled: {high} bits, open: fewer", fontsize=9)
    return save(figure, path)


def cache_bits(report: dict, path: Path) -> Path:
    """Key and value bits of every layer of the KV cache as a heat map, written into the cells."""
    rows = list(zip(*report["cache"]["layers"], strict=True))  # keys, values
    figure = Figure(figsize=(max(WIDTH, 0.27 * len(rows[0])), 1.3), layout="constrained")
    axis = figure.subplots()
    axis.imshow([[math.log2(bits) for bits in row] for row in rows], cmap="Blues", vmin=0, vmax=5, aspect="auto")
    for y, row in enumerate(rows):
        for x, bits in enumerate(row):
            axis.text(x, y, bits, ha="center", va="center", fontsize=8, color="white" if bits > 4 else "black")
    axis.set_yticks([0, 1], ["keys", "values"])
    axis.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 15)))
    axis.set_xlabel("layer", fontsize=9)
    axis.tick_params(labelsize=8, color=INK)
    return save(figure, path)


def cache_front(report: dict, path: Path) -> Path:
    """Loss against mean bits: every table evaluated, the front, and the uniform tables by name."""
    cache = report["cache"]
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axis = figure.subplots()
    searched, front = cache["searched"], cache["front"]
    points = {"color": INK, "alpha": 0.4, "markersize": 3, "label": "evaluated"}
    axis.plot([p["bits"] for p in searched], [p["loss"] for p in searched], ".", **points)
    steps = {"where": "post", "color": COLOURS[0], "marker": "o", "markersize": 4, "label": "front"}
    axis.step([p["bits"] for p in front], [p["loss"] for p in front], **steps)
    for place, (name, point) in enumerate(cache["uniform"].items()):
        axis.plot(point["bits"], point["loss"], "s", color=COLOURS[1], label=None if place else "uniform")
        axis.annotate(name, (point["bits"], point["loss"]), (4, 4), textcoords="offset points", fontsize=7)
    own = cache["models"][method_name(report)]["equivalent_bits"]
    axis.axvline(own, color=COLOURS[2], linewidth=1, linestyle="--", label="chosen")
    if min(point["loss"] for point in searched) > 0:
        axis.set_yscale("log")
    axis.set_xlabel("mean bits of keys and values, scales not counted", fontsize=9)
    axis.set_ylabel(
        {"kl": "KL to the 16-bit model, nats a token"}.get(cache["objective"], cache["objective"]), fontsize=9
    )
    plain(axis)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)
