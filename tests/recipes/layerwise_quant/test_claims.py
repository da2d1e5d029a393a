"""The table that holds the layer-wise quantisation paper's claims against a run's own curves."""

import math

import pytest

from recipes.layerwise_quant.claims import claims_table, close_share


def metric(value, spread=None):
    """With log-likelihoods of five windows for one model, or for two with this deviation."""
    of = "runs" if spread is not None else "windows"
    models = [value] if spread is None else [value - spread / 2**0.5, value + spread / 2**0.5]
    raw = [[math.log(each) + step for step in (-0.4, 0.3, -0.1, 0.25, -0.05)] for each in models]
    return {"value": value, "spread": spread, "n": 3, "n_of": of, "unit": "ppl", "higher_is_better": False, "raw": raw}


def curve(*values, spread=None):
    """Points with 0, 5, 10, … blocks lowered."""
    return [
        {"lowered": 5 * i, "bits": 4 - i / (len(values) - 1), "metrics": {"perplexity/A": metric(value, spread)}}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "values, share",
    [
        ((10, 10.5, 11.5, 20), 0.5),  # 11 lies half-way between the second and the third of four points
        ((10, 12, 13, 20), 0.5 / 3),
        ((10, 10, 10, 10), 1.0),
        ((10, 9, 12, 20), (1 + 2 / 3) / 3),
    ],
)
def test_close_share(values, share):
    assert close_share(curve(*values), "perplexity/A") == pytest.approx(share)


def seen(table):
    return {row[0][:3]: row[2] for row in table["rows"]}


def baselines(**values):
    return {name: {"perplexity/A": metric(value)} for name, value in values.items()}


def test_claims_that_hold():
    curves = {"lim": curve(10, 10.5, 12, 20), "random": curve(10, 14, 17, 20, spread=0.5)}
    table = claims_table(curves, "lim", curves["lim"][2]["metrics"], baselines(dropped=13, pruned=40), "gptq")
    assert seen(table) == {"(a)": "yes", "(b)": "yes", "(c)": "yes", "(d)": "not judged"}
    measured = {row[0][:3]: row[1] for row in table["rows"]}
    assert measured["(a)"] == "lim 44 %, random 8 %"
    assert "10.50 against 14.00 ± 0.50 at 3.67 bits" in measured["(b)"]
    assert measured["(c)"] == "lim 12.00, dropped 13.00, pruned 40.00"
    assert all(len(row) == len(table["header"]) for row in table["rows"])


def test_claims_that_do_not():
    curves = {"lim": curve(10, 13, 15, 20), "random": curve(10, 12, 15.5, 20, spread=0.5)}
    table = claims_table(curves, "lim", curves["lim"][2]["metrics"], baselines(dropped=14, pruned=40), "gptq")
    assert seen(table) == {"(a)": "no", "(b)": "no", "(c)": "against pruned only", "(d)": "not judged"}
    assert seen(claims_table(curves, "lim", curves["lim"][2]["metrics"], baselines(dropped=14), "rtn"))["(c)"] == "no"


def test_a_smaller_model_is_beaten_only_where_the_windows_agree():
    ours, theirs = metric(12.0), metric(12.5)
    theirs["raw"] = [[a + d for a, d in zip(ours["raw"][0], (0.3, -0.2, 0.1, -0.15, 0.15), strict=True)]]
    curves, mixture, dropped = {"lim": curve(10, 11, 20)}, {"perplexity/A": ours}, {"perplexity/A": theirs}
    table = claims_table(curves, "lim", mixture, {"dropped": dropped}, "rtn")
    assert seen(table)["(c)"] == "no"


def test_claims_in_part():
    curves = {"lim": curve(10, 11.5, 13.5, 20), "random": curve(10, 14, 14, 20, spread=0.7)}
    table = claims_table(curves, "lim", {}, {}, "gptq")
    assert seen(table) == {
        "(a)": "in part: further than at random",
        "(b)": "at 1 of 2 points",
        "(d)": "not judged",
    }


def test_without_a_random_order_the_first_claim_is_not_judged():
    assert seen(claims_table({"lim": curve(10, 11, 20)}, "lim", {}, {}, "gptq")) == {
        "(a)": "not judged: no random order was measured",
        "(d)": "not judged",
    }
