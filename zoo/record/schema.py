"""What a report.json holds; whoever writes one and whoever reads one check it here."""

import json
import math
import re
import statistics
from pathlib import Path

from ..errors import UserError
from ..layers.packing import format_keys
from .format import method_name
from .migrate import upgrade

SCHEMA_VERSION = 3
NONE = type(None)

# A spec is a type, a tuple of types, [spec of every item], or a dict of specs, in which "key?" may be absent and "*"
# stands for every other key. All sizes are bytes unless another unit is in the name.
METRIC = {
    "value": float,
    "spread": (float, NONE),  # sample deviation if n counts seeds or runs, standard error if windows or items
    "n": int,
    "n_of": str,
    "unit": str,
    "higher_is_better": bool,
    "values?": [float],  # one per seed, in the order of `seeds`; the checkpoint is the first seed's
}
DATA = {
    "name": str,
    "version": (str, NONE),
    "sha256": (str, NONE),
    "size": (int, NONE),
    "license?": (str, NONE),
    "windows?": int,
    "seqlen?": int,
    "items?": int,
}
LAYER = {
    "name": str,
    "format": str,
    "d_out": int,
    "d_in": int,  # of a convolution: in_channels / groups * kh * kw, the columns of its weight as a matrix
    "kernel?": [int],
    "groups?": int,
    **format_keys(),  # of the packed layers; seed and layer name a random mask
    "loss_init": (float, NONE),
    "loss_final": (float, NONE),
    "output_error": (float, NONE),
}
PAIR = {  # this model minus another on the same windows or items: measurements.paired_difference
    "difference": float,  # of a perplexity, of its logarithm
    "error": (float, NONE),  # standard error
    "n": int,  # windows or items
}
TABLE = {
    "header": [str],
    "rows": [[(str, float)]],
    "section?": str,  # of the card; SECTIONS[0] if absent
    "caption?": str,
}
SERIES = {
    "name?": str,  # in the legend
    "style": str,
    "x": [float],
    "y?": [float],  # all lists are as long as x; vertical lines have no y
    "error?": [float],
    "open?": [bool],  # which markers are not filled
    "notes?": [str],  # written beside the points
}
PANEL = {  # curves over an axis, or a heat map with its numbers written into the cells
    "title?": str,
    "log?": str,  # the logarithmic axes: some of the letters x, y and, for the cells' shades, z
    "series?": [SERIES],
    "cells?": {"*": [float]},  # by the name of the row
    "shades?": [float],  # the numbers of the lightest and the darkest cell
}
FIGURE = {
    "title": str,
    "caption?": str,
    "x?": str,  # labels of the axes, for all panels
    "y?": str,
    "columns?": int,  # of panels, 3 if absent
    "panels": [PANEL],
}
SECTIONS = ("evidence", "sizes")
STYLES = ("line", "step", "points", "dots", "guide", "vertical")  # dots and guides are grey and stay in the background
REPORT = {
    "schema_version": int,
    "recipe": str,
    "config": dict,
    "base_model": {
        "id": str,
        "revision": (str, NONE),
        "sha256": str,
        "parameters": int,
        "license": (str, NONE),
        "language": [str],
    },
    "data": {
        "calibration?": DATA,
        "training?": DATA,
        "validation?": DATA,
        "evaluation": {"tasks?": {"*": DATA}, "*": DATA},
    },
    "dense": {"*": METRIC},
    "compressed": {"*": METRIC},
    "baselines": {"*": {"*": METRIC}},
    "paired?": {"*": {"*": PAIR}},  # with "dense" and the baselines, from measurements.json; reports before 3 have none
    "size": {
        "dense_bytes": int,  # of the dense model in the checkpoint's dtype
        "compressed_bytes": int,
        "parameters": int,
        "nonzero": int,  # numbers stored: kept values, wrappers, and all that is not compressed
        "baselines?": {"*": int},
    },
    "speed": {"*": {"*": METRIC}},
    "cost": {"seconds": float, "peak_rss_bytes": int, "device": str},
    "environment": {"python": str, "versions": {"*": str}, "cpu": str},
    "seeds": [int],
    "layers": [LAYER],
    "notes": [str],
    "tables?": {"*": TABLE},  # what the method found out, by their titles
    "sweeps?": {  # a metric over some quantity, by its title: a table and a plot on the card
        "*": {"x": str, "log": bool, "series": {"*": [{"x": float, "metrics": {"*": METRIC}}]}}
    },
    "figures?": {"*": FIGURE},  # drawn as plots/<key>.png
    "footprint?": {  # what a model costs besides its weights, where the method lowers that
        "what": str,  # "KV cache"
        "unit": str,  # "bytes a token"
        "dense": int,
        "models": {"*": int},  # this one and the baselines
    },
    "same_as?": [str],  # the baselines that the method returned and its model therefore is; the card says so first
    "settings?": {"*": dict},  # by key: what config.json has to say, besides packed modules, for the claims to hold
    "samples?": [{"prompt": str, "dense": str, "compressed": str}],
    "files?": {"*": str},  # sha256 of every file of the checkpoint but report.json and README.md
}
COUNTED = ("windows", "items", "runs", "seeds")
LOWEST = {"ppl": 1.0, "fraction": 0.0, "ratio": 0.0, "kl": 0.0}


def read_report(path: Path) -> dict:
    """The checked report at `path`, an old one brought up to date.

    Raises: UserError naming the file if it is absent, no JSON, or not a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a folder that a recipe wrote is needed.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): make the checkpoint again or restore the file.") from None
    try:
        report = upgrade(report)
        check_report(report)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return report


def check_report(report: dict) -> None:
    """Raises UserError naming the first place where `report` breaks the schema or contradicts itself."""
    if isinstance(report, dict) and report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"schema_version {report.get('schema_version')!r} is unknown, {SCHEMA_VERSION} is needed: update slimzoo."
        )
    _check_shape(report, REPORT, "report")
    groups = {"dense": report["dense"], "compressed": report["compressed"]}
    groups |= {f"baselines.{name}": metrics for name, metrics in report["baselines"].items()}
    groups |= {f"speed.{phase}": ratios for phase, ratios in report["speed"].items()}
    checked = dict(groups)
    for title, sweep in report.get("sweeps", {}).items():
        for name, points in sweep["series"].items():
            checked |= {f"sweeps.{title}.{name}[{place}]": point["metrics"] for place, point in enumerate(points)}
    for where, metrics in checked.items():
        for name, metric in metrics.items():
            _check_metric(metric, f"{where}.{name}", len(report["seeds"]))
    if not report["compressed"]:
        raise UserError("compressed is empty: at least one measured metric is needed.")
    for where, metrics in groups.items():
        if not where.startswith("speed") and metrics.keys() != report["compressed"].keys():
            odd = sorted(metrics.keys() ^ report["compressed"].keys())
            raise UserError(
                f"{where}: the metric {odd[0]} is measured on one side only; dense and baselines need the same."
            )
    for name, pairs in report.get("paired", {}).items():
        _check_pairs(pairs, f"paired.{name}", name == "dense" or name in report["baselines"], report["compressed"])
    if not report["seeds"] or len(set(report["seeds"])) < len(report["seeds"]):
        raise UserError(f"seeds {report['seeds']}: one or more different seeds are needed.")
    for key in ("dense_bytes", "compressed_bytes", "parameters", "nonzero"):
        if report["size"][key] <= 0:
            raise UserError(f"size.{key} is {report['size'][key]}: more than 0 is needed.")
    if not report["data"].keys() & {"calibration", "training"}:
        raise UserError("data lacks calibration or training: what the model was made from is needed.")
    for title, found in report.get("tables", {}).items():
        _check_table(found, f"tables.{title}")
    for stem, figure in report.get("figures", {}).items():
        if not re.fullmatch(r"[\w-]+", stem) or not figure["panels"]:
            raise UserError(f"figures.{stem}: a file's name without its ending, and one panel or more are needed.")
        for place, panel in enumerate(figure["panels"]):
            _check_panel(panel, f"figures.{stem}.panels[{place}]")
    if footprint := report.get("footprint"):
        if method_name(report) not in footprint["models"]:
            raise UserError(f"footprint.models lacks {method_name(report)}, the report's own model.")
        if footprint["dense"] <= 0:
            raise UserError(f"footprint.dense is {footprint['dense']}: more than 0 is needed.")
    names = [layer["name"] for layer in report["layers"]]
    if len(set(names)) < len(names):
        raise UserError(f"layers: {next(name for name in names if names.count(name) > 1)} is listed twice.")


def _check_shape(value, spec, where: str) -> None:
    if isinstance(spec, dict):
        _check_shape(value, dict, where)
        fixed = {key.rstrip("?"): inner for key, inner in spec.items() if key != "*"}
        missing = [key for key in spec if key != "*" and not key.endswith("?") and key not in value]
        if missing:
            raise UserError(f"{where} lacks {missing[0]}.")
        for key, item in value.items():
            if key not in fixed and "*" not in spec:
                raise UserError(f"{where}.{key} is unknown; known are {', '.join(fixed)}.")
            _check_shape(item, fixed.get(key, spec.get("*")), f"{where}.{key}")
    elif isinstance(spec, list):
        _check_shape(value, list, where)
        for index, item in enumerate(value):
            _check_shape(item, spec[0], f"{where}[{index}]")
    else:
        types = spec if isinstance(spec, tuple) else (spec,)
        if float in types:
            types += (int,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if t is NONE else t.__name__ for t in types)
            raise UserError(f"{where} is {value!r}: {wanted} is needed.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is {value}: a finite number is needed.")


def _check_metric(metric: dict, where: str, seeds: int) -> None:
    value, spread, values = metric["value"], metric["spread"], metric.get("values")
    if metric["n_of"] not in COUNTED or metric["n"] < 1:
        raise UserError(f"{where}: n {metric['n']} of {metric['n_of']!r}; 1 or more {', '.join(COUNTED)} are needed.")
    lowest = LOWEST.get(metric["unit"], -math.inf)
    if value < lowest or (metric["unit"] == "fraction" and value > 1):
        raise UserError(f"{where} is {value}: impossible in unit {metric['unit']}.")
    if spread is not None and spread < 0:
        raise UserError(f"{where}: spread {spread} is negative.")
    if metric["n_of"] == "seeds" and (values is None or not len(values) == metric["n"] == seeds):
        raise UserError(f"{where}: n {metric['n']} and `values` have to match the {seeds} seeds of the report.")
    if values is None:
        return
    spread_of_values = statistics.stdev(values) if len(values) > 1 else None
    close = math.isclose(value, statistics.fmean(values), rel_tol=1e-9)
    if spread is None or spread_of_values is None:
        close &= spread == spread_of_values
    else:
        close &= math.isclose(spread, spread_of_values, rel_tol=1e-6, abs_tol=1e-12)
    if not close:
        raise UserError(f"{where}: value {value} ± {spread} is not the mean ± sample deviation of {values}.")


def _check_pairs(pairs: dict, where: str, known: bool, compressed: dict) -> None:
    if not known:
        raise UserError(f"{where}: dense or one of the baselines is needed.")
    for key, pair in pairs.items():
        if key not in compressed:
            raise UserError(f"{where}.{key}: no such metric was measured.")
        if pair["n"] < 1 or (pair["error"] or 0.0) < 0:
            raise UserError(f"{where}.{key}: 1 or more windows or items and no negative error are needed.")


def _check_table(found: dict, where: str) -> None:
    if not found["header"]:
        raise UserError(f"{where}: a header of one cell or more is needed.")
    for row in found["rows"]:
        if len(row) != len(found["header"]):
            raise UserError(f"{where}: a row has {len(row)} cells, the header {len(found['header'])}.")
    if found.get("section", SECTIONS[0]) not in SECTIONS:
        raise UserError(f"{where}: section {found['section']!r}; one of {', '.join(SECTIONS)} is needed.")


def _check_panel(panel: dict, where: str) -> None:
    if ("series" in panel) == ("cells" in panel) or ("cells" in panel) != (len(panel.get("shades", ())) == 2):
        raise UserError(f"{where}: either series, or cells and two shades are needed.")
    if set(panel.get("log", "")) - set("xyz"):
        raise UserError(f"{where}: log {panel['log']!r}; some of the letters x, y and z are needed.")
    for series in panel.get("series", ()):
        lists = {key: len(value) for key, value in series.items() if isinstance(value, list)}
        if series["style"] not in STYLES:
            raise UserError(f"{where}: style {series['style']!r}; one of {', '.join(STYLES)} is needed.")
        if (series["style"] == "vertical") == ("y" in series) or len(set(lists.values())) > 1:
            raise UserError(f"{where}: a series of style {series['style']} has lists of lengths {lists}.")
    if len({len(row) for row in panel.get("cells", {}).values()}) > 1:
        raise UserError(f"{where}: the rows of the cells are not equally long.")


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not a number")
