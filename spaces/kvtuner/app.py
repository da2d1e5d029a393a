"""Ask about a long document: a 16-bit KV cache beside one with searched widths, whose bytes grow as the answers do.

python app.py [--checkpoint FOLDER|HUB_ID]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from zoo.cache import KVTunerCache
from zoo.record.schema import read_report
from zoo.spaces import (
    MAX_NEW_TOKENS,
    Decoder,
    answer_columns,
    cache_bytes,
    check_length,
    check_new_tokens,
    check_text,
    find_checkpoint,
    page,
    sentences,
    serve,
    show_plots,
)

LOCAL = Path("runs/kvtuner")
HUB_ID = "slimzoo/smollm2-135m-instruct-kvtuner"
MAX_DOCUMENT = 40_000  # characters
MAX_QUESTION = 500
DRAW_EVERY = 8  # tokens
QUESTION = "The code of the garden gate is"
SECRET = f"{QUESTION} 48213."


def default_document(checkpoint: Path) -> str:
    """Paragraphs of SQuAD where its data is at hand, else the checkpoint's own card; a code is hidden in the middle."""
    try:
        from recipes.common.data.assets import asset_path

        articles = json.loads(asset_path("squad-dev").read_text(encoding="utf-8"))["data"]
        paragraphs = [article["paragraphs"][0]["context"] for article in articles[:8]]
    except (ImportError, OSError, ValueError):
        paragraphs = (checkpoint / "README.md").read_text(encoding="utf-8").split("\n\n")
    middle = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:middle], SECRET, *paragraphs[middle:]])


def draw(growth: dict[str, list[tuple[int, float]]]) -> Figure:
    """Megabytes of each cache against the tokens in it."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for name, points in growth.items():
        axis.plot([tokens for tokens, _ in points], [size for _, size in points], "o-", markersize=3, label=name)
    axis.set(xlabel="tokens in the cache", ylabel="MB")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return figure


def build(checkpoint: Path) -> gr.Blocks:
    report = read_report(checkpoint / "report.json")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16
    )  # both columns: only the cache differs
    footprint, table = report["footprint"], model.config.kv_cache_quantization

    def answer(document: str, question: str, new_tokens: int) -> Iterator[tuple]:
        with sentences():
            new_tokens = check_new_tokens(new_tokens)
            text = check_text(document, "The document", MAX_DOCUMENT)
            text += "\n\n" + check_text(question, "The question", MAX_QUESTION)
            ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
            check_length(ids, new_tokens, model)
        decoders = {
            "16-bit cache": Decoder(model, tokenizer, ids, cache=DynamicCache(config=model.config)),
            "KVTuner": Decoder(model, tokenizer, ids, cache=KVTunerCache.from_config(model.config)),
        }
        growth: dict[str, list[tuple[int, float]]] = {name: [] for name in decoders}
        for index in range(new_tokens):
            for name, decoder in decoders.items():  # one token each in turn: both clocks see the same load
                decoder.step()
                growth[name].append((decoder.cache.get_seq_length(), cache_bytes(decoder.cache) / 1e6))
            done = all(decoder.done for decoder in decoders.values())
            plot = draw(growth) if index % DRAW_EVERY == 0 or done or index == new_tokens - 1 else gr.skip()
            texts = [part for decoder in decoders.values() for part in (decoder.text, decoder.figures())]
            yield (*texts, plot)
            if done:
                return

    with page("KVTuner: a cache of few bits") as app:
        gr.Markdown(
            f"# KVTuner beside a 16-bit cache\n`{report['base_model']['id']}`, the same weights twice: "
            f"**{footprint['models']['kvtuner']:,}** bytes of keys and values a token instead of {footprint['dense']:,} "
            f"({table['equivalent_bits']:.2f} bits on average, {table['effective_bits']:.2f} with scales)."
        )
        document = gr.Textbox(
            default_document(checkpoint), label="Document", lines=10, max_length=MAX_DOCUMENT, elem_id="document"
        )
        with gr.Row():
            question = gr.Textbox(QUESTION, label="Question", max_length=MAX_QUESTION, scale=4, elem_id="question")
            new_tokens = gr.Slider(1, MAX_NEW_TOKENS, value=32, step=1, label="New tokens", scale=2)
            go = gr.Button("Ask", variant="primary", scale=1, elem_id="ask")
        with gr.Row():
            columns = answer_columns({"dense": "16-bit cache", "tuned": "KVTuner"}, lines=6)
        columns.append(gr.Plot(show_label=False, elem_id="growth"))
        inputs = [document, question, new_tokens]
        gr.on([go.click, question.submit], answer, inputs, columns, preprocess=False)  # checked by us, with a sentence
        with gr.Row():
            show_plots(checkpoint)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint with a KVTuner table: a folder or a Hub id")
    flags = parser.parse_args()
    checkpoint = find_checkpoint(flags.checkpoint, LOCAL, HUB_ID)
    serve(build(checkpoint), checkpoint)


if __name__ == "__main__":
    main()
