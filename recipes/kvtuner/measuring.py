"""What the recipe `kvtuner` measures and says of a table: text, retrieval, tasks, the speed of the real cache, evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from recipes.common.domains.language import Language
from recipes.common.metrics.fidelity import Reference
from recipes.common.metrics.speed import compare_speed, ratio
from recipes.kvtuner.retrieving import Item, hidden_codes, retrieval
from recipes.kvtuner.tables import (
    CacheFormat,
    Pair,
    Table,
    cache_shape,
    pair_name,
)
from zoo.cache import layer_types
from zoo.errors import UserError
from zoo.folder import open_folder


@dataclass
class CacheLanguage(Language):
    """Language models with codes to find in long prompts, which a rounded cache loses first."""

    compressed: bool = True
    exports: ClassVar[tuple[str, ...]] = ()  # the weights are the base model's: any engine loads them

    @cached_property
    def items(self) -> list[Item]:
        return hidden_codes(self.tokenizer, self.settings["retrieval_items"], self.settings["retrieval_tokens"])

    @property
    def windowed(self) -> tuple[str, ...]:
        found = ("seqlen", "eval_seqlen", "speed_tokens")
        return (*found, "retrieval_tokens") if self.settings["retrieval_items"] else found

    def check(self) -> None:
        super().check()
        self.items  # noqa: B018 (made now: too few tokens are refused)

    def metrics(self, model: nn.Module, reference: Reference | None = None) -> dict[str, dict]:
        return super().metrics(model, reference) | (retrieval(model, self.items) if self.items else {})


def check_cache(config, model: str, menu: Sequence[Pair], form: CacheFormat) -> None:
    """Raises UserError for a model whose cache cannot be quantised to these widths."""
    if getattr(config, "kv_cache_quantization", None):
        raise UserError(f"--model {model}: its cache has a table already; name the model that it was searched for.")
    odd = [i for i, kind in enumerate(layer_types(config)) if kind != "full_attention"]
    if odd:
        raise UserError(
            f"--model {model}: layers {', '.join(map(str, odd))} do not attend to all tokens"
            f" ({layer_types(config)[odd[0]]}); a model with full attention in every layer is needed."
        )
    head_dim = cache_shape(config)[2]
    step = max(1, 8 // min(bits for pair in menu for bits in pair))
    for divisor, what in ((step, f"{step} codes in a byte"), (form.group(head_dim), "--group-size")):
        if head_dim % divisor:
            raise UserError(f"--model {model}: its head size {head_dim} is no multiple of {divisor} ({what}).")


def stored_dtype(base: Path) -> torch.dtype:
    """A dtype that holds all of the base's weights, or what is not packed of them, as they are."""
    tensors = open_folder(base).tensors
    return reduce(torch.promote_types, {t.dtype for t in map(tensors.get, tensors) if t.is_floating_point()})


def packed_layers(folder: Path) -> list[dict]:
    """`layers` of the report: what was packed already in the base that the table was searched for."""
    source, rows = open_folder(folder), []
    losses = source.compression.get("proxy_loss", {})
    for name, spec in source.modules.items():
        linear, (first, final) = source.empty_model.get_submodule(name), losses.get(name) or (None, None)
        shape = {"d_out": linear.out_features, "d_in": linear.in_features}
        rows.append({"name": name, **spec, **shape, "loss_init": first, "loss_final": final, "output_error": None})
    return rows


def measure_cache_speed(base: Path, folder: Path, prompt_tokens: int, repeats: int = 3) -> dict[str, dict[str, dict]]:
    """Prefill of `prompt_tokens` and decoding after it: the checkpoint with its cache against the base, interleaved.

    Both have the same weights in the same dtype, so the ratios are the cache's doing.
    """
    speed = {"decode": {}, "prefill": {}}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        models = {
            "packed": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            "dense": AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        }
        raw = compare_speed(models, prompt_tokens=prompt_tokens, new_tokens=32, repeats=repeats)
        packed, dense = raw["packed"], raw["dense"]
        key = f"ratio_to_dense_{name}"
        speed["decode"][key] = ratio(packed["decode_tokens_per_s"], dense["decode_tokens_per_s"])
        speed["prefill"][key] = ratio(dense["prefill_seconds"], packed["prefill_seconds"])
    return speed


def notes(table: Table, prefill: str, packed_by: str | None) -> list[str]:
    """What a reader must know besides the numbers. packed_by: the method that packed the base model's weights, if any."""
    nearest = [
        min((b for b in (4, 8, 16) if b >= sum(bits) / len(table)), default=16) for bits in zip(*table, strict=True)
    ]
    lines = [
        "quality was measured with quantised keys and values already inside prefill, so that errors cross layers;"
        f" the checkpoint's default for prompts is `prefill: {prefill}`",
        "engines without widths per layer ignore the table; the nearest uniform cache without fewer bits is"
        f" {pair_name(tuple(nearest))}",
    ]
    if packed_by:
        lines.append(
            f"the weights of the base model are packed already ({packed_by}); the row dense is that model"
            " with a 16-bit cache"
        )
    return lines
