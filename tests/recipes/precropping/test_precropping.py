"""PreCropping: densities, widths and networks, and the command line on tiny images."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import train_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from recipes.common.core.cli import main, parse
from recipes.common.core.state import World
from recipes.common.data.architectures import fresh_model
from recipes.common.loops.trained import TrainedRun
from recipes.common.parts.scores import prunable_weights
from recipes.common.parts.width_fit import Budget, fit_widths, geometric_program, width_limits
from recipes.common.parts.width_graph import LayerCost, WidthGraph, width_graph
from recipes.precropping.crop_rules import crop_wish, synexp_channels, synexp_weights
from recipes.precropping.networks import CROPPED, MASKED, cropped, initialised, random_masks, resized
from zoo.errors import UserError
from zoo.models.mobilenet_v2 import SlimMobileNetV2Config, SlimMobileNetV2ForImageClassification
from zoo.models.resnet import SlimResNetConfig, SlimResNetForImageClassification, cifar_resnet_config
from zoo.record.schema import read_report

BASIC_34 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3], "num_labels": 1000}
GOLDEN = {  # ResNet-34: (weights, MACs) -> inner widths of (first, other) blocks by stage, sum log p
    "params": ((11.07e6, None), [(64, 64), (128, 128), (256, 221), (148, 111)], -10.06),
    "flops": ((None, 2.73e9), [(45, 45), (120, 90), (239, 179), (478, 359)], -9.66),
    "both": ((11.07e6, 2.73e9), [(62, 62), (128, 113), (223, 168), (218, 164)], -11.67),
    "preconfig": ((0.8, 1.0), [(73, 73), (187, 140), (321, 241), (411, 309)], -0.54),
}
FINE = {"multiple": 1, "min_width": 4, "min_ratio": 0.05}
# Densities that 20 rounds of SynFlow leave in ResNet-34 (Kaiming-normal, ones of 96 pixels, 10.91 M parameters).
SYNFLOW_34 = {"embedder": 0.994, "classifier": 0.753}
SYNFLOW_STAGES = [(0.981, 0.981, 0.982), (0.963, 0.925, 0.925), (0.851, 0.719, 0.720), (0.523, 0.312, 0.315)]
SYNFLOW_SHORTCUTS = [None, 0.569, 0.007, 0.0]


@pytest.fixture(scope="module")
def resnet_34() -> WidthGraph:
    with torch.device("meta"):
        return width_graph(ResNetForImageClassification(ResNetConfig(**BASIC_34)), 224)


@pytest.fixture(scope="module")
def mobilenet() -> WidthGraph:
    with torch.device("meta"):
        return width_graph(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)), 224)


@pytest.fixture(scope="module")
def resnet_20() -> WidthGraph:
    with torch.device("meta"):
        return width_graph(SlimResNetForImageClassification(cifar_resnet_config(20, 16, 10)), 32)


def absolute(graph: WidthGraph, budget: tuple) -> Budget:
    return Budget(
        *(
            b * total if b is not None and b <= 1 else b
            for b, total in zip(budget, graph.cost(graph.widths), strict=True)
        )
    )


def fractions(graph: WidthGraph, wish: dict[str, float]) -> np.ndarray:
    """p_l of unrounded widths."""
    return np.exp(graph.incidence @ [wish.get(group, 0.0) for group in graph.groups])


# ----------------------------------------------------------------------------------------------------------- densities


def test_totals_are_those_of_the_published_networks(resnet_34, mobilenet, resnet_20):
    assert resnet_34.cost(resnet_34.widths) == (21_779_648, 3_663_761_408)
    assert mobilenet.cost(mobilenet.widths) == (3_469_760, 300_774_272)
    assert resnet_20.cost(resnet_20.widths) == (270_896, 40_813_184)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_widths_of_resnet_34(resnet_34, name):
    budget, stages, value = GOLDEN[name]
    budget = absolute(resnet_34, budget)
    limits = width_limits(resnet_34, **FINE, max_ratio=4.0 if name == "preconfig" else 1.0)
    wish = synexp_channels(resnet_34, budget, limits)
    widths = {group: resnet_34.widths[group] * math.exp(wish[group]) for group in wish}
    for group, width in widths.items():
        _, stage, *inner = group.split(".")
        wanted = stages[int(stage)][min(int(inner[1]), 1)] if inner else resnet_34.widths[group]
        assert width == pytest.approx(wanted, abs=1), group
    p = fractions(resnet_34, wish)
    assert np.log(p).sum() == pytest.approx(value, abs=0.01)
    cost = resnet_34.params @ p, resnet_34.macs @ p
    for value, limit in zip(cost, (budget.params, budget.macs), strict=True):
        assert limit is None or value == pytest.approx(limit, rel=1e-8)
    if name == "params":
        assert cost[1] == pytest.approx(3.022e9, rel=1e-3)


def test_only_the_head_of_mobilenet_shrinks(mobilenet):
    wish = synexp_channels(mobilenet, Budget(2.31e6, None), width_limits(mobilenet, **FINE))
    assert 1280 * math.exp(wish["conv_1x1"]) == pytest.approx(401, abs=1)
    assert max(abs(u) for group, u in wish.items() if group != "conv_1x1") < 1e-8
    p = fractions(mobilenet, wish)
    assert mobilenet.macs @ p == pytest.approx(0.286e9, rel=2e-3) and np.log(p).sum() == pytest.approx(-2.32, abs=0.01)


@pytest.mark.parametrize("name", ["params", "flops", "both"])
def test_solutions_satisfy_the_kkt_conditions(resnet_34, mobilenet, name):
    from scipy.optimize import nnls

    for graph in (resnet_34, mobilenet):
        budget = absolute(graph, (0.5 if name != "flops" else None, 0.6 if name != "params" else None))
        limits = width_limits(graph, **FINE)
        wish = synexp_channels(graph, budget, limits)
        u, gain = np.array([wish[group] for group in graph.groups]), graph.incidence.sum(0)
        lower = np.array([math.log(limits[group][0] / graph.widths[group]) for group in graph.groups])
        slopes = []
        for cost, limit in ((graph.params, budget.params), (graph.macs, budget.macs)):
            if limit is None:
                continue
            terms = cost * np.exp(graph.incidence @ u) / limit
            assert terms.sum() <= 1 + 1e-9
            if terms.sum() > 1 - 1e-7:
                slopes.append(graph.incidence.T @ terms / terms.sum())
        free = (u > lower + 1e-6) & (u < -1e-6)
        multipliers, _ = nnls(np.array(slopes).T[free], gain[free])
        residual = np.array(slopes).T @ multipliers - gain
        assert np.abs(residual[free]).max(initial=0) < 1e-6
        assert residual[u >= -1e-6].max(initial=0) < 1e-6 and residual[u <= lower + 1e-6].min(initial=0) > -1e-6


def toy(sizes: tuple[int, ...] = (10, 20)) -> WidthGraph:
    """pixels (3) -> a -> b -> labels (5), 3x3 kernels, the second at half the resolution."""
    a, b = sizes
    layers = (
        LayerCost("one", None, "a", 27 * a, 27 * a * 64, False),
        LayerCost("two", "a", "b", 9 * a * b, 9 * a * b * 16, False),
        LayerCost("three", "b", None, 5 * b, 5 * b, False),
    )
    return WidthGraph(layers, {"a": a, "b": b}, frozenset())


@pytest.mark.parametrize("share", [(0.5, None), (None, 0.4), (0.45, 0.5)])
def test_a_grid_search_finds_nothing_better(share):
    graph = toy()
    budget = absolute(graph, share)
    wish = synexp_channels(graph, budget, width_limits(graph, multiple=1, min_width=1, min_ratio=0.01))
    d = np.linspace(0.01, 1, 1500)
    da, db = np.meshgrid(d, d)
    p = np.stack([da, da * db, db])
    fits = np.ones_like(da, dtype=bool)
    for cost, limit in ((graph.params, budget.params), (graph.macs, budget.macs)):
        if limit is not None:
            fits &= np.tensordot(cost, p, 1) <= limit
    best = np.where(fits, np.log(p).sum(0), -np.inf).max()
    value = np.log(fractions(graph, wish)).sum()
    assert best <= value + 1e-9 and value == pytest.approx(best, abs=0.01)


# ------------------------------------------------------------------------------------------- a density for each weight


def test_weight_level_golden_numbers_of_resnet_20(resnet_20):
    p = synexp_weights(resnet_20, absolute(resnet_20, (0.1, None)))
    encoder = "resnet.encoder.stages."
    assert p[f"{encoder}0.layers.0.layer.0.convolution"] == pytest.approx(0.5826, abs=5e-5)
    assert p[f"{encoder}1.layers.0.layer.0.convolution"] == pytest.approx(0.2913, abs=5e-5)
    assert p[f"{encoder}1.layers.0.layer.1.convolution"] == pytest.approx(0.1457, abs=5e-5)
    assert p[f"{encoder}2.layers.0.layer.0.convolution"] == pytest.approx(0.0728, abs=5e-5)
    assert p[f"{encoder}2.layers.2.layer.1.convolution"] == pytest.approx(0.0364, abs=5e-5)
    assert p[f"{encoder}2.layers.0.shortcut.convolution"] == pytest.approx(0.6555, abs=5e-5)
    full = ("resnet.embedder.embedder.convolution", "classifier.1", f"{encoder}1.layers.0.shortcut.convolution")
    assert all(p[name] == 1 for name in full)
    kept = [layer.params * p[layer.name] for layer in resnet_20.layers if p[layer.name] < 1]
    assert np.allclose(kept, 1342.4, atol=0.05) and np.ptp(kept) < 1e-9 * max(kept)
    assert sum(layer.macs * p[layer.name] for layer in resnet_20.layers) / 40_813_184 == pytest.approx(0.2814, abs=5e-5)
    p = synexp_weights(resnet_20, absolute(resnet_20, (None, 0.1)))
    assert p["resnet.embedder.embedder.convolution"] == pytest.approx(0.4543, abs=5e-5)
    assert p[f"{encoder}0.layers.0.layer.0.convolution"] == pytest.approx(0.0852, abs=5e-5)
    assert p[f"{encoder}1.layers.0.layer.0.convolution"] == pytest.approx(0.1704, abs=5e-5)
    assert sum(layer.params * p[layer.name] for layer in resnet_20.layers) / 270_896 == pytest.approx(0.1038, abs=5e-5)


@settings(max_examples=40, deadline=None)
@given(params=st.floats(0.01, 0.99), macs=st.floats(0.01, 0.99), more=st.floats(1, 2))
def test_water_filling_spends_budgets_and_rises_with_them(resnet_20, params, macs, more):
    budget = absolute(resnet_20, (params, macs))
    p = np.array(list(synexp_weights(resnet_20, budget).values()))
    cost = resnet_20.params @ p / budget.params, resnet_20.macs @ p / budget.macs
    assert max(cost) == pytest.approx(1, rel=1e-9) and (p > 0).all() and (p <= 1).all()
    free = p < 1 - 1e-9
    system = np.stack([resnet_20.params[free], resnet_20.macs[free]], 1)
    prices, *_ = np.linalg.lstsq(system / system.max(0), 1 / p[free], rcond=None)
    np.testing.assert_allclose(system / system.max(0) @ prices, 1 / p[free], rtol=1e-6)  # 1 / p = mu alpha + nu beta
    richer = Budget(min(budget.params * more, resnet_20.params.sum()), None)
    poorer = Budget(budget.params, None)
    p, q = (np.array(list(synexp_weights(resnet_20, one).values())) for one in (poorer, richer))
    assert (q >= p * (1 - 1e-12)).all()


def test_full_budgets_keep_everything(resnet_20, resnet_34):
    for graph in (resnet_20, resnet_34):
        budget = absolute(graph, (1.0, 1.0))
        assert all(p == 1 for p in synexp_weights(graph, budget).values())
        limits = width_limits(graph, **FINE)
        assert fit_widths(graph, synexp_channels(graph, budget, limits), budget, limits) == graph.widths


# -------------------------------------------------------------------------------------------------------------- SynExp


def test_synexp_depends_on_densities_only():
    """E[1^T prod |W_l * M_l| 1] = N_0 prod p mu N, for masks of weights and of filters; aligned cropping gives prod d."""
    sizes, p, draws = (8, 24, 32, 24, 6), (0.5, 0.25, 0.25, 0.5), 16_000
    generator = np.random.default_rng(0)
    mu = math.sqrt(2 / math.pi)
    dense = sizes[0] * math.prod(mu * n for n in sizes[1:])

    def estimate(mask) -> float:
        total = 0.0
        for _ in range(draws // 1000):
            flow = np.ones((1000, 1, sizes[0]))
            for layer, (n, m) in enumerate(itertools.pairwise(sizes)):
                weights = np.abs(generator.standard_normal((1000, n, m), dtype=np.float32))
                flow = flow @ (weights * mask(layer, n, m))
            total += flow.sum()
        return total / draws / dense

    def weights(layer, n, m):
        return generator.random((1000, n, m)) < p[layer]

    def filters(layer, n, m):
        return generator.random((1000, 1, m)) < p[layer]

    def aligned(layer, n, m):  # the same channels leave layer l as enter layer l + 1: half of each inner group
        return (np.arange(n) < (n if layer == 0 else n // 2))[:, None] & (np.arange(m) < (m if m == 6 else m // 2))

    assert estimate(weights) == pytest.approx(math.prod(p), rel=0.02)
    assert estimate(filters) == pytest.approx(math.prod(p), rel=0.02)
    assert estimate(aligned) == pytest.approx(0.5**3, rel=0.02)


# ---------------------------------------------------------------------------------------------- square roots of scores


def synflow_densities(graph: WidthGraph) -> dict[str, float]:
    p = {}
    for layer in graph.layers:
        parts = layer.name.split(".")
        if "stages" not in parts:
            p[layer.name] = SYNFLOW_34["classifier" if "classifier" in layer.name else "embedder"]
        elif layer.parallel:
            p[layer.name] = SYNFLOW_SHORTCUTS[int(parts[3])]
        else:
            first, second, others = SYNFLOW_STAGES[int(parts[3])]
            p[layer.name] = others if parts[5] != "0" else (first, second)[int(parts[7])]
    return p


def test_square_roots_of_synflow_densities_meet_table_1(resnet_34):
    """11.09 M weights from SynFlow's densities cost 2.73 G MACs, as in the paper's Table 1."""
    p, limits, budget = synflow_densities(resnet_34), width_limits(resnet_34, **FINE), Budget(11.09e6, None)
    widths = fit_widths(resnet_34, crop_wish(resnet_34, p), budget, limits, shift=True)
    assert [widths[f"stages.{s}"] for s in range(4)] == pytest.approx([61, 119, 213, 307], abs=2)
    params, macs = resnet_34.cost(widths)
    assert 0.999 * 11.09e6 < params <= 11.09e6 and macs == pytest.approx(2.73e9, rel=0.005)
    kept = crop_wish(resnet_34, p, keep_trunk=True)
    assert not kept.keys() & resnet_34.trunks
    inner = kept["stages.3.layers.1.layer.0"]
    assert inner == pytest.approx(math.log(0.315))  # no root: one side of its layers shrinks only
    macs = {}
    for rule in ("geomean", "producer", "ls"):
        widths = fit_widths(resnet_34, crop_wish(resnet_34, p, rule), budget, limits, shift=True)
        macs[rule] = resnet_34.cost(widths)[1]
    assert macs["ls"] < macs["geomean"] < macs["producer"]


def test_depthwise_layers_count_without_a_root(mobilenet):
    p = {layer.name: 0.25 for layer in mobilenet.layers}
    wish = crop_wish(mobilenet, p)
    assert wish["conv_1x1"] == pytest.approx(math.log(0.5))
    assert wish["layer.1.expand_1x1"] == pytest.approx((0.5 + 1 + 0.5) / 3 * math.log(0.25))


# -------------------------------------------------------------------------------------------------------------- widths


@settings(max_examples=25, deadline=None)
@given(params=st.floats(0.15, 1), macs=st.floats(0.15, 1), multiple=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_rounded_widths_meet_budgets_and_use_them_up(resnet_20, params, macs, multiple, seed):
    graph, budget = resnet_20, absolute(resnet_20, (params, macs))
    limits = width_limits(graph, multiple=multiple, min_width=4, min_ratio=0.05)
    generator = np.random.default_rng(seed)
    wish = {group: math.log(generator.uniform(0.1, 1)) for group in graph.groups}
    for shift in (False, True):
        widths = fit_widths(graph, wish, budget, limits, multiple=multiple, shift=shift)
        assert budget.holds(graph.cost(widths))
        for group, (low, high) in limits.items():
            assert low <= widths[group] <= high and widths[group] % multiple == 0
            step = min(widths[group] + multiple, high)
            assert step == widths[group] or not budget.holds(graph.cost(widths | {group: step}))


def test_budgets_are_used_to_a_hundredth(resnet_34, resnet_20):
    for graph, share, multiple in ((resnet_34, 0.5, 1), (resnet_34, 0.5, 8), (resnet_20, 0.4, 1)):
        budget = absolute(graph, (share, None))
        limits = width_limits(graph, multiple=multiple, min_width=4, min_ratio=0.05)
        widths = fit_widths(graph, synexp_channels(graph, budget, limits), budget, limits, multiple=multiple)
        assert 0.99 * budget.params <= graph.cost(widths)[0] <= budget.params


def test_trunks_may_be_kept(resnet_20):
    budget, limits = absolute(resnet_20, (0.5, 0.5)), width_limits(resnet_20, **FINE)
    wish = synexp_channels(resnet_20, budget, limits, keep_trunk=True)
    widths = fit_widths(resnet_20, wish, budget, limits)
    assert all(widths[group] == resnet_20.widths[group] for group in resnet_20.trunks)
    # with one budget there is a closed form: d_g = min(1, level / A_g), A_g the weights that touch the group
    budget = absolute(resnet_20, (0.3, None))
    wish = synexp_channels(resnet_20, budget, limits, keep_trunk=True)
    touching = {group: sum(x.params for x in resnet_20.layers if group in x.groups) for group in wish}
    levels = [math.exp(u) * touching[group] for group, u in wish.items() if u < -1e-6]
    assert np.ptp(levels) < 1e-6 * max(levels)


def test_a_budget_below_the_floor_names_the_floor(resnet_20):
    limits = width_limits(resnet_20, multiple=8, min_width=8, min_ratio=0.05)
    with pytest.raises(UserError, match=r"need [\d,]+ weights and [\d,]+ MACs"):
        fit_widths(resnet_20, dict.fromkeys(resnet_20.groups, -1.0), absolute(resnet_20, (0.02, None)), limits)


def test_the_solver_stays_at_the_upper_bounds_when_all_fits():
    gain, exponents, upper = np.ones(2), np.eye(2), np.zeros(2)
    u = geometric_program(gain, exponents, [(np.ones(2), 5.0)], upper - 1, upper)
    assert (u == upper).all()


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_full_budget_with_init_crop_is_the_stock_model(resnet_34):
    config = ResNetConfig(layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=5)
    torch.manual_seed(0)
    stock = ResNetForImageClassification(config).eval()
    slim = SlimResNetForImageClassification(SlimResNetConfig(**{k: getattr(config, k) for k in SHAPE}, num_labels=5))
    slim.load_state_dict(stock.state_dict())
    graph = width_graph(slim, 64)
    budget, limits = absolute(graph, (1.0, 1.0)), width_limits(graph, **FINE)
    small = cropped(slim, fit_widths(graph, synexp_channels(graph, budget, limits), budget, limits)).eval()
    assert small.config.widths is None and small.state_dict().keys() == stock.state_dict().keys()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(small(pixels).logits, stock(pixels).logits)


SHAPE = ("layer_type", "embedding_size", "hidden_sizes", "depths")
FAMILIES = {
    "cifar": lambda: SlimResNetForImageClassification(cifar_resnet_config(14, 8, 5)),
    "bottleneck": lambda: SlimResNetForImageClassification(
        SlimResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], num_labels=5)
    ),
    "mobilenet": lambda: SlimMobileNetV2ForImageClassification(SlimMobileNetV2Config(depth_multiplier=0.35)),
    "vgg": lambda: fresh_model("vgg-11", list("abcde"), 32, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_real_network(family):
    torch.manual_seed(0)
    dense = FAMILIES[family]()
    graph = width_graph(dense, 32)
    budget, limits = absolute(graph, (0.5, 0.5)), width_limits(graph, **FINE)
    widths = fit_widths(graph, synexp_channels(graph, budget, limits), budget, limits)
    small, p = resized(dense, widths), graph.densities(widths)
    weights = prunable_weights(small)
    for layer in graph.layers:
        assert weights[f"{layer.name}.weight"].numel() == round(layer.params * p[layer.name])
    again = width_graph(small, 32)
    assert again.widths == widths
    assert again.cost(again.widths) == graph.cost(widths)
    assert graph.sum_log_p(widths) == pytest.approx(sum(map(math.log, p.values())))
    loss = small.train()(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_cropping_keeps_the_scale_of_the_initialisation(family):
    dense = initialised(FAMILIES[family](), 0)
    graph = width_graph(dense, 32)
    widths = {group: max(1, width // 2) for group, width in graph.widths.items()}
    small = cropped(dense, widths)
    for name, weight in prunable_weights(small).items():
        whole = prunable_weights(dense)[name]
        corner = whole[tuple(slice(size) for size in weight.shape)]
        scale = math.sqrt(whole[0].numel() / weight[0].numel())
        torch.testing.assert_close(weight, corner * scale)
    fresh = initialised(resized(dense, widths), 0)
    for name, weight in prunable_weights(fresh).items():
        if weight.numel() > 500:
            assert weight.std().item() == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.2), name
    again = initialised(resized(dense, widths), 0)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.slow
def test_densities_of_synexp_beat_uniform_ones_at_2_percent():
    accuracy = {"synexp": [], "uniform": []}
    for seed in (0, 1):
        model = initialised(fresh_model("resnet-8", list("0123456789"), 8, seed), seed)
        graph = width_graph(model, 8)
        shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(model).items()}
        found = synexp_weights(graph, absolute(graph, (0.02, None)))
        p = {
            "synexp": {f"{name}.weight": value for name, value in found.items()},
            "uniform": dict.fromkeys(shapes, 0.02),
        }
        for name in accuracy:
            masks = random_masks(p[name], shapes, seed)
            assert sum(int(mask.sum()) for mask in masks.values()) == round(0.02 * graph.params.sum())
            accuracy[name].append(train_digits(copy.deepcopy(model), masks))
    assert np.mean(accuracy["synexp"]) - np.mean(accuracy["uniform"]) >= 0.08, accuracy


# --------------------------------------------------------------------------------------------------- modes and repeats


def test_two_budgets_are_never_better_than_one(resnet_34, mobilenet):
    for graph in (resnet_34, mobilenet):
        limits, values = width_limits(graph, **FINE), {}
        for budget in ((0.5, 0.7), (0.5, None), (None, 0.7)):
            wish = synexp_channels(graph, absolute(graph, budget), limits)
            values[budget] = np.log(fractions(graph, wish)).sum()
        assert values[0.5, 0.7] <= min(values[0.5, None], values[None, 0.7]) + 1e-9


def test_preconfig_at_full_budgets_widens_something(resnet_34):
    budget, limits = absolute(resnet_34, (1.0, 1.0)), width_limits(resnet_34, **FINE, max_ratio=4.0)
    widths = fit_widths(resnet_34, synexp_channels(resnet_34, budget, limits), budget, limits)
    assert resnet_34.sum_log_p(widths) > 0 and budget.holds(resnet_34.cost(widths))
    assert any(widths[group] > width for group, width in resnet_34.widths.items())


PLAN = ["precropping", "--model", "resnet-8", "--dry_run"]


def plan(capsys, *arguments: str) -> str:
    main([*PLAN, *arguments])
    return capsys.readouterr().out


@pytest.mark.slow
def test_widths_are_the_same_in_another_process_with_more_threads(capsys, images):
    here = plan(capsys, "--dataset", images)
    command = [sys.executable, "-m", "recipes", *PLAN, "--dataset", images]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here and "stages.2.layers.0.layer.0" in here


@pytest.mark.slow
def test_every_source_gives_the_same_widths_again_within_budgets(images, tmp_path):
    for source in ("synflow", "snip", "grasp", "magnitude", "erk", "uniform"):
        flags = ["--model", "resnet-8", "--dataset", images, "--source", source, "--score_rounds", "5"]
        recipe = parse("precropping", [*flags, "--score_samples", "4", "--output", str(tmp_path / "out")])
        state = TrainedRun(recipe, recipe.domain(), World())
        graph = recipe.graph(state)
        budget = recipe.budget(graph)
        first, again = (
            recipe.widths(graph, budget, recipe.fresh(state, 0), recipe.score_batches(state, source)) for _ in range(2)
        )
        assert first == again and budget.holds(graph.cost(first))
        assert max(budget.excess(graph.cost(first))) > -0.05 and first != graph.widths


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """A folder of 16x16 images in three colours with noise, split into train and test."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 8), ("test", 10)):
        for label, color in {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 40, (16, 16, 3))
                Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return str(root)


def run(images: str, output: Path, *arguments: str) -> None:
    tiny = ["--model", "resnet-8", "--epochs", "2", "--batch_size", "32", "--seeds", "2", "--eval", "accuracy"]
    main(["precropping", "--dataset", images, "--output", str(output), *tiny, *arguments])


@pytest.mark.slow
def test_baselines_have_the_same_weights_and_macs(images, tmp_path):
    flags = ["--model", "resnet-14", "--dataset", images, "--output", str(tmp_path / "out"), "--score_rounds", "5"]
    recipe = parse("precropping", flags)
    state = TrainedRun(recipe, recipe.domain(), World())
    graph = recipe.graph(state)
    params, macs = graph.cost(recipe.widths_of(state, "precropping", 3))
    cost = {name: graph.cost(recipe.widths_of(state, name, 3)) for name in CROPPED}
    assert 0.98 * params <= cost["width-params"][0] <= params
    assert 0.98 * macs <= cost["width-macs"][1] <= macs
    for name in ("inner-only", "random-widths"):
        assert cost[name][0] <= params and cost[name][1] <= macs
        assert max(cost[name][0] / params, cost[name][1] / macs) > 0.97
    inner = recipe.widths_of(state, "inner-only", 3)
    assert all(inner[group] == graph.widths[group] for group in graph.trunks)
    assert recipe.widths_of(state, "random-widths", 4) != recipe.widths_of(state, "random-widths", 3)
    for name in MASKED:
        masks = recipe.masks(state, name, 3)
        shapes = {key: weight.shape for key, weight in prunable_weights(recipe.fresh(state, 3)).items()}
        assert {key: mask.shape for key, mask in masks.items()} == shapes
        assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(params, abs=1)
    p = graph.densities(recipe.widths_of(state, "precropping", 3))
    for key, mask in recipe.masks(state, "same-p-mask", 3).items():
        assert mask.sum().item() == pytest.approx(p[key.removesuffix(".weight")] * mask.numel(), abs=1)


LOAD = """
import sys
sys.modules["zoo"] = None  # as if it were not installed
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from PIL import Image
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(**processor(Image.new("RGB", (20, 20), (200, 60, 60)), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])
"""


@pytest.mark.slow
def test_the_command_line_makes_a_small_dense_checkpoint(images, tmp_path):
    output = tmp_path / "out"
    chosen = ["width-params", "same-p-mask"]
    run(images, output, "--baselines", *chosen)
    report = read_report(output / "report.json")
    assert report["compressed"]["accuracy"]["value"] > 0.6 and set(report["baselines"]) == set(chosen)
    stored = load_file(output / "model.safetensors")
    floats = {name: tensor for name, tensor in stored.items() if tensor.is_floating_point()}
    assert sum(tensor.numel() for tensor in floats.values()) == report["size"]["nonzero"]
    weights = torch.cat([tensor.flatten() for name, tensor in floats.items() if tensor.ndim > 1])
    assert (weights == 0).double().mean() < 1e-4  # no zeros as masks

    config = json.loads((output / "config.json").read_text())
    precrop = config["compression_config"]["precrop"]
    assert precrop["achieved"]["params"] == weights.numel()
    base, widths = precrop["base_widths"], precrop["widths"]
    assert config["widths"] == {group: width for group, width in widths.items() if width != base[group]}
    networks = {row[0]: row for row in report["tables"]["Networks"]["rows"]}
    assert networks["dense"][2] == 1 and networks["precropping"][2] <= 0.4 and networks["precropping"][4] <= 0.4
    for baseline in ("width-params", "same-p-mask"):
        assert networks[baseline][2] == pytest.approx(networks["precropping"][2], rel=0.02)
    sizes = report["size"]["baselines"]
    assert (
        sizes["width-params"] < 0.6 * report["size"]["dense_bytes"]
        and sizes["same-p-mask"] == report["size"]["dense_bytes"]
    )

    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.dense_model().config.widths is None
    process = subprocess.run([sys.executable, "-c", LOAD, str(output)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] in ("red", "green", "blue")


@pytest.mark.slow
def test_init_crop_a_kept_trunk_and_a_sweep_run(images, tmp_path):
    arguments = ["--seeds", "1", "--epochs", "1", "--baselines", "none", "--sweep", "0.6"]
    run(images, tmp_path / "out", *arguments, "--init", "crop", "--trunk", "keep", "--source", "uniform")
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["widths"]
    assert widths and not any(group in ("stages.0", "stages.1", "stages.2") for group in widths)
    report = read_report(tmp_path / "out" / "report.json")
    assert set(report["sweeps"]["Quality by budget"]["series"]) == {"precropping", "width-params"}


def test_preconfig_widens_what_the_budgets_allow(capsys, images):
    lines = plan(capsys, "--dataset", images, "--preconfig", "--budget_params", "0.9", "--budget_flops", "1")
    rows = [line.split() for line in lines.splitlines() if line.startswith("stages")]
    assert any(int(width) > int(base) for _, base, width, _ in rows)
    assert float(lines.split("weights")[1].split()[2]) <= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget_params", "0"], "a number above 0"),
        (["--budget_params", "9e9"], "the base has"),
        (["--budget_params", "0.001"], "even the smallest widths need"),
        (["--preconfig", "--source", "snip"], "only --source synexp"),
        (["--preconfig", "--init", "crop"], "--init fresh"),
        (["--min_ratio", "0"], "--min_ratio"),
        (["--min_width", "0"], "--min_width"),
        (["--sweep", "1.5"], "--sweep"),
        (["--sweep", "0.5", "0.001"], "even the smallest widths need"),
        (["--trunk", "keep", "--mode", "params", "--budget_params", "0.08"], "even the smallest widths need"),
        (["--train_items", "121"], "there are 120 training images"),
        (["--eval", "bleu"], "no such metric"),
        (["--baselines", "magnitude"], "one of width-params"),
        (["--model", "resnet-9"], "no such depth"),
    ],
)
def test_mistakes_end_with_one_sentence(images, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(images, tmp_path / "out", *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_dry_run_neither_needs_nor_makes_a_folder(images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    (tmp_path / "out.state").mkdir()
    (tmp_path / "out.state" / "recipe.yaml").write_text("seed: 5")
    lines = plan(capsys, "--dataset", images, "--output", str(tmp_path / "out"))
    assert "sum log p" in lines and str(tmp_path) not in lines
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "out.state/recipe.yaml",
        "out/mine",
    ]
