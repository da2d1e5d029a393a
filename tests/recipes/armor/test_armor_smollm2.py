"""ARMOR on a real layer: SmolLM2's q_proj of block 10, and errors on text that nothing was fitted to."""

import pytest
import torch
from transformers import AutoTokenizer

from recipes.armor import Armor
from recipes.armor.factorisation import init_nowag, optimise
from recipes.common.data.base_models import resolve_model
from recipes.common.data.texts import calibration_windows, load_text
from recipes.common.loops.streaming import InputStatistics, StreamedModel, output_error, run_block
from recipes.common.parts.pruners import PerGroup, normalize, nowag, rank_correction, sparsegpt, wanda

pytestmark = pytest.mark.slow

BLOCK = 10


@pytest.fixture(scope="module")
def layer():
    """(weight of q_proj, its statistics on 16 windows, Hessian of 8 others)."""
    path = resolve_model("smollm2-135m-instruct").path
    windows = calibration_windows(load_text("wikipedia"), AutoTokenizer.from_pretrained(path), 24, 512, seed=0)
    model = StreamedModel(path)
    with torch.no_grad():
        hidden = model.embed(windows, batch=4)
        for index in range(BLOCK):
            hidden = run_block(model.load_block(index), hidden, model.kwargs[index], batch=4)
            model.free_block(index)
        block, name = model.load_block(BLOCK), f"model.layers.{BLOCK}.self_attn.q_proj"
        seen = []
        for part in (hidden[:16], hidden[16:]):
            statistics = InputStatistics(block, model.linears(BLOCK), hessian=True)
            statistics.run(part, model.kwargs[BLOCK], batch=4)
            seen.append(statistics.stats(name))
    return model.linears(BLOCK)[name].weight.detach(), seen[0], seen[1].hessian


def proxy_losses(weight, stats, b, **flags):
    """(L_init, L_final) of 300 iterations at learning rate 1e-3."""
    W_bar, _, _ = normalize(weight)
    factors = init_nowag(W_bar, stats.second_moment, b, b, 2, 4)
    recipe = Armor(iters=300, lr=1e-3, **flags)
    return optimise(factors, W_bar, stats.second_moment, recipe, torch.Generator().manual_seed(0))


def test_the_proxy_loss_falls_as_far_as_it_should(layer, monkeypatch):
    weight, stats, _ = layer
    ratio = {}
    for b in (16, 32, 64):
        first, final = proxy_losses(weight, stats, b)
        ratio[b] = final / first
    assert ratio[64] <= 0.45 and ratio[16] <= 0.70
    assert ratio[64] < ratio[32] < ratio[16]
    nothing = lambda f, E, P, d, picks: torch.zeros_like(f.M)  # noqa: E731  (no sparse-core step: continuous only)
    monkeypatch.setattr("recipes.armor.factorisation.sparse_core_step", nothing)
    first, final = proxy_losses(weight, stats, 64)
    assert final / first > ratio[64]


def test_held_out_errors_fall_with_larger_blocks_and_the_refit(layer):
    weight, stats, held_out = layer

    def error(compressed):
        return output_error(weight, compressed, held_out)

    found = {name: error(prune(weight, stats, PerGroup(2, 4))) for name, prune in (("wanda", wanda), ("nowag", nowag))}
    pruned = sparsegpt(weight, stats, PerGroup(2, 4))
    found |= {"sparsegpt": error(pruned), "rank": error(rank_correction(weight, pruned, stats, 64))}
    for b in (16, 32, 64):
        recipe = Armor(block=str(b), iters=300, curve=[], dtype="float32")
        recipe.check()
        variants = recipe.compress(None, 0, "q_proj", weight, stats)
        found[b], found[f"{b}+refit"] = error(variants["armor-no-refit"].dense), error(variants["armor"].dense)
        assert found[f"{b}+refit"] < found[b]
    assert 0.8 < found["nowag"] / found["wanda"] < 1.25
    assert min(found["nowag"], found["wanda"]) > found[16] > found[32] > found[64]
    assert found[64] < found["sparsegpt"] and found[64] < found["rank"]
    assert found["64+refit"] < found["rank"] < found["sparsegpt"]
