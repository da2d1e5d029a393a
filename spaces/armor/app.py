"""Dense and ARMOR answer one prompt side by side: text, tokens per second and bytes, live; and the report's plots.

python app.py [--checkpoint FOLDER|HUB_ID] [--dense FOLDER|HUB_ID]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoo.spaces import (
    MAX_NEW_TOKENS,
    MAX_PROMPT,
    MAX_SEED,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Decoder,
    answer_columns,
    check_length,
    check_new_tokens,
    check_temperature,
    check_text,
    check_whole,
    encode_chat,
    find_checkpoint,
    find_dense,
    page,
    sentences,
    serve,
    show_plots,
)

LOCAL = Path("runs/armor")
HUB_ID = "slimzoo/smollm2-135m-instruct-armor"


def build(checkpoint: Path, dense: str) -> gr.Blocks:
    report = json.loads((checkpoint / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
        "armor": AutoModelForCausalLM.from_pretrained(checkpoint),
    }

    def answer(prompt: str, new_tokens: int, temperature: float, seed: int) -> Iterator[tuple[str, str, str, str]]:
        with sentences():
            new_tokens, temperature = check_new_tokens(new_tokens), check_temperature(temperature)
            seed = check_whole(seed, "Seed", 0, MAX_SEED)
            ids = encode_chat(tokenizer, check_text(prompt))
            check_length(ids, new_tokens, models["armor"])
        pair = [Decoder(model, tokenizer, ids, temperature, seed) for model in models.values()]
        for _ in range(new_tokens):
            for decoder in pair:  # one token each in turn: both clocks see the same load
                decoder.step()
            yield pair[0].text, pair[0].figures(), pair[1].text, pair[1].figures()
            if all(decoder.done for decoder in pair):
                return

    name = report["base_model"]["id"]
    size = report["size"]
    with page("ARMOR 2:4, side by side") as app:
        gr.Markdown(
            f"# ARMOR 2:4 beside dense\n`{name}`: {size['dense_bytes'] / 1e6:.0f} MB dense, "
            f"**{size['compressed_bytes'] / 1e6:.0f} MB** with A·S·B. Both models answer in turn, token by token."
        )
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt", value="Why is the sky blue?", lines=2, max_length=MAX_PROMPT, scale=4, elem_id="prompt"
            )
            go = gr.Button("Generate", variant="primary", scale=1, elem_id="generate")
        with gr.Accordion("Options", open=False), gr.Row():
            new_tokens = gr.Slider(1, MAX_NEW_TOKENS, value=64, step=1, label="New tokens")
            temperature = gr.Slider(0, MAX_TEMPERATURE, value=0, step=MIN_TEMPERATURE, label="Temperature (0 = greedy)")
            seed = gr.Number(0, label="Seed", elem_id="seed")
        with gr.Row():
            columns = answer_columns({"dense": "Dense", "armor": "ARMOR"})
        gr.on(
            [go.click, prompt.submit],
            answer,
            [prompt, new_tokens, temperature, seed],
            columns,
            preprocess=False,  # checked by us, with a sentence
        )
        with gr.Row():
            show_plots(checkpoint)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", help="ARMOR checkpoint: a folder or a Hub id (default: runs/armor, else the Hub)"
    )
    parser.add_argument("--dense", help="the base model: a folder or a Hub id (default: the one in the report)")
    flags = parser.parse_args()
    checkpoint = find_checkpoint(flags.checkpoint, LOCAL, HUB_ID)
    report = json.loads((checkpoint / "report.json").read_text())
    serve(build(checkpoint, find_dense(flags.dense, report)), checkpoint)


if __name__ == "__main__":
    main()
