"""What a report.json holds; whoever writes one and whoever reads one check it here."""

import json
import math
import statistics
from pathlib import Path

from ..errors import UserError

SCHEMA_VERSION = 1
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
    "block_out?": int,
    "block_in?": int,
    "pattern?": [int],
    "nnz?": int,
    "seed?": int,
    "layer?": int,  # seed and layer name a random mask
    "generator?": str,
    "sha256?": str,
    "block?": [int],
    "blocks?": int,
    "bits?": int,
    "group_size?": int,
    "zeros?": str,
    "loss_init": (float, NONE),
    "loss_final": (float, NONE),
    "output_error": (float, NONE),
}
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
    "importance?": {  # what a recipe that ranks decoder blocks found, by their number
        "stability?": float,  # Kendall's tau between two halves of the calibration text
        "blocks": [{"index": int, "bits": int, "scores": {"*": float}}],
    },
    "curves?": {"*": [{"lowered": int, "bits": float, "metrics": {"*": METRIC}}]},  # quality by average bits, per order
    "sweeps?": {  # a metric over some quantity, by its title: a table and a plot on the card
        "*": {"x": str, "log": bool, "series": {"*": [{"x": float, "metrics": {"*": METRIC}}]}}
    },
    "tables?": {"*": {"header": [str], "rows": [[(str, float)]]}},  # further measured tables, by their title
    "cache?": {  # a KV cache with widths of its own for each layer, 16 = not quantised
        "mode": str,
        "group_size": int,
        "residual_length": int,
        "layers": [[int]],  # [key bits, value bits] of each layer
        "objective": str,  # what the losses below are
        "dense_bytes_per_token": int,  # of a 16-bit cache, all layers together
        "models": {  # this one and each baseline; bits are means over layers, effective ones count scales and minima
            "*": {"equivalent_bits": float, "effective_bits": float, "bytes_per_token": int, "kl": float}
        },
        "searched": [{"bits": float, "loss": float}],
        "uniform": {"*": {"bits": float, "loss": float}},
        "front": [{"bits": float, "loss": float, "layers": [[int]]}],
        "groups": [{"layers": [int], "candidates": [[int]]}],
        "errors": {"*": [float]},  # relative error of attention's output by pair of widths, one per layer
        "seconds": float,  # that the search took
    },
    "samples?": [{"prompt": str, "dense": str, "compressed": str}],
    "files?": {"*": str},  # sha256 of every file of the checkpoint but report.json and README.md
}
COUNTED = ("windows", "items", "runs", "seeds")
LOWEST = {"ppl": 1.0, "fraction": 0.0, "ratio": 0.0}


def read_report(path: Path) -> dict:
    """The checked report at `path`. Raises: UserError naming the file if it is absent, no JSON, or not a report."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a folder that a recipe wrote is needed.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): make the checkpoint again or restore the file.") from None
    try:
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
    for order, points in report.get("curves", {}).items():
        groups |= {f"curves.{order}[{place}]": point["metrics"] for place, point in enumerate(points)}
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
                f"{where}: the metric {odd[0]} is measured on one side only; dense and rivals need the same."
            )
    if not report["seeds"] or len(set(report["seeds"])) < len(report["seeds"]):
        raise UserError(f"seeds {report['seeds']}: one or more different seeds are needed.")
    for key in ("dense_bytes", "compressed_bytes", "parameters", "nonzero"):
        if report["size"][key] <= 0:
            raise UserError(f"size.{key} is {report['size'][key]}: more than 0 is needed.")
    if not report["data"].keys() & {"calibration", "training"}:
        raise UserError("data lacks calibration or training: what the model was made from is needed.")
    for title, found in report.get("tables", {}).items():
        for row in found["rows"]:
            if len(row) != len(found["header"]):
                raise UserError(f"tables.{title}: a row has {len(row)} cells, the header {len(found['header'])}.")
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


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not a number")
