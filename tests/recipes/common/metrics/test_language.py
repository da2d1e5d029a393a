"""Perplexity and tasks against their definitions, on models small enough to compute by hand."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.common.data.assets import asset_path
from recipes.common.data.base_models import resolve_model
from recipes.common.data.texts import evaluation_windows, load_text
from recipes.common.metrics import language as evaluation
from recipes.common.metrics.fidelity import Reference
from recipes.common.metrics.language import (
    LOCAL_TASKS,
    perplexity,
    read_items,
    run_tasks,
    text_metrics,
    window_nlls,
)
from zoo.errors import UserError
from zoo.record.format import FIDELITY

VOCABULARY = 50


def tiny_llama(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    for parameter in model.parameters():  # far from uniform predictions
        parameter.data *= 4
    return model


@pytest.fixture
def windows():
    return torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- perplexity


def definition(model: LlamaForCausalLM, windows: torch.Tensor) -> list[float]:
    """Mean NLL of each window, one token at a time: -log p(x_t | x_1 … x_{t-1}), t = 2 … T."""
    model = model.double()
    result = []
    with torch.no_grad():
        for ids in windows:
            nll = [
                -torch.log_softmax(model(ids[None, :t]).logits[0, -1], -1)[ids[t]].item() for t in range(1, len(ids))
            ]
            result.append(sum(nll) / len(nll))
    return result


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_perplexity_is_its_definition(windows, batch_size):
    nlls = definition(tiny_llama(), windows)
    assert max(nlls) - min(nlls) > 0.1
    torch.testing.assert_close(
        window_nlls(tiny_llama(), windows, batch_size), torch.tensor(nlls, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    measured = perplexity(tiny_llama(), windows, batch_size)
    mean = sum(nlls) / 5
    deviation = math.sqrt(sum((nll - mean) ** 2 for nll in nlls) / 4)
    assert measured["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert measured["spread"] == pytest.approx(math.exp(mean) * deviation / math.sqrt(5), rel=1e-4)
    rest = {key: measured[key] for key in ("n", "n_of", "unit", "higher_is_better")}
    assert rest == {"n": 5, "n_of": "windows", "unit": "ppl", "higher_is_better": False}
    assert measured["raw"] == [pytest.approx(nlls, rel=1e-5)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_fidelity_is_that_of_the_predictions_of_held_out_tokens(windows, batch_size, tmp_path):
    texts = {"A": windows, "B": windows.flip(0)[:, 2:]}
    dense, other = tiny_llama(), tiny_llama()
    other.lm_head.weight.data += 0.3 * torch.randn(
        other.lm_head.weight.shape, generator=torch.Generator().manual_seed(3)
    )
    own = text_metrics(dense, texts, batch_size, Reference(tmp_path, writing=True), compared=3)
    assert {key: own[key]["value"] for key in FIDELITY} == {"kl": 0, "kl_median": 0, "kl_p99": 0, "agreement": 1}
    assert len(list(tmp_path.iterdir())) == 6, "a file for each window that is compared"
    found = text_metrics(other, texts, batch_size, Reference(tmp_path), compared=3)
    kl, same = [], []
    with torch.no_grad():
        for rows in texts.values():
            for ids in rows[:3]:
                p, q = (one(ids[None]).logits[0, :-1].double().log_softmax(-1) for one in (dense, other))
                kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
                same.append((p.argmax(-1) == q.argmax(-1)).double())
    assert found["kl"]["raw"][0] == pytest.approx([part.mean().item() for part in kl], rel=5e-3)
    assert found["agreement"]["raw"][0] == pytest.approx([part.mean().item() for part in same])
    assert found["kl"]["value"] == pytest.approx(sum(part.mean().item() for part in kl) / 6, rel=5e-3)
    assert found["kl_median"]["value"] == pytest.approx(torch.cat(kl).quantile(0.5).item(), rel=1e-2)
    assert found["kl_p99"]["value"] == pytest.approx(torch.cat(kl).quantile(0.99).item(), rel=1e-2)
    assert {found[key]["n"] for key in FIDELITY} == {6} and found["perplexity/A"]["n"] == 5
    assert text_metrics(other, texts).keys() == {"perplexity/A", "perplexity/B"}


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(windows):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    measured = perplexity(model, windows[:1])
    assert measured["value"] == pytest.approx(VOCABULARY, rel=1e-6) and measured["spread"] is None


def test_half_precision_logits_are_summed_in_fp32(windows):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(model.bfloat16(), windows)["value"] == pytest.approx(VOCABULARY, rel=1e-6)


def test_the_mode_of_the_model_is_left_as_it_was(windows):
    for training in (True, False):
        model = tiny_llama().train(training)
        perplexity(model, windows)
        assert model.training is training and all(p.grad is None for p in model.parameters())


def test_ruined_models_are_measured_and_nan_is_told(windows):
    model = tiny_llama().train()
    model.lm_head.weight.data *= 1e6
    ruined = perplexity(model, windows)
    assert ruined["value"] > 1e100 and math.isfinite(ruined["value"]) and ruined["spread"] is None
    windows = windows.clamp(max=VOCABULARY - 2)
    windows[3, 0] = VOCABULARY - 1  # only this window sees the broken weight
    model.model.embed_tokens.weight.data[-1] = float("nan")
    for batch_size in (1, 5):
        with pytest.raises(UserError, match="Window 3 has no perplexity.*NaN"):
            perplexity(model, windows, batch_size)
    assert model.training


@pytest.fixture(scope="module")
def smollm2():
    path = resolve_model("smollm2-135m-instruct").path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


@pytest.mark.slow
def test_smollm2_reads_english_and_not_shuffled_english(smollm2):
    model, tokenizer = smollm2
    windows = evaluation_windows(load_text("A"), tokenizer, 256, 3)
    measured = perplexity(model, windows)
    assert 15 < measured["value"] < 40  # 512-token windows give about 20; shorter context, higher perplexity
    shuffled = windows[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled)["value"] > 50 * measured["value"]


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("task", "items", "choices"),
    [
        ("step_inference", 2250, 4),
        ("goal_inference", 1703, 4),
        ("social_iqa", 1954, 3),
        ("similarities_abstraction", 76, 4),
    ],
)
def test_items_of_the_local_tasks(task, items, choices):
    rows = read_items(task)
    assert len(rows) == items
    counts = [len(row["choices"]) for row in rows]
    assert max(set(counts), key=counts.count) == choices and min(counts) >= 2
    for row, example in zip(rows, json.loads(asset_path(task).read_text())["examples"], strict=True):
        assert row["q"] == example["input"].strip() and row["choices"] == list(example["target_scores"])
        assert [choice for choice, right in example["target_scores"].items() if right] == [row["choices"][row["gold"]]]


def test_items_without_exactly_one_right_answer_are_left_out(tmp_path, monkeypatch):
    scores = [{"a": 1, "b": 1}, {"a": 0, "b": 0}, {"a": 0, "b": 1}]
    (tmp_path / "task.json").write_text(
        json.dumps({"examples": [{"input": " q ", "target_scores": s} for s in scores]})
    )
    monkeypatch.setattr(evaluation, "asset_path", lambda name: tmp_path / "task.json")
    assert read_items("any") == [{"q": "q", "choices": ["a", "b"], "gold": 1}]


def by_hand(model, tokenizer, task: str, limit: int) -> list[bool]:
    """Accuracy of picking the likeliest answer, by log-likelihood (acc) or that per character (acc_norm)."""
    score, prompt = LOCAL_TASKS[task]
    hits = []
    for item in read_items(task)[:limit]:
        context = prompt.format(q=item["q"])
        n = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        totals = []
        for choice in item["choices"]:
            ids = torch.tensor([tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0].double(), -1)
            total = logp[:-1].gather(1, ids[0, 1:, None])[n - 1 :].sum().item()
            totals.append(total / len(choice) if score == "acc_norm" else total)
        hits.append(totals.index(max(totals)) == item["gold"])
    return hits


@pytest.mark.slow
def test_task_scores_are_those_computed_by_hand(smollm2):
    _, tokenizer = smollm2
    model = tiny_llama(len(tokenizer)).eval()
    measured = run_tasks(model, tokenizer, list(LOCAL_TASKS), limit=30)
    assert list(measured) == [f"{score}/{task}" for task, (score, _) in LOCAL_TASKS.items()]
    for task, (score, _) in LOCAL_TASKS.items():
        entry = measured[f"{score}/{task}"]
        hits = by_hand(model, tokenizer, task, 30)
        assert entry["value"] == pytest.approx(sum(hits) / 30, abs=1e-9) and entry["raw"] == [hits]
        assert entry["spread"] == pytest.approx(math.sqrt(entry["value"] * (1 - entry["value"]) / 29), rel=1e-6)
        assert (entry["n"], entry["n_of"], entry["unit"], entry["higher_is_better"]) == (30, "items", "fraction", True)


@pytest.mark.slow
def test_smollm2_is_better_than_chance_at_similarities(smollm2):
    model, tokenizer = smollm2
    entry = run_tasks(model, tokenizer, ["similarities_abstraction"], limit=40)["acc/similarities_abstraction"]
    assert entry["value"] > 0.25 + 2 * entry["spread"]


def test_results_of_groups_and_filters_become_metrics():
    results = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "gsm8k": {"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": "N/A", "sample_len": 4},
            "wikitext": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        },
        "group_subtasks": {"mmlu": ["a", "stem"], "stem": ["b"], "gsm8k": []},
        "n-samples": {name: {"original": 99, "effective": n} for name, n in zip("ab", (3, 4), strict=True)}
        | {"gsm8k": {"effective": 5}, "wikitext": {"effective": 6}},
        "higher_is_better": {
            "mmlu": {"acc": True},
            "gsm8k": {"exact_match": True},
            "wikitext": {"word_perplexity": False},
        },
    }
    entries = {key: m for name in results["results"] for key, m in evaluation._scores(results, name)}
    assert {key: (m["value"], m["spread"], m["n"], m["unit"], m["higher_is_better"]) for key, m in entries.items()} == {
        "acc/mmlu": (0.5, 0.1, 7, "fraction", True),
        "exact_match-strict-match/gsm8k": (0.2, None, 5, "fraction", True),
        "word_perplexity/wikitext": (12.5, None, 6, "ppl", False),
    }


@pytest.mark.slow
def test_an_unknown_task_is_told_with_those_there_are(smollm2):
    with pytest.raises(
        UserError, match="--tasks step_inferense: no such task; there are step_inference, goal_inference"
    ):
        run_tasks(tiny_llama(), smollm2[1], ["similarities_abstraction", "step_inferense"], limit=1)
