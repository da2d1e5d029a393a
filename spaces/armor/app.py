"""Dense and ARMOR answer one prompt side by side: text, tokens per second and bytes, live; and the report's plots.

python app.py [--checkpoint FOLDER|HUB_ID] [--dense FOLDER|HUB_ID]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

LOCAL = Path("runs/armor")
HUB_ID = "slimzoo/smollm2-135m-instruct-armor"
MAX_PROMPT = 2000  # characters
MAX_NEW_TOKENS = 256


def find_checkpoint(name: str | None) -> Path:
    """A local folder, or a snapshot of a Hub repository."""
    name = name or os.environ.get("SLIMZOO_CHECKPOINT") or (str(LOCAL) if LOCAL.exists() else HUB_ID)
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


def find_dense(name: str | None, report: dict) -> str:
    """The base model: as named, else the very weights that the recipe compressed, else the report's Hub id."""
    name = name or os.environ.get("SLIMZOO_DENSE")
    if name:
        return name
    try:
        from recipes.common.base_models import resolve_model
    except ImportError:
        return report["base_model"]["id"]
    return str(resolve_model(report["config"]["model"], report["config"].get("revision")).path)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers in memory, tied weights once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def cache_bytes(cache: DynamicCache) -> int:
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


class Decoder:
    """Greedy or sampled decoding of one model, a token per call, with its own clock."""

    def __init__(self, model: PreTrainedModel, tokenizer, ids: torch.Tensor, temperature: float, seed: int):
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = DynamicCache(config=model.config)
        self.next_input, self.tokens, self.seconds, self.done = ids, [], 0.0, False
        self.first_seconds = 0.0

    @torch.inference_mode()
    def step(self) -> None:
        if self.done:
            return
        begin = time.perf_counter()
        logits = self.model(self.next_input, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        if self.temperature > 0:
            probabilities = torch.softmax(logits.float() / self.temperature, -1)
            token = torch.multinomial(probabilities, 1, generator=self.generator)
        else:
            token = logits.argmax().view(1)
        elapsed = time.perf_counter() - begin
        if self.tokens:
            self.seconds += elapsed
        else:
            self.first_seconds = elapsed
        self.done = token.item() == self.tokenizer.eos_token_id
        if not self.done:
            self.tokens.append(token.item())
            self.next_input = token.view(1, 1)

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def figures(self) -> str:
        speed = f"{(len(self.tokens) - 1) / self.seconds:.1f} tokens/s" if self.seconds else "…"
        return (
            f"**{speed}** after the first · prompt in {self.first_seconds:.2f} s · "
            f"**{weight_bytes(self.model) / 1e6:.0f} MB** weights + {cache_bytes(self.cache) / 1e6:.2f} MB cache"
        )


def encode(tokenizer, prompt: str) -> torch.Tensor:
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def build(checkpoint: Path, dense: str) -> gr.Blocks:
    report = json.loads((checkpoint / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
        "armor": AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True),
    }

    def answer(prompt: str, new_tokens: int, temperature: float, seed: int) -> Iterator[tuple[str, str, str, str]]:
        prompt = prompt.strip()
        if not prompt:
            raise gr.Error("The prompt is empty: write a question first.")
        if len(prompt) > MAX_PROMPT:
            raise gr.Error(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT} are allowed.")
        new_tokens = max(1, min(int(new_tokens), MAX_NEW_TOKENS))
        ids = encode(tokenizer, prompt)
        pair = [Decoder(model, tokenizer, ids, temperature, int(seed)) for model in models.values()]
        for _ in range(new_tokens):
            for decoder in pair:  # one token each in turn: both clocks see the same load
                decoder.step()
            yield pair[0].text, pair[0].figures(), pair[1].text, pair[1].figures()
            if all(decoder.done for decoder in pair):
                return

    name = report["base_model"]["id"]
    size = report["size"]
    with gr.Blocks(title="ARMOR 2:4, side by side", analytics_enabled=False) as app:
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
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0 = greedy)")
            seed = gr.Number(0, precision=0, label="Seed")
        with gr.Row():
            columns = []
            for title in ("Dense", "ARMOR"):
                with gr.Column():
                    columns.append(gr.Textbox(label=title, lines=10, elem_id=f"{title.lower()}-text"))
                    columns.append(gr.Markdown(elem_id=f"{title.lower()}-figures"))
        gr.on(
            [go.click, prompt.submit],
            answer,
            [prompt, new_tokens, temperature, seed],
            columns,
            concurrency_limit=1,
        )
        with gr.Row():
            for plot in sorted((checkpoint / "plots").glob("*.png")):
                gr.Image(str(plot), label=plot.stem.replace("_", " "), show_label=True)
    return app.queue(max_size=16, default_concurrency_limit=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", help="ARMOR checkpoint: a folder or a Hub id (default: runs/armor, else the Hub)"
    )
    parser.add_argument("--dense", help="the base model: a folder or a Hub id (default: the one in the report)")
    flags = parser.parse_args()
    checkpoint = find_checkpoint(flags.checkpoint)
    report = json.loads((checkpoint / "report.json").read_text())
    build(checkpoint, find_dense(flags.dense, report)).launch(allowed_paths=[str(checkpoint / "plots")])


if __name__ == "__main__":
    main()
