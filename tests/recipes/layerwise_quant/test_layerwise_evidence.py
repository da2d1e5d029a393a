"""What reports of layer-wise quantisation show, held against one of the first version that was made from the same finds."""

import json

import pytest
from example_report import VERSION_1

from recipes.layerwise_quant.evidence import curve_evidence, importance_evidence
from zoo.record.format import CARDS
from zoo.record.schema import check_report, read_report


@pytest.fixture(scope="module")
def old():
    return json.loads((VERSION_1 / "report.json").read_text())


@pytest.fixture(scope="module")
def new():
    return read_report(VERSION_1 / "report.json")


@pytest.fixture(scope="module")
def plan(old):
    """Scores and widths by block, not in the blocks' order."""
    blocks = old["importance"]["blocks"][::-1]
    scores = {name: {block["index"]: block["scores"][name] for block in blocks} for name in ("lim", "zd")}
    return scores, {block["index"]: block["bits"] for block in blocks}, old["importance"]["stability"]


def test_importance_is_that_of_the_first_version(plan, new):
    found = importance_evidence(*plan)
    assert found == {"figures": {"importance": new["figures"]["importance"]}}
    check_report(new | found)


@pytest.mark.parametrize(
    "bits, caption",
    [
        ((4, 4, 4, 4), "Blocks with 4 bits: 0, 1, 2, 3."),
        ((4, 2, 3, 2), "Blocks with 2 bits: 1, 3; with 3 bits: 2."),
    ],
)
def test_blocks_of_the_lower_widths_are_named(plan, bits, caption):
    figure = importance_evidence(plan[0], dict(enumerate(bits)), 0.5)["figures"]["importance"]
    tau = "Kendall's tau of LIM between two halves of the calibration text: 0.50."
    assert figure["caption"] == f"{caption} {tau}"
    assert figure["panels"][0]["series"][0]["open"] == [width < 4 for width in bits]


def test_curves_are_those_of_the_first_version(old, new):
    found = curve_evidence(old["curves"])
    assert found["figures"] == {"curves": new["figures"]["curves"]}
    titles = ["perplexity A by average bits, order", "acc riddles by average bits, order"]
    assert found["tables"] == {title: new["tables"][title] for title in titles}
    check_report(new | found)


def test_committed_reports_have_the_same_parts(plan, old):
    committed = read_report(CARDS / "smollm2-135m-instruct-layerwise-quant" / "report.json")
    figures = importance_evidence(*plan)["figures"] | curve_evidence(old["curves"])["figures"]
    assert figures.keys() == committed["figures"].keys()
    for stem, figure in figures.items():
        assert figure.keys() == committed["figures"][stem].keys(), stem
        series, theirs = (found["panels"][0]["series"][0] for found in (figure, committed["figures"][stem]))
        assert series.keys() == theirs.keys()
    (title, *_) = curve_evidence(old["curves"])["tables"]
    assert committed["tables"][title]["header"][0] == title
