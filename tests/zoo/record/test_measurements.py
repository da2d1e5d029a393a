"""Models compared in pairs: differences and errors by hand, what they decide, and the file that they come from."""

import math
import statistics

import pytest
from example_report import example_report, metric

from zoo.errors import UserError
from zoo.record.card import PAIRED, UNPAIRED, render_card
from zoo.record.compare import compare, verdicts
from zoo.record.format import format_change
from zoo.record.measurements import (
    FILE,
    paired_difference,
    paired_differences,
    read_measurements,
    seed_values,
    write_measurements,
)
from zoo.record.schema import check_report


def test_one_seed_by_hand():
    found = paired_difference([[[3.0, 5.0, 4.0, 8.0]]], [[[1.0, 4.0, 2.0, 5.0]]])  # 2, 1, 2, 3
    assert found == {"difference": 2.0, "error": pytest.approx(math.sqrt(2 / 3) / 2), "n": 4}


def test_seeds_may_scatter_more_than_windows_and_the_larger_error_counts():
    theirs = [[[1.0, 2.0, 3.0, 4.0]]]  # measured once, as a given dense model is
    ours = [[[2.0, 3.0, 4.0, 5.0]], [[4.0, 5.0, 6.0, 7.0]], [[3.0, 4.0, 5.0, 6.0]]]  # 1, 3 and 2 above it everywhere
    found = paired_difference(ours, theirs)
    assert found == {"difference": 2.0, "error": pytest.approx(1 / math.sqrt(3)), "n": 4}
    ours = [[[2.0, 2.0, 2.0, 2.0]], [[2.1, 2.1, 2.1, 2.1]], [[1.9, 1.9, 1.9, 1.9]]]  # the windows scatter more
    found = paired_difference(ours, theirs)
    assert found["error"] == pytest.approx(statistics.stdev([1, 0, -1, -2]) / 2)


def test_draws_of_a_random_baseline_count_too():
    found = paired_difference([[[1.0, 1.0]]], [[[2.0, 2.0], [4.0, 4.0]]])
    assert found == {"difference": -2.0, "error": pytest.approx(math.sqrt(2) / math.sqrt(2)), "n": 2}


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ([[[1.0, 2.0]]], [[[1.0]]]),
        ([[[1.0]]], [[[1.0, 2.0]]]),
        ([[[1.0, 2.0]]] * 2, [[[1.0, 2.0]]] * 3),
        ([[[1.0, 2.0]], [[1.0]]], [[[1.0, 2.0]]]),
    ],
)
def test_what_does_not_fit_together_is_not_paired(ours, theirs):
    assert paired_difference(ours, theirs) is None


def test_a_single_window_has_no_error():
    assert paired_difference([[[1.0]]], [[[3.0]]]) == {"difference": -2.0, "error": None, "n": 1}


def test_values_of_seeds_are_those_of_the_report():
    assert seed_values([[[1.0, 3.0]], [[0.0, 1.0]]], "fraction") == [2.0, 0.5]
    assert seed_values([[[0.0, 2.0], [2.0, 2.0]]], "ppl") == [pytest.approx((math.e + math.e**2) / 2)]
    assert math.isfinite(seed_values([[[2000.0]]], "ppl")[0])


# ----------------------------------------------------------------------------------------------------------- verdicts


def language_report(ours, theirs, paired=True):
    """One text; log-likelihoods of every window of both models, one seed."""

    def row(windows):
        value = math.exp(statistics.fmean(windows))
        return {
            "perplexity/A": metric(value, value * statistics.stdev(windows) / math.sqrt(len(windows)), len(windows))
        }

    raw = {
        name: {"perplexity/A": [[windows]]} for name, windows in (("armor", ours), ("wanda", theirs), ("dense", ours))
    }
    report = example_report(
        seeds=[0], sweeps={}, dense=row(ours), compressed=row(ours), baselines={"wanda": row(theirs)}
    )
    report["paired"] = paired_differences(raw, "armor")
    check_report(report)
    return report if paired else {key: part for key, part in report.items() if key != "paired"}


WINDOWS = [2.1, 3.4, 2.7, 3.9, 2.4, 3.1]  # texts differ from one another far more than models do
NEARLY = [x + d for x, d in zip(WINDOWS, [0.03, 0.05, 0.04, 0.06, 0.02, 0.04], strict=True)]


def test_pairs_decide_where_the_scatter_of_the_rows_does_not():
    assert compare(language_report(WINDOWS, NEARLY), "perplexity/A", "wanda") == "better"
    assert compare(language_report(NEARLY, WINDOWS), "perplexity/A", "wanda") == "worse"
    assert compare(language_report(WINDOWS, NEARLY, paired=False), "perplexity/A", "wanda") == "undecided"


def test_one_seed_no_longer_makes_every_difference_a_verdict():
    """As a rerun found: +0.9 ± 0.7 %."""
    noise = [0.009 + d for d in (0.03, -0.02, 0.02, -0.01, -0.03, 0.01)]
    report = language_report([x + d for x, d in zip(WINDOWS, noise, strict=True)], WINDOWS)
    assert compare(report, "perplexity/A", "wanda") == "undecided"
    assert "undecided on perplexity A (+0.9 ± 1.0 %)" in verdicts(report)[1]


@pytest.mark.parametrize("windows", [2, 3])
def test_few_windows_decide_nothing(windows):
    """Two that happen to differ alike look certain."""
    report = language_report(WINDOWS[:windows], [x + 0.05 for x in WINDOWS[:windows]])
    pair = report["paired"]["wanda"]["perplexity/A"]
    assert abs(pair["difference"]) > 2 * pair["error"]
    assert compare(report, "perplexity/A", "wanda") == "undecided"


@pytest.mark.parametrize("error, verdict", [(0.0501, "undecided"), (0.05, "better"), (None, "undecided")])
def test_two_standard_errors_are_needed(error, verdict):
    report = language_report(WINDOWS, NEARLY)
    report["paired"]["wanda"]["perplexity/A"] = {"difference": -0.1, "error": error, "n": 6}
    assert compare(report, "perplexity/A", "wanda") == verdict


def test_right_and_wrong_answers_are_compared_item_by_item():
    """Two more of a hundred right: nothing if they are other ones, something if they are the same and eight more."""
    ours, theirs = [[1] * 60 + [0] * 40], [[1] * 50 + [0] * 50]
    found = paired_difference([ours], [theirs])
    assert found["difference"] == 0.1 and found["error"] == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    shuffled = [theirs[0][::-1]]
    found = paired_difference([ours], [shuffled])
    assert found["difference"] == 0.1 and found["error"] > 0.09


def test_nothing_is_compared_with_dense_on_nearness_to_dense():
    fidelity = {"kl": 0.02, "agreement": 0.91}
    report = example_report(seeds=[0], baselines={}, sweeps={}, paired={})
    for key, value in fidelity.items():
        unit = "kl" if key == "kl" else "fraction"
        report["compressed"][key] = metric(value, 0.001, unit=unit, higher=key == "agreement")
        report["dense"][key] = metric(float(key == "agreement"), 0.0, unit=unit, higher=key == "agreement")
    report["compressed"] = {key: report["compressed"][key] for key in fidelity}
    report["dense"] = {key: report["dense"][key] for key in fidelity}
    report["baselines"] = {"wanda": {**report["compressed"], "kl": metric(0.5, 0.001, unit="kl")}}
    check_report(report)
    against_dense, against_wanda = verdicts(report)
    assert "KL" not in against_dense and "better on mean KL (-96.0 %)" in against_wanda
    text = render_card(report, repo_id=None)
    assert "KL(dense ‖ model) in nats" in text and "| **armor** | **0.0200** | **0.910** |" in text
    assert "| wanda | 0.5000 | 0.910 |" in text and "on 7 held-out windows" in text


@pytest.mark.parametrize(
    "ours, theirs, unit, paired, shown",
    [
        (12.0, 10.0, "ppl", None, "+20.0 %"),
        (12.0, 10.0, "ppl", {"difference": 0.18, "error": 0.01, "n": 9}, "+20.0 ± 1.2 %"),
        (0.52, 0.5, "fraction", {"difference": 0.02, "error": 0.015, "n": 9}, "+2.0 ± 1.5 points"),
        (0.3, 0.2, "kl", {"difference": 0.1, "error": 0.02, "n": 9}, "+50.0 ± 10.0 %"),
        (0.3, 0.2, "kl", {"difference": 0.1, "error": None, "n": 1}, "+50.0 %"),
        (0.003, 0.0, "kl", {"difference": 0.003, "error": 0.001, "n": 9}, "+0.003 ± 0.001 kl"),
    ],
)
def test_a_change_is_shown_with_its_error(ours, theirs, unit, paired, shown):
    assert format_change(metric(ours, unit=unit), metric(theirs, unit=unit), paired) == shown


def test_the_card_says_how_it_was_compared():
    report = example_report()
    assert PAIRED in render_card(report, repo_id=None) and UNPAIRED not in render_card(report, repo_id=None)
    del report["paired"]
    assert UNPAIRED in render_card(report, repo_id=None)


@pytest.mark.parametrize(
    "paired, said",
    [
        ({"nobody": {}}, "paired.nobody: dense or one of the baselines"),
        ({"wanda": {"acc/none": {"difference": 0.0, "error": None, "n": 1}}}, "no such metric"),
        ({"wanda": {"perplexity/A": {"difference": 0.0, "error": -0.1, "n": 1}}}, "no negative error"),
        ({"wanda": {"perplexity/A": {"difference": 0.0, "error": 0.1, "n": 0}}}, "1 or more windows"),
        ({"wanda": {"perplexity/A": {"difference": math.inf, "error": 0.1, "n": 3}}}, "inf"),
    ],
)
def test_impossible_pairs_are_refused(paired, said):
    with pytest.raises(UserError, match=said):
        check_report(example_report(paired=paired))


# ----------------------------------------------------------------------------------------------------------- the file


def test_the_file_gives_back_what_was_written(tmp_path):
    variants = {"dense": {"acc": [[[1, 0, 1]]]}, "own": {"acc": [[[0, 0, 1]], [[0.5, 1e-9, 1]]]}}
    write_measurements(variants, tmp_path)
    assert read_measurements(tmp_path) == variants


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"variants": []}',
        '{"variants": {"a": 1}}',
        '{"variants": {"a": {"m": [[]]}}}',
        '{"variants": {"a": {"m": [[[NaN]]]}}}',
        '{"variants": {"a": {"m": [[[1e999]]]}}}',
        f'{{"variants": {{"a": {{"m": [[[{10**400}]]]}}}}}}',
        '{"variants": {"a": {"m": [[["1"]]]}}}',
        '{"variants": {"a": {"m": [[[true]]]}}}',
        '{"variants": {"a": {"m": [1.5]}}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="measurements.json is damaged"):
        read_measurements(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="measurements.json cannot be read"):
        read_measurements(tmp_path)
