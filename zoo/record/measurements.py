"""measurements.json: the values behind a report's means, one for every window or item, and models compared by them.

{"variants": {variant: {metric: [[[value of a window or item, …] for each model] for each seed]}}}, the variants being
dense, the report's own method and its baselines. Several models of a seed are draws of a random baseline. What was measured
once, as a given dense model is, has one seed. A metric whose value is no mean over windows or items is not there.
"""

import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

FILE = "measurements.json"
LARGEST = 1e100  # of a value: sums of more overflow
FEWEST = 4  # windows or items: of fewer, nobody knows how they scatter
Raw = list[list[list[float]]]  # by seed, model of the seed, window or item


def write_measurements(variants: dict[str, dict[str, Raw]], folder: Path) -> None:
    text = json.dumps({"variants": variants}, separators=(",", ":"), allow_nan=False)
    partial = Path(folder) / f".{FILE}.part"
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(Path(folder) / FILE)


def read_measurements(folder: Path) -> dict[str, dict[str, Raw]]:
    """{variant: {metric: Raw}} of a checkpoint folder.

    Raises: UserError for a file that is missing or holds something else.
    """
    path = Path(folder) / FILE
    try:
        variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
        for metrics in variants.values():
            for raw in metrics.values():
                if not _is_raw(raw):
                    raise ValueError("lists of finite numbers by seed and model are needed")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
    return variants


def _is_raw(raw) -> bool:
    def lists(value, depth: int) -> bool:
        if depth == 0:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        return isinstance(value, list) and len(value) > 0 and all(lists(part, depth - 1) for part in value)

    return lists(raw, 3)


def seed_values(raw: Raw, unit: str) -> list[float]:
    """What a report says of each seed: the mean over its models; of a perplexity, the mean of exp(mean)."""
    made = (lambda values: math.exp(min(statistics.fmean(values), 709.0))) if unit == "ppl" else statistics.fmean
    return [statistics.fmean(map(made, models)) for models in raw]


def paired_difference(ours: Raw, theirs: Raw) -> dict | None:
    """{"difference", "error", "n"} of two models on the same n windows or items; None where they do not fit together.

    d[s, m, i] is ours minus theirs for seed s, model m of that seed (a random baseline has several) and window or item i;
    what was measured once stands against every seed. Of a perplexity the values are log-likelihoods, so d is the logarithm
    of the ratio. The difference is the mean of d. Its error is the largest of these standard errors of the mean, each
    deviation / sqrt(count), as far as there are two or more:

        over windows or items   of the means over s and m       another draw of the text or test set
        over seeds              of the means over m and i       another run of the method
        over draws              of the means over s and i       another draw of the random baseline

    error is None if there is one of each only.
    """
    try:
        d = _array(ours) - _array(theirs)  # (S, M, n); a side that has one of something stands against all of the other
    except (ValueError, RuntimeError):
        return None
    if len(ours[0][0]) != len(theirs[0][0]):
        return None
    means = [d.mean((0, 1)), d.mean((1, 2)), d.mean((0, 2))]
    errors = [(part.std(correction=1) / math.sqrt(len(part))).item() for part in means if len(part) > 1]
    return {"difference": d.mean().item(), "error": max(errors, default=None), "n": d.shape[2]}


def _array(raw: Raw) -> Tensor:
    return torch.tensor(raw, dtype=torch.float64)


def paired_differences(variants: dict[str, dict[str, Raw]], own: str) -> dict[str, dict[str, dict]]:
    """`paired` of a report: {dense or baseline: {metric: {"difference", "error", "n"}}} of the variant `own`."""
    found: dict[str, dict[str, dict]] = {}
    for name, metrics in variants.items():
        pairs = {
            key: paired_difference(variants[own][key], raw) for key, raw in metrics.items() if key in variants[own]
        }
        if name != own:
            found[name] = {key: pair for key, pair in pairs.items() if pair is not None}
    return found
