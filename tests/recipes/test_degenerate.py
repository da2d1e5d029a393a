"""Weights and inputs that are zero or constant, somewhere or everywhere: exact where a format can hold it, and never NaN."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_base
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from recipes.armor import Armor
from recipes.common.data.architectures import fresh_model
from recipes.common.loops.streaming import MatrixStore, StreamedModel, compress_blocks, output_error
from recipes.common.parts.pruners import (
    LayerStats,
    PerGroup,
    PerMatrix,
    PerRow,
    magnitude,
    nowag,
    rank_correction,
    sparsegpt,
    wanda,
)
from recipes.common.parts.quantizers import awq, awq_scales, gptq, hqq, rtn
from recipes.common.parts.scores import grasp_scores, keep_fractions, snip_scores, synflow_scores
from recipes.common.parts.width_fit import Budget, fit_widths, width_limits
from recipes.common.parts.width_graph import width_graph
from recipes.kvtuner.allocation import cluster, pareto_pairs
from recipes.kvtuner.simulation import measure_errors, round_keys, round_values
from recipes.kvtuner.tables import cache_format
from recipes.layerwise_quant import LayerwiseQuant
from recipes.lpvit import BASELINES
from recipes.lpvit.blocks import block_sums, matrix, pack_model, reconstruct
from recipes.lpvit.selection import (
    Calibrated,
    Choice,
    apply_masks,
    choose_in_rounds,
    magnitude_masks,
    select_layers,
    wanda_masks,
    weight_masks,
)
from recipes.precropping.crop_rules import RULES, crop_wish
from recipes.random_pruning.packing import STORAGES, pack_masked
from zoo.layers.packing import dense_weight
from zoo.random_mask import random_mask

D_OUT, D_IN, GROUP = 48, 128, 32
KINDS = ("weight", "rows", "columns", "group", "constant rows", "inputs", "some inputs")


def case(kind: str) -> tuple[torch.Tensor, LayerStats, torch.Tensor]:
    """A weight and the statistics of its inputs with something degenerate in them, and the places that must be exact."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(D_OUT, D_IN, generator=generator), torch.randn(512, D_IN, generator=generator)
    exact = torch.zeros(D_OUT, D_IN, dtype=torch.bool)
    if kind == "weight":
        weight, exact = torch.zeros_like(weight), ~exact
    elif kind == "rows":
        weight[:16], exact[:16] = 0, True
    elif kind == "columns":
        weight[:, 32:64] = 0
        exact[:, 32:64] = True
    elif kind == "group":
        weight[5, 64:96], exact[5, 64:96] = 0, True
    elif kind == "constant rows":
        weight[:8], weight[8:16], exact[:16] = 0.375, -1.5, True
    elif kind == "inputs":
        x.zero_()
    else:
        x[:, 32:64] = 0
    hessian = x.T @ x / len(x)
    return weight, LayerStats(hessian, hessian.diagonal().clone(), len(x)), exact


def check(kind: str, weight, stats, exact, made: torch.Tensor) -> None:
    """What holds whatever the method; `exact`: where it must give the weight itself."""
    error = output_error(weight, made, stats.hessian)
    assert made.isfinite().all() and math.isfinite(error)
    assert torch.equal(made[exact], weight[exact])
    assert error == 0 or kind not in ("weight", "inputs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [PerGroup(2, 4), PerRow(40), PerMatrix(2000)])
def test_pruners(keep, kind):
    weight, stats, exact = case(kind)
    for prune in (magnitude, wanda, nowag, sparsegpt):
        here = exact & (weight == 0)  # a constant row is not constant any more
        if prune is sparsegpt and kind not in ("weight", "rows"):
            here = here & False  # others may make up for what is pruned
        pruned = prune(weight, stats, keep)
        check(kind, weight, stats, here, pruned)
    corrected = rank_correction(weight, pruned, stats, 4)
    check(kind, weight, stats, exact & (kind == "weight"), corrected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"continuous": "als"}, {"continuous": "gd", "refit": "A", "select": "uniform"}]
)
def test_armor(settings, kind):
    weight, stats, exact = case(kind)
    recipe = Armor(block="16", iters=8, dtype="float32", **settings)
    for variant in recipe.compress(None, 0, "w", weight, stats).values():
        check(kind, weight, stats, exact if kind in ("weight", "rows") else exact & False, variant.dense)
        assert all(math.isfinite(loss) for loss in variant.losses)
        if variant.spec:
            stored = dense_weight("w", variant.spec, variant.tensors, list(weight.shape))
            torch.testing.assert_close(stored, variant.dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("backend", ["rtn", "rtn search", "hqq", "gptq", "gptq search", "awq"])
def test_quantisers(backend, symmetric, kind):
    if backend == "hqq" and symmetric:
        return
    weight, stats, exact = case(kind)
    for bits in (2, 3, 4, 8):
        options = (bits, GROUP, symmetric, torch.bfloat16)
        if backend.startswith("rtn"):
            made = rtn(weight, *options, search=backend != "rtn")
        elif backend == "hqq":
            made = hqq(weight, *options)
        elif backend.startswith("gptq"):
            made = gptq(weight, stats, *options, search=backend != "gptq")
        else:
            columns, rows = awq_scales([weight], stats, stats.second_moment, *options), torch.ones(D_OUT)
            assert columns.isfinite().all() and (columns > 0).all()
            made = awq(weight, stats, columns, rows, *options)
            quantised = made.dequantize() / columns
        dense = made.dequantize() if backend != "awq" else quantised
        here = exact
        if backend == "awq" and kind == "constant rows":
            here = exact & False  # scaled, they are not constant
        if backend.startswith("gptq") and kind not in ("weight", "rows", "constant rows"):
            here = exact & False  # a zero may make up for an error elsewhere in its row
        check(kind, weight, stats, here, dense)
        assert made.codes.max().item() < 2**bits and made.scales.isfinite().all() and (made.scales > 0).all()


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """A language model of which two blocks add nothing, one in the manner of LLaMA-Pro, one with values that are 0."""
    folder = make_base(tmp_path_factory.mktemp("hollow") / "model", "llama", num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = model.model.layers[0], model.model.layers[1]
    for linear in (first.self_attn.o_proj, first.mlp.down_proj, second.self_attn.v_proj, second.mlp.up_proj):
        nn.init.zeros_(linear.weight)
    model.save_pretrained(folder)
    return folder


def compress(folder, methods, store) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (4, 32), generator=generator)
    compress_blocks(StreamedModel(folder), tokens, methods, store)


@pytest.mark.slow
def test_blocks_that_add_nothing_are_compressed_exactly_by_armor_and_its_baselines(hollow, tmp_path):
    recipe, store = Armor(block="16", iters=3), MatrixStore(tmp_path)
    recipe = replace(recipe, baselines=recipe.baseline_names())
    methods = recipe.methods(None, 0)
    compress(hollow, methods, store)
    for method in methods:
        for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.v_proj", "1.mlp.up_proj"):
            for variant, facts in store.facts(method.name, f"model.layers.{name}").items():
                assert facts["output_error"] in (0, None), (method.name, name)
                if variant != "armor-no-refit" or not facts.get("spec"):
                    assert not store.weight(method.name, f"model.layers.{name}", variant).any()
        for name in ("1.self_attn.o_proj", "1.mlp.down_proj"):  # whose inputs are 0
            assert all(
                f["output_error"] in (0, None) for f in store.facts(method.name, f"model.layers.{name}").values()
            )


@pytest.mark.parametrize("backend", ["rtn", "hqq", "gptq", "awq"])
def test_blocks_that_add_nothing_are_compressed_exactly_by_every_quantiser(hollow, tmp_path, backend):
    from recipes.common.core.state import World
    from recipes.layerwise_quant.mixtures import QuantRun

    recipe = LayerwiseQuant(model=str(hollow), backend=backend, group_size=32, sequential=True)
    run, store = QuantRun(recipe, recipe.domain(), World()), MatrixStore(tmp_path)
    method = recipe.quantiser(run, "own", backend, lambda block: {"own": 4}, ("own",))
    compress(hollow, [method], store)
    for name in run.linears:
        facts, weight = store.facts("own", name)["own"], store.weight("own", name, "own")
        assert weight.isfinite().all() and math.isfinite(facts["output_error"])
    for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.v_proj", "1.mlp.up_proj"):
        assert not store.weight("own", f"model.layers.{name}", "own").any()


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_a_cache_of_constant_keys_and_zero_values_is_exact(hollow, mode):
    form, menu = (
        cache_format(mode, None if mode == "per_token" else 16, None if mode == "per_token" else 16),
        ((2, 2), (8, 4)),
    )
    constant = torch.full((1, 2, 32, 16), -0.375)
    channels = torch.randn(16).half().float().expand(1, 2, 32, 16)  # KIVI's groups of keys run along the tokens
    for bits in (2, 4, 8):
        for keys in (constant, torch.zeros_like(constant), *([channels] if mode == "kivi" else [])):
            assert torch.equal(round_keys(keys, bits, form), keys)
        assert torch.equal(round_values(constant, bits, form), constant)
    model = AutoModelForCausalLM.from_pretrained(hollow).eval()
    sequences = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    errors = measure_errors(model, sequences, 24, menu, form)
    assert errors.output[1] == errors.elementwise[1] == [0, 0]  # its values are 0
    assert all(math.isfinite(e) and e > 0 for e in errors.output[0])
    rows = [dict(zip(menu, row, strict=True)) for row in errors.output]
    candidates = [pareto_pairs(row) for row in rows]
    assert candidates[1] == ((2, 2),) and cluster(rows, candidates, 0.05, 2, 8)


# -------------------------------------------------------------------------------------------------------------- images


def hollow_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3, initializer_range=0.2)
    model = ViTForImageClassification(config).eval()
    layers = select_layers(model, (8, 8), include="", exclude="", embed=False, head=False, ragged=False)
    first, *_, last = (m for m in layers.values())
    with torch.no_grad():
        nn.init.zeros_(last.weight)
        first.weight[:8] = 0
        first.weight[8:, 8:] = 0.25
    return model


def test_blocks_of_zeros_and_layers_of_zeros_are_pruned_and_packed():
    model = hollow_vit()
    layers = select_layers(model, (8, 8), include="", exclude="", embed=False, head=False, ragged=False)
    pixels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    calibrated = Calibrated(model, layers, (8, 8), list(pixels.split(6)), seed=0)
    own = Choice("out", "fisher", "lagrangian", "physical", 2, "ls")
    choices = {
        "own": own,
        "official": replace(own, target_fn="sq", rank="taylor", alloc="derivative", power_mode="official"),
    }
    choices |= {name: replace(own, **changes) for name, changes in BASELINES.items()}
    for name, choice in choices.items():
        keeps = choose_in_rounds(calibrated, replace(choice, rounds=min(choice.rounds, 2)), 0.5)
        masks = weight_masks(keeps, calibrated)
        pruned = apply_masks(model, masks)
        if choice.reconstruct == "ls":
            errors = reconstruct(pruned, model, masks, list(pixels.split(6)), 8)
            assert all(math.isfinite(e) for pair in errors.values() for e in pair), name
        left = {n: block_sums(matrix(pruned.get_submodule(n)).detach().abs(), (8, 8)) > 0 for n in layers}
        packed = pack_model(pruned, left, (8, 8), {"method": "lpvit"})
        with torch.no_grad():
            found, wanted = (m(pixel_values=pixels).logits for m in (packed, pruned))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for masks in (magnitude_masks(calibrated, 0.5), wanda_masks(calibrated, 0.5)):
        assert apply_masks(model, masks)(pixel_values=pixels).logits.isfinite().all()


def test_blank_images_and_zero_weights_have_scores_and_widths():
    model = fresh_model("resnet-8-4", ["a", "b"], 8, 0)
    some = list(model.parameters())[6]
    nn.init.zeros_(some)
    batch = {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1])}
    with torch.device("meta"):
        graph = width_graph(fresh_model("resnet-8-4", ["a", "b"], 8, 0), 8)
    limits = width_limits(graph, multiple=1, min_width=1, min_ratio=0.05)
    budget = Budget(0.4 * graph.params.sum(), 0.4 * graph.macs.sum())
    for scores in (snip_scores(model, [batch]), grasp_scores(model, [batch]), synflow_scores(model, (3, 8, 8))):
        assert all(score.isfinite().all() for score in scores.values())
        fractions = keep_fractions(scores, 0.4)
        p = {name.removesuffix(".weight"): value for name, value in fractions.items()}
        for rule in RULES:
            widths = fit_widths(graph, crop_wish(graph, p, rule, False), budget, limits, multiple=1, shift=True)
            assert all(width >= 1 for width in widths.values())


@pytest.mark.parametrize("storage", STORAGES)
def test_kept_weights_that_are_zero_are_packed(storage):
    model = fresh_model("resnet-8-4", ["a", "b"], 8, 0).eval()
    shapes = {f"{n}.weight": m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    masks = {n: random_mask(0, i, s.numel(), max(1, s.numel() // 8)).view(s) for i, (n, s) in enumerate(shapes.items())}
    for name in list(masks)[1:3]:
        nn.init.zeros_(model.get_parameter(name))
    packed = pack_masked(copy.deepcopy(model), masks, storage, 0, {"method": "random-pruning"})
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            packed(pixel_values=pixels).logits, model(pixel_values=pixels).logits, rtol=1e-4, atol=1e-5
        )
