"""KVTuner on SmolLM2: errors and ladder from calibration text, quality on held-out text."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.common.data.base_models import resolve_model
from recipes.common.data.texts import calibration_windows, evaluation_windows, load_text
from recipes.common.metrics.language import perplexity
from recipes.kvtuner.allocation import pareto_pairs
from recipes.kvtuner.simulation import measure_errors, quantised_cache
from recipes.kvtuner.tables import FORMATS, PAIRS, pair_name

pytestmark = pytest.mark.slow

PER_TOKEN, KIVI = FORMATS["per_token"], FORMATS["kivi"]
LAYERS, PROMPT, DEMOTED = 30, 256, 15


@pytest.fixture(scope="module")
def smollm2():
    """(model, errors per layer and pair in both modes, held-out windows)."""
    path = resolve_model("smollm2-135m-instruct").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    windows = calibration_windows(load_text("wikipedia"), tokenizer, 2, 320, seed=0)
    errors = {}
    for form in (PER_TOKEN, KIVI):
        rows = measure_errors(model, windows, PROMPT, PAIRS, form).output
        errors[form.mode] = [dict(zip(PAIRS, row, strict=True)) for row in rows]
    return model, errors, evaluation_windows(load_text("B"), tokenizer, 320, 3)


@pytest.fixture(scope="module")
def quality(smollm2):
    """Perplexity of a table, measured once."""
    model, _, windows = smollm2
    known = {}

    def measure(table, form=PER_TOKEN):
        if (table, form) not in known:
            with quantised_cache(model, table, form):
                known[table, form] = perplexity(model, windows)["value"]
        return known[table, form]

    return measure


def mean(errors, pair):
    return statistics.fmean(row[pair] for row in errors)


def test_keys_matter_more_than_values(smollm2):
    _, errors, _ = smollm2
    per_token = errors["per_token"]
    assert mean(per_token, (4, 2)) <= 0.6 * mean(per_token, (2, 4))
    kept = [pareto_pairs(row) for row in per_token]
    common = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
    assert sum(pairs == common for pairs in kept) >= 25
    assert kept[0] != common and (4, 8) in kept[0]
    early = [pareto_pairs(row) for row in errors["kivi"][:3]]
    assert any((4, 8) in pairs for pairs in early), [list(map(pair_name, pairs)) for pairs in early]
    assert all(mean(errors["kivi"], pair) < mean(per_token, pair) for pair in PAIRS)


def test_the_order_of_uniform_tables(smollm2, quality):
    model, _, windows = smollm2
    dense = perplexity(model, windows)["value"]
    uniform = {pair: ((pair,) * LAYERS) for pair in PAIRS}
    for form in (PER_TOKEN, KIVI):
        assert quality(uniform[8, 8], form) == pytest.approx(dense, rel=0.01)
    assert quality(uniform[8, 2]) < quality(uniform[2, 8]) / 5
    assert quality(uniform[2, 2], KIVI) < quality(uniform[2, 2]) / 10
    assert quality(uniform[4, 4], KIVI) < quality(uniform[4, 4])


def test_sensitivity_tells_which_layers_to_demote(smollm2, quality):
    """From K8V4, half the layers to K4V2: the least sensitive ones, random ones, the most sensitive ones."""
    _, errors, _ = smollm2
    rise = [row[4, 2] - row[8, 4] for row in errors["per_token"]]
    order = sorted(range(LAYERS), key=rise.__getitem__)

    def demoted(layers):
        return quality(tuple((4, 2) if layer in set(layers) else (8, 4) for layer in range(LAYERS)))

    draws = [torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]
    found, reverse = demoted(order[:DEMOTED]), demoted(order[-DEMOTED:])
    chance = math.exp(statistics.fmean(math.log(demoted(draw[:DEMOTED])) for draw in draws))
    assert found < chance and found < reverse, (found, chance, reverse)
