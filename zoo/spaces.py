"""What the Spaces share: where models come from, what a visitor may ask for, decoding two models in turn with a clock each,
bytes in memory, and parts of their pages, which alone need gradio."""

import math
import os
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image, ImageOps
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import CACHE
from .errors import UserError

MAX_PROMPT = 2000  # characters
MAX_NEW_TOKENS = 256
MAX_TEMPERATURE, MIN_TEMPERATURE = 2.0, 0.1  # 0 is greedy
MAX_SEED = 2**32 - 1
MAX_IMAGE_BYTES = 5 << 20
MAX_PIXELS = 4096 * 4096
MAX_SIDE = 8192  # pixels
MAX_ASPECT = 16  # a processor that resizes the shorter side makes the longer one as much longer
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SHOWN_SIDE = 1024  # pixels of the image that a page shows
HELD = 100  # visitors in line, one being served
KEPT = 600  # seconds that an uploaded file stays
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


# ----------------------------------------------------------------------------------------------- what a visitor may ask


def check_text(text: object, name: str = "The prompt", limit: int = MAX_PROMPT) -> str:
    """A visitor's text without the space around it. Raises: UserError if it is none, empty, too long or not printable."""
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise UserError(f"{name} is empty: write one first.")
    if len(text) > limit:
        raise UserError(f"{name} has {len(text)} characters; at most {limit} are allowed.")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t":
            raise UserError(f"{name} holds U+{ord(character):04X}, which is no text: remove it.")
    return text


def is_number(value: object, low: float, high: float) -> bool:
    """Whether it lies from low to high; an emptied field is None, and NaN lies nowhere."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_number(value: object, name: str, low: float, high: float) -> float:
    if not is_number(value, low, high):
        raise UserError(f"{name}: a number from {low:g} to {high:g} is needed.")
    return float(value)


def check_whole(value: object, name: str, low: int, high: int) -> int:
    if not is_number(value, low, high) or value != int(value):
        raise UserError(f"{name}: a whole number from {low} to {high} is needed.")
    return int(value)


def check_temperature(value: object) -> float:
    """0 or more than logits can be divided by without an overflow."""
    if not is_number(value, MIN_TEMPERATURE, MAX_TEMPERATURE) and not is_number(value, 0, 0):
        raise UserError(f"Temperature: 0 (greedy) or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g} is needed.")
    return float(value)


def check_new_tokens(value: object) -> int:
    return check_whole(value, "New tokens", 1, MAX_NEW_TOKENS)


def check_length(ids: Tensor, new_tokens: int, model: PreTrainedModel) -> None:
    """Raises: UserError if the model does not read the prompt's ids (1, T) and `new_tokens` more."""
    wanted, limit = ids.shape[1] + new_tokens, getattr(model.config, "max_position_embeddings", math.inf)
    if wanted > limit:
        raise UserError(
            f"What was written and the answer take {wanted} tokens; the model reads {limit}: shorten the text or ask for"
            " fewer tokens."
        )


def open_image(path: str | Path) -> Image.Image:
    """An uploaded image in RGB, upright. Raises: UserError, before a pixel is decoded, for a file or image that is too large
    or too long, and for what is no image that can be read."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise UserError(f"The file has {size / 2**20:.1f} MiB; at most {MAX_IMAGE_BYTES >> 20} MiB are allowed.")
        with Image.open(path, formats=IMAGE_FORMATS) as image:  # reads the header only
            check_size(image.width, image.height)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
                upright = upright.convert("I").point(lambda value: value / 256).convert("L")
            return upright.convert("RGB")
    except UserError:
        raise
    except Exception:  # PIL lists nowhere what it raises on damaged files
        raise UserError("The file is not an image that can be read; upload a PNG, JPEG, WebP or GIF.") from None


def check_size(width: int, height: int) -> None:
    """Bounds what decoding and resizing an image take."""
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS or long > MAX_SIDE:
        raise UserError(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,}, and {MAX_SIDE} a side, are allowed."
        )
    if long > MAX_ASPECT * short:
        raise UserError(
            f"The image has {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter."
        )


# --------------------------------------------------------------------------------------------------- what models answer


@torch.inference_mode()
def classify(model: PreTrainedModel, pixels: Tensor) -> tuple[dict[str, float], str]:
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


def encode_chat(tokenizer, prompt: str) -> Tensor:
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
        ids: Tensor,
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


@contextmanager
def sentences() -> Iterator[None]:
    """A UserError inside is shown on the page as its sentence, without a traceback in the log."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None  # it stays until it is closed


def page(title: str):
    """The gr.Blocks of a Space; files that visitors uploaded are removed after a while."""
    import gradio as gr

    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT))


def serve(app, *checkpoints: Path, wait: bool = True) -> None:
    """Starts a page and, with `wait`, stays.

    One visitor is answered at a time, HELD more are shown their place in line, and the next is refused. Uploads are bounded
    where the page has a field for them, and refused where it has none: gradio would store them.
    """
    import gradio as gr

    takes_files = any(isinstance(block, gr.UploadButton) for block in app.blocks.values())
    app.queue(max_size=HELD, default_concurrency_limit=1)
    app.launch(
        allowed_paths=[str(checkpoint / "plots") for checkpoint in checkpoints],
        max_file_size=MAX_IMAGE_BYTES if takes_files else 0,
        prevent_thread_lock=not wait,
    )


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
        with sentences():
            if path is None:
                raise UserError("Upload an image first.")
            image = open_image(path)
        shown = image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return [shown, *answer(image)]

    with gr.Row():
        with gr.Column(scale=1):
            upload = gr.UploadButton("Upload an image", file_types=["image"], variant="primary", elem_id="upload")
            outputs = [gr.Image(label="Image", interactive=False, height=220, elem_id="picture")]
        for name, title in titles.items():
            with gr.Column(scale=1):
                outputs += [gr.Label(label=title, elem_id=name), gr.Markdown(elem_id=f"{name}-time")]
    upload.upload(opened, upload, outputs)


def show_plots(checkpoint: Path) -> None:
    """The plots that the recipe drew."""
    import gradio as gr

    for plot in sorted((checkpoint / "plots").glob("*.png")):
        gr.Image(str(plot), label=plot.stem.replace("-", " ").replace("_", " "), interactive=False)
