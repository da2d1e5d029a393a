"""How much each decoder block matters: how it changes its input, how its weights spread, what its quantisation costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.common.core.plots import layer_index
from recipes.common.core.state import cached_json
from recipes.common.metrics.fidelity import divergence
from zoo.errors import UserError


def lim(x: Tensor, y: Tensor) -> Tensor:
    """-mean cos(x_t, y_t) over the tokens but the first: one score per window. x, y (N, T, d), in [-1, 1]   (step 1)"""
    return -torch.nn.functional.cosine_similarity(x[:, 1:].float(), y[:, 1:].float(), dim=-1).mean(1)


def zd(weights: list[Tensor], two_sided: bool = False) -> float:
    """Share of the weights of a block together that lie more than a deviation above (or beyond) the mean   (step 1)"""
    count = sum(w.numel() for w in weights)
    mean = sum(w.double().sum().item() for w in weights) / count
    variance = sum((w.double() - mean).square().sum().item() for w in weights) / (count - 1)
    far = 0
    for w in weights:
        z = w.double() - mean
        far += int(((z.abs() if two_sided else z) > math.sqrt(variance)).sum())
    return far / count


def score_block(folder: Path, index: int, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    """Scores of one block of the dense model, to folder/<index>.json; x, y (N, T, d) are its inputs and outputs."""
    if not weights:
        return

    def make() -> dict:
        windows = torch.cat([lim(*pair) for pair in zip(x.split(4), y.split(4), strict=True)])
        if not torch.isfinite(windows).all():
            raise UserError(f"block {index}: its hidden states hold NaN or Inf; such a model cannot be ranked.")
        matrices = list(weights.values())
        return {
            "lim": windows.mean().item(),
            "halves": [half.mean().item() for half in windows.chunk(2)],
            "zd": zd(matrices),
            "zd-two-sided": zd(matrices, two_sided=True),
        }

    cached_json(folder / f"{index}.json", make)


@torch.inference_mode()
def block_damage(
    model: nn.Module, window: Tensor, linears: dict[str, nn.Linear], stored: Callable[[str], Tensor]
) -> dict[int, float]:
    """Mean KL(dense || one block's linears replaced by stored(name)) over the tokens of a window (T,), in nats, by block."""
    batch = window[None].to(model.device)
    reference = model(input_ids=batch, use_cache=False).logits[0]
    blocks: dict[int, list[str]] = {}
    for name in linears:
        blocks.setdefault(layer_index(name, 0), []).append(name)
    damage = {}
    for block, names in blocks.items():
        kept = {name: model.get_submodule(name).weight.data for name in names}
        for name in names:
            model.get_submodule(name).weight.data = stored(name).to(kept[name])
        swapped = model(input_ids=batch, use_cache=False).logits[0]
        for name in names:
            model.get_submodule(name).weight.data = kept[name]
        damage[block] = divergence(reference, swapped).mean().item()
    return damage


def least_first(importance: dict[int, float]) -> list[int]:
    """Blocks by rising importance; of equals the later one first   (step 2)"""
    return sorted(importance, key=lambda block: (importance[block], -block))


def kendall_tau(a: list[float], b: list[float]) -> float:
    """Agreement of two rankings, -1..1; 1 for a single element."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = ((a[i] - a[j]) * (b[i] - b[j]) for i, j in pairs)
    return sum((s > 0) - (s < 0) for s in signs) / len(pairs) if pairs else 1.0
