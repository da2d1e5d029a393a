"""SNIP, GraSP and SynFlow scores against their definitions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from recipes.common.parts.densities import prunable_layers
from recipes.common.parts.scores import (
    check_flow,
    grasp_scores,
    keep_fractions,
    prunable_weights,
    snip_scores,
    synflow_masks,
    synflow_scores,
    top_masks,
)
from zoo.errors import UserError
from zoo.models.resnet import SlimResNetForImageClassification, cifar_resnet_config

ROUNDS = 10
RESNET_34 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3], "num_labels": 1000}


@pytest.fixture(scope="module")
def resnet_34():
    """ResNet-34 with Kaiming-normal weights of the fan-in, under which SynFlow's published cost is reproduced."""
    model, generator = ResNetForImageClassification(ResNetConfig(**RESNET_34)), torch.Generator().manual_seed(0)
    for weight in prunable_weights(model).values():
        nn.init.kaiming_normal_(weight, generator=generator)
    return model


def batch(images: int, size: int, seed: int = 0, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, size, size, generator=generator, dtype=dtype)
    return {"pixel_values": pixels, "labels": torch.randint(4, (images,), generator=generator)}


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return SlimResNetForImageClassification(cifar_resnet_config(8, 4, 4, image_size=8)).eval()


def smooth_net() -> nn.Module:
    """Twice differentiable, in double precision."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3, stride=2), nn.Softplus()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 4)).double()


def test_prunable_are_convolutions_and_linears_only():
    model = small_resnet()
    names = set(prunable_weights(model))
    assert names == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def test_snip_is_the_derivative_by_a_factor_on_each_weight():
    model = small_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [batch(6, 8, 0), batch(6, 8, 1)]
    scores = snip_scores(model, batches)
    factors = {name: torch.ones_like(weight, requires_grad=True) for name, weight in prunable_weights(model).items()}
    loss = 0
    for one in batches:
        twin = copy.deepcopy(model).train()
        masked = {name: weight.detach() * factors[name] for name, weight in prunable_weights(twin).items()}
        logits = torch.func.functional_call(twin, masked, (one["pixel_values"],)).logits
        loss = loss + F.cross_entropy(logits, one["labels"])
    for name, gradient in zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True):
        torch.testing.assert_close(scores[name], gradient.abs(), rtol=1e-4, atol=1e-7)
        assert scores[name].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def gradient_of(model, halves, temperature, weights: dict) -> dict:
    """sum_b dL_b/dw at other weights."""
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, weight in prunable_weights(twin).items():
            weight.copy_(weights[name])
    loss = sum(F.cross_entropy(twin(half["pixel_values"]) / temperature, half["labels"]) for half in halves)
    found = torch.autograd.grad(loss, list(prunable_weights(twin).values()))
    return dict(zip(weights, found, strict=True))


def test_grasp_is_a_finite_difference_of_the_gradient():
    model, temperature, step = smooth_net(), 2.0, 1e-5
    halves = [batch(5, 8, 0, torch.float64), batch(5, 8, 1, torch.float64)]
    scores = grasp_scores(model, halves, temperature)
    here = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    g = gradient_of(model, halves, temperature, here)
    ahead = gradient_of(model, halves, temperature, {name: here[name] + step * g[name] for name in here})
    behind = gradient_of(model, halves, temperature, {name: here[name] - step * g[name] for name in here})
    wanted = {name: here[name] * (ahead[name] - behind[name]) / (2 * step) for name in here}
    total = abs(sum(score.sum() for score in wanted.values()))
    for name, score in scores.items():
        torch.testing.assert_close(score, wanted[name] / total, rtol=1e-3, atol=1e-6)


def test_grasp_removes_the_weights_without_which_the_gradient_grows():
    """The paper removes the largest -w * H g: taking such weights back raises the norm of the gradient."""
    model, temperature = smooth_net(), 1.0
    halves = [batch(8, 8, 0, torch.float64)]
    scores = grasp_scores(model, halves, temperature)
    here = {name: weight.detach() for name, weight in prunable_weights(model).items()}

    def norm(weights):
        return sum(g.square().sum() for g in gradient_of(model, halves, temperature, weights).values()).item()

    flat = torch.cat([score.flatten() for score in scores.values()])
    worst = {name: score <= flat.kthvalue(20).values for name, score in scores.items()}
    best = {name: score >= flat.kthvalue(flat.numel() - 20).values for name, score in scores.items()}
    without_worst = norm({name: weight * (1 - 0.01 * worst[name]) for name, weight in here.items()})
    without_best = norm({name: weight * (1 - 0.01 * best[name]) for name, weight in here.items()})
    assert without_worst > norm(here) > without_best
    kept = top_masks(scores, flat.numel() - 20)
    assert all(torch.equal(~mask, worst[name]) for name, mask in kept.items())


def plain_vgg() -> nn.Module:
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (8, 16, 16):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))


def test_synflow_is_conserved_layer_by_layer():
    model = plain_vgg()
    scores = synflow_scores(model, (3, 8, 8))
    positive = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
        flow = positive(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum()
    for score in scores.values():
        assert (score >= 0).all() and score.dtype == torch.float64
        assert score.sum().item() == pytest.approx(flow.item(), rel=1e-10)


def test_synflow_empties_no_layer_and_keeps_its_budget():
    model = plain_vgg()
    masks = synflow_masks(model, (3, 8, 8), density=0.01, rounds=100)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.01 * total)
    assert all(mask.any() for mask in masks.values())
    one_round = top_masks(synflow_scores(model, (3, 8, 8)), int(0.01 * total))
    assert any(not torch.equal(masks[name], one_round[name]) for name in masks)


@pytest.mark.slow
def test_synflow_costs_what_the_paper_says_of_resnet_34(resnet_34):
    """10.91 M parameters kept cost 2.78 G MACs (Table 1); here 10 of the rounds, of which 20 give 2.783 G."""
    weights = sum(weight.numel() for weight in prunable_weights(resnet_34).values())
    others = sum(parameter.numel() for parameter in resnet_34.parameters()) - weights
    masks = synflow_masks(resnet_34, (3, 96, 96), (10.91e6 - others) / weights, rounds=ROUNDS)
    empty = copy.deepcopy(resnet_34).to("meta")
    layers = prunable_layers(empty, torch.empty(1, 3, 224, 224, device="meta"))
    macs = sum(layer.macs * masks[name].double().mean().item() for name, layer in layers.items())
    assert macs == pytest.approx(2.783e9, rel=0.005)


def test_float32_overflows_and_says_so(resnet_34):
    with pytest.raises(UserError, match=r"float32.*snip"):
        synflow_scores(resnet_34, (3, 96, 96), dtype=torch.float32)


def test_clipping_activations_are_taken_out():
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=4))
    generator = torch.Generator().manual_seed(0)
    for weight in prunable_weights(model).values():
        nn.init.kaiming_normal_(weight, generator=generator)
    scores = synflow_scores(model, (3, 32, 32))
    assert all(score.any() for score in scores.values())
    assert any(isinstance(module, nn.ReLU6) for module in model.modules())  # the model itself keeps them


def test_synflow_sees_normalization_at_its_start():
    model = small_resnet()
    scores = synflow_scores(model, (3, 8, 8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(5.0)
                module.running_var.fill_(3.0)
                module.weight.fill_(-1.0)
    again = synflow_scores(model, (3, 8, 8))
    assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_masks_keep_the_largest_and_leave_ties_out():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([5.0, 2.0])}
    masks = top_masks(scores, 2)
    assert masks["a"].tolist() == [[True, False], [False, False]] and masks["b"].tolist() == [True, False]
    masks = top_masks(scores, 3)  # three weights share the third place
    assert sum(int(mask.sum()) for mask in masks.values()) == 2
    assert all(mask.all() for mask in top_masks(scores, 6).values())
    with pytest.raises(UserError, match="finite"):
        top_masks({"a": torch.tensor([1.0, float("nan")])}, 1)


def test_kept_fractions_spend_the_budget():
    scores = snip_scores(small_resnet(), [batch(6, 8)])
    fractions = keep_fractions(scores, 0.3)
    total = sum(score.numel() for score in scores.values())
    assert sum(fractions[name] * scores[name].numel() for name in scores) == pytest.approx(int(0.3 * total))
    assert all(p == 1 for p in keep_fractions(scores, 1.0).values())


def test_collapse_is_refused_where_nothing_bypasses_the_layer():
    model = small_resnet()
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}
    check_flow(model, full, (3, 8, 8), 1.0)
    shortcut = next(name for name in full if "shortcut" in name)
    check_flow(model, full | {shortcut: torch.zeros_like(full[shortcut])}, (3, 8, 8), 1.0)
    stem = "resnet.embedder.embedder.convolution.weight"
    with pytest.raises(UserError, match="nothing bypasses"):
        check_flow(model, full | {stem: torch.zeros_like(full[stem])}, (3, 8, 8), 0.1)
