"""A language model of 1 B parameters end to end: packed weights against dense ones, and KV caches against 16 bits.

Each runs in a process of its own, `python -m recipes.bench.models --model KIND` or `--cache KIND`, which prints what it
measured as JSON: peak memory is that of a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, StaticCache

from recipes.bench.attention import QUANTISED
from recipes.bench.kernels import BLOCK, GROUP, two_of_four
from recipes.bench.rounds import rounds, run_apart
from recipes.common.metrics.memory import peak_rss_bytes
from zoo.cache import ATTENTION, CACHE, KVTunerCache
from zoo.layers.packing import pack_layers

DENSE = ("dense_bf16", "dense_fp32")
PACKED = ("armor", "packed_4", "packed_8")
CACHES = {  # (mode, widths) of every layer, or the layer class of transformers' own; None = 16 bits
    "16 bits": None,
    "KV8": ("per_token", [8, 8]),
    "KV4": ("per_token", [4, 4]),
    "K4V2": ("per_token", [4, 2]),
    "KV2": ("per_token", [2, 2]),
    "KIVI 8": ("kivi", [8, 8]),
    "KIVI 4": ("kivi", [4, 4]),
    "KIVI 2": ("kivi", [2, 2]),
} | {f"{name} 4": layer for name, layer in QUANTISED.items()}
CONTEXT = 16384  # tokens in those caches
ONE_B = LlamaConfig(  # random weights, 1.0 B parameters
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    tie_word_embeddings=False,
)


def bench_model(quick: bool) -> Iterator[dict]:
    """Rows for decoding and for a prompt of 512 tokens; every kind runs twice in turn, and the better run counts."""
    runs: dict[str, list[dict]] = {kind: [] for kind in DENSE + PACKED}
    for _ in range(1 if quick else 2):
        for kind, results in runs.items():
            results.append(run_apart("recipes.bench.models", "--model", kind, "--tokens", 8 if quick else 24))
    best = {kind: min(results, key=lambda r: r["decode"]) for kind, results in runs.items()}
    decoding = {kind: found["decode"] for kind, found in best.items()}
    prefill = {kind: min(r["prefill"] for r in results) for kind, results in runs.items()}
    for phase, tokens, seconds in (("decode", 1, decoding), ("prefill", 512, prefill)):
        for kind in PACKED:
            found = best[kind]
            yield {
                "op": f"1 B model, {kind}, {phase}",
                "shape": [ONE_B.num_hidden_layers, ONE_B.hidden_size, ONE_B.intermediate_size],
                "dtype": "bfloat16",
                "batch": tokens,
                "seconds": seconds[kind],
                "bytes": found["bytes"],
                "read_bandwidth": found["read_bandwidth"],
                "fraction_of_bound": found["bytes"] / found["read_bandwidth"] / seconds[kind],
                "ratio_to": {dense: seconds[dense] / seconds[kind] for dense in DENSE},
                "tokens_per_second": {k: tokens / seconds[k] for k in (kind, *DENSE)},
                "peak_rss_bytes": {k: best[k]["peak_rss"] for k in (kind, *DENSE)},
            }


def bench_caches(quick: bool) -> Iterator[dict]:
    """Rows for the dense model in bf16 on every cache that is there, against a cache of 16 bits."""
    tokens = CONTEXT // 8 if quick else CONTEXT
    seconds: dict[str, float] = {}
    for kind in CACHES:
        run = run_apart("recipes.bench.models", "--cache", kind, "--context", tokens)
        seconds[kind] = run["decode"]
        yield {
            "op": f"1 B model, cache {kind}",
            "shape": [ONE_B.num_hidden_layers, tokens],
            "dtype": "bfloat16",
            "batch": 1,
            "seconds": run["decode"],
            "peak_rss_bytes": run["peak_rss"],
            "ratio_to": {"16 bits": seconds["16 bits"] / run["decode"]},
        }


def build_model(kind: str) -> nn.Module:
    """A random LLaMA-shaped model of 1 B parameters: dense_bf16, dense_fp32, armor with random 2:4 cores, or packed_4 and
    packed_8 with random codes of so many bits in groups of 128, the head too, and attention by "slimzoo_kv"."""
    dtype = torch.float32 if kind == "dense_fp32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ONE_B, dtype=dtype)
        if not kind.startswith("dense"):
            spec = {"format": "armor", "block_in": BLOCK, "block_out": BLOCK, "pattern": [2, 4]}
            if kind != "armor":
                spec = {"format": "packed", "bits": int(kind[-1]), "group_size": GROUP, "zeros": "integer"}
            linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            if kind == "armor":
                linears.remove("lm_head")
            pack_layers(model, dict.fromkeys(linears, spec))
    rotary = type(model.model.rotary_emb)(ONE_B)
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    for module in model.modules():
        if hasattr(module, "core_values"):
            values, mask = two_of_four(module.out_features, module.in_features)
            module.reset_parameters()
            module.core_values.copy_(values * 0.02)
            module.core_mask.copy_(mask)
        elif hasattr(module, "qweight"):
            module.qweight.copy_(torch.randint(0, 256, module.qweight.shape, dtype=torch.uint8))
            module.scales.fill_(0.04 / 2**module.bits)
            module.zeros.fill_(2 ** (module.bits - 1))
        else:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    if kind.startswith("packed"):
        model.set_attn_implementation(ATTENTION)
    return model.eval()


def decode(model: nn.Module, step: Callable, cache: Cache, new_tokens: int) -> float:
    """Seconds per token of greedy decoding by `step` at batch 1, after a prompt of 32 tokens; the cache is empty before."""
    out = model(torch.randint(0, 32000, (1, 32)), use_cache=True, **{CACHE: cache})
    begin = time.perf_counter()
    for place in range(32, 32 + new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = step(token, use_cache=True, position_ids=torch.tensor([[place]]), **{CACHE: cache})
    return (time.perf_counter() - begin) / new_tokens


def decode_compiled(model: nn.Module, new_tokens: int, repeats: int) -> list[float]:
    """As `decode`, by torch.compile and a cache of fixed length. A first run compiles; thereafter guards are not checked
    any more, since nothing that they guard changes here and 600 frozen tensors take 7 ms a token."""
    step, cache = torch.compile(model.forward), StaticCache(config=model.config, max_cache_len=32 + new_tokens)
    seconds = []
    with torch.no_grad():
        for _ in range(1 + repeats):
            cache.reset()
            seconds.append(decode(model, step, cache, new_tokens))
            torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    return seconds[1:]


def run_model(kind: str, new_tokens: int, repeats: int, compiled: bool) -> dict:
    """Decoding and a prompt of 512 tokens, medians, and the peak memory."""
    model, prefill = build_model(kind), []
    with torch.no_grad():  # as generate() does
        steps = [] if compiled else [decode(model, model, DynamicCache(), new_tokens) for _ in range(repeats)]
        for _ in range(repeats):
            begin = time.perf_counter()
            model(torch.randint(0, 32000, (1, 512)), logits_to_keep=1)
            prefill.append(time.perf_counter() - begin)
    steps = steps or decode_compiled(model, new_tokens, repeats)
    peak = peak_rss_bytes()  # before the read bandwidth takes its own
    return {
        "decode": statistics.median(steps),
        "prefill": statistics.median(prefill),
        "bytes": sum(t.nbytes for t in model.parameters()),  # the embedding, of which a row is read, included
        "peak_rss": peak,
        "read_bandwidth": rounds({}, 10)[1],
    }


def run_cache(kind: str, tokens: int, new_tokens: int) -> dict:
    """Seconds per decoded token of the dense bf16 model after `tokens` random keys and values, and the peak memory."""
    model, made = build_model("dense_bf16"), CACHES[kind]
    config = model.config  # the cache asks it which attention function reads what it hands out
    layers = config.num_hidden_layers
    if made is None:
        cache = DynamicCache()
    elif isinstance(made, tuple):
        mode, pair = made
        form = {"group_size": 32, "residual_length": 32} if mode == "kivi" else {"group_size": -1, "residual_length": 0}
        table = {"mode": mode, **form, "prefill": "exact", "layers": [pair] * layers}
        cache = KVTunerCache.from_config(config, {"method": "kvtuner", "version": 1, "scale_dtype": "float16"} | table)
        model.set_attn_implementation(ATTENTION)
    else:
        cache = Cache(layers=[made(nbits=4, q_group_size=64) for _ in range(layers)])
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    with torch.inference_mode():
        for layer in range(layers):
            cache.update(*torch.randn(2, 1, heads, tokens, size).bfloat16(), layer)
        seconds = []
        for place in range(tokens, tokens + new_tokens):
            token, begin = torch.randint(0, 32000, (1, 1)), time.perf_counter()
            model(token, use_cache=True, position_ids=torch.tensor([[place]]), **{CACHE: cache})
            seconds.append(time.perf_counter() - begin)
    return {"decode": statistics.median(seconds), "peak_rss": peak_rss_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=DENSE + PACKED)
    what.add_argument("--cache", choices=CACHES)
    parser.add_argument("--tokens", type=int, default=24, help="decoded by --model")
    parser.add_argument("--compiled", action="store_true", help="--model decodes by torch.compile")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in the cache of --cache")
    flags = parser.parse_args()
    if flags.model:
        print(json.dumps(run_model(flags.model, flags.tokens, repeats=3, compiled=flags.compiled)))
    else:
        print(json.dumps(run_cache(flags.cache, flags.context, new_tokens=8)))


if __name__ == "__main__":
    main()
