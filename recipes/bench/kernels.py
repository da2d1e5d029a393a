"""Speed in one run: kernels against torch's own, and a 1 B model end to end. `make bench`, or

python -m recipes.bench.kernels [--quick] [--only PART] [--output runs/bench.json]

Rivals take turns within each round and medians are compared, so that a busy machine slows all alike. Weights rotate
through copies that together exceed the last-level cache, and two rivals of a round never read the same copy.
`fraction_of_bound` is bytes / read bandwidth / time, with the bandwidth of a sum over 128 MiB that takes its turn among
the rivals; a kernel that reads better than the sum exceeds 1. Arithmetic bounds block_sparse_linear: there it is the
time that torch's dense product would need for the kept blocks alone, over the time taken.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from zoo.cache import ATTENTION, CACHE, KVTunerCache
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.bitmask_linear import bitmask_linear
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.block_diagonal_linear import block_diagonal_linear
from zoo.kernels.block_sparse_linear import block_sparse_linear
from zoo.kernels.block_sparse_linear.reference import pack_blocks
from zoo.kernels.build import LEVELS, level
from zoo.kernels.kv_attention import Part, kv_attention, quantize_channels, quantize_tokens
from zoo.kernels.kv_attention.reference import dequantize
from zoo.kernels.packed_linear import packed_linear
from zoo.layers.packing import pack_layers

SHAPES = [(4096, 4096), (11008, 4096)]
BLOCK = 64
GROUP = 128
KINDS = ("dense_bf16", "dense_fp32", "armor", "packed_4", "packed_8")
KV_SHAPE = (8, 4, 128)  # key heads, query heads of each, numbers of a head
KV_FORMATS = [  # name, (key bits, value bits), keys by channel
    ("kv_attention KV8", (8, 8), False),
    ("kv_attention KV4", (4, 4), False),
    ("kv_attention K4V2", (4, 2), False),
    ("kv_attention KV2", (2, 2), False),
    ("kv_attention KIVI 4", (4, 4), True),
    ("kv_attention KIVI 2", (2, 2), True),
]
VIT_SHAPES = [(768, 768), (3072, 768), (768, 3072)]  # ViT-B: projections, fc1, fc2
VIT_TOKENS = (1, 8, 197, 8 * 197)  # the last two: one image of 224 x 224, and eight
CACHES = {  # of a whole model: (mode, widths) of every layer, or the layer class of transformers' own; None = 16 bits
    "16 bits": None,
    "KV8": ("per_token", [8, 8]),
    "KV4": ("per_token", [4, 4]),
    "K4V2": ("per_token", [4, 2]),
    "KV2": ("per_token", [2, 2]),
    "KIVI 8": ("kivi", [8, 8]),
    "KIVI 4": ("kivi", [4, 4]),
    "KIVI 2": ("kivi", [2, 2]),
    "quanto 4": QuantoQuantizedLayer if is_optimum_quanto_available() else ...,
    "HQQ 4": HQQQuantizedLayer if is_hqq_available() else ...,
}
CONTEXT = 16384  # tokens in those caches
KV_BATCHES = [(1, 8192), (1, 32768), (8, 8192)]
CACHE_BYTES = 128 << 20  # more than any last-level cache the copies could hide in
READ_BYTES = 128 << 20
ONE_B = LlamaConfig(  # random weights, 1.0 B parameters
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    tie_word_embeddings=False,
)


def rounds(rivals: dict[str, Callable[[int], object]], repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each rival, and the bytes per second that all threads together read from memory meanwhile.

    Every round runs all rivals, each with the round's number as its argument, and one sum over READ_BYTES.
    """
    data = torch.ones(READ_BYTES // 4)
    rivals = rivals | {"memory": lambda _: data.sum()}
    for run in rivals.values():
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(repeats):
        for name, run in rivals.items():
            begin = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians, READ_BYTES / medians.pop("memory")


def two_of_four(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """(values bf16, mask) of a random 2:4 weight."""
    keep = (torch.rand(d_out, d_in // 4, 4).argsort(-1) < 2).view(d_out, d_in)
    values, mask, _ = pack_bitmask(torch.randn(d_out, d_in).bfloat16(), keep, per_row=d_in // 2)
    return values, mask


def bench_kernels(d_out: int, d_in: int, batch: int, repeats: int) -> list[dict]:
    """Rows for bitmask_linear and armor_linear in bf16 against torch's dense linear in bf16 and fp32."""
    copies = max(2, -(-CACHE_BYTES // (d_out * d_in)))
    dense = [torch.randn(d_out, d_in) for _ in range(copies)]
    dense16 = [w.bfloat16() for w in dense]
    packed = [two_of_four(d_out, d_in) for _ in range(copies)]
    wrap_in = [(torch.randn(d_in // BLOCK, BLOCK, BLOCK) / 8).bfloat16() for _ in range(copies)]
    wrap_out = [(torch.randn(d_out // BLOCK, BLOCK, BLOCK) / 8).bfloat16() for _ in range(copies)]
    x = torch.randn(batch, d_in)
    x16 = x.bfloat16()
    linear = nn.functional.linear

    def armor(i: int) -> Tensor:
        return armor_linear(x16, wrap_in[i % copies], *packed[i % copies], wrap_out[i % copies])

    seconds, bandwidth = rounds(
        {
            "torch bf16": lambda i: linear(x16, dense16[i % copies]),
            "torch fp32": lambda i: linear(x, dense[i % copies]),
            "bitmask_linear": lambda i: bitmask_linear(x16, *packed[i % copies]),
            "armor_linear": lambda i: armor(i + copies // 2),  # not the weights that were just read
            "block_diagonal_linear": lambda i: block_diagonal_linear(x16, wrap_in[i % copies]),
        },
        repeats,
    )
    core = sum(t.nbytes for t in packed[0])
    sizes = {
        "bitmask_linear": core,
        "armor_linear": core + wrap_in[0].nbytes + wrap_out[0].nbytes,
        "block_diagonal_linear": wrap_in[0].nbytes,
    }
    return rows_of(sizes, d_out, d_in, batch, seconds, bandwidth)


def rows_of(
    sizes: dict[str, int], d_out: int, d_in: int, batch: int, seconds: dict[str, float], bandwidth: float
) -> list[dict]:
    """The rows of the operations in `sizes` (bytes read); all others that were timed are their peers."""
    peers = [name for name in seconds if name not in sizes]
    return [
        {
            "op": op,
            "shape": [d_out, d_in],
            "dtype": "bfloat16",
            "batch": batch,
            "seconds": seconds[op],
            "bytes": size,
            "read_bandwidth": bandwidth,
            "fraction_of_bound": size / bandwidth / seconds[op],
            "ratio_to": {peer: seconds[peer] / seconds[op] for peer in peers},
        }
        for op, size in sizes.items()
    ]


def bench_packed(d_out: int, d_in: int, batch: int, repeats: int) -> list[dict]:
    """Rows for packed_linear at 2, 3, 4 and 8 bits in groups of 128 with integer zeros, x in bf16; torch's own 4-bit
    product, of the same groups, is a peer up to 32 rows."""
    copies = max(2, -(-CACHE_BYTES * 2 // (d_out * d_in)))
    dense = [torch.randn(d_out, d_in) for _ in range(copies)]
    dense16 = [w.bfloat16() for w in dense]
    groups = d_in // GROUP
    packed = {
        bits: [
            (
                torch.randint(0, 256, (d_out, d_in * bits // 8), dtype=torch.uint8),
                torch.rand(d_out, groups).bfloat16(),
                torch.randint(0, 2**bits, (d_out, groups), dtype=torch.uint8),
            )
            for _ in range(copies)
        ]
        for bits in (2, 3, 4, 8)
    }
    x = torch.randn(batch, d_in)
    x16 = x.bfloat16()
    linear = nn.functional.linear

    def run(bits: int, int8: bool) -> Callable[[int], object]:
        apart = copies // 2 if int8 else 0  # not the weights that were just read
        return lambda i: packed_linear(x16, *packed[bits][(i + apart) % copies], bits=bits, group_size=GROUP, int8=int8)

    rivals = {
        "torch bf16": lambda i: linear(x16, dense16[i % copies]),
        "torch fp32": lambda i: linear(x, dense[i % copies]),
    }
    if batch <= 32:
        codes = torch.randint(0, 16, (d_out, d_in), dtype=torch.int32)
        torchs = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(copies)]
        scales_and_zeros = torch.rand(groups, d_out, 2).bfloat16()
        rivals["torch int4"] = lambda i: torch._weight_int4pack_mm_for_cpu(
            x16, torchs[i % copies], GROUP, scales_and_zeros
        )
    seconds, bandwidth = rounds(
        rivals
        | {f"packed_linear {bits} bits": run(bits, False) for bits in packed}
        | {f"packed_linear {bits} bits, int8 x": run(bits, True) for bits in packed if batch <= 32},
        repeats,
    )
    sizes = {op: sum(w.nbytes for w in packed[int(op.split()[1])][0]) for op in seconds if op not in rivals}
    return rows_of(sizes, d_out, d_in, batch, seconds, bandwidth)


def bench_blocks(d_out: int, d_in: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Rows for block_sparse_linear with half of the blocks of 16, 32 and 64 kept, equally many in each block-row, against
    torch's dense product and, for blocks of 32 in fp32, its product with the same BSR weight. One copy of each: where
    arithmetic is the bound, no cache helps."""
    x, dense, bias = (torch.randn(shape).to(dtype) for shape in ((tokens, d_in), (d_out, d_in), (d_out,)))
    packed = {
        size: pack_blocks(dense, torch.rand(d_out // size, d_in // size).argsort(-1) < d_in // size // 2, (size, size))
        for size in (16, 32, 64)
    }
    blocks, crow, col = packed[32].values()
    with warnings.catch_warnings(action="ignore"):  # torch calls BSR a beta
        bsr = torch.sparse_bsr_tensor(crow, col, blocks, (d_out, d_in), check_invariants=True)

    def run(size: int) -> Callable[[int], object]:
        return lambda _: block_sparse_linear(x, **packed[size], bias=bias, d_out=d_out)

    name = str(dtype).removeprefix("torch.")
    ours = {f"block_sparse_linear {size} {name}": run(size) for size in packed}
    peers = {f"torch {name}": lambda _: nn.functional.linear(x, dense, bias)}
    if dtype == torch.float32:  # the only one that torch's CPU product takes
        peers["torch BSR"] = lambda _: nn.functional.linear(x, bsr, bias)
    seconds, bandwidth = rounds(peers | ours, repeats)
    sizes = {op: sum(t.nbytes for t in packed[int(op.split()[1])].values()) for op in ours}
    rows = rows_of(sizes, d_out, d_in, tokens, seconds, bandwidth)
    return [row | {"dtype": name, "fraction_of_bound": row["ratio_to"][f"torch {name}"] / 2} for row in rows]


def bench_vit(name: str, hidden_size: int, heads: int, repeats: int) -> list[dict]:
    """Rows for a whole DeiT of random weights, 8 images of 224 pixels, half of the blocks of 32 of each encoder matrix,
    against the dense model, fp32 and bf16. The bound is that of its products: half of the dense time."""
    config = ViTConfig(hidden_size=hidden_size, num_attention_heads=heads, intermediate_size=4 * hidden_size)
    modules = {}
    for layer in range(config.num_hidden_layers):
        for part in (
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.o_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            grid = (4 if part == "mlp.fc1" else 1) * (4 if part == "mlp.fc2" else 1) * (hidden_size // 32) ** 2
            modules[f"vit.layers.{layer}.{part}"] = {"format": "block_sparse", "block": [32, 32], "blocks": grid // 2}
    dense = ViTForImageClassification(config).eval()
    packed = copy.deepcopy(dense)
    pack_layers(packed, modules)
    for path in modules:
        layer = packed.get_submodule(path)
        layer.load_state_dict(half_of_blocks(layer.out_features, layer.in_features), strict=False)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        pixels = torch.randn(8, 3, 224, 224, dtype=dtype)
        models = {"dense": dense.to(dtype), "block_sparse": packed.to(dtype)}
        with torch.inference_mode():
            seconds, bandwidth = rounds(
                {key: partial(run_images, model, pixels) for key, model in models.items()}, repeats
            )
        ratio = seconds["dense"] / seconds["block_sparse"]
        rows.append(
            {
                "op": f"{name} block_sparse 32",
                "shape": [hidden_size, config.num_hidden_layers],
                "dtype": str(dtype).removeprefix("torch."),
                "batch": 8,
                "seconds": seconds["block_sparse"],
                "bytes": sum(t.nbytes for t in packed.state_dict().values()),
                "fraction_of_bound": ratio / 2,
                "ratio_to": {f"dense {str(dtype).removeprefix('torch.')}": ratio},
                "read_bandwidth": bandwidth,
            }
        )
    return rows


def run_images(model: nn.Module, pixels: Tensor, _: int) -> Tensor:
    return model(pixel_values=pixels).logits


def half_of_blocks(d_out: int, d_in: int) -> dict[str, Tensor]:
    """A random weight, equally many of its blocks of 32 kept in each block-row."""
    keep = torch.rand(d_out // 32, d_in // 32).argsort(-1) < d_in // 64
    return pack_blocks(0.02 * torch.randn(d_out, d_in), keep, (32, 32))


def bench_attention(batch: int, tokens: int, repeats: int) -> list[dict]:
    """Rows for kv_attention: one decoded token of 32 query heads over 8 key heads of 128, q in bf16, per pair of widths and
    mode. Peers: torch's attention over a bf16 and an fp32 cache, dequantising everything and then torch's, and one step
    of transformers' own quantised caches (dequantising, appending, torch's attention), where their packages are there.
    """
    kv_heads, ratio, size = KV_SHAPE
    copies = max(2, -(-CACHE_BYTES // (batch * kv_heads * tokens * size)))
    states = [[torch.randn(batch, kv_heads, tokens, size).bfloat16() for _ in range(2)] for _ in range(2)]
    states32 = [[x.float() for x in pair] for pair in states[:1]]
    q = torch.randn(batch, kv_heads * ratio, size).bfloat16()
    grouped = q.view(batch, kv_heads, ratio, size)
    attention = nn.functional.scaled_dot_product_attention

    def stored(x: Tensor, bits: int, channels: bool, values: bool) -> Part:
        if channels and not values:
            return Part(*quantize_channels(x, bits, 32), None, bits)
        return Part(*quantize_tokens(x, bits, 32 if channels else -1), None, bits)

    packed = {}
    for name, (k_bits, v_bits), channels in KV_FORMATS:
        k, v = states[0]
        first = stored(k, k_bits, channels, False), stored(v, v_bits, channels, True)
        clone = [Part(*(t.clone() for t in part[:3]), None, part.bits) for part in first for _ in range(copies - 1)]
        packed[name] = [first, *zip(clone[: copies - 1], clone[copies - 1 :], strict=True)]

    def dequantised(i: int) -> Tensor:
        pair = packed["kv_attention KV4"][(i + copies // 2) % copies]
        return attention(grouped, *(dequantize(part).bfloat16() for part in pair))

    rivals = {
        "torch bf16": lambda i: attention(grouped, *states[i % 2]),
        "torch fp32": lambda i: attention(grouped.float(), *states32[0]),
        "dequantise + torch": dequantised,
    }
    for backend, available in (("quanto", is_optimum_quanto_available()), ("hqq", is_hqq_available())):
        if available:
            layer = (QuantoQuantizedLayer if backend == "quanto" else HQQQuantizedLayer)(nbits=4, q_group_size=64)
            layer.update(*states[0])
            token = [x[:, :, :1] for x in states[0]]
            rivals[f"transformers {backend} 4 bits"] = lambda i, layer=layer, token=token: attention(
                grouped, *layer.update(*token)
            )
    seconds, bandwidth = rounds(
        rivals | {name: lambda i, pairs=pairs: kv_attention(q, *pairs[i % copies]) for name, pairs in packed.items()},
        repeats,
    )
    sizes = {name: sum(t.nbytes for part in pairs[0] for t in part[:3]) for name, pairs in packed.items()}
    return rows_of(sizes, kv_heads * ratio, tokens, batch, seconds, bandwidth)


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


def run_model(kind: str, new_tokens: int, repeats: int, compiled: bool = False) -> dict:
    """Decoding and a prompt of 512 tokens, medians, and the peak memory."""
    model, prefill = build_model(kind), []
    with torch.no_grad():  # as generate() does
        steps = [] if compiled else [decode(model, model, DynamicCache(), new_tokens) for _ in range(repeats)]
        for _ in range(repeats):
            begin = time.perf_counter()
            model(torch.randint(0, 32000, (1, 512)), logits_to_keep=1)
            prefill.append(time.perf_counter() - begin)
    steps = steps or decode_compiled(model, new_tokens, repeats)
    peak = peak_memory()
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
    return {"decode": statistics.median(seconds), "peak_rss": peak_memory()}


def bench_caches(quick: bool) -> list[dict]:
    """Rows for a whole model on every cache that is there, each in a process of its own, against a cache of 16 bits."""
    found, tokens = {}, CONTEXT // 8 if quick else CONTEXT
    for kind in [kind for kind, made in CACHES.items() if made is not ...]:
        command = [sys.executable, "-m", "recipes.bench.kernels", "--cache", kind, "--context", str(tokens)]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"1 B model in bf16 after {tokens} tokens:")
    rows = []
    for kind, run in found.items():
        ratio = found["16 bits"]["decode"] / run["decode"]
        row = {
            "op": f"1 B model, cache {kind}",
            "shape": [ONE_B.num_hidden_layers, tokens],
            "dtype": "bfloat16",
            "batch": 1,
        }
        rows.append(row | {"seconds": run["decode"], "peak_rss_bytes": run["peak_rss"], "ratio_to": {"16 bits": ratio}})
        print(
            f"{kind:12}{1 / run['decode']:7.1f} tokens/s {ratio:6.2f}x   peak memory {run['peak_rss'] / 2**30:.2f} GiB"
        )
    return rows


def peak_memory() -> int:
    """Bytes of resident memory at most so far. Linux's ru_maxrss would begin at what the parent process had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_model(quick: bool) -> list[dict]:
    """The end-to-end rows; every kind runs in a process of its own, twice in turn, and the better half counts."""
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in range(1 if quick else 2):
        for kind in KINDS:
            command = [
                sys.executable,
                "-m",
                "recipes.bench.kernels",
                "--model",
                kind,
                "--tokens",
                "8" if quick else "24",
            ]
            runs[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    best = {kind: min(results, key=lambda r: r["decode"]) for kind, results in runs.items()}
    prefill = {kind: min(r["prefill"] for r in results) for kind, results in runs.items()}
    rows = []
    for phase, tokens, seconds in (("decode", 1, {k: r["decode"] for k, r in best.items()}), ("prefill", 512, prefill)):
        for kind in KINDS[2:]:
            found = best[kind]
            rows.append(
                {
                    "op": f"1 B model, {kind}, {phase}",
                    "shape": [ONE_B.num_hidden_layers, ONE_B.hidden_size, ONE_B.intermediate_size],
                    "dtype": "bfloat16",
                    "batch": tokens,
                    "seconds": seconds[kind],
                    "bytes": found["bytes"],
                    "read_bandwidth": found["read_bandwidth"],
                    "fraction_of_bound": found["bytes"] / found["read_bandwidth"] / seconds[kind],
                    "ratio_to": {dense: seconds[dense] / seconds[kind] for dense in KINDS[:2]},
                    "tokens_per_second": {k: tokens / seconds[k] for k in (kind, *KINDS[:2])},
                    "peak_rss_bytes": {k: best[k]["peak_rss"] for k in (kind, *KINDS[:2])},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: figures are rough")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument(
        "--only", choices=["linear", "block_sparse", "attention", "caches", "model"], help="one part (default: all)"
    )
    parser.add_argument("--model", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=24, help=argparse.SUPPRESS)
    parser.add_argument("--cache", choices=CACHES, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=CONTEXT, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.model:
        print(json.dumps(run_model(flags.model, flags.tokens, repeats=3, compiled=flags.compiled)))
        return
    if flags.cache:
        print(json.dumps(run_cache(flags.cache, flags.context, new_tokens=8)))
        return
    print(f"{torch.get_num_threads()} threads, {LEVELS[level()]}")
    print(f"{'op':32}{'shape':>14}{'batch':>7}{'GB/s':>7}{'of bound':>10}   speed against its peers")
    rows = []

    def add(found: list[dict]) -> None:
        show(found)
        rows.extend(found)

    if flags.only in (None, "linear"):
        for d_out, d_in in SHAPES:
            for batch in (1, 8, 512):
                repeats = 3 if flags.quick else 40 if batch < 512 else 7
                add(bench_kernels(d_out, d_in, batch, repeats))
                add(bench_packed(d_out, d_in, batch, repeats))
    if flags.only in (None, "block_sparse"):
        for dtype in (torch.float32, torch.bfloat16):
            for d_out, d_in in VIT_SHAPES:
                for tokens in VIT_TOKENS:
                    add(bench_blocks(d_out, d_in, tokens, dtype, 3 if flags.quick else 40 if tokens <= 8 else 7))
        for name, hidden_size, heads in (("DeiT-S", 384, 6), ("DeiT-B", 768, 12)):
            add(bench_vit(name, hidden_size, heads, 3 if flags.quick else 7))
    if flags.only in (None, "attention"):
        for batch, tokens in KV_BATCHES:
            add(bench_attention(batch, tokens, 3 if flags.quick else 15))
    if flags.only in (None, "caches"):
        rows += bench_caches(flags.quick)
    if flags.only in (None, "model"):
        add(bench_model(flags.quick))
        for row in rows[-2 * len(KINDS[2:]) :]:
            if "decode" in row["op"]:
                speeds = "  ".join(f"{kind} {speed:.1f} tokens/s" for kind, speed in row["tokens_per_second"].items())
                peaks = "  ".join(f"{kind} {peak / 2**30:.2f} GiB" for kind, peak in row["peak_rss_bytes"].items())
                print(f"{speeds}; peak memory {peaks}")
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(flags.output)


def show(rows: list[dict]) -> None:
    for row in rows:
        shape, bound = "x".join(map(str, row["shape"])), f"{100 * row['fraction_of_bound']:.0f} %"
        ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["ratio_to"].items())
        print(f"{row['op']:32}{shape:>14}{row['batch']:>7}{row['read_bandwidth'] / 1e9:>7.1f}{bound:>10}   {ratios}")


if __name__ == "__main__":
    main()
