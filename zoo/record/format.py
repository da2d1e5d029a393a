"""How a report's names and numbers are written: in its card, in the table that a recipe prints, in plots and Spaces."""

import re
from pathlib import Path

CARDS = Path(__file__).resolve().parent.parent.parent / "model_cards"  # beside this package, in a clone and in a wheel
DIGITS = {"fraction": 3, "kl": 4}  # behind the point, 2 for other units
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FIDELITY = ("kl", "kl_median", "kl_p99", "agreement")  # to the dense model's predictions
TITLES = {  # of the metrics whose keys do not say it; the name of the data follows
    "top5": "top-5 accuracy",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_scaled": "temperature-scaled ECE",
    "auroc": "AUROC against",
    "fpr95": "FPR at 95 % TPR against",
    "auroc_energy": "energy AUROC against",
    "fpr95_energy": "energy FPR at 95 % TPR against",
    "fgsm": "accuracy under FGSM",
    "pgd": "accuracy under PGD",
    "kl": "mean KL",
    "kl_median": "median KL",
    "kl_p99": "99th-percentile KL",
    "agreement": "top-1 agreement",
}


def method_name(report: dict) -> str:
    """What made the weights: the recipe's `method` flag where it has one, else the recipe."""
    return report["config"].get("method", report["recipe"])


def baseline_name(ratio: str) -> str:
    """'dense bf16' for the key ratio_to_dense_bf16."""
    return ratio.removeprefix("ratio_to_").replace("_", " ")


def metric_title(key: str) -> str:
    """'perplexity A' for the key perplexity/A."""
    kind, _, where = key.partition("/")
    return f"{TITLES.get(kind, kind.replace('_', ' '))} {where}".strip()


def slug(name: str) -> str:
    """An identifier for the Hub: a Hub id as it is, else lower case with dashes."""
    return name if HUB_ID.fullmatch(name) else re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def base_link(name: str) -> str:
    """A base model's id, linked if it is one of the Hub's."""
    return f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else f"`{name}`"


def format_metric(metric: dict) -> str:
    """'18.12 ± 0.07', '0.530', '1.32 ± 0.02×'; ± is over seeds or runs only, not over windows or items."""
    value, spread = metric["value"], metric["spread"]
    digits = DIGITS.get(metric["unit"], 2)
    unit = "×" if metric["unit"] == "ratio" else ""
    if spread is None or metric["n_of"] not in ("seeds", "runs"):
        return f"{format_number(value, digits)}{unit}"
    return f"{format_number(value, digits)} ± {format_number(spread, digits)}{unit}"


def format_number(value: float, digits: int) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def format_change(ours: dict, baseline: dict, paired: dict | None = None) -> str:
    """'+3.4 %', or for fractions '-2.0 points'; '+3.4 ± 0.5 %' with the standard error of a paired difference."""
    scale, ending, digits = 100 / (baseline["value"] or 1.0), "%", ",.1f"
    if ours["unit"] == "fraction":
        scale, ending = 100.0, "points"
    elif baseline["value"] == 0:
        scale, ending, digits = 1.0, ours["unit"], ".2g"
    error = ""
    if paired is not None and paired["error"] is not None:
        natural = ours["value"] if ours["unit"] == "ppl" else 1.0  # its difference is one of logarithms
        error = f" ± {scale * natural * paired['error']:{digits}}"
    return f"{scale * (ours['value'] - baseline['value']):+{digits}}{error} {ending}"


def format_bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(header: list[str], rows: list[list], align: str = "---:") -> str:
    """A Markdown table; its first column is left-aligned, the others right or as `align` says. Numbers have 4 digits."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(format_cell(cell) for cell in line)} |" for line in lines)


def format_cell(cell: str | float) -> str:
    return cell.replace("|", "/") if isinstance(cell, str) else f"{cell:,.4g}"
