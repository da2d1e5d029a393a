"""ARMOR on random matrices: the steps of its method, against definitions and brute force."""

import itertools
import json

import pytest
import torch
from tiny_models import make_base

from recipes.armor import Armor, group_of, wrapper_overhead
from recipes.armor.evidence import checks_table
from recipes.armor.factorisation import (
    block_diag_product,
    denormalise,
    gradients,
    group_view,
    init_nowag,
    left,
    of_core,
    optimise,
    pick_groups,
    rebalance,
    refit,
    refit_B,
    ridge,
    right,
    sparse_core_step,
)
from recipes.common.core.cli import main, parse
from recipes.common.parts.pruners import LayerStats, PerGroup, normalize, nowag
from zoo.errors import UserError
from zoo.kernels.bitmask_linear.reference import unpack_bitmask

pytestmark = pytest.mark.slow


def problem(d_out=32, d_in=48, seed=0):
    """A weight, an importance with outlier features, and correlated inputs' Hessian."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=g) / d_in**0.5
    x = torch.randn(512, d_in, generator=g) @ (mix + torch.eye(d_in)) * torch.rand(d_in, generator=g).add(0.1).pow(2)
    W = torch.randn(d_out, d_in, generator=g)
    H = x.T @ x / len(x)
    return W, LayerStats(hessian=H, second_moment=H.diagonal().clone(), tokens=len(x))


def start(W, stats, b_out=16, b_in=16, n=2, m=4):
    W_bar, r1, r2 = normalize(W)
    return init_nowag(W_bar, stats.second_moment, b_out, b_in, n, m), W_bar, stats.second_moment, r1, r2


def loss(f, W_bar, d):
    return ((block_diag_product(f.A, f.S, f.B) - W_bar).square() * d).sum() / (W_bar.square() * d).sum()


def options(**flags):
    recipe = Armor(**flags)
    recipe.check()
    return recipe


def randomise(f, seed=0):
    g = torch.Generator().manual_seed(seed)
    f.A += 0.3 * torch.randn(f.A.shape, generator=g)
    f.B += 0.3 * torch.randn(f.B.shape, generator=g)
    return f


def test_init_is_nowag():
    W, stats = problem()
    f, W_bar, d, r1, r2 = start(W, stats)
    torch.testing.assert_close(
        block_diag_product(*denormalise(f, r1, r2)), nowag(W, stats, PerGroup(2, 4)), atol=1e-6, rtol=0
    )
    dropped = (W_bar.square() * d)[~f.M].sum() / (W_bar.square() * d).sum()
    torch.testing.assert_close(loss(f, W_bar, d), dropped)


def test_block_one_is_stationary():
    W, stats = problem()
    f, W_bar, d, *_ = start(W, stats, 1, 4)
    f.B = torch.ones(W.shape[1], 1, 1)  # b = 1 on both sides: scalars
    P = right(f.S, f.B)
    G = 2 * d * (left(f.A, P) - W_bar)
    grad_A, grad_S, grad_B = gradients(f.A, f.S, f.B, P, G)
    assert grad_A.abs().max() == 0 and grad_B.abs().max() == 0 and (grad_S * f.M).abs().max() == 0


def test_identity_wrappers_cannot_improve_the_mask_but_random_ones_can():
    W, stats = problem()
    for wrappers, improves in ((False, False), (True, True)):
        f, W_bar, d, *_ = start(W, stats)
        if wrappers:
            randomise(f)
        before = loss(f, W_bar, d)
        g = torch.Generator().manual_seed(0)
        for _ in range(200):
            P = right(f.S, f.B)
            E = left(f.A, P) - W_bar
            sparse_core_step(f, E, P, d, pick_groups(torch.zeros_like(E), f, 1, "uniform", g))
        assert (loss(f, W_bar, d) < 0.9 * before) == improves
        assert loss(f, W_bar, d) <= before * (1 + 1e-5)


def test_sparse_core_step_is_the_exact_minimum():
    """Against lstsq over the 6 supports on the explicit design matrix; one call for all blocks equals one by one."""
    W, stats = problem()
    f, W_bar, d, *_ = start(W, stats)
    randomise(f)
    picks = torch.randint(0, 16 * 4, (2, 3, 1), generator=torch.Generator().manual_seed(1))
    expected = f.S.clone()
    for m, n in itertools.product(range(2), range(3)):
        r, g = divmod(picks[m, n, 0].item(), 4)
        root_d = d[16 * n : 16 * n + 16].sqrt()
        S_block = f.S[16 * m : 16 * m + 16, 16 * n : 16 * n + 16].clone()
        S_block[r, 4 * g : 4 * g + 4] = 0
        target = W_bar[16 * m : 16 * m + 16, 16 * n : 16 * n + 16] - f.A[m] @ S_block @ f.B[n]
        best = None
        for support in itertools.combinations(range(4), 2):
            design = torch.stack(
                [(torch.outer(f.A[m][:, r], f.B[n][4 * g + t]) * root_d).flatten() for t in support], 1
            )
            solution = torch.linalg.lstsq(design.double(), (target * root_d).flatten().double()).solution
            error = (design.double() @ solution - (target * root_d).flatten()).square().sum()
            if best is None or error < best[0]:
                best = (error, support, solution.float())
        values = torch.zeros(4)
        values[list(best[1])] = best[2]
        expected[16 * m + r, 16 * n + 4 * g : 16 * n + 4 * g + 4] = values
    P = right(f.S, f.B)
    E = left(f.A, P) - W_bar
    sparse_core_step(f, E, P, d, picks)
    torch.testing.assert_close(f.S, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(P, right(f.S, f.B), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(E, left(f.A, P) - W_bar, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_several_groups_at_once_equal_one_after_another(pattern):
    W, stats = problem()
    several, W_bar, d, *_ = start(W, stats, n=pattern[0], m=pattern[1])
    randomise(several)
    single = several.clone()
    picks = torch.randint(0, 16 * 16 // pattern[1], (2, 3, 6), generator=torch.Generator().manual_seed(2))
    picks[..., 3] = picks[..., 1]  # the same group twice
    before = loss(several, W_bar, d)
    P = right(several.S, several.B)
    E = left(several.A, P) - W_bar
    sparse_core_step(several, E, P, d, picks)
    torch.testing.assert_close(E, left(several.A, right(several.S, several.B)) - W_bar, atol=1e-5, rtol=1e-4)
    for i in range(6):
        P = right(single.S, single.B)
        E = left(single.A, P) - W_bar
        sparse_core_step(single, E, P, d, picks[..., i : i + 1])
    torch.testing.assert_close(several.S, single.S, atol=1e-4, rtol=1e-3)
    assert torch.equal(several.M, single.M)
    assert loss(several, W_bar, d) < before
    assert (group_view(several.M, several).sum(-1) == pattern[0]).all()
    assert not several.S[~several.M].any()


def test_gradients_are_those_of_autograd():
    W, stats = problem()
    f, W_bar, d, *_ = start(W, stats)
    randomise(f)
    A, S, B = (t.clone().requires_grad_() for t in (f.A, f.S, f.B))
    ((torch.block_diag(*A) @ S @ torch.block_diag(*B) - W_bar).square() * d).sum().backward()
    P = right(f.S, f.B)
    ours = gradients(f.A, f.S, f.B, P, 2 * d * (left(f.A, P) - W_bar))
    for mine, theirs in zip(ours, (A.grad, S.grad, B.grad), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("continuous", ["gd", "als"])
def test_provable_modes_never_rise(continuous):
    W, stats = problem()
    f, W_bar, d, *_ = start(W, stats)
    previous = loss(f, W_bar, d)
    first = previous
    for step in range(30):
        optimise(f, W_bar, d, options(iters=1, continuous=continuous), torch.Generator().manual_seed(step))
        now = loss(f, W_bar, d)
        assert now <= previous * (1 + 1e-5)
        previous = now
    assert now < (0.9 if continuous == "gd" else 0.7) * first


@pytest.mark.parametrize("select", ["l1", "l2", "linf", "greedy", "uniform"])
def test_best_iterate_is_returned(select):
    """A learning rate that diverges must still not end above its start, and a sane one must end well below."""
    W, stats = problem()
    for lr, bound in ((10.0, 1.0), (1e-2, 0.8)):
        f, W_bar, d, *_ = start(W, stats)
        before = loss(f, W_bar, d).item()
        first, final = optimise(f, W_bar, d, options(iters=60, lr=lr, select=select), torch.Generator().manual_seed(0))
        assert first == pytest.approx(before, rel=1e-5)
        assert final == pytest.approx(loss(f, W_bar, d).item(), rel=1e-3)
        assert final <= bound * first
        assert (group_view(f.M, f).sum(-1) == 2).all() and not f.S[~f.M].any()


def test_zero_iterations_is_nowag():
    W, stats = problem()
    recipe = options(block="16", iters=0, refit="none", dtype="float32")
    packed = recipe.compress(None, 0, "x", W, stats)["armor"]
    torch.testing.assert_close(packed.dense, nowag(W, stats, PerGroup(2, 4)), atol=1e-6, rtol=0)


def test_gains_grow_with_the_block_and_need_both_steps():
    W, stats = problem(64, 128)
    finals = {}
    for b in (4, 16, 64):
        f, W_bar, d, *_ = start(W, stats, b, b)
        first, finals[b] = optimise(f, W_bar, d, options(iters=150, lr=3e-3), torch.Generator().manual_seed(0))
    assert finals[64] < finals[16] < finals[4] < first
    assert finals[64] < 0.45 * first


def test_overhead_of_the_papers_models():
    """Qwen2.5: (hidden, ffn, kv width) of 7B, 14B, 32B, 72B; the paper prints +4.95, 4.17, 3.44 and 2.4 %."""
    for hidden, ffn, kv, expected in (
        (3584, 18944, 512, 4.95),
        (5120, 13824, 1024, 4.17),
        (5120, 27648, 1024, 3.44),
        (8192, 29568, 1024, 2.40),
    ):
        shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
        extra = sum(wrapper_overhead(o, i, 128, 128) * o * i for o, i in shapes)
        assert 100 * extra / sum(o * i for o, i in shapes) == pytest.approx(expected, abs=0.005)


def test_packed_tensors_give_the_dense_weight_back():
    W, stats = problem()
    recipe = options(block="16", iters=20, dtype="float32")
    variant = recipe.compress(None, 0, "x", W, stats)["armor"]
    t = variant.tensors
    S = unpack_bitmask(t["core_values"], t["core_mask"], W.shape[1])
    assert (S.view(32, 12, 4).ne(0).sum(-1) <= 2).all()
    torch.testing.assert_close(block_diag_product(t["wrap_out"], S, t["wrap_in"]), variant.dense, atol=1e-5, rtol=1e-4)


def test_refit_lowers_the_output_error_each_time():
    W, stats = problem(64, 128)
    f, W_bar, d, r1, r2 = start(W, stats)
    optimise(f, W_bar, d, options(iters=50), torch.Generator().manual_seed(0))
    A, S, B = denormalise(f, r1, r2)
    H = stats.hessian + torch.diag(ridge(stats.hessian))

    def error(A, S, B):
        delta = block_diag_product(A, S, B) - W
        return torch.sum(delta @ H * delta).item()

    def fit(what, steps=30, rounds=1):
        recipe = options(refit=what, refit_steps=steps, refit_rounds=rounds)
        return refit(W, stats.hessian, A, S, f.M, B, PerGroup(2, 4), recipe)

    (A1, *_), (A2, S2, M2, B2) = fit("A"), fit("A+S")
    assert torch.equal(A1, A2) and torch.equal(B, B2) and torch.equal(M2, f.M)
    assert error(A, S, B) > error(A1, S, B) > error(A1, S2, B)
    assert not S2[~f.M].any()
    rounds = [error(A, S, B) for A, S, _, B in (fit("A+S+B", rounds=n) for n in (1, 2, 4))]
    assert error(A1, S2, B) > 1.05 * rounds[0] and rounds[0] > rounds[1] > rounds[2]
    masks = [error(A, S, B) for A, S, _, B in (fit("M+A+S+B", rounds=n) for n in (1, 2, 4))]
    assert error(A, S, B) > masks[0] > masks[1] > masks[2]
    _, S4, M4, _ = fit("M+A+S+B", rounds=2)
    assert (M4.view(64, 32, 4).sum(-1) == 2).all() and not S4[~M4].any() and not torch.equal(M4, f.M)
    A3, S3, *_ = fit("A+S", steps=2000)
    delta = block_diag_product(A3, S3, B) - W  # the gradient by the kept entries vanishes at the minimum
    gradient = left(A3.transpose(1, 2), right(delta @ H, B.transpose(1, 2))) * f.M
    reference = left(A3.transpose(1, 2), right(W @ H, B.transpose(1, 2))) * f.M
    assert gradient.norm() < 1e-3 * reference.norm()


def test_a_refit_mask_that_leads_nowhere_is_not_taken(monkeypatch):
    W, stats = problem(64, 128)
    f, W_bar, d, r1, r2 = start(W, stats)
    optimise(f, W_bar, d, options(iters=20), torch.Generator().manual_seed(0))
    A, S, B = denormalise(f, r1, r2)
    keep, calls = PerGroup(2, 4), []

    def worse(W, H, more, A, S, M, B, keep):
        calls.append(1)
        mask = keep.mask(-S.abs())
        return W * mask, mask

    monkeypatch.setattr("recipes.armor.factorisation.refit_mask", worse)
    plain, found = (refit(W, stats.hessian, A, S, f.M, B, keep, options(refit=what)) for what in ("A+S+B", "M+A+S+B"))
    assert all(map(torch.equal, plain, found)) and len(calls) == 1


@pytest.mark.parametrize("dead", [0, 1])
def test_a_matrix_of_zeros_and_wrappers_without_inverse_refit_to_themselves(dead):
    W, stats = problem(64, 128)
    f, *_ = start(W, stats)
    A, S, B = f.A * (1 - dead), f.S * 0, f.B
    fitted = refit(W * 0, stats.hessian, A, S, f.M, B, PerGroup(2, 4), options())
    assert all(torch.isfinite(part).all() for part in fitted) and not fitted[1].any()
    assert (fitted[2].view(64, 32, 4).sum(-1) == 2).all()


def test_refit_of_B_is_exact_where_it_converges():
    """Against the normal equations of every block of B together, solved densely."""
    W, stats = problem(32, 16)
    f, *_ = start(W, stats, 8, 8)
    randomise(f)
    H, more = stats.hessian, ridge(stats.hessian)
    Hd = H + torch.diag(more)
    torch.testing.assert_close(of_core(H, more, f.B), left(f.B, right(Hd, f.B.transpose(1, 2))))
    B = refit_B(W @ Hd, H, more, f.A, f.S, f.B, steps=500)
    T, L = left(f.A, f.S).double(), torch.linalg.cholesky(Hd.double())
    columns = []  # one for each entry of B: what it adds to A S B L
    for n, i, j in itertools.product(range(2), range(8), range(8)):
        unit = torch.zeros(16, 16, dtype=torch.float64)
        unit[8 * n + i, 8 * n + j] = 1
        columns.append((T @ unit @ L).flatten())
    solution = torch.linalg.lstsq(torch.stack(columns, 1), (W.double() @ L).flatten()[:, None]).solution
    exact = solution.view(2, 8, 8).float()
    torch.testing.assert_close(
        block_diag_product(f.A, f.S, B), block_diag_product(f.A, f.S, exact), atol=1e-3, rtol=1e-3
    )


def test_rebalance_moves_powers_of_two_only():
    W, stats = problem()
    f, *_ = start(W, stats)
    randomise(f)
    A, S, B = f.A.clone(), f.S, f.B.clone()
    A[0] *= 3e6
    B[1] *= 1e-5
    A2, S2, B2 = rebalance(A, S, B)
    assert A2.abs().amax((1, 2)).max() <= 2**8 and B2.abs().amax((1, 2)).min() >= 2**-8
    assert torch.equal(block_diag_product(A2, S2, B2), block_diag_product(A, S, B))


def test_same_seed_same_bits():
    W, stats = problem()
    recipe = options(block="16", iters=30)
    once, again = (recipe.compress(None, 0, "layer", W, stats)["armor"] for _ in range(2))
    assert all(torch.equal(once.tensors[k], again.tensors[k]) for k in once.tensors)
    other = recipe.compress(None, 0, "another layer", W, stats)["armor"]
    assert not torch.equal(once.dense, other.dense)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pattern", "4:2"], "N:M with 0 < N < M"),
        (["--pattern", "banana"], "N:M with 0 < N < M"),
        (["--block", "48"], "power of two"),
        (["--iters", "-1"], "--iters -1"),
        (["--lr", "0"], "--lr"),
        (["--select", "best"], "--select best"),
        (["--groups-per-block", "0"], "--groups_per_block 0"),
        (["--max-overhead", "2"], "--max_overhead 2"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    with pytest.raises((UserError, SystemExit), match=None) as caught:
        parse("armor", flags).check()
    if caught.type is UserError:
        assert message in str(caught.value)
    else:
        assert caught.value.code == 2


def test_bad_shapes_are_named_before_any_work():
    recipe = options(block="128")
    with pytest.raises(UserError, match=r"k_proj: block 128 does not divide its 192 outputs"):
        recipe.check_matrix("k_proj", 192, 576)
    with pytest.raises(UserError, match="not a multiple of 4"):
        options().check_matrix("x", 64, 66)
    assert options(block="auto", max_overhead=0.2).blocks(192, 576) == (16, 16)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    (folder / "calibration.txt").write_text("some plain words to calibrate on, again and again. " * 60)
    base = make_base(folder / "model", "llama")
    flags = {"model": base, "calibration": folder / "calibration.txt", "output": folder / "out", "nsamples": 2}
    flags |= {"seqlen": 32, "eval_windows": 2, "eval_seqlen": 32, "tasks": "none", "block": 16, "iters": 6}
    arguments = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    main(["armor", *arguments, "--curve", "0", "3", "9", "--baselines", "sparsegpt", "gptq-4"])
    return json.loads((folder / "out" / "report.json").read_text())


def test_the_report_shows_quality_against_minutes(report):
    table = report["tables"]["Quality against minutes"]
    rows = {row[0].strip("*"): [cell.strip("*") for cell in row[1:]] for row in table["rows"]}
    own = ["armor, 0 iterations", "armor, 3 iterations", "armor, 6 iterations"]
    assert rows.keys() == {*own, "armor-no-refit", "sparsegpt", "gptq-4"}
    losses = [float(rows[name][1]) for name in own]
    assert losses[0] > losses[1] > losses[2] and rows["sparsegpt"][1] == ""
    errors = {name: float(row[2]) for name, row in rows.items()}
    assert errors["armor, 6 iterations"] < errors["armor-no-refit"]
    assert errors["armor, 6 iterations"] <= errors["armor, 0 iterations"]  # to the four digits shown
    minutes = [float(row[1].strip("*")) for row in table["rows"]]
    assert minutes == sorted(minutes)
    (points,) = report["sweeps"]["Perplexity against minutes"]["series"].values()
    assert len(points) == 3 and [p["x"] for p in points] == sorted(p["x"] for p in points)
    assert points[-1]["metrics"]["perplexity/A"]["value"] == report["compressed"]["perplexity/A"]["value"]
    assert report["baselines"].keys() == {"armor-no-refit", "sparsegpt", "gptq-4"}  # the points are no baselines


def test_four_bits_are_a_baseline_of_fewer_bytes(report):
    size = report["size"]
    assert size["baselines"]["gptq-4"] < size["baselines"]["sparsegpt"] < size["compressed_bytes"]
    errors = {
        row[0]: float(row[3]) for row in report["tables"]["Quality against minutes"]["rows"] if "armor," not in row[0]
    }
    assert errors["gptq-4"] < errors["sparsegpt"]
    assert [group_of(d) for d in (576, 1536, 96, 48, 64)] == [64, 64, 32, -1, 64]


def test_checks_say_what_is_met():
    def metrics(*values):
        return {f"perplexity/{name}": {"value": value} for name, value in zip("ABC", values, strict=True)}

    found = {"dense": metrics(20, 22, 14), "armor": metrics(30, 36, 31), "armor-no-refit": metrics(44, 46, 30)}
    table = checks_table(found | {"sparsegpt": metrics(80, 35, 96)}, "armor")
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert table["header"] == ["expected of perplexity", "A", "B", "C"]
    assert rows["the refit closes 50 % of the gap to dense"] == ["58 %, met", "42 %, **not met**", "-6 %, **not met**"]
    assert [cell.endswith(" met") for cell in rows["armor below sparsegpt"]] == [True, False, True]
    assert rows.keys() == {"the refit closes 50 % of the gap to dense", "dense below armor", "armor below sparsegpt"}
