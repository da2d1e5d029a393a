"""How near a model's predictions are to the dense model's: KL(dense || model) of every prediction, and top-1 agreement.

A prediction is a row of logits: over the vocabulary at a position of a text, or over the classes of an image. The dense
model's are kept on file, so that it is never in memory beside the model that is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.common.metrics.metric import mean_of, metric

CHUNK = 2**24  # numbers of an intermediate result
MOST_BYTES = 2**31  # of a run's dense predictions: more windows than fit are not compared
GROUPS = 20  # of images, for the standard errors of quantiles


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) of every row in nats, (N,) float64: p = softmax(reference), q = softmax(logits), both (N, V).

    Softmaxes in fp32, the sum in fp64; a p of 0 adds nothing. Log-probabilities will do as `reference`.
    """
    rows, found = max(1, CHUNK // logits.shape[-1]), []
    for target, own in zip(reference.split(rows), logits.split(rows), strict=True):
        log_p = target.to(own.device).float().log_softmax(-1)
        p, log_q = log_p.exp(), own.float().log_softmax(-1)
        terms = torch.where(p > 0, p * (log_p - log_q), 0)
        found.append(terms.sum(-1, dtype=torch.float64))
    return torch.cat(found).clamp(min=0)  # rounding may fall below 0


@dataclass(frozen=True)
class Reference:
    """The dense model's predictions in a folder, a file for each named part: of (N, V) logits the log-probabilities in
    float16 and the top-1 places in int32, 2 N V + 4 N bytes. That precision changes a KL by about a thousandth of it.

    writing: the model that is measured is the dense one.
    """

    folder: Path
    writing: bool = False

    def compare(self, name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(KL(dense || model) in nats (N,) float64, whether both rank the same first (N,) bool) of logits (N, V)."""
        file, top = self.folder / f"{name}.safetensors", logits.argmax(-1).cpu()
        if self.writing:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"log_p": logits.float().log_softmax(-1).half().cpu(), "top": top.int()}, file)
            return torch.zeros(len(top), dtype=torch.float64), torch.ones(len(top), dtype=torch.bool)
        kept = load_file(file)
        return divergence(kept["log_p"], logits).cpu(), kept["top"] == top


def compared_windows(windows: dict[str, Tensor], vocabulary: int) -> int:
    """How many windows of each text (N, T) are compared: all, or as many as `MOST_BYTES` of predictions hold."""
    a_window = sum(2 * (rows.shape[1] - 1) * vocabulary for rows in windows.values())
    return min(max(map(len, windows.values())), max(1, MOST_BYTES // a_window))


def fidelity(kl: Sequence[Tensor], agrees: Sequence[Tensor], n_of: str) -> dict[str, dict]:
    """{"kl", "kl_median", "kl_p99", "agreement": metric} of predictions compared (`Reference.compare`).

    Args:
        kl, agrees: with n_of "windows" one (N,) a window, over all of which median and percentile are taken; with
            "items" a single (N,), one prediction an item.
    """
    if n_of == "items":
        means, same, groups = kl[0], agrees[0], kl[0].tensor_split(min(GROUPS, len(kl[0])))
    else:
        means, same = (torch.stack([part.double().mean() for part in parts]) for parts in (kl, agrees))
        groups = kl
    return {
        "kl": mean_of(means, n_of, "kl", higher_is_better=False),
        "kl_median": quantile_of(groups, 0.5, len(means), n_of),
        "kl_p99": quantile_of(groups, 0.99, len(means), n_of),
        "agreement": mean_of(same, n_of),
    }


def quantile_of(groups: Sequence[Tensor], q: float, n: int, n_of: str) -> dict:
    """The q-quantile of all numbers in `groups` as a metric of unit "kl".

    Its raw values are jackknife pseudo-values, one a group: theta + (G - 1) (mean of the theta_-g - theta_-g), theta_-g
    being the quantile without group g. Their mean is the quantile, their standard error the jackknife's; it holds as the
    groups are long (Shao and Wu 1989), where leaving out single numbers would not do.
    """

    def quantile(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).double().quantile(q)

    value = quantile(groups)
    if len(groups) < 2:
        return metric(value.item(), None, n, n_of, "kl", higher_is_better=False)
    without = torch.stack([quantile([*groups[:g], *groups[g + 1 :]]) for g in range(len(groups))])
    pseudo = value + (len(groups) - 1) * (without.mean() - without)
    return mean_of(pseudo, n_of, "kl", higher_is_better=False) | {"value": value.item(), "n": n}
