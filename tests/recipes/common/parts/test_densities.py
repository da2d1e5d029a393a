"""Layer-wise densities: values worked out for known networks, exact budgets, refusals."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from recipes.common.data.architectures import architecture
from recipes.common.parts.densities import FORMULAS, layer_counts, layer_densities, mac_ratio, prunable_layers
from zoo.errors import UserError
from zoo.models.resnet import SlimResNetForImageClassification, cifar_resnet_config

STAGE = "resnet.encoder.stages.{}.layers.{}.{}.convolution.weight"
GOLDEN_LAYERS = (
    "resnet.embedder.embedder.convolution.weight",
    STAGE.format(0, 0, "layer.0"),
    STAGE.format(1, 0, "layer.0"),
    STAGE.format(1, 1, "layer.0"),
    STAGE.format(2, 0, "layer.0"),
    STAGE.format(2, 1, "layer.0"),
    STAGE.format(2, 0, "shortcut"),
    "classifier.1.weight",
)
GOLDEN = {  # density: (densities of GOLDEN_LAYERS, MAC ratio, number of dense layers)
    0.05: ((0.4748, 0.1353, 0.0961, 0.0623, 0.0454, 0.0298, 0.3926, 0.9486), 0.0866, 0),
    0.10: ((0.9830, 0.2802, 0.1991, 0.1290, 0.0940, 0.0617, 0.8128, 1), 0.1773, 2),
    0.20: ((1, 0.5938, 0.4219, 0.2735, 0.1992, 0.1309, 1, 1), 0.3580, 4),
    0.50: ((1, 1, 1, 0.7676, 0.5592, 0.3673, 1, 1), 0.7372, 11),
}


def layers_of(config, side: int):
    with torch.device("meta"):
        model = SlimResNetForImageClassification(config)
        return prunable_layers(model, torch.empty(1, 3, side, side))


@pytest.fixture(scope="module")
def resnet20():
    return layers_of(cifar_resnet_config(20, 16, 10), 32)


@pytest.fixture(scope="module")
def wide50():
    return layers_of(architecture("wrn-50-2", 1000, 224), 224)


def shapes_of(layers):
    return {name: layer.shape for name, layer in layers.items()}


def spent(densities, shapes):
    return math.fsum(densities[name] * math.prod(shape) for name, shape in shapes.items())


def total(shapes):
    return sum(map(math.prod, shapes.values()))


# -------------------------------------------------------------------------------------------------- ratios and budgets


@pytest.mark.parametrize("density", GOLDEN)
def test_the_golden_table_of_resnet_20(resnet20, density):
    wanted, macs, dense = GOLDEN[density]
    assert (len(resnet20), total(shapes_of(resnet20))) == (22, 270_896)
    assert sum(layer.macs for layer in resnet20.values()) == 40_813_184
    found = layer_densities(shapes_of(resnet20), density, "erk")
    assert [found[name] for name in GOLDEN_LAYERS] == pytest.approx(wanted, abs=5.1e-5)
    assert mac_ratio(found, resnet20) == pytest.approx(macs, abs=5.1e-5)
    assert sum(value == 1 for value in found.values()) == dense


@pytest.mark.parametrize(("density", "rest"), [(0.1, 0.09832), (0.05, 0.04812)])
def test_uniform_plus_keeps_its_budget(resnet20, density, rest):
    found = list(layer_densities(shapes_of(resnet20), density, "uniform_plus").values())
    assert found[0] == 1 and found[-1] == 0.2
    assert found[1:-1] == pytest.approx([rest] * 20, abs=5.1e-6)


def test_the_golden_values_of_wide_resnet_50_2(wide50):
    shapes = shapes_of(wide50)
    assert total(shapes) == 68_814_016
    erk, plus = (layer_densities(shapes, 0.2, ratio) for ratio in ("erk", "erk_plus"))
    assert erk["classifier.1.weight"] == pytest.approx(0.3183, abs=5.1e-5)
    assert sum(value == 1 for value in erk.values()) == 17
    assert mac_ratio(erk, wide50) == pytest.approx(0.365, abs=5.1e-4)
    assert mac_ratio(plus, wide50) == pytest.approx(0.340, abs=5.1e-4)
    assert plus["classifier.1.weight"] == 1
    assert layer_densities(shapes, 0.5, "erk") == pytest.approx(layer_densities(shapes, 0.5, "erk_plus"), rel=1e-12)


@pytest.mark.parametrize("ratio", FORMULAS)
@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_every_ratio_spends_its_budget_exactly(resnet20, ratio, density):
    shapes = shapes_of(resnet20)
    found = layer_densities(shapes, density, ratio)
    assert list(found) == list(shapes)
    assert spent(found, shapes) == pytest.approx(density * total(shapes), rel=1e-9)
    assert all(0 < value <= 1 for value in found.values())
    counts = layer_counts(found, {name: layer.size for name, layer in resnet20.items()})
    assert sum(counts.values()) == round(density * total(shapes))
    assert all(abs(counts[name] - found[name] * layer.size) < 1 for name, layer in resnet20.items())


def random_shapes():
    conv = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5]))
    linear = st.tuples(st.integers(1, 60), st.integers(1, 60))
    shape = st.one_of(conv.map(lambda s: (s[0], s[1], s[2], s[2])), linear)
    return st.lists(shape, min_size=3, max_size=8).map(lambda shapes: {f"l{i}": s for i, s in enumerate(shapes)})


@settings(deadline=None, max_examples=150)
@given(random_shapes(), st.floats(0.01, 1), st.sampled_from(FORMULAS))
def test_budgets_hold_for_any_shapes(shapes, density, ratio):
    try:
        found = layer_densities(shapes, density, ratio)
    except UserError:
        assume(False)
    assert spent(found, shapes) == pytest.approx(density * total(shapes), rel=1e-9)
    assert all(0 < value <= 1 + 1e-12 for value in found.values())
    if ratio in ("er", "erk"):
        raw = {
            n: sum(s if ratio == "erk" else s[:2]) / math.prod(s if ratio == "erk" else s[:2])
            for n, s in shapes.items()
        }
        ordered = sorted(shapes, key=raw.get)
        values = [found[name] for name in ordered]
        assert all(a <= b * (1 + 1e-12) for a, b in zip(values, values[1:], strict=False))
        free = [found[name] / raw[name] for name in shapes if found[name] < 1]
        assert not free or max(free) == pytest.approx(min(free))  # one epsilon
    if ratio == "balanced":
        kept = [found[name] * math.prod(shape) for name, shape in shapes.items() if found[name] < 1]
        assert not kept or max(kept) == pytest.approx(min(kept))


def test_erk_plus_with_erks_own_classifier_is_erk(resnet20):
    shapes = shapes_of(resnet20)
    for density in (0.03, 0.05, 0.5):
        erk = layer_densities(shapes, density, "erk")
        plus = layer_densities(shapes, density, "erk_plus", fc_density=erk["classifier.1.weight"])
        assert plus == pytest.approx(erk, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("density", "ratio", "options", "message"),
    [
        (0.1, "magic", {}, r"--ratio magic: one of uniform, uniform_plus, er, erk"),
        (0.1, "snip", {}, "--ratio snip"),  # needs scores: no formula may answer for it
        (0.0, "erk", {}, "--density 0.0"),
        (1.1, "erk", {}, "--density 1.1"),
        (0.002, "uniform_plus", {}, "spends 0.002067 on resnet.embedder.*classifier.1.weight; more is needed"),
        (0.002, "erk_plus", {}, "spends 0.002363 on classifier.1.weight; more is needed"),
        (0.1, "erk_plus", {"fc_density": 1.5}, "--fc_density 1.5"),
        (1.0, "erk_plus", {"fc_density": 0.5}, "at most 0.9988 can be kept; raise --fc_density"),
    ],
)
def test_unknown_ratios_and_infeasible_budgets_are_refused(resnet20, density, ratio, options, message):
    with pytest.raises(UserError, match=message):
        layer_densities(shapes_of(resnet20), density, ratio, **options)


def test_no_layer_is_left_without_a_weight():
    sizes = {"a": 10, "b": 1000, "c": 100_000}
    counts = layer_counts(dict.fromkeys(sizes, 0.0005), sizes)
    assert counts == {"a": 1, "b": 1, "c": 49}
    with pytest.raises(UserError, match="2 weights for 3 layers are too few; at least 3e-05"):
        layer_counts(dict.fromkeys(sizes, 0.00002), sizes)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.0, 1.0)), min_size=1, max_size=12))
def test_counts_are_within_one_of_what_is_asked(rows):
    sizes = {str(i): size for i, (size, _) in enumerate(rows)}
    wanted = {str(i): density for i, (_, density) in enumerate(rows)}
    whole = round(math.fsum(wanted[name] * sizes[name] for name in sizes))
    assume(whole >= len(sizes))
    counts = layer_counts(wanted, sizes)
    assert sum(counts.values()) == whole
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)
    if all(wanted[name] * sizes[name] >= 1 for name in sizes):
        assert all(abs(counts[name] - wanted[name] * sizes[name]) < 1 for name in sizes)


# ------------------------------------------------------------------------------------------------------ what is prunable


class Odd(nn.Module):
    """Layers that run in another order than they are made, one that never runs, norms, an embedding."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(5, 5)
        self.embedding = nn.Embedding(7, 6)
        self.per_place = nn.Linear(4, 6)

    def forward(self, pixel_values):
        x = self.depthwise(self.first(pixel_values)).flatten(2).transpose(1, 2)
        return self.last(self.norm(self.per_place(x)).mean(1))


def test_prunable_are_convolutions_and_linears_that_run_in_their_order():
    found = prunable_layers(Odd(), torch.randn(1, 3, 11, 11))
    assert list(found) == ["first.weight", "depthwise.weight", "per_place.weight", "last.weight"]
    assert [layer.shape for layer in found.values()] == [(4, 3, 3, 3), (4, 1, 3, 3), (6, 4), (2, 6)]
    assert [layer.macs for layer in found.values()] == [108 * 25, 36 * 9, 24 * 9, 12]
    assert list(prunable_layers(Odd(), torch.randn(1, 3, 11, 11), exclude="^first|last")) == list(found)[1:3]
    with pytest.raises(UserError, match="--exclude 'weight'"):
        prunable_layers(Odd(), torch.randn(1, 3, 11, 11), exclude="weight")
