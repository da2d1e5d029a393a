"""Speeds are taken in turns, and ratios within a round."""

import time

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.common.metrics.speed import compare_speed, ratio


class Recorder(LlamaForCausalLM):
    """A model that notes each call's name and number of tokens, and takes its time over them."""

    def __init__(self, name: str, seconds: float, log: list):
        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        super().__init__(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self, input_ids, **kwargs):
        self.log.append((self.name, input_ids.shape[1]))
        time.sleep(self.seconds)
        return super().forward(input_ids, **kwargs)


def test_speeds_are_measured_in_turns_after_a_warm_up():
    log = []
    models = {name: Recorder(name, seconds, log) for name, seconds in (("fast", 0.01), ("slow", 0.03))}
    raw = compare_speed(models, prompt_tokens=7, new_tokens=4, repeats=3)
    turn = [7, 1, 1, 1, 1]
    assert [(name, n) for name, n in log[6:]] == [
        (name, n) for name in ("fast", "slow", "slow", "fast", "fast", "slow") for n in turn
    ]
    assert [n for _, n in log[:6]] == [7, 1, 1] * 2
    assert {name: {key: len(values) for key, values in lists.items()} for name, lists in raw.items()} == {
        name: {"prefill_seconds": 3, "decode_tokens_per_s": 3} for name in models
    }
    assert all(0.03 < seconds < 0.5 for seconds in raw["slow"]["prefill_seconds"])
    assert all(5 < speed < 1 / 0.03 for speed in raw["slow"]["decode_tokens_per_s"])
    faster = ratio(raw["fast"]["decode_tokens_per_s"], raw["slow"]["decode_tokens_per_s"])
    assert faster["value"] > 1.2


def test_a_ratio_pairs_its_rounds():
    entry = ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert (entry["value"], entry["spread"]) == (2.0, 1.0)
    assert (entry["n"], entry["n_of"], entry["unit"], entry["higher_is_better"]) == (3, "runs", "ratio", True)
    assert ratio([3.0], [2.0])["spread"] is None
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])
