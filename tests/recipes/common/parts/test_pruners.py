"""The pruners under each rule: against brute force in float64, their own optimality, exact counts, awkward inputs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.common.parts.pruners import (
    LayerStats,
    PerGroup,
    PerMatrix,
    PerRow,
    StatsAccumulator,
    magnitude,
    mask_n_m,
    normalize,
    nowag,
    rank_correction,
    sanitize,
    sparsegpt,
    wanda,
)
from zoo.errors import UserError


def correlated(d_out=24, d_in=32, tokens=400, seed=0):
    """A weight and the statistics of correlated inputs with outlier features."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in // 4, generator=g) @ torch.randn(d_in // 4, d_in, generator=g)
    x = (x + torch.randn(tokens, d_in, generator=g)) * torch.logspace(-1, 1, d_in)[torch.randperm(d_in, generator=g)]
    H = x.T @ x / tokens
    return torch.randn(d_out, d_in, generator=g), LayerStats(H, H.diagonal().clone(), tokens), x


def output_error(W, pruned, H):
    return torch.sum((pruned - W) @ H * (pruned - W)).item()


def brain_surgeon(w, H, n, m):
    """One row by the definition of optimal brain surgery, column by column in float64, removing columns from H^-1."""
    w, inverse = w.double().clone(), torch.linalg.inv(H.double())
    for j in range(len(w)):
        if j % m == 0:
            group = range(j, j + m)
            # U_jj^2 of the Cholesky factor is the j-th diagonal of the inverse once all columns before j are removed.
            reduced, scores = inverse.clone(), []
            for i in group:
                scores.append(w[i] ** 2 / reduced[i, i])
                reduced = reduced - torch.outer(reduced[:, i], reduced[i]) / reduced[i, i]
            drop = {j + i for i in sorted(range(m), key=lambda i: scores[i])[: m - n]}
        if j in drop:
            w = w - w[j] / inverse[j, j] * inverse[:, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # removed: it never counts again
    return w


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_sparsegpt_is_sequential_brain_surgery(pattern, monkeypatch):
    W, stats, _ = correlated()
    monkeypatch.setattr("recipes.common.parts.pruners.LAZY_CHUNK", 8)  # several chunks, so lazy updates count
    ours = sparsegpt(W, stats, PerGroup(*pattern))
    H = 2 * stats.hessian
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    expected = torch.stack([brain_surgeon(row, H, *pattern) for row in W])
    torch.testing.assert_close(ours, expected.float(), atol=2e-3, rtol=2e-3)


def column_by_column(W, H, choice, chunk):
    """SparseGPT in float64 with no lazy updates. choice(first, scores) -> bool (d_out, columns); it decides on `chunk`
    columns at a time, by the weights as they then are."""
    W, U = W.double().clone(), torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    for j in range(W.shape[1]):
        if j % chunk == 0:
            kept = choice(j, W[:, j : j + chunk] ** 2 / U.diagonal()[j : j + chunk] ** 2)
        error = torch.where(kept[:, j % chunk], 0.0, W[:, j]) / U[j, j]
        W[:, j] = torch.where(kept[:, j % chunk], W[:, j], 0.0)
        W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    return W


def best(scores, count):
    """The `count` largest of a list, of equals the first: a list of bool."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in order for i in range(len(scores))]


@pytest.mark.parametrize("keep", [PerGroup(2, 4), PerGroup(1, 6), PerRow(13), PerRow(30), PerMatrix(317), PerMatrix(5)])
def test_sparsegpt_chooses_within_groups_or_chunks(keep, monkeypatch):
    """36 columns in chunks of 8, the last of 4; what is kept up to column e is count e / 36, rounded."""
    W, stats, _ = correlated(24, 36)
    monkeypatch.setattr("recipes.common.parts.pruners.LAZY_CHUNK", 8)

    def choice(first, scores):
        if isinstance(keep, PerGroup):
            return torch.tensor([best(row, keep.n) for row in scores.tolist()])
        before, after = (int(keep.count * end / 36 + 0.5) for end in (first, first + scores.shape[1]))
        if isinstance(keep, PerRow):
            return torch.tensor([best(row, after - before) for row in scores.tolist()])
        return torch.tensor(best(scores.flatten().tolist(), after - before)).view(scores.shape)

    H = 2 * stats.hessian
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    expected = column_by_column(W, H, choice, keep.m if isinstance(keep, PerGroup) else 8)
    ours = sparsegpt(W, stats, keep)
    assert torch.equal(ours != 0, expected != 0)
    torch.testing.assert_close(ours, expected.float(), atol=2e-3, rtol=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rules_keep_exact_counts_of_the_largest_and_of_equals_the_first(data):
    d_out, groups, m = (data.draw(st.integers(1, 5)) for _ in range(3))
    d_in = groups * m
    values = st.lists(st.integers(-1, 2), min_size=d_out * d_in, max_size=d_out * d_in)
    scores = torch.tensor(data.draw(values)).view(d_out, d_in).float()
    n, per_row, all_in_all = (data.draw(st.integers(0, most)) for most in (m, d_in, d_out * d_in))
    rows = scores.tolist()
    expected = {
        PerGroup(n, m): [sum((best(row[g : g + m], n) for g in range(0, d_in, m)), []) for row in rows],
        PerRow(per_row): [best(row, per_row) for row in rows],
        PerMatrix(all_in_all): torch.tensor(best(sum(rows, []), all_in_all)).view(d_out, d_in).tolist(),
    }
    for keep, mask in expected.items():
        assert keep.mask(scores).tolist() == mask
        assert keep.mask(scores.T.contiguous().T).tolist() == mask  # whatever lies next to what in memory


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(0, 10**9))
def test_shares_of_chunks_add_up_and_fit(d_out, d_in, chunk, choice):
    chunks = [range(first, min(first + chunk, d_in)) for first in range(0, d_in, chunk)]
    row, matrix = choice % (d_in + 1), choice % (d_out * d_in + 1)
    per_row = [PerRow(row).within(columns, d_in).count for columns in chunks]
    assert sum(per_row) == row and all(0 <= n <= len(c) for n, c in zip(per_row, chunks, strict=True))
    assert all(abs(n - row * len(c) / d_in) <= 1 for n, c in zip(per_row, chunks, strict=True))
    whole = [PerMatrix(matrix).within(columns, d_in).count for columns in chunks]
    assert sum(whole) == matrix and all(0 <= n <= d_out * len(c) for n, c in zip(whole, chunks, strict=True))


@pytest.mark.parametrize("prune", [magnitude, wanda, nowag, sparsegpt])
@pytest.mark.parametrize("keep", [PerRow(11), PerMatrix(100), PerRow(0), PerMatrix(0), PerRow(32), PerMatrix(24 * 32)])
def test_counts_per_row_and_per_matrix_are_met(prune, keep):
    W, stats, _ = correlated()
    kept = prune(W, stats, keep) != 0
    if isinstance(keep, PerRow):
        assert (kept.sum(1) == keep.count).all()
    else:
        assert kept.sum() == keep.count
        assert keep.count in (0, kept.numel()) or len(set(kept.sum(1).tolist())) > 1  # rows differ
    zeros = prune(torch.zeros(24, 32), stats, keep)
    assert torch.equal(zeros, torch.zeros(24, 32))


def test_sparsegpt_without_correlation_is_magnitude():
    W, stats, _ = correlated()
    plain = LayerStats(torch.eye(32), torch.ones(32), 1)
    torch.testing.assert_close(sparsegpt(W, plain, PerGroup(2, 4)), magnitude(W, plain, PerGroup(2, 4)))


def test_errors_are_ordered_on_correlated_inputs_with_outliers():
    W, stats, _ = correlated(64, 128, 2000)
    errors = [
        output_error(W, prune(W, stats, PerGroup(2, 4)), stats.hessian) for prune in (sparsegpt, wanda, magnitude)
    ]
    assert errors[0] < 0.8 * errors[1] and errors[1] < errors[2]


@pytest.mark.parametrize("prune", [magnitude, wanda, nowag, sparsegpt])
def test_every_group_keeps_two_of_four_even_with_ties_and_zeros(prune):
    _, stats, _ = correlated()
    for W in (torch.ones(8, 32), torch.zeros(8, 32), torch.randint(-1, 2, (8, 32)).float()):
        pruned = prune(W, stats, PerGroup(2, 4))
        assert ((pruned != 0).view(8, 8, 4).sum(-1) <= 2).all() and torch.isfinite(pruned).all()
        assert torch.equal(pruned, prune(W, stats, PerGroup(2, 4)))
    assert torch.equal(mask_n_m(torch.ones(1, 8), 2, 4), torch.tensor([[True, True, False, False] * 2]))


def test_wanda_scores_ignore_the_scale_of_rows_and_see_that_of_inputs():
    W, stats, _ = correlated()
    scaled = wanda(W * torch.arange(1, 25)[:, None], stats, PerGroup(2, 4))
    assert torch.equal(scaled != 0, wanda(W, stats, PerGroup(2, 4)) != 0)
    assert not torch.equal(wanda(W, stats, PerGroup(2, 4)) != 0, magnitude(W, stats, PerGroup(2, 4)) != 0)


def test_nowag_keeps_values_and_is_the_best_mask_for_its_loss():
    W, stats, _ = correlated(2, 4)
    W_bar, r1, r2 = normalize(W)
    torch.testing.assert_close(r2[:, None] * W_bar * r1, W)
    pruned = nowag(W, stats, PerGroup(2, 4))
    assert torch.equal(pruned[pruned != 0], W[pruned != 0])
    cost = W_bar.square() * stats.second_moment
    for row in range(2):
        dropped = [cost[row, list(drop)].sum() for drop in itertools.combinations(range(4), 2)]
        assert cost[row][pruned[row] == 0].sum() == pytest.approx(min(dropped).item(), rel=1e-5)


def test_rank_correction_is_the_best_of_its_rank():
    W, stats, _ = correlated()
    pruned = magnitude(W, stats, PerGroup(2, 4))
    root = stats.second_moment.sqrt()
    tail = torch.linalg.svdvals((W - pruned) * root)
    for rank in (0, 3, 24):
        left = (W - rank_correction(W, pruned, stats, rank)) * root
        assert left.norm().item() == pytest.approx(tail[rank:].norm().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("keep", [PerGroup(2, 4), PerRow(16), PerMatrix(400)])
def test_dead_and_singular_inputs(keep):
    W, stats, x = correlated()
    x[:, 5] = 0
    x = x[:3]  # rank 3
    H = x.T @ x / 3
    pruned = sparsegpt(W, LayerStats(H, H.diagonal().clone(), 3), keep)
    assert torch.isfinite(pruned).all() and (pruned[:, 5] == 0).all()
    assert (pruned[:, :5] != 0).any() and (pruned[:, 6:] != 0).any()


def test_importance_of_dead_inputs_is_the_mean_of_the_others():
    assert sanitize(torch.tensor([4.0, 0.0, float("nan"), 2.0])).tolist() == [4, 3, 3, 2]
    assert sanitize(torch.zeros(4)).tolist() == [1, 1, 1, 1]  # behind a layer that is zero
    with pytest.raises(UserError, match="not finite"):
        sanitize(torch.tensor([0.0, float("inf")]))


def test_accumulated_moments_are_those_of_all_tokens():
    _, _, x = correlated(tokens=300)
    whole, diagonal = StatsAccumulator(32, hessian=True), StatsAccumulator(32, hessian=False)
    for part in x.view(10, 30, 32).split([1, 4, 5]):
        whole.add(part)
        diagonal.add(part)
    exact = (x.double().T @ x.double() / 300).float()
    torch.testing.assert_close(whole.stats().hessian, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(diagonal.stats().second_moment, exact.diagonal(), atol=1e-4, rtol=1e-4)
    assert whole.stats().tokens == 300 and diagonal.stats().hessian is None
