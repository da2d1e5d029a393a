"""What the Spaces share: where models come from, decoding two of them in turn with a clock each, bytes in memory, and parts
of their pages, which alone need gradio."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image, ImageOps
from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import CACHE
from .errors import UserError

MAX_PROMPT = 2000  # characters
MAX_NEW_TOKENS = 256
MAX_IMAGE_BYTES = 5 << 20
MAX_PIXELS = 4096 * 4096
TURNS = 5  # forward passes that an image's latency is the fastest of
CLASSES_SHOWN = 5


def find_checkpoint(name: str | None, local: Path, hub_id: str) -> Path:
    """The folder of a checkpoint: as named (folder or Hub id) or by $SLIMZOO_CHECKPOINT, else `local`, else the Hub's."""
    name = name or os.environ.get("SLIMZOO_CHECKPOINT") or (str(local) if local.exists() else hub_id)
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


def find_dense(name: str | None, report: dict) -> str:
    """The base model: as named or by $SLIMZOO_DENSE, else the folder that the recipe started from (what a recipe
    converted stays in the cache), else the report's Hub id.
    """
    name = name or os.environ.get("SLIMZOO_DENSE")
    if name:
        return name
    model = report["config"]["model"]
    for folder in (Path(model), Path(constants.HF_HOME) / "slimzoo" / "models" / model):
        if (folder / "config.json").is_file():
            return str(folder)
    return report["base_model"]["id"]


def open_image(path: str | Path) -> Image.Image:
    """An uploaded image in RGB, upright. Raises: UserError for a file that is too large or no image that can be read."""
    size = Path(path).stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise UserError(f"The file has {size / 2**20:.1f} MiB; at most {MAX_IMAGE_BYTES >> 20} MiB are allowed.")
    try:
        with Image.open(path) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"The image has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are allowed."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what PIL raises on damaged files
        raise UserError("The file is not an image that can be read; upload a PNG, JPEG or WebP.") from None


@torch.inference_mode()
def classify(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[dict[str, float], str]:
    """({class: probability} of the likeliest, how long it took, as Markdown) for one image (1, 3, H, W)."""
    seconds = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        logits = model(pixel_values=pixels).logits[0]
        seconds.append(time.perf_counter() - begin)
    chances = logits.softmax(-1)
    best = chances.argsort(descending=True)[:CLASSES_SHOWN].tolist()
    shown = f"**{1e3 * min(seconds):.1f} ms** for one image of {pixels.shape[-2]} x {pixels.shape[-1]} pixels"
    return {str(model.config.id2label[i]): chances[i].item() for i in best}, shown


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers in memory, tied weights once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def encode_chat(tokenizer, prompt: str) -> torch.Tensor:
    """Token ids (1, T) of one message of a user, in the model's chat template if it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


class Decoder:
    """Greedy or sampled decoding of one model, a token per call, with its own clock; by default on a DynamicCache."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        ids: torch.Tensor,
        temperature: float = 0.0,
        seed: int = 0,
        cache: Cache | None = None,
    ):
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.next_input, self.tokens, self.seconds, self.done = ids, [], 0.0, False
        self.first_seconds = 0.0

    @torch.no_grad()
    def step(self) -> None:
        if self.done:
            return
        begin = time.perf_counter()
        logits = self.model(self.next_input, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits[0, -1]
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
        """Speed and bytes so far, as Markdown."""
        speed = f"{(len(self.tokens) - 1) / self.seconds:.1f} tokens/s" if self.seconds else "…"
        return (
            f"**{speed}** after the first · prompt in {self.first_seconds:.2f} s · "
            f"**{weight_bytes(self.model) / 1e6:.0f} MB** weights + **{cache_bytes(self.cache) / 1e6:.2f} MB** cache"
        )


# ------------------------------------------------------------------------------------------------------ parts of pages


def answer_columns(titles: dict[str, str], lines: int = 10) -> list:
    """Two outputs a column, for a `Decoder`'s text and figures; titles: {start of the element's id: title}."""
    import gradio as gr

    outputs = []
    for name, title in titles.items():
        with gr.Column():
            outputs.append(gr.Textbox(label=title, lines=lines, elem_id=f"{name}-text"))
            outputs.append(gr.Markdown(elem_id=f"{name}-figures"))
    return outputs


def upload_row(titles: dict[str, str], answer: Callable[[Image.Image], list]) -> None:
    """An upload button and, of each model, its classes and how long they took: what answer(image) returns, two a model.

    A file that is no image is answered with one sentence; titles as in `answer_columns`.
    """
    import gradio as gr

    def opened(path: str | None) -> list:
        if path is None:
            raise gr.Error("Upload an image first.")
        try:
            image = open_image(path)
        except UserError as error:
            raise gr.Error(str(error)) from None
        return [image, *answer(image)]

    with gr.Row():
        with gr.Column(scale=1):
            upload = gr.UploadButton("Upload an image", file_types=["image"], variant="primary", elem_id="upload")
            outputs = [gr.Image(label="Image", interactive=False, height=220, elem_id="picture")]
        for name, title in titles.items():
            with gr.Column(scale=1):
                outputs += [gr.Label(label=title, elem_id=name), gr.Markdown(elem_id=f"{name}-time")]
    upload.upload(opened, upload, outputs, concurrency_limit=1)


def show_plots(checkpoint: Path) -> None:
    """The plots that the recipe drew."""
    import gradio as gr

    for plot in sorted((checkpoint / "plots").glob("*.png")):
        gr.Image(str(plot), label=plot.stem.replace("-", " ").replace("_", " "), interactive=False)
