"""Networks of other widths, fresh or cropped from a wider one, and sparse ones to compare them with."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recipes.common.core.state import module_seed
from recipes.common.parts.densities import layer_counts
from recipes.common.parts.scores import prunable_weights
from recipes.common.parts.width_graph import CHANNEL_GROUPS, WidthGraph
from zoo.models.widths import base_widths
from zoo.random_mask import random_mask

CROPPED = ("width-params", "width-macs", "inner-only", "random-widths")  # baselines that are narrower networks
MASKED = ("same-p-mask", "erk-mask", "uniform-mask", "synflow-mask", "snip-mask", "grasp-mask")  # sparse, dense widths


def initialised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Kaiming-normal weights of the model's own fan-in, biases 0; every layer has a generator of its own."""
    for name, weight in prunable_weights(model).items():
        generator = torch.Generator().manual_seed(module_seed(seed, name))
        nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)
        bias = model.get_submodule(name.removesuffix(".weight")).bias
        if bias is not None:
            nn.init.zeros_(bias)
    return model


def resized(model: PreTrainedModel, widths: dict[str, int]) -> PreTrainedModel:
    """A new model of the same class with these widths, initialised anyhow."""
    base = CHANNEL_GROUPS[model.config.model_type.removeprefix("slim_")](model)
    config = copy.deepcopy(model.config)
    changed = {group: widths[group] for group, width in base_widths(model, base).items() if widths[group] != width}
    config.widths = ((config.widths or {}) | changed) or None
    return type(model)(config)


@torch.no_grad()
def cropped(model: PreTrainedModel, widths: dict[str, int]) -> PreTrainedModel:
    """The first channels of every group, weights times sqrt(fan_old / fan_new), so that signals keep their scale."""
    small = resized(model, widths)
    scales = {}
    for name, weight in prunable_weights(small).items():
        old = model.get_parameter(name)
        scales[name] = math.sqrt((old.numel() / len(old)) / (weight.numel() / len(weight)))
    for name, tensor in small.state_dict().items():
        whole = model.state_dict()[name]
        tensor.copy_(whole[tuple(slice(size) for size in tensor.shape)] * scales.get(name, 1))
    return small


def baseline_wish(graph: WidthGraph, name: str, seed: int) -> dict[str, float]:
    """{group: log d_g} of one of CROPPED before the common shift: equal in all groups or inside blocks, or drawn."""
    if name == "random-widths":
        generator = np.random.default_rng(module_seed(seed, name))
        return {group: math.log(generator.uniform(0.05, 1)) for group in graph.groups}
    return {group: 0.0 for group in graph.groups if name != "inner-only" or group not in graph.trunks}


def random_masks(p: dict[str, float], shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random positions, exact counts."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = layer_counts(p, sizes)
    return {
        name: random_mask(seed, layer, sizes[name], counts[name]).view(shape)
        for layer, (name, shape) in enumerate(shapes.items())
    }


def network_row(name: str, model: nn.Module, graph: WidthGraph) -> list:
    """A row of the table NETWORKS: weights and MACs, zeros not counted, and SynExp's value of them."""
    weights = prunable_weights(model)
    kept = {key.removesuffix(".weight"): int(weight.count_nonzero()) for key, weight in weights.items()}
    p = np.array([kept[layer.name] / layer.params for layer in graph.layers])
    params, macs = sum(kept.values()), float(graph.macs @ p)
    value = float(np.log(p).sum()) if p.all() else "a layer is empty"
    return [name, f"{params:,}", params / graph.params.sum(), f"{macs:,.0f}", macs / graph.macs.sum(), value]


NETWORKS = ["network", "weights", "of dense", "MACs", "of dense", "sum log p"]
