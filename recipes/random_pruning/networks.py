"""The networks that are compared: how their weights begin, and which of the weights that are left do anything."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.core.state import module_seed
from recipes.common.loops.training import Masks
from recipes.common.parts.scores import prunable_weights, synflow_scores
from recipes.common.parts.width_fit import Budget, check_floor, fit_widths, width_limits
from recipes.common.parts.width_graph import CHANNEL_GROUPS, width_graph
from zoo.errors import UserError


def kaiming(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """w ~ N(0, 2 / fan_in), in place, every weight from a stream of its own; biases and norms stay as they are."""
    for name, weight in prunable_weights(model).items():
        generator = torch.Generator().manual_seed(module_seed(seed, name))
        std = math.sqrt(2 / weight[0].numel())
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def xavier(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """w ~ N(0, 2 / (fan_in + fan_out)), in place."""
    for name, weight in prunable_weights(model).items():
        generator = torch.Generator().manual_seed(module_seed(seed, f"xavier/{name}"))
        nn.init.xavier_normal_(weight.data, generator=generator)
    return model


def narrowed(base: PreTrainedModel, weights: int, density: float, seed: int) -> PreTrainedModel:
    """A dense network of as many weights as a sparse one has: all widths times sqrt(density), then tuned to the number.

    Raises: UserError for a family without widths, and for fewer weights than its smallest network has.
    """
    if base.config.model_type.removeprefix("slim_") not in CHANNEL_GROUPS:
        raise UserError(f"a {base.config.model_type} has no widths to reduce: choose --baselines without it.")
    graph = width_graph(base, base.config.image_size)
    limits = width_limits(graph, multiple=1, min_width=1, min_ratio=0.0)
    budget = Budget(params=weights, macs=None)
    check_floor(graph, budget, limits)
    shrunk = dict.fromkeys(graph.widths, math.log(density) / 2)
    config = copy.deepcopy(base.config)
    config.widths = fit_widths(graph, shrunk, budget, limits, shift=True)
    torch.manual_seed(seed)
    return kaiming(type(base)(config), seed)


def live_weights(model: PreTrainedModel, masks: Masks) -> int:
    """How many of the kept weights are on a path of kept weights from the pixels to the labels.

    Those with a SynFlow score above 0: with |w| > 0, nothing cancels.
    """
    model = copy.deepcopy(model)
    for weight in prunable_weights(model).values():
        weight.data.fill_(weight[0].numel() ** -0.5)
    config = model.config
    scores = synflow_scores(model, (config.num_channels, config.image_size, config.image_size), masks)
    return sum(int((score > 0).sum()) for score in scores.values())
