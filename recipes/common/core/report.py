"""Build a report from what a run measured, print it as a table, and write it with its plots and card."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import metadata_load

from recipes.common.core import plots
from recipes.common.core.recipe import write_text
from recipes.common.data.assets import ASSETS
from zoo.checkpoint import read_checkpoint_sizes
from zoo.record.card import (
    compare,
    format_bytes,
    format_metric,
    format_time,
    method_name,
    render_card,
    rival_name,
    speed_verdict,
    verdicts,
)
from zoo.record.schema import SCHEMA_VERSION, check_report
from zoo.record.verify import hash_files, layer_bytes

if TYPE_CHECKING:
    from recipes.common.core.recipe import Recipe
    from recipes.common.data.base_models import BaseModel
    from recipes.common.data.texts import Text

PACKAGES = ("slimzoo", "torch", "transformers", "safetensors", "huggingface-hub", "numpy", "lm-eval")
LANGUAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": ["en"]}
MARKS = {"better": "+", "worse": "-", "undecided": "~"}


def build(
    *,
    recipe: Recipe,
    base_model: dict,
    data: dict,
    dense: dict[str, dict],
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
        base_model, data, size: as `base_row`, `text_data` and `packed_size` give them for language models.
        dense: {metric name: M}. compressed, baselines: one such dict per seed.
        speed: {"decode": {"ratio_to_dense_bf16": M, …}, "prefill": {…}}.
        layers: one row per packed matrix. seconds: of the whole run. notes: what a reader must know of it.
        samples: [{"prompt", "dense", "compressed"}], greedy generations.
        findings: what else the method found out: "importance", "curves", "sweeps", more "notes" (see report_schema.py).
    """
    findings = dict(findings or {})
    report = {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.name,
        "config": json.loads(json.dumps(recipe.settings())),
        "base_model": base_model,
        "data": data,
        "dense": dense,
        "compressed": over_seeds(compressed),
        "baselines": {name: over_seeds(runs) for name, runs in baselines.items()},
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


def base_row(base: BaseModel) -> dict:
    """`base_model` of a report that starts from a language model."""
    row = {key: getattr(base, key) for key in ("id", "revision", "sha256", "parameters", "license")}
    return row | {"language": languages(base)}


def text_data(recipe: Recipe, calibration: Text, texts: dict[str, Text], dense: dict[str, dict]) -> dict:
    """`data` of a report on a language model: texts calibrated and measured on, tasks, and how much of each."""
    evaluation = {
        name: text_row(text, windows=dense[f"perplexity/{name}"]["n"], seqlen=recipe.eval_seqlen)
        for name, text in texts.items()
    }
    tasks = {key.partition("/")[2]: m["n"] for key, m in dense.items() if m["n_of"] == "items"}
    if tasks:
        evaluation["tasks"] = {name: task_row(name, items) for name, items in tasks.items()}
    return {
        "calibration": text_row(calibration, windows=recipe.nsamples, seqlen=recipe.seqlen),
        "evaluation": evaluation,
    }


def packed_size(folder: Path, layers: list[dict], baseline_layers: dict[str, list[dict]], itemsize: int) -> dict:
    """`size` of a report, with that of the baselines, were they packed.

    baseline_layers: {baseline: rows like `layers`}, how its matrices would be packed ("block_out" = "block_in" = r stands
    for a correction of rank r); gives the baselines their place in the plot.
    """
    size = read_checkpoint_sizes(folder)
    if baseline_layers:
        rest = size["compressed_bytes"] - sum(layer_bytes(row, itemsize) for row in layers)
        size["baselines"] = {
            name: rest + sum(layer_bytes(row, itemsize) for row in rows) for name, rows in baseline_layers.items()
        }
    return size


def text_row(text: Text, **amount: int) -> dict:
    """A row of `data`: where the text comes from, and how much of it was used."""
    return {key: getattr(text, key) for key in ("name", "version", "sha256", "size", "license")} | amount


def languages(base: BaseModel) -> list[str]:
    """As the base model's card states them; the packaged models come without one. Empty when unknown."""
    if base.id in LANGUAGES:
        return LANGUAGES[base.id]
    card = base.path / "README.md"
    stated = (metadata_load(card) or {}).get("language") if card.exists() else None
    return [stated] if isinstance(stated, str) else stated or []


def task_row(name: str, items: int) -> dict:
    """The row of `data.evaluation.tasks` of a local task, or of one that lm-eval fetched by itself."""
    if name in ASSETS:
        asset = ASSETS[name]
        row = {"name": asset.archive.package, "version": asset.archive.version, "license": asset.license}
        return row | {"sha256": asset.sha256, "size": None, "items": items}
    version = f"lm-eval {importlib.metadata.version('lm-eval')}"
    return {"name": name, "version": version, "sha256": None, "size": None, "items": items}


def over_seeds(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """{metric: M} of one run per seed -> {metric: M} with mean, sample standard deviation and the single values.

    A single run stays as it is: its n counts windows or items, and its spread is the standard error over those.
    """
    if len(runs) == 1:
        return runs[0]
    merged = {}
    for key, first in runs[0].items():
        values = [run[key]["value"] for run in runs]
        merged[key] = first | {
            "value": statistics.fmean(values),
            "spread": statistics.stdev(values),
            "n": len(values),
            "n_of": "seeds",
            "values": values,
        }
    return merged


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


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------- showing and writing


def render_table(report: dict) -> str:
    """What a recipe prints last: models by metrics, each marked against dense, then sizes, speed and verdicts."""
    keys = list(report["compressed"])
    models = {"dense": report["dense"], method_name(report): report["compressed"], **report["baselines"]}
    rows = [["", *(f"{key} {'(up)' if report['dense'][key]['higher_is_better'] else '(down)'}" for key in keys)]]
    for name, metrics in models.items():
        cells = []
        for key in keys:
            mark = "" if name == "dense" else MARKS[compare(report, key, metrics[key], report["dense"][key])]
            cells.append(f"{format_metric(metrics[key])} {mark:1}")
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    size, cost = report["size"], report["cost"]
    lines += [
        "against dense: + better, - worse, ~ undecided (nearer than two standard deviations)",
        "",
        *verdicts(report),
        f"size: {format_bytes(size['compressed_bytes'])} of {format_bytes(size['dense_bytes'])} dense "
        f"({100 * size['compressed_bytes'] / size['dense_bytes']:.1f} %)",
    ]
    if cache := report.get("cache"):
        dense_bytes, own = cache["dense_bytes_per_token"], cache["models"][method_name(report)]
        lines.append(
            f"KV cache: {own['bytes_per_token']:,} of {dense_bytes:,} bytes a token"
            f" ({100 * own['bytes_per_token'] / dense_bytes:.1f} %), {own['equivalent_bits']:.2f} bits, with scales"
            f" {own['effective_bits']:.2f}"
        )
    for phase, ratios in report["speed"].items():
        shown = (f"{format_metric(m)} of {rival_name(rival)}" for rival, m in ratios.items())
        lines.append(f"speed, {phase}: {', '.join(shown)}")
    if report["speed"]:
        lines.append(speed_verdict(report))
    lines.append(f"cost: {format_time(cost['seconds'])}, {format_bytes(cost['peak_rss_bytes'])} of memory")
    return "\n".join(lines)


def write(report: dict, folder: Path) -> dict:
    """Puts plots, report.json and README.md into a checkpoint folder; returns the report with the files' hashes."""
    folder = Path(folder)
    plots.draw(report, folder)
    report = report | {"files": hash_files(folder)}
    check_report(report)
    card = render_card(report, repo_id=None)
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "README.md", card)
    return report
