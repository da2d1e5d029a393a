"""LPViT's method on tiny random transformers: blocks, curves, allocation, energy, least squares."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.nn import functional as F
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from recipes.lpvit import BASELINES
from recipes.lpvit.allocation import (
    EnergyTable,
    Layer,
    allocate_derivative,
    allocate_lagrangian,
    find_budget,
    lamp_scores,
    official_power,
    sampled,
    settle,
    smooth,
    stencil,
    total_cost,
)
from recipes.lpvit.blocks import (
    block_sizes,
    block_statistics,
    block_sums,
    count_macs,
    distortion_curve,
    magnitude_scores,
    matrix,
    mean_gradients,
    reconstruct,
    removal_order,
    spread_blocks,
    taylor_scores,
    waves,
)
from recipes.lpvit.selection import (
    Calibrated,
    Choice,
    apply_masks,
    choose_blocks,
    magnitude_masks,
    parse_block,
    select_layers,
    wanda_masks,
    weight_masks,
)
from zoo.errors import UserError

OWN = Choice("out", "fisher", "lagrangian", "physical", 4, "ls")
ALL = {"include": "", "exclude": "", "embed": False, "head": False, "ragged": False}


def tiny_vit(seed=0, **settings):
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config |= {"image_size": 32, "patch_size": 8, "num_labels": 10, "initializer_range": 0.15}
    model = ViTForImageClassification(ViTConfig(**config | settings)).eval()
    for name, parameter in model.named_parameters():  # biases and norms that are not trivial
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        assert parameter.requires_grad, name
    return model


def pixels(count, seed=0, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def calibrate(model, block=(8, 8), images=24, **changes):
    layers = select_layers(model, block, **ALL | changes)
    return Calibrated(model, layers, block, list(pixels(images).split(10)), seed=0)


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(tiny_vit())


# ------------------------------------------------------------------------------------------------------------- budgets


def test_lpvit_code_counts_by_its_curves_and_keeps_the_largest_blocks(calibrated):
    """As the authors' code runs: its caller's order for the masks is not read, and mean |W| is the default."""
    code = replace(OWN, **BASELINES["lpvit-code"])
    assert (code.rank, code.mask_rank, OWN.mask_rank) == ("taylor", "l1", None)
    masks = choose_blocks(calibrated, code, 0.5)
    one_order = choose_blocks(calibrated, replace(code, mask_rank=None), 0.5)
    for name, keep in masks.items():
        assert keep.sum() == one_order[name].sum()
        means = magnitude_scores(matrix(calibrated.layers[name]).detach(), calibrated.block)
        if 0 < keep.sum() < keep.numel():
            assert means[keep].min() >= means[~keep].max()
    assert any(not torch.equal(keep, one_order[name]) for name, keep in masks.items())


@pytest.mark.parametrize("budget", ["flops", "params", "energy"])
@pytest.mark.parametrize("alloc", ["lagrangian", "derivative", "uniform", "global", "lamp", "erk"])
def test_masks_are_blocks_and_the_budget_is_met_within_one(calibrated, alloc, budget):
    table = EnergyTable()
    for rank, target in (("fisher", 0.5), ("l1", 0.31)):
        keeps = choose_blocks(calibrated, replace(OWN, rank=rank, alloc=alloc), target, budget=budget, min_density=0.1)
        masks = weight_masks(keeps, calibrated)
        model = apply_masks(calibrated.model, masks)
        costs = {
            "flops": calibrated.macs(),
            "params": {name: block_sizes(shape, (8, 8)).double() for name, shape in calibrated.shapes.items()},
            "energy": calibrated.energies(table, 32),
        }[budget]
        fixed = calibrated.fixed_energy(table, 32) if budget == "energy" else 0
        spent = fixed + sum((costs[name] * keep).sum().item() for name, keep in keeps.items())
        limit = target * (fixed + sum(cost.sum().item() for cost in costs.values()))
        assert limit - max(cost.max().item() for cost in costs.values()) < spent <= limit * (1 + 1e-12)
        for name, keep in keeps.items():
            weight = matrix(model.get_submodule(name))
            assert math.ceil(0.1 * keep.numel()) <= keep.sum() <= keep.numel()
            assert torch.equal(block_sums((weight != 0).float(), (8, 8)), 64.0 * keep)
            assert torch.equal(weight[masks[name]], matrix(calibrated.layers[name])[masks[name]])


def test_the_counter_agrees_with_brute_force(calibrated):
    masks = weight_masks(choose_blocks(calibrated, OWN, 0.5), calibrated)
    model = apply_masks(calibrated.model, masks)
    counts = count_macs(model, pixels(1), masks)
    brute = sum(17 * int((matrix(model.get_submodule(name)) != 0).sum()) for name in masks)
    assert counts["pruned"] == brute
    assert counts["pruned_dense"] == 17 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    biases = 17 * 2 * (4 * 32 + 64 + 32)
    outside = 16 * (32 * 192 + 32) + 10 * 32 + 10  # patch embedding on 16 patches, head on one token
    assert counts["linear"] == brute + biases + outside
    assert counts["attention"] == 2 * 2 * 17 * 17 * 32  # two products, two layers


def test_single_weights_meet_the_same_budget(calibrated):
    for masks in (magnitude_masks(calibrated, 0.5), wanda_masks(calibrated, 0.5)):
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert abs(kept / sum(mask.numel() for mask in masks.values()) - 0.5) < 1e-3
    assert all((mask.sum(1) == mask.shape[1] // 2).all() for mask in masks.values())  # Wanda's rows
    inputs = calibrated.model.vit.embeddings(torch.cat(calibrated.batches))
    x = calibrated.model.vit.layers[0].layernorm_before(inputs).flatten(0, 1)
    name = "vit.layers.0.attention.q_proj"
    scores = matrix(calibrated.layers[name]).abs() * x.norm(dim=0)
    assert (scores * masks[name]).sum() > 0.999 * scores.sort(1).values[:, 16:].sum()


def test_target_one_changes_nothing(calibrated):
    for name in ("lagrangian", "derivative", "uniform", "global", "lamp", "erk"):
        for budget in ("flops", "energy"):
            assert all(
                keep.all() for keep in choose_blocks(calibrated, replace(OWN, alloc=name), 1.0, budget=budget).values()
            )


# -------------------------------------------------------------------------------- statistics and curves (steps 1 to 3)


def test_the_curve_is_the_mean_square_of_the_directional_derivative():
    model, x = tiny_vit(), pixels(5)
    layers = select_layers(model, (8, 8), **ALL)
    statistics = block_statistics(model, [x[:3], x[3:]], layers, (8, 8), "out", probes=2, seed=3)
    name = "vit.layers.0.attention.o_proj"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(3)
    v = [torch.randn(2, 10, generator=generator) for _ in x]  # per image: (probes, classes)
    gone = torch.ones(4, 4, dtype=torch.bool)
    gone.view(-1)[order[7:]] = False  # the first seven of them go
    weight = layers[name].weight
    delta = -weight.detach() * spread_blocks(gone, weight.shape, (8, 8))
    squares = []
    for image, directions in zip(x, v, strict=True):
        for direction in directions:
            (g,) = torch.autograd.grad((model(pixel_values=image[None]).logits[0] * direction).sum(), weight)
            squares.append((g * delta).sum().item() ** 2)
    S = statistics[name]
    assert S.shape == (10, 4, 4)
    c = S.flatten(1)[:, order].cumsum(1)
    assert (c[:, 6].square().mean() / 2).item() == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-5)
    curve = distortion_curve(S, order)
    assert curve[0] == 0 and len(curve) == 17 and (curve.diff() >= 0).all()
    assert curve[7].item() == pytest.approx((c.square().mean(0) / 2)[:7].max().item(), rel=1e-5)


def test_statistics_do_not_depend_on_frozen_weights_or_the_batches(calibrated):
    model, x = tiny_vit().requires_grad_(False), pixels(20)
    layers = select_layers(model, (8, 8), **ALL)
    once = block_statistics(model, [x], layers, (8, 8), "ce")
    thrice = block_statistics(model, x.split(7), layers, (8, 8), "ce")
    for name in layers:
        torch.testing.assert_close(once[name], thrice[name])


def test_self_labels_give_the_gradient_of_the_cross_entropy():
    model, x = tiny_vit(), pixels(1)
    layers = select_layers(model, (8, 8), **ALL)
    S = block_statistics(model, [x], layers, (8, 8), "ce")["vit.layers.1.mlp.fc1"]
    logits = model(pixel_values=x).logits
    weight = layers["vit.layers.1.mlp.fc1"].weight
    (g,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(-1)), weight)
    torch.testing.assert_close(S[0], block_sums((g * weight).detach(), (8, 8)), rtol=1e-4, atol=1e-6)


def test_the_mean_gradient_gives_a_rank_one_curve(calibrated):
    name = "vit.layers.0.mlp.fc2"
    g, weight = (
        mean_gradients(calibrated.model, calibrated.batches, calibrated.layers)[name],
        calibrated.layers[name].weight,
    )
    x = torch.cat(calibrated.batches)
    (expected,) = torch.autograd.grad(calibrated.model(pixel_values=x).logits.square().mean(), weight)
    torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-6)
    order = removal_order(taylor_scores(weight.detach(), g, (8, 8)))
    curve = distortion_curve(calibrated.block_slopes("sq")[name], order)
    best = 0
    for k in range(len(order) + 1):
        gone = torch.zeros(len(order), dtype=torch.bool)
        gone[order[:k]] = True
        delta = -weight.detach() * spread_blocks(gone.view(4, 8), weight.shape, (8, 8))
        best = max(best, 0.5 * (g * delta).sum().item() ** 2)
        assert curve[k].item() == pytest.approx(best, rel=1e-4, abs=1e-9)


# ------------------------------------------------------------------------------------------------- what curves predict


@pytest.mark.parametrize("share, rank_agreement", [(0.05, 0.8), (0.2, 0.7)])
def test_small_removals_change_the_logits_as_predicted(share, rank_agreement):
    model = tiny_vit(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    x = pixels(96)
    calibrated = Calibrated(model, select_layers(model, (8, 8), **ALL), (8, 8), list(x.split(32)), seed=0, probes=4)
    predicted, measured = [], []
    with torch.no_grad():
        reference = model(pixel_values=x).logits
    for name, S in calibrated.block_slopes("out").items():
        order = removal_order(S.square().mean(0))
        count = max(1, round(share * len(order)))
        keep = torch.ones(len(order), dtype=torch.bool)
        keep[order[:count]] = False
        mask = spread_blocks(keep.view(S.shape[1:]), calibrated.shapes[name], (8, 8))
        with torch.no_grad():
            changed = apply_masks(model, {name: mask})(pixel_values=x).logits
        predicted.append(distortion_curve(S, order)[count].item())
        measured.append(0.5 * (changed - reference).square().sum(1).mean().item())
    assert spearmanr(predicted, measured).statistic >= rank_agreement
    if share == 0.05:
        assert all(0.4 <= p / m <= 2 for p, m in zip(predicted, measured, strict=True))


# ------------------------------------------------------------------------------------------------- allocation (step 5)


def random_layers(seed, counts=(6, 6), convex=True, equal=True):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for index, n in enumerate(counts):
        steps = torch.rand(n, generator=generator, dtype=torch.float64)
        steps = steps.sort().values if convex else steps
        cost = torch.ones(n, dtype=torch.float64)
        if not equal:
            cost *= torch.randint(1, 5, (1,), generator=generator)
        curve = F.pad(steps.cumsum(0), (1, 0))
        layers[str(index)] = Layer(curve, cost / 10, cost, most=n - 1)
    return layers


def summed(layers, removed):
    return sum(layer.distortion[removed[name]].item() for name, layer in layers.items())


@given(seed=st.integers(0, 10**6), budget=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_the_allocation_is_the_best_of_all_on_convex_curves(seed, budget):
    layers = random_layers(seed)
    found = allocate_lagrangian(layers, budget)
    feasible = [
        dict(zip(layers, counts, strict=True))
        for counts in itertools.product(range(6), repeat=2)
        if total_cost(layers, dict(zip(layers, counts, strict=True))) <= budget
    ]
    assert total_cost(layers, found) <= budget
    assert summed(layers, found) == pytest.approx(min(summed(layers, removed) for removed in feasible))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_no_random_allocation_is_better(seed):
    layers = random_layers(seed, counts=(60, 90, 40, 75), convex=False, equal=False)
    for power, layer in zip((2, 4, 1.5, 3), layers.values(), strict=True):  # as measured: steep at the end, and bumpy
        steps = layer.distortion.diff() + 0.5
        layer.distortion = F.pad((steps.cumsum(0) / steps.sum()).pow(power) * layer.cost.sum(), (1, 0))
    budget = 0.5 * total_cost(layers, dict.fromkeys(layers, 0))
    found = summed(layers, allocate_lagrangian(layers, budget))
    generator = torch.Generator().manual_seed(seed)
    tried = 0
    while tried < 200:
        removed = {n: int(torch.randint(0, layer.most + 1, (1,), generator=generator)) for n, layer in layers.items()}
        if total_cost(layers, removed) <= budget:
            assert found <= summed(layers, removed)
            tried += 1


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_less_budget_never_keeps_more(seed):
    layers = random_layers(seed, counts=(9, 14, 7), convex=False, equal=False)
    total = total_cost(layers, dict.fromkeys(layers, 0))
    last = dict.fromkeys(layers, 0)
    for share in (1.0, 0.8, 0.6, 0.4, 0.3):
        removed = allocate_lagrangian(layers, share * total)
        assert all(removed[name] >= last[name] for name in layers)  # a larger multiplier
        last = removed


# ----------------------------------------------------------------------------------------------------- energy (step 4)


def test_the_price_of_energy_lowers_it_at_the_same_multiplications():
    model = tiny_swin()
    calibrated = calibrate(model, images=8)
    assert len(set(calibrated.tokens.values())) > 1  # or one energy per multiplication would hold everywhere
    last = math.inf
    for rho in (0.0, 0.25, 0.5, 0.75, 1.0):
        keeps = choose_blocks(calibrated, OWN, 0.5, power_weight=rho)
        energy = sum((calibrated.energies(EnergyTable(), 32)[n] * keep).sum().item() for n, keep in keeps.items())
        assert energy <= last * (1 + 1e-3)  # the last block of the budget may be another one
        last = energy
    free = choose_blocks(calibrated, replace(OWN, power_mode="off"), 0.5)
    assert all(torch.equal(keep, free[n]) for n, keep in choose_blocks(calibrated, OWN, 0.5, power_weight=0.0).items())
    assert any(not torch.equal(keep, free[n]) for n, keep in keeps.items())


def test_energy_counts_every_operation():
    table = EnergyTable(fp16_mac=1, fp32_mac=2, int8_mac=3, sram_32bit=10, dram_32bit=100)
    energy = table.block_energy((8, 12), (4, 8), tokens=5, bits=32)
    assert energy.tolist() == [[32 * (5 * 2 + 100) + 5 * 8 * 10, 16 * (5 * 2 + 100) + 5 * 4 * 10]] * 2
    half = table.block_energy((8, 12), (4, 8), tokens=5, bits=16)
    assert half[0, 0] == 32 * (5 * 1 + 50) + 5 * 8 * 5
    assert table.fixed_energy(8, 5, 32) == 5 * 8 * 10


def test_the_codes_power_term_spares_large_layers():
    """Effective slopes lambda - beta RC floor(C_in / 16): of two layers with the same curve the larger keeps more."""
    curve = torch.linspace(0, 1, 41, dtype=torch.float64).square()
    layers = {name: Layer(curve, torch.ones(40).double(), torch.ones(40).double(), 38) for name in ("small", "large")}
    d_in = {"small": 64, "large": 256}
    power = official_power(layers, d_in)
    steepest = stencil(smooth(sampled(curve))).max().item()
    beta = 2 * steepest / (40 * 4 + 40 * 16)
    for name in layers:
        slope = (power[name][-1] - power[name][0]).item()  # by the fraction removed
        assert slope == pytest.approx(beta * 40 * (d_in[name] // 16))
    powered = {n: replace(layer, distortion=layer.distortion + power[n]) for n, layer in layers.items()}
    for allocate in (allocate_lagrangian, allocate_derivative):
        removed = allocate(powered, 40.0)
        assert removed["large"] < removed["small"]
    assert allocate_lagrangian(layers, 40.0) == {"small": 20, "large": 20}


# ---------------------------------------------------------------------------------------------- least squares (step 6)


def test_reconstruction_at_full_density_returns_the_weights():
    model, dense = tiny_vit(), tiny_vit()
    masks = {
        name: torch.ones_like(matrix(layer), dtype=torch.bool)
        for name, layer in select_layers(model, (8, 8), **ALL).items()
    }
    reconstruct(model, dense, masks, [pixels(16)], 8)
    for name in masks:
        torch.testing.assert_close(
            model.get_submodule(name).weight, dense.get_submodule(name).weight, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("ragged", [False, True])
def test_reconstruction_lowers_errors_and_keeps_zeros_and_biases(ragged):
    dense = tiny_vit(hidden_size=36, intermediate_size=68) if ragged else tiny_vit()
    calibrated = calibrate(dense, ragged=ragged, embed=ragged, head=ragged)
    keeps = choose_blocks(calibrated, OWN, 0.4)
    keeps["vit.layers.1.mlp.fc1"][1] = False  # a block-row without blocks
    masks = weight_masks(keeps, calibrated)
    model = apply_masks(dense, masks)
    before = torch.cat([model(pixel_values=x).logits - dense(pixel_values=x).logits for x in calibrated.batches])
    done = []
    errors = reconstruct(model, dense, masks, calibrated.batches, 8, done.append)
    after = torch.cat([model(pixel_values=x).logits - dense(pixel_values=x).logits for x in calibrated.batches])
    assert sum(done) == len(masks)
    assert all(0 <= end <= start * (1 + 1e-9) for start, end in errors.values())
    assert sum(end < 0.9 * start for start, end in errors.values()) > len(masks) / 2
    assert after.square().sum() < 0.8 * before.square().sum()
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module in masks:
            assert (matrix(model.get_submodule(module))[~masks[module]] == 0).all()
        else:
            assert torch.equal(parameter, dense.get_parameter(name))


def test_the_error_of_a_layer_is_what_its_outputs_say():
    dense = tiny_vit()
    calibrated = calibrate(dense, include="layers.0.mlp.fc1")
    masks = weight_masks(choose_blocks(calibrated, OWN, 0.5), calibrated)
    model = apply_masks(dense, masks)
    (name,) = masks
    outputs = []
    for m in (dense, model):
        handle = m.get_submodule(name).register_forward_hook(lambda layer, _, y: outputs.append(y - layer.bias))
        m(pixel_values=torch.cat(calibrated.batches))
        handle.remove()
    expected = ((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()).item()
    assert reconstruct(model, dense, masks, calibrated.batches, 8)[name][0] == pytest.approx(expected, rel=1e-4)


def test_layers_with_one_input_are_refitted_together():
    model = tiny_vit()
    groups = waves(model, select_layers(model, (8, 8), **ALL), pixels(1))
    short = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]] * 2


# ------------------------------------------------------------------------------------------------- other models, mistakes


def tiny_swin():
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    config.num_labels = 5
    model = SwinForImageClassification(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_windows_count_as_tokens_of_their_image():
    """Swin's layers see (images * windows, tokens, width); a row of S has to stay one image's."""
    model = tiny_swin()
    layers = select_layers(model, (8, 8), **ALL)
    x = pixels(6)
    together = block_statistics(model, [x], layers, (8, 8), "ce")
    for name in ("swin.encoder.layers.0.blocks.1.attention.k_proj", "swin.encoder.layers.0.downsample.reduction"):
        alone = torch.cat([block_statistics(model, [image], layers, (8, 8), "ce")[name] for image in x.split(1)])
        torch.testing.assert_close(together[name], alone, rtol=1e-3, atol=1e-5)
    calibrated = calibrate(model, images=4)
    masks = weight_masks(choose_blocks(calibrated, OWN, 0.5), calibrated)
    assert count_macs(apply_masks(model, masks), x[:1], masks)["pruned"] == sum(
        int(mask.sum()) * calibrated.tokens[name] for name, mask in masks.items()
    )


def test_embedding_and_heads_join_on_request():
    model = tiny_vit()
    names = select_layers(model, (8, 8), **ALL | {"embed": True, "head": True, "ragged": True})
    assert {"classifier", "vit.embeddings.patch_embeddings.projection"} < names.keys()
    calibrated = calibrate(model, embed=True, head=True, ragged=True)
    assert calibrated.tokens["classifier"] == 1
    assert calibrated.tokens["vit.embeddings.patch_embeddings.projection"] == 16
    keeps = choose_blocks(calibrated, OWN, 0.5)
    assert keeps["classifier"].shape == (2, 4)  # ten classes in two rows of 8


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: select_layers(tiny_vit(), (8, 8), **ALL | {"include": "nothing"}),
            "no layer of the model is selected",
        ),
        (lambda: select_layers(tiny_vit(), (64, 8), **ALL), "has only 32x32 weights"),
        (lambda: select_layers(tiny_vit(), (12, 8), **ALL), "pass --ragged"),
        (lambda: parse_block("16,7"), "multiples of 4"),
        (lambda: parse_block("x"), "multiples of 4"),
        (lambda: choose_blocks(calibrate(tiny_vit()), OWN, 0.02, min_density=0.05), r"0\.0\d+ is the least"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_gradients_that_are_not_finite_name_their_layer():
    model = tiny_vit()
    model.vit.layers[1].mlp.fc2.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"vit\.layers\.0\.attention\.q_proj: its gradients"):
        block_statistics(model, [pixels(2)], select_layers(model, (8, 8), **ALL), (8, 8))


def test_an_energy_table_has_every_key(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text("fp16_mac: 1\nfp32_mac: 2\nint8_mac: 1\nsram_32bit: 3\ndram_32bit: 9\n")
    assert EnergyTable.read(str(path)).dram_32bit == 9
    for text, message in (
        ("fp16_mac: 1\n", "dram_32bit is missing"),
        (path.read_text() + "volts: 1\n", "volts is unknown"),
        (path.read_text().replace("9", "-9"), "more than 0"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            EnergyTable.read(str(path))


def test_lamp_divides_by_what_goes_no_sooner():
    torch.testing.assert_close(lamp_scores(torch.tensor([1.0, 3.0, 4.0])), torch.tensor([1 / 8, 3 / 7, 1.0]))


def test_the_stencil_is_exact_for_quartics():
    alpha = torch.arange(101, dtype=torch.float64) / 100
    slope = stencil(alpha**4 - alpha)
    torch.testing.assert_close(slope[4:-4], (4 * alpha**3 - 1)[4:-4])


def test_settle_fills_a_budget_from_both_sides():
    layers = random_layers(0, counts=(8, 8), equal=True)
    for start in ({"0": 0, "1": 0}, {"0": 7, "1": 7}):
        removed = settle(layers, start, 9.0, lambda name, k: layers[name].distortion[k].item())
        assert total_cost(layers, removed) == 9.0


def test_a_reachable_budget_is_found():
    layers = random_layers(0, counts=(8, 8))
    assert find_budget(layers, 0.5) == 8.0
    assert find_budget(layers, 0.5, fixed=4.0) == 6.0
    assert find_budget(layers, 1.0, fixed=0.1) == 16.0
    with pytest.raises(UserError, match=r"0\.125 is the least"):
        find_budget(layers, 0.1)


def test_every_baseline_names_flags_that_exist():
    assert all(replace(OWN, **changes) for changes in BASELINES.values())
