"""What a convolutional network costs at any widths: its groups of channels, and weights and MACs of every layer.

Layer l reads one group of channels and writes one (zoo.models.widths). With d_g the kept fraction of group g, an
ordinary layer keeps p_l = d_in d_out of its weights, a depth-wise one p_l = d_g, a layer with one fixed side p_l = d
of the other; its weights and its multiply-accumulates (MACs) both fall by p_l. Counted are convolutions and linear
layers, shortcuts and the classifier included, biases and norms not.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from recipes.common.parts.densities import prunable_layers
from zoo.errors import UserError
from zoo.models import mobilenet_v2, resnet, vgg
from zoo.models.widths import base_widths

CHANNEL_GROUPS = {
    "resnet": resnet.channel_groups,
    "mobilenet_v2": mobilenet_v2.channel_groups,
    "vgg": vgg.channel_groups,
}
TRUNKS = {"resnet": r"embedder|stages\.\d+", "mobilenet_v2": r".*\.reduce_1x1"}  # groups that leave a block; VGG: none


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer at the base widths."""

    name: str  # of the module
    source: str | None  # the group that it reads; None for the pixels
    target: str | None  # the group that it writes; None for the labels
    params: int  # weights, alpha_l in the paper's notation
    macs: int  # per image, beta_l
    parallel: bool  # a projection beside a residual branch

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that d_in and d_out are of: a depth-wise layer has one, counted once."""
        return tuple(dict.fromkeys(group for group in (self.source, self.target) if group is not None))


@dataclass(frozen=True)
class WidthGraph:
    """The layers of a network and the base width of every group of channels."""

    layers: tuple[LayerCost, ...]
    widths: dict[str, int]
    trunks: frozenset[str]  # the groups between blocks, residual sums among them; all others are inside one block

    @property
    def groups(self) -> list[str]:
        return list(self.widths)

    @cached_property
    def incidence(self) -> np.ndarray:
        """(layers, groups), 1 where a layer's p has the factor d_g: log p = incidence @ log d."""
        return np.array([[float(group in layer.groups) for group in self.groups] for layer in self.layers])

    @cached_property
    def params(self) -> np.ndarray:
        """(layers,) weights at the base widths."""
        return np.array([layer.params for layer in self.layers], dtype=np.float64)

    @cached_property
    def macs(self) -> np.ndarray:
        """(layers,) MACs per image at the base widths."""
        return np.array([layer.macs for layer in self.layers], dtype=np.float64)

    def densities(self, widths: dict[str, int]) -> dict[str, float]:
        """{layer: p_l} at these widths."""
        return {
            layer.name: float(np.prod([widths[group] / self.widths[group] for group in layer.groups]))
            for layer in self.layers
        }

    def cost(self, widths: dict[str, int]) -> tuple[int, int]:
        """(weights, MACs) at these widths, exact."""
        params = macs = 0
        for layer in self.layers:
            p, m = layer.params, layer.macs
            for group in layer.groups:
                p, m = p // self.widths[group] * widths[group], m // self.widths[group] * widths[group]
            params, macs = params + p, macs + m
        return params, macs

    def sum_log_p(self, widths: dict[str, int]) -> float:
        """The value of SynExp's objective, sum over layers of log p_l."""
        log_d = np.log([widths[group] / self.widths[group] for group in self.groups])
        return float((self.incidence @ log_d).sum())


def width_graph(model: nn.Module, image_size: int) -> WidthGraph:
    """The graph of a ResNet, MobileNetV2 or VGG classifier, stock or ours, for square images of this side.

    Raises: UserError naming the supported families for any other model.
    """
    family = model.config.model_type.removeprefix("slim_")
    if family not in CHANNEL_GROUPS:
        raise UserError(f"model_type {family!r}: channels can be cropped in {', '.join(CHANNEL_GROUPS)} only.")
    groups = CHANNEL_GROUPS[family](model)
    empty = copy.deepcopy(model).to("meta")
    costs = prunable_layers(empty, torch.empty(1, model.config.num_channels, image_size, image_size, device="meta"))
    assert costs.keys() == {f"{name}.weight" for name in groups}, "a layer is missing from the groups"
    layers = tuple(
        LayerCost(
            name,
            source,
            target,
            costs[f"{name}.weight"].size,
            costs[f"{name}.weight"].macs,
            name.endswith("shortcut.convolution"),
        )
        for name, (source, target) in groups.items()
    )
    widths = base_widths(model, groups)
    return WidthGraph(
        layers, widths, frozenset(group for group in widths if re.fullmatch(TRUNKS.get(family, ""), group))
    )
