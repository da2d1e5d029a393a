"""Build a report from what a run measured, print it as a table, and write it with its plots and card."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recipes.common.core import plots
from recipes.common.core.state import write_text
from recipes.common.metrics.memory import peak_rss_bytes
from recipes.common.metrics.metric import over_seeds
from zoo.record.card import render_card
from zoo.record.compare import compare, speed_verdict, verdicts
from zoo.record.format import FIDELITY, baseline_name, format_bytes, format_metric, format_time, method_name
from zoo.record.measurements import paired_differences, write_measurements
from zoo.record.schema import SCHEMA_VERSION, check_report
from zoo.record.verify import hash_files

if TYPE_CHECKING:
    from recipes.common.core.recipe import Recipe

PACKAGES = ("slimzoo", "torch", "transformers", "safetensors", "huggingface-hub", "numpy", "lm-eval")
MARKS = {"better": "+", "worse": "-", "undecided": "~"}


def build(
    *,
    recipe: Recipe,
    base_model: dict,
    data: dict,
    dense: list[dict[str, dict]],
    compressed: list[dict[str, dict]],
    baselines: dict[str, list[dict[str, dict]]],
    size: dict,
    speed: dict[str, dict[str, dict]],
    layers: list[dict],
    seconds: float,
    seeds: list[int],
    notes: list[str] | tuple[str, ...] = (),
    samples: list[dict[str, str]] | None = None,
    findings: dict | None = None,
) -> dict:
    """The report of a finished run, checked.

    Args:
        base_model, data: what it was made from and measured on, as the domain gives them. size: of the checkpoint.
        dense, compressed, baselines: {metric name: M}, one such dict per seed; of the dense model one where it is the same
            for all. Their raw values are compared in pairs, and left out.
        speed: {"decode": {"ratio_to_dense_bf16": M, …}, "prefill": {…}}.
        layers: one row per packed matrix. seconds: of the whole run. notes: what a reader must know of it.
        samples: [{"prompt", "dense", "compressed"}], greedy generations.
        findings: what else the method found out: "tables", "sweeps", "figures", "footprint", "settings", "same_as" as in
            zoo/record/schema.py, and more "notes".
    """
    findings = dict(findings or {})
    raw = raw_values({"dense": dense, recipe.method: compressed, **baselines})
    report = {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.name,
        "config": json.loads(json.dumps(recipe.settings())),
        "base_model": base_model,
        "data": data,
        "dense": over_seeds(dense),
        "compressed": over_seeds(compressed),
        "baselines": {name: over_seeds(runs) for name, runs in baselines.items()},
        "paired": paired_differences(raw, recipe.method),
        "size": size,
        "speed": speed,
        "cost": {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), "device": device_name(recipe.device)},
        "environment": environment(),
        "seeds": seeds,
        "layers": layers,
        "notes": [*notes, *findings.pop("notes", [])],
    }
    if samples:
        report["samples"] = samples
    report |= findings
    check_report(report)
    return report


def raw_values(variants: dict[str, list[dict[str, dict]]]) -> dict[str, dict[str, list]]:
    """What measurements.json holds of {variant: metrics of each seed}: the metrics that have raw values for every seed."""
    return {
        name: {key: [run[key]["raw"] for run in runs] for key in runs[0] if all("raw" in run[key] for run in runs)}
        for name, runs in variants.items()
    }


def merged(*parts: dict[str, dict]) -> dict[str, dict]:
    """The tables, figures, … of several parts of the findings, in their order."""
    found: dict[str, dict] = {}
    for part in parts:
        for kind, titled in part.items():
            found.setdefault(kind, {}).update(titled)
    return found


# ----------------------------------------------------------------------------------------------------- the machine


def environment() -> dict:
    """Python, the versions of what computes, and the processor."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "versions": versions, "cpu": cpu_name()}


def cpu_name() -> str:
    """Model of the processor and the number of threads that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


# ------------------------------------------------------------------------------------------------- showing and writing


def render_table(report: dict) -> str:
    """What a recipe prints last: models by metrics, marked with how the own one is to each, then sizes, speed, verdicts."""
    keys = list(report["compressed"])
    models = {"dense": report["dense"], method_name(report): report["compressed"], **report["baselines"]}
    rows = [["", *(f"{key} {'(up)' if report['dense'][key]['higher_is_better'] else '(down)'}" for key in keys)]]
    for name, metrics in models.items():
        cells = []
        for key in keys:
            own = metrics is report["compressed"] or (name == "dense" and key in FIDELITY)
            mark = "" if own else MARKS[compare(report, key, name)]
            cells.append(f"{format_metric(metrics[key])} {mark:1}")
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    if report.get("same_as"):
        lines.insert(0, f"what the method returned is a baseline: {', '.join(report['same_as'])}")
    size, cost = report["size"], report["cost"]
    lines += [
        f"{method_name(report)} is + better, - worse than that row, ~ undecided (nearer than two standard errors)",
        "",
        *verdicts(report),
        f"size: {format_bytes(size['compressed_bytes'])} of {format_bytes(size['dense_bytes'])} dense "
        f"({100 * size['compressed_bytes'] / size['dense_bytes']:.1f} %)",
    ]
    if footprint := report.get("footprint"):
        own, dense = footprint["models"][method_name(report)], footprint["dense"]
        lines.append(f"{footprint['what']}: {own:,} of {dense:,} {footprint['unit']} ({100 * own / dense:.1f} %)")
    for phase, ratios in report["speed"].items():
        shown = (f"{format_metric(m)} of {baseline_name(ratio)}" for ratio, m in ratios.items())
        lines.append(f"speed, {phase}: {', '.join(shown)}")
    if report["speed"]:
        lines.append(speed_verdict(report))
    lines.append(f"cost: {format_time(cost['seconds'])}, {format_bytes(cost['peak_rss_bytes'])} of memory")
    return "\n".join(lines)


def write(report: dict, folder: Path, raw: dict[str, dict[str, list]]) -> dict:
    """Puts plots, report.json, README.md and the raw values (`raw_values`) of what was measured into a checkpoint folder;
    returns the report with the files' hashes.
    """
    folder = Path(folder)
    write_measurements(raw, folder)
    plots.draw(report, folder)
    report = report | {"files": hash_files(folder)}
    check_report(report)
    card = render_card(report, repo_id=None)
    write_text(folder / "report.json", as_text(report))
    write_text(folder / "README.md", card)
    return report


def as_text(report: dict) -> str:
    """What report.json holds."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
