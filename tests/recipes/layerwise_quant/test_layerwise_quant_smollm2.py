"""The paper's claims on SmolLM2: importance from calibration text, quality on held-out text."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.common.data.base_models import resolve_model
from recipes.common.data.texts import calibration_windows, evaluation_windows, load_text
from recipes.common.parts.quantizers import rtn
from recipes.layerwise_quant.importance import kendall_tau, least_first, lim

pytestmark = pytest.mark.slow

GROUP = 64
HALF = 15  # blocks lowered, of 30


class Mixtures:
    """SmolLM2 whose blocks are swapped between widths; LIM of its blocks, by hooks, and quality on text A."""

    def __init__(self):
        path = resolve_model("smollm2-135m-instruct-degridded").path
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.layers = self.model.model.layers
        self.windows = evaluation_windows(load_text("A"), tokenizer, 256, 4)
        self.dense = {n: m.weight.data for n, m in self.layers.named_modules() if isinstance(m, torch.nn.Linear)}
        self.quantised = {
            bits: {n: rtn(w, bits, GROUP, False, torch.bfloat16).dequantize() for n, w in self.dense.items()}
            for bits in (2, 3, 4)
        }
        self.forwards = [layer.forward for layer in self.layers]
        self.lim = self.measure_lim(calibration_windows(load_text("wikipedia"), tokenizer, 16, 512, seed=0))

    @torch.no_grad()
    def measure_lim(self, windows):
        scores = [[] for _ in self.layers]
        hooks = [
            layer.register_forward_hook(lambda _, args, out, place=place: place.append(lim(args[0], out)))
            for layer, place in zip(self.layers, scores, strict=True)
        ]
        for window in windows.split(4):
            self.model.model(window, use_cache=False)
        for hook in hooks:
            hook.remove()
        return [torch.cat(parts) for parts in scores]

    def set(self, bits):
        """bits: {block: width}; a missing block hands its input on."""
        for name, module in self.layers.named_modules():
            block = int(name.split(".")[0]) if name else None
            if name in self.dense and block in bits:
                module.weight.data = self.dense[name] if bits[block] == 16 else self.quantised[bits[block]][name]
        for block, layer in enumerate(self.layers):
            layer.forward = self.forwards[block] if block in bits else lambda hidden_states, **_: hidden_states

    @torch.no_grad()
    def logits(self, bits):
        self.set(bits)
        return self.model(self.windows, use_cache=False).logits

    def perplexity(self, bits):
        loss = torch.nn.functional.cross_entropy(self.logits(bits)[:, :-1].flatten(0, 1), self.windows[:, 1:].flatten())
        return math.exp(loss)

    def lowered(self, blocks, high=4, low=3):
        return {block: low if block in set(blocks) else high for block in range(30)}


@pytest.fixture(scope="module")
def mixtures():
    return Mixtures()


@pytest.fixture(scope="module")
def order(mixtures):
    return least_first({block: scores.mean().item() for block, scores in enumerate(mixtures.lim)})


def test_the_ranking_is_stable_and_the_ends_matter_most(mixtures, order):
    halves = [[scores[part].mean().item() for scores in mixtures.lim] for part in (slice(0, 8), slice(8, 16))]
    assert kendall_tau(*halves) >= 0.9
    assert set(order[-2:]) == {0, 29}


def test_half_the_blocks_at_3_bits_in_the_order_of_lim(mixtures, order):
    found = mixtures.perplexity(mixtures.lowered(order[:HALF]))
    reverse = mixtures.perplexity(mixtures.lowered(order[-HALF:]))
    draws = [torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()[:HALF] for seed in range(5)]
    chance = statistics.fmean(mixtures.perplexity(mixtures.lowered(draw)) for draw in draws)
    four, three = (mixtures.perplexity(mixtures.lowered([], high=bits)) for bits in (4, 3))
    assert found < reverse and found < chance, (found, reverse, chance)
    assert found < math.sqrt(four * three), (found, four, three)  # straight between the ends, in log perplexity


def test_fewer_bits_beat_fewer_blocks_but_not_at_two_bits(mixtures, order):
    """At 3.5 bits a weight: 4 and 3 bits, 4 bits with blocks dropped, and 4 and 2 bits from the extremes."""
    dropped = {block: 4 for block in range(30) if block not in order[:4]}  # 26 / 30 * 4 = 3.47 bits
    mixed, pruned = mixtures.perplexity(mixtures.lowered(order[:HALF])), mixtures.perplexity(dropped)
    rough = mixtures.perplexity(mixtures.lowered(order[:8], low=2))
    assert 1.1 * mixed <= pruned and pruned < rough, (mixed, pruned, rough)


def test_the_curve_falls_and_ends_in_the_uniform_models(mixtures, order):
    reference = mixtures.logits(dict.fromkeys(range(30), 16)).log_softmax(-1)
    damage = []
    for count in (0, 10, 20, 30):
        logits = mixtures.logits(mixtures.lowered(order[:count]))
        damage.append(
            torch.nn.functional.kl_div(logits.log_softmax(-1), reference, reduction="sum", log_target=True).item()
        )
        if count in (0, 30):
            assert torch.equal(logits, mixtures.logits(dict.fromkeys(range(30), 4 if count == 0 else 3)))
    assert all(later >= 0.98 * earlier for earlier, later in zip(damage, damage[1:], strict=False)), damage
