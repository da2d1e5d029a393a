"""Cards: read back by huggingface_hub, every number traceable to the report, signs as measured."""

import itertools
import math
import re

import pytest
import yaml
from example_report import example_report, metric
from huggingface_hub import EvalResult, ModelCard, metadata_load

from zoo.errors import UserError
from zoo.record.card import baseline_texts, render_card
from zoo.record.compare import compare
from zoo.record.format import CARDS
from zoo.record.schema import check_report

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?")


@pytest.mark.parametrize("repo_id", [None, "org/the-model"])
def test_front_matter_is_read_back_by_the_hub_client(tmp_path, repo_id):
    report = example_report()
    path = tmp_path / "README.md"
    path.write_text(render_card(report, repo_id=repo_id), encoding="utf-8")
    card = ModelCard.load(path)
    assert card.content == path.read_text(encoding="utf-8")  # nothing is lost on the way through the client
    data = card.data
    assert (data.license, data.base_model, data.base_model_relation) == (
        "apache-2.0",
        "made-up/Base-Model",
        "quantized",
    )
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert (data.language, data.datasets) == (["en"], ["made-up/calibration-set"])
    assert {"slimzoo", "armor", "2:4-sparsity", "compressed"} <= set(data.tags)
    assert data.widget == [{"text": "Say hi.", "output": {"text": "Hi there!"}}]
    assert data.model_name == (repo_id or "base-model-armor")
    results = {f"{result.metric_type}/{result.dataset_config}": result for result in data.eval_results}
    assert results.keys() == report["compressed"].keys()
    for key, result in results.items():
        assert isinstance(result, EvalResult)
        assert result.metric_value == report["compressed"][key]["value"]
        assert result.metric_args["spread"] == report["compressed"][key]["spread"]
        assert result.dataset_name.startswith("invented") and result.dataset_revision == "v-11.5"
        assert (result.source_url is not None) == (repo_id is not None)
    assert "https://arxiv.org/abs/2510.05528" in card.text  # the Hub makes a tag of it


def test_model_index_has_what_the_hub_requires(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(render_card(example_report(), repo_id="org/the-model"), encoding="utf-8")
    (model,) = metadata_load(path)["model-index"]
    assert model["name"] == "org/the-model"
    assert len(model["results"]) == 3  # one per text and task: the client merges results of equal data sets
    for result in model["results"]:
        assert result["task"]["type"] == "text-generation"
        assert all(isinstance(result["dataset"][key], str) for key in ("type", "name"))
        for entry in result["metrics"]:
            assert isinstance(entry["type"], str) and math.isfinite(entry["value"])


def other_numbers(value, key="", count=None):
    """The report with each number scaled by a factor of its own, and still consistent; counts of seeds stay."""
    count = count or itertools.count(20)
    if isinstance(value, dict) and "unit" in value:
        scale = (2 if value["unit"] == "ppl" else 0.3) + next(count) / 100
        scaled = {k: scale * value[k] for k in ("value", "spread") if value[k] is not None}
        if value["n_of"] == "seeds":
            return value | scaled | {"values": [scale * v for v in value["values"]]}
        return value | scaled | {"n": next(count) * value["n"]}
    if isinstance(value, dict):
        return {k: other_numbers(v, k, count) for k, v in value.items()}
    if isinstance(value, list) and key not in ("seeds", "pattern"):
        return [other_numbers(v, key, count) for v in value]
    if isinstance(value, str | list | bool) or key in ("schema_version", "seeds"):
        return value
    return next(count) * value if isinstance(value, int) else next(count) / 41 * value


def strings(value):
    if isinstance(value, dict):
        return " ".join(f"{k} {strings(v)}" for k, v in value.items())
    return " ".join(map(strings, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def test_every_number_comes_from_the_report():
    """With other numbers in the report, none of the card's old numbers is left; and no template types one."""
    report = example_report()
    other = other_numbers(report)
    check_report(other)
    constant = set(NUMBER.findall(strings(report))) | {"2510.05528"}  # names, versions, the paper
    shown, shown_other = (set(NUMBER.findall(render_card(r, repo_id=None))) - constant for r in (report, other))
    assert len(shown) > 40
    short = {number for number in shown if len(number.replace(".", "").strip("0")) < 3}  # may agree by rounding
    assert (shown & shown_other) - short == set()
    widths = {"1", "2", "4", "8", "16"}  # of formats, which are no measurements
    for path in CARDS.glob("*.md"):
        text = re.sub(r"^arxiv: .*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(NUMBER.findall(text)) <= widths, path


def test_every_baseline_is_described_once_and_as_its_recipe_means_it():
    lines = (CARDS / "baselines.yaml").read_text().splitlines()
    names = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    assert len(set(names)) == len(names)
    assert "three draws" in baseline_texts("layerwise-quant")["random"]
    assert "three random tables" in baseline_texts("kvtuner")["random"]


@pytest.mark.parametrize("method", ["armor", *sorted(baseline_texts().keys() - {"sparsegpt+rank", "armor-no-refit"})])
def test_every_method_of_the_recipe_has_a_card(method):
    report = example_report()
    report["config"]["method"] = method
    card = ModelCard(render_card(report, repo_id=None))
    assert method in card.data.tags and method in card.text and "2:4" in card.text


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(
    "ours, baseline, verdict", [(10.0, 10.5, 1), (10.5, 10.0, -1), (10.0, 10.1, 0), (10.0, 10.0, 0)], ids=str
)
def test_comparison_has_the_sign_of_the_metric_and_respects_the_spread(higher, ours, baseline, verdict):
    rows = [metric(v, 0.1, 2, "seeds", "ppl", higher, values=[v - 0.05, v + 0.05]) for v in (ours, baseline, 9.0)]
    expected = {0: "undecided", 1: "better", -1: "worse"}[-verdict if higher else verdict]
    assert compare(unpaired(*rows), "perplexity/A", "wanda") == expected


def unpaired(ours, baseline, dense, key="perplexity/A"):
    """A report as they were before values of single windows were kept."""
    report = example_report()
    del report["paired"]
    report["compressed"][key], report["baselines"]["wanda"][key], report["dense"][key] = ours, baseline, dense
    return report


@pytest.mark.parametrize("ours, verdict", [(10.0, "undecided"), (2.0, "better")])
def test_without_pairs_the_scatter_of_windows_counts(ours, verdict):
    rows = [metric(v, v * 0.1, 12) for v in (ours, 10.4, 9.8)]
    assert compare(unpaired(*rows), "perplexity/A", "wanda") == verdict
    over_seeds = [metric(v, 0.001, 2, "seeds", values=[v, v]) for v in (ours, 10.4)]
    assert compare(unpaired(*over_seeds, rows[2]), "perplexity/A", "wanda") == verdict


def test_of_an_unknown_scatter_nothing_is_said():
    rows = [metric(v, None, 1) for v in (1.5, 99.0, 1.4)]
    assert compare(unpaired(*rows), "perplexity/A", "wanda") == "undecided"


def test_an_accuracy_on_few_items_is_not_a_gain():
    for items, verdict in ((211, "undecided"), (100_000, "better")):
        rows = [metric(v, None, items, "items", "fraction", True) for v in (0.55, 0.50, 0.60)]
        assert compare(unpaired(*rows, key="acc/riddles"), "acc/riddles", "wanda") == verdict


def test_a_gain_that_did_not_appear_is_said():
    report = example_report()
    text = ModelCard(render_card(report, repo_id=None)).text
    (wanda,) = re.findall(r"armor against wanda: .*", text)
    (sparsegpt,) = re.findall(r"armor against sparsegpt: .*", text)
    assert "No gain" not in wanda and "better on perplexity A (-38.4 ± 1.3 %)" in wanda
    assert "No gain over it was measured." in sparsegpt and "worse on perplexity A (+4.1 ± 1.8 %)" in sparsegpt
    assert "Faster: decode against dense bf16, decode against dense fp32; slower: prefill against dense bf16." in text
    report["speed"]["decode"]["ratio_to_dense_bf16"]["spread"] = 0.3  # 1.47 is then not told from 1
    del report["speed"]["decode"]["ratio_to_dense_fp32"]
    text = render_card(report, repo_id=None)
    assert "undecided (within two standard deviations of equal): decode against dense bf16." in text
    assert "Faster" not in text and "No gain in speed was measured." in text
    report["size"]["compressed_bytes"] = report["size"]["dense_bytes"] + 1
    assert "Nothing is saved." in render_card(report, repo_id=None)


def test_what_is_unknown_is_left_out():
    report = example_report(speed={}, layers=[])
    del report["samples"]
    report["base_model"] |= {"id": "a folder", "license": None, "language": []}
    report["data"]["calibration"]["name"] = "my file.txt"
    card = ModelCard(render_card(report, repo_id=None))
    assert card.data.license == "unknown"
    assert not {"base_model", "base_model_relation", "language", "datasets", "widget"} & card.data.to_dict().keys()
    assert "Speed was not measured." in card.text
    assert "## Examples" not in card.text and "proxy_loss.png" not in card.text
    assert "$" not in card.text


def test_tables_sweeps_and_figures_have_their_places():
    text = render_card(example_report(), repo_id=None)
    sizes, evidence = re.findall(r"\n## (?:Size|Evidence)\n(.*?)(?=\n## )", text, re.S)
    assert "\n\nInvented sizes:\n\n|  | kB |\n| --- | ---: |\n| all | 63.17 |\n\nVery small.\n" in sizes
    assert (
        "Invented findings:\n\n| riddle | share |\n| --- | ---: |\n| easy | 0.7431 |\n| hard | 0.1357 |\n" in evidence
    )
    assert "Invented sizes" not in evidence and "Invented findings" not in sizes
    assert "\n\nNothing was measured.\n\n![An invented figure](plots/invented.png)\n" in evidence
    assert "| acc riddles by words of a riddle | 12 | 48 |" in evidence
    assert "| armor | 0.623 ± 0.014 | 0.437 ± 0.014 |" in evidence
    assert "![Riddles by length](plots/sweep-riddles-by-length.png)" in evidence


def test_a_title_that_the_header_says_is_not_repeated():
    report = example_report(tables={"a b": {"header": ["a b", "c"], "rows": [["d", "e"]]}})
    text = render_card(report, repo_id=None)
    assert "| a b | c |" in text and "a b:" not in text


def test_untouched_weights_are_no_saving_but_what_the_method_lowers_is():
    report = example_report(footprint={"what": "KV cache", "unit": "bytes", "dense": 8, "models": {"armor": 2}})
    assert "| **armor** | **143.2 kB** |" in render_card(report, repo_id=None)
    report["size"]["compressed_bytes"] = report["size"]["dense_bytes"]
    text = render_card(report, repo_id=None)
    assert "The weights are those of the base model, 197.5 kB." in text
    assert "numbers stored" not in text and "Nothing is saved." not in text


def test_the_card_shows_the_config_as_it_was():
    report = example_report()
    text = ModelCard(render_card(report, repo_id=None)).text
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1]) == report["config"]


def test_text_for_the_method_is_needed():
    with pytest.raises(UserError, match="invented-method"):
        render_card(example_report(config={"method": "invented-method"}), repo_id=None)
    with pytest.raises(UserError, match=r"armor.md uses \$pattern"):
        render_card(example_report(config={"method": "armor"}), repo_id=None)


def nested(report, path, value):
    *parents, last = path.split("|")
    for key in parents:
        report = report[int(key) if key.isdigit() else key]
    if value is None:
        del report[last]
    else:
        report[last] = value


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("schema_version", 4, "schema_version 4"),
        ("data|calibration|sha256", None, "report.data.calibration lacks sha256"),
        ("size|compressed_bites", 5, "report.size.compressed_bites is unknown"),
        ("size|nonzero", 0, "size.nonzero is 0"),
        ("size|nonzero", True, "report.size.nonzero is True"),
        ("size|nonzero", 3.5, "report.size.nonzero is 3.5"),
        ("notes", "text", "report.notes is 'text'"),
        ("seeds", [5, 5], r"seeds \[5, 5\]"),
        ("seeds", [5, 6, 7], "match the 3 seeds"),
        ("dense|perplexity/A|value", math.nan, "report.dense.perplexity/A.value is nan"),
        ("dense|perplexity/A|value", 0.5, "impossible in unit ppl"),
        ("dense|acc/riddles|value", 1.01, "impossible in unit fraction"),
        ("dense|acc/riddles|n_of", "people", "n 211 of 'people'"),
        ("dense|perplexity/A|spread", -0.1, "spread -0.1 is negative"),
        ("dense|perplexity/A", None, "dense: the metric perplexity/A is measured on one side only"),
        ("baselines|wanda|acc/riddles", None, "baselines.wanda: the metric acc/riddles"),
        ("compressed|perplexity/A|value", 12.5, "is not the mean"),
        ("compressed|perplexity/A|spread", 0.1, "is not the mean"),
        ("compressed", {}, "compressed is empty"),
        ("layers|1|name", "model.layers.0.mlp.up_proj", "up_proj is listed twice"),
        ("layers|1|bits", "four", "bits is 'four'"),  # a key of a weight format
        ("tables|Invented findings|rows", [["easy"]], "Invented findings: a row has 1 cells, the header 2"),
        ("tables|Invented findings|header", [], "a header of one cell or more"),
        ("tables|Invented sizes|section", "speed", "section 'speed'; one of evidence, sizes"),
        (
            "sweeps|Riddles by length|series|armor|0|metrics|acc/riddles|value",
            1.2,
            "length.armor.0..acc/riddles is 1.2",
        ),
        ("figures", {"../up": {"title": "", "panels": [{"series": []}]}}, "figures.../up: a file's name"),
        ("figures|invented|panels", [], "figures.invented: .* one panel or more"),
        ("figures|invented|panels|0|log", "xw", r"panels\[0\]: log 'xw'"),
        ("figures|invented|panels|0|cells", {"row": [1, 2]}, "either series, or cells"),
        ("figures|invented|panels|0|series|0|style", "pie", "style 'pie'; one of line, step"),
        ("figures|invented|panels|0|series|0|error", [0.5], "lists of lengths {'x': 2, 'y': 2, 'error': 1}"),
        ("figures|invented|panels|0|series|0|y", None, "of style line has lists"),
        ("footprint", {"what": "cache", "unit": "bytes", "dense": 4, "models": {"wanda": 1}}, "lacks armor"),
        ("footprint", {"what": "cache", "unit": "bytes", "dense": 0, "models": {"armor": 1}}, "footprint.dense is 0"),
    ],
)
def test_a_broken_report_is_refused_by_name(path, value, said):
    report = example_report()
    check_report(report)
    nested(report, path, value)
    with pytest.raises(UserError, match=said):
        check_report(report)


def test_a_card_says_first_that_the_method_returned_a_baseline():
    """In its title and its first sentence; without the finding the card is as ever."""
    report = example_report()
    plain = render_card(report, repo_id=None)
    found = render_card(report | {"same_as": ["wanda", "magnitude"]}, repo_id=None)
    title, first = found.split("---\n")[2].strip().splitlines()[0:3:2]
    assert title == "# base-model-armor (the same as wanda)"
    assert "What the method returned here is a baseline, wanda" in first and "magnitude" in first
    assert first.index("baseline, wanda") < first.index("Every linear weight")
    assert "same as wanda" not in plain and "is a baseline" not in plain


def test_a_card_says_first_which_baselines_are_smaller_and_better():
    report = example_report()
    key = "perplexity/A"
    assert "No larger and better" not in render_card(report, repo_id=None)
    for name, ppl, size, told in (("wanda", 1.5, 10, True), ("wanda", 1.5, 10**9, False), ("wanda", 1e4, 10, False)):
        baselines = {name: report["compressed"] | {key: metric(ppl, 0.01)}}
        changed = report | {"baselines": baselines, "size": report["size"] | {"baselines": {name: size}}}
        changed = {k: v for k, v in changed.items() if k != "paired"}
        first = render_card(changed, repo_id=None).split("---\n")[2].strip().splitlines()[2]
        assert ("No larger and better here: wanda" in first) == told, (ppl, size)
