"""Average bits by slider: size, quality and the answers of a model whose blocks have two widths, beside the dense model.

At the checkpoint's own average the checkpoint itself answers. At any other one the dense weights are rounded to nearest on
the spot, in the checkpoint's groups and its order of blocks, which takes a second or two for a small model.

python app.py [--checkpoint FOLDER|HUB_ID] [--dense FOLDER|HUB_ID]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipes.common.parts.quantizers import rtn
from recipes.layerwise_quant.plans import order_blocks, parse_levels, pinned, plan_bits
from zoo.folder import open_folder
from zoo.kernels.packed_linear.reference import pack_codes
from zoo.layers.packing import pack_layers, row_bytes
from zoo.record.format import metric_title
from zoo.record.schema import read_report
from zoo.spaces import (
    MAX_NEW_TOKENS,
    MAX_PROMPT,
    Decoder,
    answer_columns,
    check_length,
    check_new_tokens,
    check_number,
    check_text,
    encode_chat,
    find_checkpoint,
    find_dense,
    page,
    sentences,
    serve,
    show_plots,
)

LOCAL = Path("runs/layerwise-quant")
HUB_ID = "slimzoo/smollm2-135m-instruct-layerwise-quant"
LOW, HIGH = 2.0, 8.0  # of the slider


class Mixtures:
    """The checkpoint and what its dense base becomes at other averages."""

    def __init__(self, checkpoint: Path, dense: str):
        self.report = read_report(checkpoint / "report.json")
        compression = open_folder(checkpoint).compression
        self.own_average = round(compression["average_bits"], 2)
        self.own_bits = {int(block): bits for block, bits in compression["bits_by_layer"].items()}
        self.modules = compression["modules"]
        self.dense = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        self.own = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.backend = compression["backend"]
        self.weights = dict.fromkeys(self.own_bits, 0)
        for name, row in self.rows():
            if block_of(name) in self.weights:
                self.weights[block_of(name)] += row["d_out"] * row["d_in"]
        blocks, scores = list(self.weights), {}
        for panel in self.report["figures"]["importance"]["panels"]:
            (points,) = panel["series"]
            scores[panel["title"]] = dict(zip(points["x"], points["y"], strict=True))
        kept = pinned(self.report["config"]["keep"], blocks)
        self.order = order_blocks(compression["importance"], scores, blocks, kept, self.report["seeds"][0])
        self.latest: tuple[float, PreTrainedModel] = (self.own_average, self.own)

    @property
    def curves(self) -> dict[str, dict]:
        """{title of a metric: its "y" at the averages "x", in the checkpoint's own order}; empty if not measured."""
        panels = self.report["figures"].get("curves", {"panels": []})["panels"]
        return {panel["title"]: panel["series"][0] for panel in panels}

    def rows(self) -> list[tuple[str, dict]]:
        return [(row["name"], row) for row in self.report["layers"]]

    def bits(self, average: float) -> dict[int, int]:
        """{block: width}; the checkpoint's own at its average, else the closest pair of widths around it."""
        if average == self.own_average:
            return self.own_bits
        return plan_bits(self.order, self.weights, average, *parse_levels("auto", average))

    def bytes(self, bits: dict[int, int]) -> int:
        """Of the whole checkpoint with these widths: the packed matrices, and all else in bf16."""
        packed = sum(row_bytes(row | {"bits": bits.get(block_of(name), row["bits"])}, 2) for name, row in self.rows())
        return packed + self.report["size"]["compressed_bytes"] - sum(row_bytes(row, 2) for _, row in self.rows())

    @torch.no_grad()
    def model(self, average: float) -> PreTrainedModel:
        """The model at an average; the last one made is kept."""
        if average == self.own_average:
            return self.own
        if self.latest[0] != average:
            bits = self.bits(average)
            config = copy.deepcopy(self.dense.config)
            config.tie_word_embeddings &= "lm_head" not in self.modules
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            specs = {
                name: spec | {"zeros": "integer", "bits": bits.get(block_of(name), spec["bits"])}
                for name, spec in self.modules.items()
            }
            pack_layers(model, specs)
            rounded = {}
            for name, spec in specs.items():
                weight = self.dense.get_submodule(name).weight.float()
                quantised = rtn(weight, spec["bits"], spec["group_size"], False, torch.bfloat16)
                rounded[f"{name}.qweight"] = pack_codes(quantised.codes, spec["bits"], spec["group_size"])
                rounded[f"{name}.scales"], rounded[f"{name}.zeros"] = quantised.scales.bfloat16(), quantised.zeros
            left = {k: v for k, v in self.dense.state_dict().items() if k.rpartition(".")[0] not in specs}
            model.load_state_dict(left | rounded, strict=True)
            model.tie_weights()
            self.latest = (average, model.eval())
        return self.latest[1]


def block_of(name: str) -> int | None:
    """The number of the decoder block in a module's name; None for the head."""
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def describe(mixtures: Mixtures, average: float) -> str:
    """Size, and the nearest measured point of the report's curves, as Markdown."""
    bits, dense = mixtures.bits(average), mixtures.report["size"]["dense_bytes"]
    size, low = mixtures.bytes(bits), min(bits.values())
    lowered = sum(width == low for width in bits.values())
    widths = f"{lowered} of {len(bits)} blocks at {low} bits" + (
        f", the others at {max(bits.values())}" if max(bits.values()) > low else ""
    )
    lines = [
        f"### {average:.2f} bits: **{size / 1e6:.0f} MB** of {dense / 1e6:.0f} MB ({100 * size / dense:.0f} %)",
        widths + ".",
    ]
    if average == mixtures.own_average:
        found = mixtures.report["compressed"]
        lines.append(
            "This is the checkpoint itself; "
            + perplexities(found)
            + f" (dense: {perplexities(mixtures.report['dense'])})."
        )
    else:
        lines.append(
            f"These weights are rounded to nearest here and now; those of the checkpoint by {mixtures.backend}."
        )
        curves = mixtures.curves
        places = next(iter(curves.values()))["x"] if curves else []
        if places and min(places) <= average <= max(places):
            near = min(range(len(places)), key=lambda i: abs(places[i] - average))
            found = {
                key: metric | {"value": curves[metric_title(key)]["y"][near]}
                for key, metric in mixtures.report["compressed"].items()
            }
            lines.append(f"Nearest measured mixture, {places[near]:.2f} bits: {perplexities(found)}.")
        else:
            lines.append("Quality at this average was not measured.")
    return "\n\n".join(lines)


def perplexities(metrics: dict) -> str:
    return "perplexity " + ", ".join(
        f"{key.partition('/')[2]} {metric['value']:.1f}" for key, metric in metrics.items() if metric["unit"] == "ppl"
    )


def draw(mixtures: Mixtures, average: float) -> Figure:
    """The report's curve with the chosen average, and the width of every block."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis, strip = figure.subplots(2, 1, height_ratios=[5, 1])
    key = next(iter(mixtures.report["compressed"]))
    if curve := mixtures.curves.get(metric_title(key)):
        axis.plot(curve["x"], curve["y"], "o-", label=f"order: {curve['name']}")
    axis.plot(
        mixtures.own_average, mixtures.report["compressed"][key]["value"], "*", markersize=13, label="the checkpoint"
    )
    axis.axhline(mixtures.report["dense"][key]["value"], linestyle="--", color="gray", label="dense")
    axis.axvline(average, color="tab:red", linewidth=1)
    axis.set(xlabel="average bits", ylabel=key, xlim=(LOW - 0.1, HIGH + 0.1))
    axis.legend(frameon=False, fontsize=8)
    bits = mixtures.bits(average)
    strip.imshow([[bits[block] for block in sorted(bits)]], aspect="auto", cmap="Blues", vmin=1, vmax=8)
    for block, width in sorted(bits.items()):
        strip.text(block, 0, width, ha="center", va="center", fontsize=7, color="white" if width > 5 else "black")
    strip.set(yticks=[], xlabel="block")
    return figure


def build(checkpoint: Path, dense: str) -> gr.Blocks:
    tokenizer, mixtures = AutoTokenizer.from_pretrained(checkpoint), Mixtures(checkpoint, dense)

    def snapped(average: float) -> float:
        """The checkpoint's own average is a place of its own on the slider."""
        with sentences():
            average = check_number(average, "Average bits", LOW, HIGH)
        return mixtures.own_average if abs(average - mixtures.own_average) < 0.025 else round(average, 2)

    def show(average: float) -> tuple[str, Figure]:
        average = snapped(average)
        return describe(mixtures, average), draw(mixtures, average)

    def answer(average: float, prompt: str, new_tokens: int) -> Iterator[tuple[str, str, str, str]]:
        average = snapped(average)
        with sentences():
            new_tokens = check_new_tokens(new_tokens)
            ids = encode_chat(tokenizer, check_text(prompt))
            check_length(ids, new_tokens, mixtures.own)
        pair = [Decoder(model, tokenizer, ids) for model in (mixtures.dense, mixtures.model(average))]
        for _ in range(new_tokens):
            for decoder in pair:  # one token each in turn: both clocks see the same load
                decoder.step()
            yield pair[0].text, pair[0].figures(), pair[1].text, pair[1].figures()
            if all(decoder.done for decoder in pair):
                return

    with page("Average bits by slider") as app:
        gr.Markdown(
            f"# Average bits by slider\n`{mixtures.report['base_model']['id']}`: blocks that matter less get fewer bits."
        )
        slider = gr.Slider(LOW, HIGH, value=mixtures.own_average, step=0.05, label="Average bits", elem_id="bits")
        with gr.Row():
            facts = gr.Markdown(describe(mixtures, mixtures.own_average), elem_id="facts")
            plot = gr.Plot(draw(mixtures, mixtures.own_average), show_label=False, elem_id="curve")
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt", value="Why is the sky blue?", lines=2, max_length=MAX_PROMPT, scale=4, elem_id="prompt"
            )
            new_tokens = gr.Slider(1, MAX_NEW_TOKENS, value=64, step=1, label="New tokens", scale=2)
            go = gr.Button("Generate", variant="primary", scale=1, elem_id="generate")
        with gr.Row():
            columns = answer_columns({"dense": "Dense", "packed": "At these bits"})
        slider.change(show, slider, [facts, plot], trigger_mode="always_last", preprocess=False)  # checked by us
        gr.on([go.click, prompt.submit], answer, [slider, prompt, new_tokens], columns, preprocess=False)
        with gr.Row():
            show_plots(checkpoint)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a layer-wise quantised checkpoint: a folder or a Hub id")
    parser.add_argument("--dense", help="the base model: a folder or a Hub id (default: the one in the report)")
    flags = parser.parse_args()
    checkpoint = find_checkpoint(flags.checkpoint, LOCAL, HUB_ID)
    report = read_report(checkpoint / "report.json")
    serve(build(checkpoint, find_dense(flags.dense, report)), checkpoint)


if __name__ == "__main__":
    main()
