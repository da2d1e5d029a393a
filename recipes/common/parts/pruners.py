"""One-shot pruners of a single weight matrix from the statistics of its inputs: baselines, and parts of methods.

All take W (d_out, d_in) fp32, the statistics of its inputs and a rule that says how many weights to keep and where
(PerGroup, PerRow, PerMatrix), and return the pruned dense weight.
Sources: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774), NoWag (arXiv 2504.14569).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import UserError

DAMPING = 0.01  # of the mean diagonal of H
LAZY_CHUNK = 128  # columns whose updates SparseGPT gathers before it touches the rest
EPS = 1e-5  # NoWag's guard of the norms


@dataclass
class LayerStats:
    """Second moments of a linear layer's inputs: hessian (d_in, d_in) = mean x x^T, or None; second_moment (d_in,)."""

    hessian: Tensor | None
    second_moment: Tensor
    tokens: int


class StatsAccumulator:
    """Running mean of x x^T (or of x^2 only) over batches, in fp32 and in place: one d_in x d_in matrix and no more."""

    def __init__(self, d_in: int, hessian: bool):
        self.mean = torch.zeros(d_in, d_in) if hessian else torch.zeros(d_in)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x (..., d_in)."""
        x = x.flatten(0, -2).float()
        self.mean = self.mean.to(x.device)
        old, self.tokens = self.tokens, self.tokens + len(x)
        if self.mean.ndim == 2:
            self.mean.addmm_(x.T, x, beta=old / self.tokens, alpha=1 / self.tokens)
        else:
            self.mean.mul_(old / self.tokens).add_(x.square().sum(0), alpha=1 / self.tokens)

    def stats(self) -> LayerStats:
        if self.mean.ndim == 1:
            return LayerStats(None, self.mean, self.tokens)
        return LayerStats(self.mean, self.mean.diagonal().clone(), self.tokens)


@dataclass(frozen=True)
class PerGroup:
    """Keep n of every m consecutive inputs of each output; m divides d_in."""

    n: int
    m: int

    def mask(self, scores: Tensor) -> Tensor:
        """bool (d_out, d_in): the largest of scores (d_out, d_in); of equals those that come first."""
        return mask_n_m(scores, self.n, self.m)

    def within(self, columns: range, d_in: int) -> PerGroup:
        """The rule for some columns of a matrix of d_in: those of whole groups."""
        return self


@dataclass(frozen=True)
class PerRow:
    """Keep `count` weights of each output, 0..d_in."""

    count: int

    def mask(self, scores: Tensor) -> Tensor:
        """bool (d_out, d_in): the largest of scores (d_out, d_in) in each row; of equals those that come first."""
        return largest(scores, self.count)

    def within(self, columns: range, d_in: int) -> PerRow:
        """The rule for some columns of a matrix of d_in; over columns that follow one another the counts add up."""
        return PerRow(share(self.count, columns, d_in))


@dataclass(frozen=True)
class PerMatrix:
    """Keep `count` weights of the whole matrix, 0..d_out d_in."""

    count: int

    def mask(self, scores: Tensor) -> Tensor:
        """bool (d_out, d_in): the largest of scores (d_out, d_in); of equals the first in row-major order."""
        return largest(scores.flatten(), self.count).view(scores.shape)

    def within(self, columns: range, d_in: int) -> PerMatrix:
        """As `PerRow.within`."""
        return PerMatrix(share(self.count, columns, d_in))


Keep = PerGroup | PerRow | PerMatrix


def mask_n_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n largest of every m consecutive scores along the last dimension; ties go to the first. bool."""
    return largest(scores.unflatten(-1, (-1, m)), n).flatten(-2)


def largest(scores: Tensor, count: int) -> Tensor:
    """bool: the `count` largest scores along the last dimension; ties go to the first."""
    keep = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, keep, True)


def share(count: int, columns: range, d_in: int) -> int:
    """Of `count` weights kept in d_in columns, those in `columns`: the difference of two cumulative shares, each rounded
    half up, so that it never exceeds what the columns hold."""
    before, after = ((2 * count * end + d_in) // (2 * d_in) for end in (columns.start, columns.stop))
    return after - before


def sanitize(second_moment: Tensor) -> Tensor:
    """Importance d (d_in,): non-finite or non-positive entries become the mean of the valid ones, and 1 where all are 0,
    as behind a layer that is zero."""
    valid = torch.isfinite(second_moment) & (second_moment > 0)
    if not valid.any():
        if second_moment.any():
            raise UserError("the calibration inputs of a layer are not finite; use other calibration data.")
        return torch.ones_like(second_moment)
    return torch.where(valid, second_moment, second_moment[valid].mean())


def normalize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NoWag: columns to unit norm, then rows. Returns (W_bar, r1 (d_in,), r2 (d_out,)), W = diag(r2) W_bar diag(r1)."""
    r1 = weight.norm(dim=0) + EPS
    W1 = weight / r1
    r2 = W1.norm(dim=1) + EPS
    return W1 / r2[:, None], r1, r2


def magnitude(weight: Tensor, stats: LayerStats, keep: Keep) -> Tensor:
    """Keeps the largest |W_ij|."""
    return weight * keep.mask(weight.abs())


def wanda(weight: Tensor, stats: LayerStats, keep: Keep) -> Tensor:
    """Keeps the largest |W_ij| sqrt(mean x_j^2)."""
    return weight * keep.mask(weight.abs() * stats.second_moment.sqrt())


def nowag(weight: Tensor, stats: LayerStats, keep: Keep) -> Tensor:
    """NoWag-P: keeps the largest d_j W_bar_ij^2; W's values are unchanged."""
    return weight * keep.mask(normalize(weight)[0].square() * sanitize(stats.second_moment))


def sparsegpt(weight: Tensor, stats: LayerStats, keep: Keep) -> Tensor:
    """SparseGPT: prunes column by column and moves each error onto the columns that follow.

    H = 2 mean x x^T + damping; U = upper Cholesky factor of H^-1. At each group of m columns, or for the other rules at
    each chunk of 128, the entries with the largest W_ij^2 / U_jj^2 of the *updated* weights are kept; a chunk keeps its
    share of the count. Each column then passes err = (w - q) / U_jj on: W[:, j:] -= err U[j, j:]. Updates beyond a chunk
    are applied at its end. Inputs that are always zero lose their weights, whatever the rule.
    """
    H = 2 * stats.hessian
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.to(H.dtype))
    W = torch.where(dead, 0.0, weight)
    U = inverse_cholesky(H, DAMPING)
    columns = W.T.contiguous()  # (d_in, d_out): a column of W is a contiguous row here
    d_in = len(columns)
    together = keep.m if isinstance(keep, PerGroup) else LAZY_CHUNK  # columns of one choice
    chunk_size = max(LAZY_CHUNK // together, 1) * together
    for start in range(0, d_in, chunk_size):
        end = min(start + chunk_size, d_in)
        chunk = columns[start:end]  # a view
        errors = torch.zeros_like(chunk)
        U_chunk = U[start:end, start:end]
        scale = U_chunk.diagonal().square()
        for j in range(end - start):
            if j % together == 0:
                scores = (chunk[j : j + together].square() / scale[j : j + together, None]).T
                chosen = range(start + j, start + j + scores.shape[1])
                kept = keep.within(chosen, d_in).mask(scores).T  # (columns of the choice, d_out)
            w = chunk[j]
            q = w * kept[j % together]
            error = (w - q) / U_chunk[j, j]
            chunk[j + 1 :].addr_(U_chunk[j, j + 1 :], error, alpha=-1)
            chunk[j] = q
            errors[j] = error
        columns[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return columns.T.contiguous()


def inverse_cholesky(H: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + damping)^-1; the damping grows tenfold, at most five times, until it exists."""
    mean = H.diagonal().mean()
    for power in range(6):
        damped = H.clone()
        damped.diagonal().add_(damping * 10**power * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and torch.isfinite(U).all():
                return U
    raise UserError("a layer's Hessian has no Cholesky factor even with heavy damping; use more calibration data.")


def rank_correction(weight: Tensor, pruned: Tensor, stats: LayerStats, rank: int) -> Tensor:
    """pruned + the best rank-r approximation of (W - W_hat) diag(sqrt d), unscaled after: r (d_out + d_in) parameters."""
    root = sanitize(stats.second_moment).sqrt()
    left, singular, right = torch.linalg.svd((weight - pruned) * root, full_matrices=False)
    return pruned + (left[:, :rank] * singular[:rank]) @ right[:rank] / root
