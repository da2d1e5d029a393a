"""Networks that were cut before training: what they say of an image beside the dense ones, and how they were cut.

python app.py [--checkpoint FOLDER|HUB_ID ...] [--dense FOLDER|HUB_ID ...]
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

import zoo  # noqa: F401 (registers the model classes)
from zoo.errors import UserError
from zoo.record.format import FIDELITY, format_bytes, format_metric, metric_title
from zoo.spaces import classify, find_checkpoint, page, serve, show_plots, upload_row

CHECKPOINTS = {  # where a recipe leaves its checkpoint, and its Hub repository
    "random-pruning": (Path("runs/random-pruning"), "slimzoo/resnet-14-8-cifar10-random-pruning"),
    "precropping": (Path("runs/precropping"), "slimzoo/resnet-8-cifar10-precropping"),
}


@dataclass
class Pair:
    """A checkpoint and, if it is at hand, the dense network that was trained beside it."""

    folder: Path
    report: dict
    model: PreTrainedModel
    dense: PreTrainedModel | None
    processor: object

    @property
    def recipe(self) -> str:
        return self.report["recipe"]

    def models(self) -> dict[str, PreTrainedModel | None]:
        return {"dense": self.dense, self.recipe: self.model}


def load_pair(folder: Path, dense: str | None) -> Pair:
    """Raises: UserError for a checkpoint that neither recipe made."""
    report = json.loads((folder / "report.json").read_text())
    if report["recipe"] not in CHECKPOINTS:
        raise UserError(f"{folder} is of the recipe {report['recipe']}: one of {', '.join(CHECKPOINTS)} is needed.")
    beside = folder.with_name(f"{folder.name}-dense")
    dense = dense or (str(beside) if beside.is_dir() else None)
    load = AutoModelForImageClassification.from_pretrained
    processor = AutoImageProcessor.from_pretrained(folder)
    return Pair(folder, report, load(folder).eval(), load(dense).eval() if dense else None, processor)


def sizes_before_and_after(pair: Pair) -> tuple[str, list[str], list[int], list[float]]:
    """(what is counted, names, before, after): weights of every layer, or channels of every group."""
    compression = pair.model.config.compression_config
    if "precrop" in compression:
        before, after = compression["precrop"]["base_widths"], compression["precrop"]["widths"]
        return "channels", list(before), list(before.values()), [after[name] for name in before]
    sizes = {name: weight.numel() for name, weight in pair.model.dense_model().named_parameters()}
    densities = {name: compression["densities"][name] for name in sizes if name in compression["densities"]}
    before = [sizes[name] for name in densities]
    after = [count * density for count, density in zip(before, densities.values(), strict=True)]
    return "weights", [name.removesuffix(".weight") for name in densities], before, after


def draw_architecture(pair: Pair) -> Figure:
    """Every layer or group before (outline) and after (filled), from the pixels down to the labels."""
    what, names, before, after = sizes_before_and_after(pair)
    figure = Figure(figsize=(8, 1.4 + 0.2 * len(names)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(names))
    axis.barh(rows, before, color="none", edgecolor="#555555", linewidth=0.8, label="dense")
    axis.barh(rows, after, color="#0072B2", height=0.55, label=pair.recipe)
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        axis.text(max(old, new), row, f" {100 * new / old:.0f} %", va="center", fontsize=7)
    if what == "weights":
        axis.set_xscale("log")
    axis.set_yticks(rows, [name.replace("convolution", "conv") for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(what)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def describe(pair: Pair) -> str:
    """The report's headline, as Markdown."""
    report, size = pair.report, pair.report["size"]
    lines = [
        f"### {report['base_model']['id']}, {report['recipe']}",
        f"**{format_bytes(size['compressed_bytes'])}** of {format_bytes(size['dense_bytes'])} dense, measured with"
        f" {len(report['seeds'])} seeds on held-out images ({report['data']['evaluation']['test']['name']}):",
    ]
    for key in [key for key in report["compressed"] if key not in FIDELITY][:3]:
        own, dense = report["compressed"][key], report["dense"][key]
        lines.append(f"- {metric_title(key)}: **{format_metric(own)}**, dense {format_metric(dense)}")
    return "\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def build(pairs: list[Pair]) -> gr.Blocks:
    def answer(image: Image.Image) -> list:
        shown = []
        for pair in pairs:
            pixels = pair.processor(image, return_tensors="pt").pixel_values
            for model in pair.models().values():
                shown += [{}, "The dense network is not at hand."] if model is None else classify(model, pixels)
        return shown

    titles = {}
    for pair in pairs:
        for name in pair.models():
            titles[f"{pair.recipe}-{name}"] = f"{name} ({pair.recipe}'s)" if name == "dense" else name
    with page("Pruning at initialisation") as app:
        gr.Markdown("# Pruning at initialisation\nNetworks that were made small before they were trained.")
        upload_row(titles, answer)
        for pair in pairs:
            with gr.Tab(pair.recipe):
                gr.Markdown(describe(pair), elem_id=f"{pair.recipe}-facts")
                gr.Plot(draw_architecture(pair), label="Before and after", elem_id=f"{pair.recipe}-architecture")
                show_plots(pair.folder)
        labels = pairs[0].model.config.id2label
        examples = [str(labels[i]) for i in sorted(labels, key=int)]
        gr.Markdown(f"The networks know {len(examples)} classes: {', '.join(examples)}; of anything else they guess.")
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", help="one or two checkpoints: folders or Hub ids")
    parser.add_argument("--dense", nargs="+", help="the dense network of each (default: <checkpoint>-dense)")
    flags = parser.parse_args()
    named = flags.checkpoint or os.environ.get("SLIMZOO_CHECKPOINT", "").split() or [None] * len(CHECKPOINTS)
    folders = [find_checkpoint(name, *places) for name, places in zip(named, CHECKPOINTS.values(), strict=False)]
    dense = flags.dense or [None] * len(folders)
    pairs = [load_pair(folder, name) for folder, name in zip(folders, dense, strict=True)]
    serve(build(pairs), *folders)


if __name__ == "__main__":
    main()
