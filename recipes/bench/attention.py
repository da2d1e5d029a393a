"""Decode attention over packed keys and values, against torch's and transformers' own quantised caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from recipes.bench.rounds import copies_of, rounds, rows_of
from zoo.kernels.kv_attention import Part, kv_attention, quantize_channels, quantize_tokens
from zoo.kernels.kv_attention.reference import dequantize

HEADS = (8, 4, 128)  # key heads, query heads of each, numbers of a head
BATCHES = [(1, 8192), (1, 32768), (8, 8192)]  # sequences, tokens of each
FORMATS = [  # name, (key bits, value bits), keys by channel
    ("kv_attention KV8", (8, 8), False),
    ("kv_attention KV4", (4, 4), False),
    ("kv_attention K4V2", (4, 2), False),
    ("kv_attention KV2", (2, 2), False),
    ("kv_attention KIVI 4", (4, 4), True),
    ("kv_attention KIVI 2", (2, 2), True),
]
QUANTISED = {  # the layers of transformers' own caches whose packages are there
    name: layer
    for name, layer, available in (
        ("quanto", QuantoQuantizedLayer, is_optimum_quanto_available()),
        ("HQQ", HQQQuantizedLayer, is_hqq_available()),
    )
    if available
}


def bench_attention(quick: bool) -> Iterator[dict]:
    """Rows for kv_attention: one decoded token of 32 query heads over 8 key heads of 128, q in bf16, per pair of widths and
    mode. Peers: torch's attention over a bf16 and an fp32 cache, dequantising everything and then torch's, and one step
    of transformers' own quantised caches (dequantising, appending, torch's attention), where their packages are there.
    """
    for batch, tokens in BATCHES:
        yield from bench_cache(batch, tokens, 3 if quick else 15)


def bench_cache(batch: int, tokens: int, repeats: int) -> list[dict]:
    """The rows of one cache of `tokens` keys and values in each of `batch` sequences."""
    kv_heads, ratio, size = HEADS
    copies = copies_of(batch * kv_heads * tokens * size)
    states = [[torch.randn(batch, kv_heads, tokens, size).bfloat16() for _ in range(2)] for _ in range(2)]
    states32 = [x.float() for x in states[0]]
    q = torch.randn(batch, kv_heads * ratio, size).bfloat16()
    grouped = q.view(batch, kv_heads, ratio, size)
    attention = nn.functional.scaled_dot_product_attention
    packed = {}
    for name, (k_bits, v_bits), channels in FORMATS:
        k, v = states[0]
        first = stored(k, k_bits, channels, False), stored(v, v_bits, channels, True)
        clone = [Part(*(t.clone() for t in part[:3]), None, part.bits) for part in first for _ in range(copies - 1)]
        packed[name] = [first, *zip(clone[: copies - 1], clone[copies - 1 :], strict=True)]

    def dequantised(i: int) -> Tensor:
        pair = packed["kv_attention KV4"][(i + copies // 2) % copies]
        return attention(grouped, *(dequantize(part).bfloat16() for part in pair))

    peers = {
        "torch bf16": lambda i: attention(grouped, *states[i % 2]),
        "torch fp32": lambda i: attention(grouped.float(), *states32),
        "dequantise + torch": dequantised,
    }
    token = [x[:, :, :1] for x in states[0]]
    for name, made in QUANTISED.items():
        layer = made(nbits=4, q_group_size=64)
        layer.update(*states[0])
        peers[f"transformers {name.lower()} 4 bits"] = lambda i, layer=layer: attention(grouped, *layer.update(*token))
    ours = {name: lambda i, pairs=pairs: kv_attention(q, *pairs[i % copies]) for name, pairs in packed.items()}
    seconds, bandwidth = rounds(peers | ours, repeats)
    sizes = {name: sum(t.nbytes for part in pairs[0] for t in part[:3]) for name, pairs in packed.items()}
    return rows_of(sizes, kv_heads * ratio, tokens, batch, seconds, bandwidth)


def stored(x: Tensor, bits: int, channels: bool, values: bool) -> Part:
    """Keys or values packed, `channels` as KIVI does: keys by channel, values in groups of 32."""
    if channels and not values:
        return Part(*quantize_channels(x, bits, 32), None, bits)
    return Part(*quantize_tokens(x, bits, 32 if channels else -1), None, bits)
