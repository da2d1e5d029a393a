"""What a quantised KV cache does to a model, without the cache: keys and values rounded inside attention.

Every measurement of the recipe `kvtuner` runs here: the model is a stock one, and while a hook is set its attention
layers read keys and values (after RoPE and norms) that were quantised and dequantised, already in prefill, so that
errors cross layers as in the paper.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common.metrics.fidelity import divergence
from recipes.kvtuner.tables import CacheFormat, Pair, Table
from zoo.cache import CACHE
from zoo.kernels.kv_attention import quantize_channels, quantize_tokens
from zoo.kernels.kv_attention.reference import dequantize_channels, dequantize_tokens

NAME = "slimzoo_kv_hook"  # of the attention function that calls the hook
TOKENS = 2048  # per forward pass, about
Hook = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# --------------------------------------------------------------------------------------------------- fake quantisation


def round_keys(k: Tensor, bits: int, form: CacheFormat) -> Tensor:
    """k (B, Hkv, S, D) as the cache gives it back at `bits`; same dtype. KIVI: whole blocks of tokens, by channel."""
    if bits == 16:
        return k
    if form.mode == "per_token":
        return dequantize_tokens(*quantize_tokens(k, bits, form.group_size), bits).to(k.dtype)
    done = quantised_tokens(k.shape[2], form)
    if not done:
        return k
    packed = quantize_channels(k[:, :, :done], bits, form.group_size)
    return torch.cat([dequantize_channels(*packed, bits).to(k.dtype), k[:, :, done:]], 2)


def round_values(v: Tensor, bits: int, form: CacheFormat) -> Tensor:
    """v (B, Hkv, S, D) as the cache gives it back at `bits`; same dtype. Always by token."""
    done = quantised_tokens(v.shape[2], form)
    if bits == 16 or not done:
        return v
    packed = quantize_tokens(v[:, :, :done], bits, form.group_size)
    return torch.cat([dequantize_tokens(*packed, bits).to(v.dtype), v[:, :, done:]], 2)


def quantised_tokens(tokens: int, form: CacheFormat) -> int:
    """Tokens of a sequence that are not in the residual."""
    return tokens - tokens % form.residual_length if form.residual_length else tokens


@contextmanager
def attention_hook(model: nn.Module, hook: Hook) -> Iterator[None]:
    """While open, every attention layer computes with what hook(layer, query, key, value) returns for key and value.

    query (B, H, T, D), key and value (B, Hkv, S, D), after RoPE; the layer is the attention module. The attention
    function of the model does the rest.
    """
    previous = model.config._attn_implementation

    def attention(module, query, key, value, attention_mask, **kwargs):
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(previous, eager)
        return inner(module, query, *hook(module, query, key, value), attention_mask, **kwargs)

    if previous == NAME:
        raise RuntimeError("attention hooks do not nest")
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del registry._global_mapping[NAME]


@contextmanager
def quantised_cache(model: nn.Module, table: Table, form: CacheFormat) -> Iterator[None]:
    """While open, `model` computes as if its KV cache had the widths of `table`, in prefill too."""

    def hook(layer: nn.Module, _: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        bits_k, bits_v = table[layer.layer_idx]
        return round_keys(key, bits_k, form), round_values(value, bits_v, form)

    with attention_hook(model, hook):
        yield


# ------------------------------------------------------------------------------------------------------ errors, step 2


class Errors(NamedTuple):
    """One row a layer, one number a pair, averaged over prompts."""

    output: list[list[float]]  # ||o - o^|| / ||o||, what everything else uses
    elementwise: list[list[float]]  # mean |o - o^| / |o|, as the paper's formula reads; shown for reference


@torch.inference_mode()
def greedy(model: nn.Module, prompts: Tensor, steps: int) -> Tensor:
    """prompts (N, P) -> (N, P + steps), continued greedily; the end-of-text token is a token like any other."""
    rows = []
    for batch in tqdm(prompts.split(max(1, TOKENS // prompts.shape[1])), desc="greedy answers", leave=False):
        ids, past = [batch], None
        for _ in range(steps):
            out = model(input_ids=ids[-1].to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: past})
            past = out[CACHE]
            ids.append(out.logits[:, -1:].argmax(-1).cpu())
        rows.append(torch.cat(ids, 1))
    return torch.cat(rows)


@torch.inference_mode()
def measure_errors(
    model: nn.Module, sequences: Tensor, prompt: int, pairs: tuple[Pair, ...], form: CacheFormat
) -> Errors:
    """Errors of attention's output at the decode queries (those after the prompt), no error carried across layers.

    Args:
        sequences: (N, T) prompts with their greedy answers. prompt: tokens of the prompts.
        pairs: columns of the result.
    """
    totals: dict[int, Tensor] = {}  # (2, pairs) of each layer, summed over prompts

    def hook(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = query[:, :, prompt:].float(), key.float(), value.float()
        q = q.unflatten(1, (k.shape[1], -1)) * layer.scaling  # (B, Hkv, queries of a head, T, D)
        future = torch.ones(q.shape[3], k.shape[2], dtype=torch.bool, device=q.device).triu(prompt + 1)
        rounded = {bits: round_values(v, bits, form) for bits in {b for _, b in pairs}}
        o = attend(q, k, future) @ v[:, :, None]
        found = torch.zeros(2, len(pairs), dtype=torch.float64)
        for bits_k in {b for b, _ in pairs}:
            a_hat = attend(q, round_keys(k, bits_k, form), future)
            for place, (own_k, bits_v) in enumerate(pairs):
                if own_k == bits_k:
                    o_hat = a_hat @ rounded[bits_v][:, :, None]
                    wrong, size = (x.flatten(1).norm(dim=1).double() for x in (o - o_hat, o))
                    found[0, place] = torch.where(wrong > 0, wrong / size, 0).sum()  # of values that are all 0 none
                    found[1, place] = relative(o, o_hat).double().sum()
        totals[layer.layer_idx] = totals.get(layer.layer_idx, 0) + found
        return key, value

    batches = sequences.split(max(1, TOKENS // sequences.shape[1]))
    with attention_hook(model, hook):
        for batch in tqdm(batches, desc="attention errors", unit="batch", leave=False):
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
    mean = torch.stack([totals[i] for i in sorted(totals)], 1) / len(sequences)  # (2, L, pairs)
    return Errors(*mean.tolist())


def attend(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """softmax(q k^T) over the past: q (B, Hkv, G, T, D) scaled, k (B, Hkv, S, D), future (T, S) -> (B, Hkv, G, T, S)."""
    return (q @ k[:, :, None].transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(-1)


def relative(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean |x - x^| / |x| of each prompt, over the entries that are not 0: (B,)."""
    there = x != 0
    ratio = torch.where(there, (x - x_hat).abs() / x.abs().where(there, torch.ones_like(x)), 0)
    return ratio.flatten(1).sum(1) / there.flatten(1).sum(1).clamp_min(1)


# -------------------------------------------------------------------------------------------------- objectives, step 5


@torch.inference_mode()
def log_probabilities(model: nn.Module, windows: Tensor) -> list[Tensor]:
    """log p(next token) at every position of the windows (N, T): fp32 (n, T, vocabulary) for each batch of them."""
    batches = windows.split(max(1, TOKENS // windows.shape[1]))
    return [model(input_ids=b.to(model.device), use_cache=False).logits.float().log_softmax(-1) for b in batches]


@torch.inference_mode()
def block_inputs(model: nn.Module, windows: Tensor) -> list[list[Tensor]]:
    """What every decoder block reads: (n, T, d) for each batch of the windows (N, T) and each block."""
    found: list[list[Tensor]] = []

    def record(_, args: tuple, kwargs: dict) -> None:
        found[-1].append(args[0] if args else kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in model.get_decoder().layers]
    for batch in windows.split(max(1, TOKENS // windows.shape[1])):
        found.append([])
        model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def resumed(model: nn.Module, block: int, states: Tensor) -> Iterator[None]:
    """While open, the decoder begins at `block` with what it reads, `states` (B, T, d); those before it are not computed."""
    skipped = model.get_decoder().layers[:block]
    for layer in skipped:
        layer.forward = lambda *_, **__: states
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward


@torch.inference_mode()
def mean_kl(
    model: nn.Module, windows: Tensor, reference: list[Tensor], inputs: list[list[Tensor]] | None = None, start: int = 0
) -> float:
    """mean over tokens of KL(p || p^) in nats: p from `log_probabilities` of the full-precision model, p^ the model's.

    start, inputs: the first block that differs from the full-precision model, and that model's `block_inputs`.
    """
    total = 0.0
    for place, (batch, full) in enumerate(
        zip(windows.split(max(1, TOKENS // windows.shape[1])), reference, strict=True)
    ):
        with resumed(model, start, inputs[place][start]) if start else nullcontext():
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        total += divergence(full.flatten(0, 1), logits.flatten(0, 1)).sum().item()
    return total / windows.numel()


@torch.inference_mode()
def first_divergence(model: nn.Module, sequences: Tensor, prompt: int) -> float:
    """Mean number of steps before greedy decoding leaves the answers in `sequences` (N, T), which start at `prompt`.

    One forward pass tells: up to the first disagreement, decoding would have read the same tokens.
    """
    steps = []
    for batch in sequences.split(max(1, TOKENS // sequences.shape[1])):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        agree = logits[:, prompt - 1 : -1].argmax(-1).cpu() == batch[:, prompt:]
        steps.append(agree.long().cumprod(1).sum(1))
    return torch.cat(steps).double().mean().item()
