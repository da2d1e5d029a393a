"""Seeds measured one run at a time, merged: as if one run had measured them all."""

import pytest
import torch
from example_report import example_report

from recipes.common.core.merge import merge
from recipes.common.core.report import raw_values
from recipes.common.metrics.metric import mean_of, over_seeds
from zoo.errors import UserError
from zoo.record.format import method_name
from zoo.record.measurements import paired_differences
from zoo.record.schema import check_report

SEEDS = (5, 6, 7)


def measured(seed, variant):
    """{metric: M} of a run at a seed; the dense model is the same in all."""
    generator = torch.Generator().manual_seed(0 if variant == "dense" else 10 * seed + len(variant))
    values = torch.rand(6, generator=generator)
    return {"accuracy": mean_of((values > 0.3).long(), "items", higher_is_better=True)}


def report_of(*seeds):
    """The report of one run at these seeds, with its measurements."""
    report = example_report()
    own = method_name(report)
    variants = {name: [measured(seed, name) for seed in seeds] for name in (own, "magnitude")}
    variants["dense"] = [measured(seeds[0], "dense")]
    found, raw = {name: over_seeds(runs) for name, runs in variants.items()}, raw_values(variants)
    point = [{"x": 1.0, "metrics": over_seeds([measured(seed, "swept") for seed in seeds])}]
    report |= {
        "config": report["config"] | {"seed": seeds[0], "seeds": 1},  # of the run that made the checkpoint
        "seeds": list(seeds),
        "dense": found["dense"],
        "compressed": found[own],
        "baselines": {"magnitude": found["magnitude"]},
        "paired": paired_differences(raw, own),
        "sweeps": {"by density": {"x": "density", "log": False, "series": {"ours": point}}},
        "cost": {"seconds": 10.0 * len(seeds), "peak_rss_bytes": 100 * seeds[0], "device": "cpu"},
        "notes": ["all", *(f"seed {seed}" for seed in seeds)],
    }
    report.pop("same_as", None)
    check_report(report)
    return report, raw


def test_merged_seeds_are_one_run_of_all():
    merged = report_of(SEEDS[0])
    for seed in SEEDS[1:]:
        merged = merge(merged, report_of(seed))
    wanted, raw = report_of(*SEEDS)
    found, found_raw = merged
    assert found_raw == raw and found["compressed"]["accuracy"]["n_of"] == "seeds"
    assert found["cost"].pop("peak_rss_bytes") == 700 and wanted["cost"].pop("peak_rss_bytes") == 500
    assert found == wanted


def test_seeds_that_train_a_dense_model_each_keep_them_all():
    """Also where two happen to be equally good."""
    runs = []
    for seed in SEEDS[:2]:
        report, raw = report_of(seed)
        runs.append((report | {"base_model": report["base_model"] | {"sha256": f"{seed}" * 64}}, raw))
    report, raw = merge(*runs)
    assert report["dense"]["accuracy"]["values"] == [runs[0][0]["dense"]["accuracy"]["value"]] * 2
    assert len(raw["dense"]["accuracy"]) == 2 and "accuracy" in report["paired"]["dense"]


def test_measurements_of_other_seeds_are_refused():
    (report, _), (_, raw) = report_of(5), report_of(6, 7)
    with pytest.raises(UserError, match="not of the report's models and seeds"):
        merge((report, raw), report_of(8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [5]}, "seed 5 is in both runs"),
        ({"recipe": "lpvit"}, "made with another recipe"),
        ({"config": {"iters": 3, "seed": 6}}, "other values of .*iters"),
        ({"baselines": {}}, "magnitude was measured in one of the runs only"),
    ],
)
def test_what_was_made_otherwise_is_refused(change, said):
    report, raw = report_of(6)
    with pytest.raises(UserError, match=said):
        merge(report_of(5), (report | change, raw))
