"""What the recipe `kvtuner` measures of a finished table: text, retrieval, tasks, and the speed of the real cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.common.data.texts import load_text
from recipes.common.loops.streamed import EVALUATION_TEXTS, held_out_windows, load_fp32, measure_model
from recipes.common.metrics.language import compare_speed, ratio
from recipes.kvtuner.retrieving import Item, hidden_codes, retrieval
from recipes.kvtuner.searching import front
from recipes.kvtuner.simulation import quantised_cache
from recipes.kvtuner.tables import (
    CacheFormat,
    Pair,
    Table,
    bytes_per_token,
    effective_bits,
    equivalent_bits,
    pair_name,
)
from zoo.checkpoint import load_compression


def measure_cache(
    model: nn.Module, tokenizer, windows: dict[str, Tensor], items: list[Item], settings: dict
) -> dict[str, dict]:
    """The metrics that a report claims, of the model as it is now: held-out texts, tasks, codes in long prompts."""
    return measure_model(model, tokenizer, windows, settings) | (retrieval(model, items) if items else {})


def remeasure(folder: Path, report: dict) -> dict[str, dict]:
    """Measures a finished checkpoint again as its report says it was measured: what `verify` compares with."""
    config = AutoConfig.from_pretrained(folder).kv_cache_quantization
    form = CacheFormat(config["mode"], config["group_size"], config["residual_length"])
    model, tokenizer, settings = load_fp32(folder).eval(), AutoTokenizer.from_pretrained(folder), report["config"]
    windows = held_out_windows({name: load_text(name) for name in EVALUATION_TEXTS}, tokenizer, settings)
    items = hidden_codes(tokenizer, settings["retrieval_items"], settings["retrieval_tokens"])
    with quantised_cache(model, tuple(map(tuple, config["layers"])), form):
        return measure_cache(model, tokenizer, windows, items, settings)


def packed_layers(folder: Path) -> list[dict]:
    """`layers` of the report: what was packed already in the base that the table was searched for."""
    compression = load_compression(folder)
    losses = compression.get("proxy_loss", {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rows = []
    for name, spec in compression["modules"].items():
        linear, (first, final) = model.get_submodule(name), losses.get(name) or (None, None)
        shape = {"d_out": linear.out_features, "d_in": linear.in_features}
        rows.append({"name": name, **spec, **shape, "loss_init": first, "loss_final": final, "output_error": None})
    return rows


def cache_findings(
    found: dict,
    models: dict[str, tuple[Table, CacheFormat]],
    kls: dict[str, float],
    *,
    menu: Sequence[Pair],
    objective: str,
    kv_heads: int,
    head_dim: int,
) -> dict:
    """`cache` of the report: the table, how it was found, and what the cache of every model measured takes.

    Args:
        found: what `KVTuner.tune` returns. models: the recipe's own first. kls: on held-out text, by model.
    """
    table, form = next(iter(models.values()))
    uniform = {pair: (pair,) * len(table) for pair in [*menu, (16, 16)]}
    return {
        **asdict(form),
        "layers": [list(pair) for pair in table],
        "objective": objective,
        "dense_bytes_per_token": bytes_per_token(uniform[16, 16], form, kv_heads, head_dim),
        "models": {
            name: {
                "equivalent_bits": equivalent_bits(own),
                "effective_bits": effective_bits(own, its_form, head_dim),
                "bytes_per_token": bytes_per_token(own, its_form, kv_heads, head_dim),
                "kl": kls[name],
            }
            for name, (own, its_form) in models.items()
        },
        "searched": [{"bits": bits, "loss": loss} for loss, bits in found["archive"].values()],
        "uniform": {
            pair_name(pair): dict(zip(("loss", "bits"), found["archive"][uniform[pair]], strict=True)) for pair in menu
        },
        "front": front(found["archive"]),
        "groups": [{"layers": list(g.layers), "candidates": [list(p) for p in g.candidates]} for g in found["groups"]],
        "errors": {pair_name(pair): [row[pair] for row in found["errors"]] for pair in menu},
        "seconds": found["seconds"],
    }


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
