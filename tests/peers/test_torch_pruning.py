"""Our groups of channels and costs beside Torch-Pruning's, and cropping before training beside pruning after it."""

import copy
import math

import pytest
import torch
import torch_pruning as tp
from digits import train_digits
from torch import nn

from recipes.common.data.architectures import fresh_model
from recipes.common.parts.width_fit import Budget, fit_widths, width_limits
from recipes.common.parts.width_graph import width_graph
from recipes.precropping.crop_rules import synexp_channels
from recipes.precropping.networks import initialised, resized

MODELS = ["resnet-14", "resnet-50", "mobilenet-v2-0.35", "vgg-11"]


class Logits(nn.Module):
    """The model as a function of pixels alone, as Torch-Pruning calls it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixel_values=pixels).logits


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_costs_are_torch_prunings(name):
    model, pixels = fresh_model(name, list("abcde"), 32, 0).eval(), torch.randn(1, 3, 32, 32)
    graph = width_graph(model, 32)
    theirs = tp.DependencyGraph().build_dependency(Logits(model), pixels)
    names = {module: key for key, module in model.named_modules()}
    for group in graph.groups:
        writer = next(layer for layer in graph.layers if layer.target == group)
        module = model.get_submodule(writer.name)
        found = theirs.get_pruning_group(module, tp.prune_conv_out_channels, idxs=[0])
        touched = {names[item.dep.target.module] for item in found if item.dep.target.module in names}
        wanted = {layer.name for layer in graph.layers if group in layer.groups}
        assert {key for key in touched if isinstance(model.get_submodule(key), nn.Conv2d | nn.Linear)} == wanted, group
    macs, _ = tp.utils.count_ops_and_params(Logits(model), pixels)
    others = macs - graph.cost(graph.widths)[1]  # theirs also counts normalisation and biases
    assert 0 <= others < 0.15 * macs


def test_pruning_a_trained_network_is_near_cropping_an_untrained_one():
    """The same weights: cropped before training, or trained whole, pruned by group norms, and trained on for a quarter."""
    epochs = 8
    dense = initialised(fresh_model("resnet-8", list("0123456789"), 8, 0), 0)
    graph = width_graph(dense, 8)
    budget, limits = (
        Budget(0.4 * graph.params.sum(), None),
        width_limits(graph, multiple=1, min_width=4, min_ratio=0.05),
    )
    widths = fit_widths(graph, synexp_channels(graph, budget, limits), budget, limits)
    ours = train_digits(initialised(resized(dense, widths), 0), None, epochs + epochs // 4)

    pruned = copy.deepcopy(dense)
    train_digits(pruned, None, epochs)
    pruner = tp.pruner.MagnitudePruner(
        Logits(pruned),
        torch.randn(1, 3, 8, 8),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=1 - math.sqrt(0.4),
        ignored_layers=[pruned.classifier[1]],
    )
    pruner.step()
    kept = sum(parameter.numel() for parameter in pruned.parameters() if parameter.ndim > 1)
    assert kept == pytest.approx(0.4 * graph.params.sum(), rel=0.1)
    theirs = train_digits(pruned, None, epochs // 4)
    print(f"accuracy: cropped before training {ours:.3f}, pruned after it {theirs:.3f}")
    assert ours > 0.85 and theirs > 0.85 and abs(theirs - ours) < 0.06
