"""A vision transformer without most of its blocks, beside the dense one: what both see, how fast, and which blocks are left.

python app.py [--checkpoint FOLDER|HUB_ID] [--dense FOLDER|HUB_ID]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import gradio as gr
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

import zoo  # noqa: F401 (registers the model classes)
from zoo.kernels.block_sparse_linear.reference import block_rows
from zoo.layers.block_sparse import BlockSparseLinear
from zoo.record.format import FIDELITY, format_bytes, format_metric, metric_title
from zoo.spaces import classify, find_checkpoint, find_dense, page, serve, show_plots, upload_row

LOCAL = Path("runs/lpvit")
HUB_ID = "slimzoo/vit-tiny-easy-vqa-lpvit"
COLUMNS = 6  # masks in a row
COST = "Cost of an image"  # the report's table of multiply-adds and energy


def load_dense(checkpoint: Path, name: str | None, report: dict) -> PreTrainedModel:
    """As named, else the dense model kept beside the checkpoint, else the base model of the report."""
    beside = checkpoint.with_name(f"{checkpoint.name}-dense")
    source = name or (str(beside) if beside.is_dir() else find_dense(None, report))
    return AutoModelForImageClassification.from_pretrained(source).eval()


def block_masks(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """{layer: bool (R, C), True where a block is kept}."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BlockSparseLinear):
            masks[name] = torch.zeros(layer.grid, dtype=torch.bool)
            masks[name][block_rows(layer.crow_indices, len(layer.blocks)), layer.col_indices.long()] = True
    return masks


def short(name: str) -> str:
    """'vit.layers.0.attention.q_proj' -> '0 q_proj'."""
    parts = name.split(".")
    return " ".join([*(part for part in parts if part.isdigit()), parts[-1]])


def draw_masks(masks: dict[str, torch.Tensor]) -> Figure:
    """Every layer's grid of blocks: rows are outputs, columns inputs; what is kept is dark."""
    rows = math.ceil(len(masks) / COLUMNS)
    figure = Figure(figsize=(11, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, mask) in zip(axes, masks.items(), strict=False):
        axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest", aspect="auto")
        axis.set_title(f"{short(name)}: {100 * mask.float().mean():.0f} %", fontsize=8)
    return figure


def describe(report: dict) -> str:
    """Size, measured quality and modelled cost, as Markdown."""
    size = report["size"]
    lines = [
        f"### {report['base_model']['id']}, {report['recipe']}",
        f"**{format_bytes(size['compressed_bytes'])}** of {format_bytes(size['dense_bytes'])} dense. On held-out images"
        f" ({report['data']['evaluation']['test']['name']}):",
        "",
    ]
    for key in [key for key in report["compressed"] if key not in FIDELITY][:3]:
        own, dense = report["compressed"][key], report["dense"][key]
        lines.append(f"- {metric_title(key)}: **{format_metric(own)}**, dense {format_metric(dense)}")
    for what, dense, own in report.get("tables", {}).get(COST, {"rows": []})["rows"]:
        lines.append(f"- {what}: **{own:.4g}**, dense {dense:.4g}")
    return "\n".join(lines)


def build(checkpoint: Path, dense_name: str | None) -> gr.Blocks:
    report = json.loads((checkpoint / "report.json").read_text())
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    pruned = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    models = {"dense": load_dense(checkpoint, dense_name, report), "pruned": pruned}

    def answer(image: Image.Image) -> list:
        pixels = processor(image, return_tensors="pt").pixel_values
        return [part for model in models.values() for part in classify(model, pixels)]

    with page("Block-sparse vision transformer") as app:
        gr.Markdown(
            "# Block-sparse vision transformer\nWhole blocks of its weights are gone; the blocks that remain were refitted."
        )
        upload_row({name: name for name in models}, answer)
        gr.Markdown(describe(report), elem_id="facts")
        gr.Plot(draw_masks(block_masks(pruned)), label="Blocks that are kept", elem_id="masks")
        show_plots(checkpoint)
        labels = [str(pruned.config.id2label[i]) for i in sorted(pruned.config.id2label, key=int)]
        known = ", ".join(labels[:30]) + (" and more" if len(labels) > 30 else "")
        gr.Markdown(f"Both models know {len(labels)} classes: {known}. Of anything else they guess.")
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a block-sparse checkpoint: a folder or a Hub id")
    parser.add_argument(
        "--dense", help="the dense model: a folder or a Hub id (default: <checkpoint>-dense, or the base)"
    )
    flags = parser.parse_args()
    checkpoint = find_checkpoint(flags.checkpoint, LOCAL, HUB_ID)
    serve(build(checkpoint, flags.dense), checkpoint)


if __name__ == "__main__":
    main()
