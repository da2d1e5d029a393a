"""Reports of one recipe at other seeds, made one run at a time, as the one report that a run of all the seeds had made."""

from __future__ import annotations

from recipes.common.metrics.metric import over_seeds
from zoo.errors import UserError
from zoo.record.format import method_name
from zoo.record.measurements import Raw, paired_differences
from zoo.record.schema import check_report

Measured = tuple[dict, dict[str, dict[str, Raw]]]  # a report, and its measurements.json


def merge(first: Measured, second: Measured) -> Measured:
    """The report and measurements of `first` with the seeds of `second` added.

    Means, deviations and paired differences are those over all seeds. What belongs to one checkpoint (its size, layers,
    settings, plots of the method, speed) stays that of the first. The cost is the sum.

    Raises: UserError if the two were not made alike, or share a seed.
    """
    (one, raw), (other, more) = first, second
    check_alike(one, other)
    check_raw(*first)
    check_raw(*second)
    seeds = [*one["seeds"], *other["seeds"]]
    given = (
        one["base_model"]["sha256"] == other["base_model"]["sha256"]
    )  # else each seed trains a dense model of its own
    cost = one["cost"] | {
        "seconds": one["cost"]["seconds"] + other["cost"]["seconds"],
        "peak_rss_bytes": max(one["cost"]["peak_rss_bytes"], other["cost"]["peak_rss_bytes"]),
    }
    report = one | {
        "seeds": seeds,
        "dense": one["dense"] if given else together(one, other, one["dense"], other["dense"]),
        "compressed": together(one, other, one["compressed"], other["compressed"]),
        "baselines": {
            name: together(one, other, metrics, other["baselines"][name]) for name, metrics in one["baselines"].items()
        },
        "cost": cost,
        "notes": list(dict.fromkeys([*one["notes"], *other["notes"]])),
    }
    if "sweeps" in one:
        report["sweeps"] = {title: swept(one, other, title) for title in one["sweeps"]}
    raw = {
        name: metrics
        if name == "dense" and given
        else {key: [*values, *more[name][key]] for key, values in metrics.items()}
        for name, metrics in raw.items()
    }
    report["paired"] = paired_differences(raw, method_name(report))
    check_report(report)
    return report, raw


def check_alike(one: dict, other: dict) -> None:
    """Raises: UserError naming what of two reports differs that has to be the same."""
    ours, theirs = (report["config"] for report in (one, other))
    settings = (ours.keys() | theirs.keys()) - {"seed", "seeds"}
    if changed := sorted(key for key in settings if ours.get(key) != theirs.get(key)):
        raise UserError(f"the runs were made with other values of {', '.join(changed)}: only seeds may differ.")
    for key in ("recipe", "data"):
        if one[key] != other[key]:
            raise UserError(f"the runs were made with another {key}: only seeds may differ.")
    if one["base_model"]["id"] != other["base_model"]["id"]:
        raise UserError("the runs were made from other base models: only seeds may differ.")
    for key in ("compressed", "baselines"):
        if odd := sorted(one[key].keys() ^ other[key].keys()):
            raise UserError(f"{odd[0]} was measured in one of the runs only.")
    if twice := sorted(set(one["seeds"]) & set(other["seeds"])):
        raise UserError(f"seed {twice[0]} is in both runs.")


def check_raw(report: dict, raw: dict[str, dict[str, Raw]]) -> None:
    """Raises: UserError if the measurements are not those of the report's variants and seeds."""
    variants = {"dense", method_name(report), *report["baselines"]}
    allowed = {name: (len(report["seeds"]), *([1] if name == "dense" else [])) for name in variants}
    if raw.keys() != variants or any(len(rows) not in allowed[name] for name in raw for rows in raw[name].values()):
        raise UserError(f"measurements.json is not of the report's models and seeds {report['seeds']}: restore both.")


def by_seed(metrics: dict[str, dict], count: int) -> list[dict[str, dict]]:
    """{metric: M} over `count` seeds -> one such dict for each; what was measured once counts for every seed."""
    single = {key: {k: v for k, v in m.items() if k != "values"} for key, m in metrics.items()}
    values = {key: m.get("values", [m["value"]] * count) for key, m in metrics.items()}
    return [{key: m | {"value": values[key][place]} for key, m in single.items()} for place in range(count)]


def together(one: dict, other: dict, ours: dict[str, dict], theirs: dict[str, dict]) -> dict[str, dict]:
    """{metric: M} over the seeds of two reports."""
    return over_seeds([*by_seed(ours, len(one["seeds"])), *by_seed(theirs, len(other["seeds"]))])


def swept(one: dict, other: dict, title: str) -> dict:
    """A sweep over the seeds of both reports; the first's where the other has other points, or draws are its repetitions."""
    ours, theirs = one["sweeps"][title], other.get("sweeps", {}).get(title, {"series": {}})
    points = [
        {(name, point["x"]): point["metrics"] for name, row in sweep["series"].items() for point in row}
        for sweep in (ours, theirs)
    ]
    drawn = any(m["n_of"] == "runs" for found in points for metrics in found.values() for m in metrics.values())
    if drawn or points[0].keys() != points[1].keys():
        return ours
    series = {
        name: [
            point | {"metrics": together(one, other, point["metrics"], points[1][name, point["x"]])} for point in row
        ]
        for name, row in ours["series"].items()
    }
    return ours | {"series": series}
