"""How fast models generate, beside one another."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.metrics.metric import metric
from zoo.cache import CACHE


def compare_speed(
    models: dict[str, nn.Module], prompt_tokens: int, new_tokens: int, repeats: int, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Prefill and greedy decode at batch 1, the models taking turns so that a busy machine slows all alike.

    Every model is warmed up once, untimed. The prompt is random ids that all models know; decoding is forced to
    `new_tokens` steps, so the work does not depend on what the model says.

    Returns:
        {name: {"prefill_seconds": [repeats], "decode_tokens_per_s": [repeats]}}; entry i of all lists was measured in
        the same round.
    """
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    for model in models.values():
        model.eval()
        generation_times(model, prompt, min(new_tokens, 2))
    raw = {name: {"prefill_seconds": [], "decode_tokens_per_s": []} for name in models}
    names = list(models)
    for repeat in tqdm(range(repeats), desc="speed", unit="round", leave=False):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:  # nobody is always first
            prefill, decode = generation_times(models[name], prompt, new_tokens)
            raw[name]["prefill_seconds"].append(prefill)
            raw[name]["decode_tokens_per_s"].append(new_tokens / decode)
    return raw


@torch.inference_mode()
def generation_times(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds for the prompt (1, T) up to its next token, seconds for `new_tokens` further greedy tokens)."""
    ids = prompt.to(model.device)
    begin = _now(model)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefilled = _now(model)
    for _ in range(new_tokens):
        out = model(input_ids=token, use_cache=True, **{CACHE: out[CACHE]})
        token = out.logits[:, -1:].argmax(-1)
    return prefilled - begin, _now(model) - prefilled


def _now(model: nn.Module) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def ratio(a: list[float], b: list[float]) -> dict:
    """a / b round by round, as a metric: the median, with the sample standard deviation over rounds (None for one)."""
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    spread = statistics.stdev(rounds) if len(rounds) > 1 else None
    return metric(statistics.median(rounds), spread, len(rounds), "runs", "ratio")
