"""ARMOR's factorisation of one matrix, W_bar ~ A S B: steps 3 to 7 of `recipes.armor`, all arithmetic in fp32."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.common.parts.pruners import LayerStats, PerGroup, mask_n_m, sparsegpt
from zoo.errors import UserError

if TYPE_CHECKING:
    from recipes.armor import Armor

RIDGE = 1e-9  # added to the diagonal of the small normal equations of the sparse-core step
DAMPING = 0.01  # of the mean diagonal of H, as SparseGPT does
SHRINK = 0.3  # of H towards its diagonal: inputs of other texts are correlated otherwise
FP16_RANGE = 2.0**8  # wrapper blocks outside [1/range, range] hand a power of two to S
PATIENCE = 100  # iterations without progress before the loop stops


# ------------------------------------------------------------------------------------------- A S B and its pieces


@dataclass
class Factors:
    """A (d_out/b_out, b_out, b_out), B (d_in/b_in, b_in, b_in), S and M (d_out, d_in); n of every m entries of S kept."""

    A: Tensor
    S: Tensor
    M: Tensor
    B: Tensor
    n: int
    m: int

    def clone(self) -> Factors:
        return Factors(self.A.clone(), self.S.clone(), self.M.clone(), self.B.clone(), self.n, self.m)


def left(A: Tensor, X: Tensor) -> Tensor:
    """diag(A) X for X (d_out, d_in)."""
    blocks, b, _ = A.shape
    return torch.bmm(A, X.view(blocks, b, -1)).view_as(X)


def columns(X: Tensor, B: Tensor) -> Tensor:
    """X (d_out, d_in) as one strided matrix per block of columns: (d_in/b, d_out, b), no copy."""
    return X.view(X.shape[0], *B.shape[:2]).transpose(0, 1)


def right(X: Tensor, B: Tensor) -> Tensor:
    """X diag(B) for X (d_out, d_in)."""
    out = torch.empty_like(X)
    torch.bmm(columns(X, B), B, out=columns(out, B))
    return out


def block_diag_product(A: Tensor, S: Tensor, B: Tensor) -> Tensor:
    """A S B as a dense (d_out, d_in) matrix."""
    return left(A, right(S, B))


def gradients(A: Tensor, S: Tensor, B: Tensor, P: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of L by A, S (all entries, kept or not) and B, given P = S B and G = dL/d(ASB)."""
    blocks, b, _ = A.shape
    grad_A = torch.bmm(G.view(blocks, b, -1), P.view(blocks, b, -1).transpose(1, 2))  # G_m (SB)_m^T
    T = left(A.transpose(1, 2), G)  # A^T G
    grad_S = right(T, B.transpose(1, 2))  # A^T G B^T
    grad_B = torch.bmm(columns(S, B).transpose(1, 2), columns(T, B))  # S_n^T (A^T G)_n
    return grad_A, grad_S, grad_B


# --------------------------------------------------------------------------------------------------- steps 4 and 5


def init_nowag(W_bar: Tensor, d: Tensor, b_out: int, b_in: int, n: int, m: int) -> Factors:
    """Step 4: identity wrappers around the NoWag-P core."""
    d_out, d_in = W_bar.shape
    M = mask_n_m(W_bar.square() * d, n, m)
    A = torch.eye(b_out, device=W_bar.device).repeat(d_out // b_out, 1, 1)
    B = torch.eye(b_in, device=W_bar.device).repeat(d_in // b_in, 1, 1)
    return Factors(A, W_bar * M, M, B, n, m)


def optimise(
    f: Factors,
    W_bar: Tensor,
    d: Tensor,
    options: Armor,
    generator: torch.Generator,
    watch: Callable[[int, Factors, float], None] = lambda *_: None,
) -> tuple[float, float]:
    """Step 5, in place on `f`. Returns (L_init, L_final) with L_final <= L_init.

    watch(iterations done, best factors so far, their loss) is called before every iteration and at the end.
    Cost per iteration: six block-diagonal products, i.e. 3 forward equivalents of 2 (b_out + b_in) FLOP per weight.
    """
    Z = (W_bar.square() * d).sum()
    if Z == 0:  # a zero matrix is represented exactly
        return 0.0, 0.0
    weight = 2 * d / Z  # G = weight * E
    adam = None
    if options.continuous == "adam":
        adam = torch.optim.Adam([f.A, f.S, f.B], lr=options.lr, fused=True)
    P = right(f.S, f.B)
    E = left(f.A, P).sub_(W_bar)  # residual A S B - W_bar
    best, best_loss, first, previous, stalled = f, math.inf, math.nan, math.inf, 0
    for step in range(options.iters + 1):
        G = E * weight
        loss = torch.dot(G.flatten(), E.flatten()).item() / 2
        first = loss if step == 0 else first
        if loss < best_loss:
            best, best_loss = f.clone(), loss
        watch(step, best, best_loss)
        stalled = stalled + 1 if loss > (1 - 1e-6) * previous or loss > previous - 1e-8 else 0
        previous = loss
        if step == options.iters or stalled >= PATIENCE:
            break
        grad_A, grad_S, grad_B = gradients(f.A, f.S, f.B, P, G)
        if adam:
            cosine = 0.5 * (1 + math.cos(math.pi * step / options.iters)) if options.schedule == "cosine" else 1.0
            adam.param_groups[0]["lr"] = options.lr * cosine
            f.A.grad, f.S.grad, f.B.grad = grad_A, grad_S * f.M, grad_B
            adam.step()
        elif options.continuous == "gd":
            gradient_descent(f, W_bar, d, Z)
        else:
            alternating_least_squares(f, W_bar, d)
        P = right(f.S, f.B)
        E = left(f.A, P).sub_(W_bar)
        picks = pick_groups(grad_S, f, options.groups_per_block, options.select, generator)
        changed = sparse_core_step(f, E, P, d, picks)
        if adam:
            for moment in ("exp_avg", "exp_avg_sq"):
                adam.state[f.S][moment].masked_fill_(changed, 0)
    f.A, f.S, f.M, f.B = best.A, best.S, best.M, best.B
    return first, best_loss


def group_view(X: Tensor, f: Factors) -> Tensor:
    """X (d_out, d_in) -> (m, n, b_out, b_in/M, M): the groups of each block pair, as a view."""
    b_out, b_in = f.A.shape[1], f.B.shape[1]
    return X.view(len(f.A), b_out, len(f.B), b_in // f.m, f.m).transpose(1, 2)


def pick_groups(grad_S: Tensor, f: Factors, k: int, select: str, generator: torch.Generator) -> Tensor:
    """k groups per block pair, drawn with probability in proportion to their gradient's norm: (m, n, k) indices.

    An index counts groups row by row inside the block. The same group may be drawn twice; re-solving it is then void.
    """
    entries = group_view(grad_S.abs(), f).unbind(-1)  # reducing a dimension of M this way is several times faster
    if select == "uniform":
        mass = torch.ones_like(entries[0])
    elif select == "linf":
        mass = functools.reduce(torch.maximum, entries)
    elif select == "l2":
        mass = sum(entry.square() for entry in entries).sqrt()
    else:
        mass = sum(entries)
    mass = mass.flatten(2) + 1e-20  # a draw needs some mass
    if select == "greedy":
        return mass.topk(k, dim=-1).indices
    cumulative = mass.cumsum(-1)
    u = torch.rand(*mass.shape[:2], k, generator=generator, device=mass.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u).clamp_(max=mass.shape[-1] - 1)


def sparse_core_step(f: Factors, E: Tensor, P: Tensor, d: Tensor, picks: Tensor) -> Tensor:
    """Re-solves the picked groups of S exactly, one after another inside a block, all blocks at once.

    With a = A_m[:, r], B_g = the group's rows of B_n and R0 the residual without the group:
        u = B_g D R0^T a;   K_T = B_T D B_T^T + ridge;   T* = argmax_T u_T^T K_T^-1 u_T;   s_T* = -K_T*^-1 u_T* / |a|^2
    E = A S B - W_bar and P = S B are updated in place by rank-1 terms. Of E only a^T E is needed until the end, and
    for later groups it changes by (a_j . a_i) w_i: hence E is read once and written once for any number of groups.

    Args: picks (m, n, k) from `pick_groups`. Returns (d_out, d_in) bool: entries of groups whose support changed.
    """
    blocks_out, blocks_in, k = picks.shape
    b_out, b_in = f.A.shape[1], f.B.shape[1]
    q = b_in // f.m
    mi = torch.arange(blocks_out, device=E.device)[:, None]
    ni = torch.arange(blocks_in, device=E.device)[None, :]
    rows, groups = picks // q, picks % q
    a = f.A.transpose(1, 2)[mi[..., None], rows]  # (m, n, k, b_out)
    Bg = f.B.view(blocks_in, q, f.m, b_in)[ni[..., None], groups]  # (m, n, k, M, b_in)
    dn = d.view(blocks_in, b_in)
    Bd = Bg * dn[:, None, None, :]
    K = Bd @ Bg.transpose(-1, -2)  # (m, n, k, M, M)
    supports = torch.tensor(list(itertools.combinations(range(f.m), f.n)), device=E.device)  # (T, N)
    K_inv = inverse(K[..., supports[:, :, None], supports[:, None, :]])  # (m, n, k, T, N, N)
    gram = a @ a.transpose(-1, -2)  # (m, n, k, k)
    E_blocks = E.view(blocks_out, b_out, blocks_in, b_in).transpose(1, 2)
    y = a @ E_blocks  # a^T E: (m, n, k, b_in)
    S_groups, M_groups = group_view(f.S, f), group_view(f.M, f)
    P_rows = P.view(blocks_out, b_out, blocks_in, b_in).transpose(1, 2)
    changed = torch.zeros_like(f.M)
    changed_groups = group_view(changed, f)
    w = torch.empty_like(y)
    for i in range(k):
        at = (mi, ni, rows[..., i], groups[..., i])
        old, old_mask = S_groups[at], M_groups[at]  # (m, n, M)
        norm = gram[..., i, i]  # |a|^2
        u = (Bd[:, :, i] @ y[:, :, i, :, None])[..., 0] - norm[..., None] * (K[:, :, i] @ old[..., None])[..., 0]
        u_T = u[..., supports]  # (m, n, T, N)
        solved = (K_inv[:, :, i] @ u_T[..., None])[..., 0]
        choice = (u_T * solved).sum(-1).argmax(-1)  # the decrease of every support, times |a|^2
        T = supports[choice]  # (m, n, N)
        values = -solved.gather(2, choice[..., None, None].expand(-1, -1, 1, f.n))[:, :, 0] / (norm[..., None] + 1e-8)
        new = torch.zeros_like(old).scatter_(-1, T, values)
        new_mask = torch.zeros_like(old_mask).scatter_(-1, T, True)
        dead = (norm == 0)[..., None]  # a zero column of A: nothing to solve
        new, new_mask = torch.where(dead, old, new), torch.where(dead, old_mask, new_mask)
        S_groups[at], M_groups[at] = new, new_mask
        changed_groups[at] |= (new_mask != old_mask).any(-1, keepdim=True)
        w[:, :, i] = ((new - old)[..., None, :] @ Bg[:, :, i])[..., 0, :]
        y += gram[..., i, None] * w[:, :, i, None, :]
        P_rows[mi, ni, rows[..., i]] += w[:, :, i]
    E_blocks += a.transpose(-1, -2) @ w
    return changed


def inverse(K: Tensor) -> Tensor:
    """Inverse of small symmetric matrices (..., N, N) plus the ridge; 2x2 by the closed form."""
    N = K.shape[-1]
    K = K + RIDGE * torch.eye(N, device=K.device)
    if N != 2:
        return torch.cholesky_inverse(torch.linalg.cholesky(K))
    adjugate = torch.stack([K[..., 1, 1], -K[..., 0, 1], -K[..., 1, 0], K[..., 0, 0]], -1).view_as(K)
    determinant = K[..., 0, 0] * K[..., 1, 1] - K[..., 0, 1].square()
    return adjugate / determinant.clamp_min(RIDGE**2)[..., None, None]


def gradient_descent(f: Factors, W_bar: Tensor, d: Tensor, Z: Tensor) -> None:
    """The paper's theory: A, then B, then S, each one step of 1/beta, beta the local smoothness: L never rises."""

    def residual_gradients() -> tuple[Tensor, Tensor, Tensor]:
        P = right(f.S, f.B)
        return gradients(f.A, f.S, f.B, P, (left(f.A, P) - W_bar) * (2 * d / Z))

    P = right(f.S, f.B).view(len(f.A), f.A.shape[1], -1)
    beta = 2 / Z * torch.linalg.eigvalsh((P * d) @ P.transpose(1, 2))[:, -1]
    f.A -= residual_gradients()[0] / beta.clamp_min(1e-30)[:, None, None]

    AS = columns(left(f.A, f.S), f.B)  # (n, d_out, b_in)
    peak = d.view(len(f.B), -1).amax(1)
    beta = 2 / Z * torch.linalg.eigvalsh(AS.transpose(1, 2) @ AS)[:, -1] * peak
    f.B -= residual_gradients()[2] / beta.clamp_min(1e-30)[:, None, None]

    of_A = torch.linalg.eigvalsh(f.A.transpose(1, 2) @ f.A)[:, -1]
    of_B = torch.linalg.eigvalsh((f.B * d.view(len(f.B), 1, -1)) @ f.B.transpose(1, 2))[:, -1]
    beta = 2 / Z * of_A[:, None] * of_B  # (m, n): the block pairs of S are independent of each other
    beta = beta.repeat_interleave(f.A.shape[1], 0).repeat_interleave(f.B.shape[1], 1)
    f.S -= residual_gradients()[1] * f.M / beta.clamp_min(1e-30)


def alternating_least_squares(f: Factors, W_bar: Tensor, d: Tensor) -> None:
    """B and then A by their exact minimisers; d cancels out of B's normal equations, column by column."""
    AS = columns(left(f.A, f.S), f.B)
    f.B = solve_psd(AS.transpose(1, 2) @ AS, AS.transpose(1, 2) @ columns(W_bar, f.B), f.B)
    P = right(f.S, f.B).view(len(f.A), f.A.shape[1], -1)
    PD = (P * d).transpose(1, 2)
    W_blocks = W_bar.view(len(f.A), f.A.shape[1], -1)
    f.A = solve_psd(P @ PD, (W_blocks @ PD).transpose(1, 2), f.A.transpose(1, 2)).transpose(1, 2).contiguous()


def solve_psd(gram: Tensor, rhs: Tensor, current: Tensor) -> Tensor:
    """argmin_X tr(X^T gram X) - 2 tr(X^T rhs) per block, as a correction of `current`, so that a tiny ridge (which a
    singular gram needs) pulls towards the current value and the loss cannot rise."""
    ridge = 1e-7 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    for _ in range(8):  # equal rows can leave a gram that rounding makes indefinite
        gram_r = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram_r)
        if not failed.any():
            break
        ridge = torch.where(failed > 0, 10 * ridge, ridge)
    return current + torch.cholesky_solve(rhs - gram @ current, factor)


# --------------------------------------------------------------------------------------------------- steps 6 and 7


def denormalise(f: Factors, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step 6: folds r2 (d_out,) into the rows of A and r1 (d_in,) into the columns of B. Returns (A', S, B')."""
    return f.A * r2.view(len(f.A), -1, 1), f.S, f.B * r1.view(len(f.B), 1, -1)


def rebalance(A: Tensor, S: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves a power of two from blocks whose largest entry leaves [2^-8, 2^8] into S: exact, and safe in fp16."""

    def shift(blocks: Tensor) -> Tensor:
        peak = blocks.abs().amax((1, 2))
        outside = ((peak < 1 / FP16_RANGE) | (peak > FP16_RANGE)) & (peak > 0)
        return torch.where(outside, torch.exp2(torch.floor(torch.log2(peak.clamp_min(1e-38)))), 1.0)

    to_rows, to_columns = shift(A), shift(B)
    S = S * to_rows.repeat_interleave(A.shape[1])[:, None] * to_columns.repeat_interleave(B.shape[1])
    return A / to_rows[:, None, None], S, B / to_columns[:, None, None]


def refit(
    W: Tensor, H: Tensor | None, A: Tensor, S: Tensor, M: Tensor, B: Tensor, keep: PerGroup, options: Armor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step 7: lowers tr((ASB - W) H (ASB - W)^T), which no turn of it can raise. Returns (A, S, M, B).

    options.refit names the parts of a turn: M, a new mask (`refit_mask`); A, exactly; S and B, in `options.refit_steps`
    steps each. There are `options.refit_rounds` turns; one whose new mask leads nowhere better is done again without, and
    those that follow keep the mask. W (d_out, d_in), H (d_in, d_in) = mean x x^T, with `ridge` on its diagonal.
    """
    if H is None:
        raise UserError("--refit needs full Hessians, which this calibration did not collect; use --refit none.")
    parts, steps = options.refit.split("+"), options.refit_steps
    # H is the largest tensor here, half a gigabyte at d_in = 11008: the ridge is added to what it is multiplied with.
    more = ridge(H)
    WH = (W @ H).addcmul_(W, more)

    def turn(A: Tensor, S: Tensor, M: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A = refit_A(WH, H, more, A, S, B)
        if "S" in parts:
            S = refit_S(WH, H, more, A, S, M, B, steps)
        if "B" in parts:
            B = refit_B(WH, H, more, A, S, B, steps)
        return A, S, M, B

    def loss(A: Tensor, S: Tensor, M: Tensor, B: Tensor) -> float:
        delta = block_diag_product(A, S, B).sub_(W)
        return torch.sum((delta @ H).addcmul_(delta, more).mul_(delta)).item()

    found, masks = (A, S, M, B), "M" in parts
    for _ in range(options.refit_rounds if {"M", "B"} & set(parts) else 1):
        if masks:
            A, S, M, B = found
            tried = turn(A, *refit_mask(W, H, more, A, S, M, B, keep), B)
            masks = loss(*tried) < loss(*found)
        found = tried if masks else turn(*found)
    A, S, M, B = found
    return (refit_A(WH, H, more, A, S, B) if "B" in parts else A), S, M, B


def ridge(H: Tensor) -> Tensor:
    """What a refit adds to the diagonal of H (d_in, d_in): (d_in,). In proportion to it, which is as good as shrinking all
    else, and a constant.
    """
    diagonal = H.diagonal()
    return SHRINK / (1 - SHRINK) * diagonal + DAMPING * diagonal.mean()


def of_core(H: Tensor, more: Tensor, B: Tensor) -> Tensor:
    """B (H + diag(more)) B^T: the second moments of what S is applied to."""
    Q = right(H, B.transpose(1, 2))  # H B^T, and row by row of blocks B H B^T
    rows = zip(B, Q.split(B.shape[1]), more.split(B.shape[1]), strict=True)
    for n, (block, part, own) in enumerate(rows):
        part[:, n * len(block) : (n + 1) * len(block)].addcmul_(block.T, own[:, None])
        part.copy_(block @ part)
    return Q


def refit_mask(
    W: Tensor, H: Tensor, more: Tensor, A: Tensor, S: Tensor, M: Tensor, B: Tensor, keep: PerGroup
) -> tuple[Tensor, Tensor]:
    """(S, M) of SparseGPT between the wrappers: of A^-1 W B^-1, for inputs B x; what is given where they have no inverse.

    It takes the rows of S for independent, which they are where A^T A is diagonal: nothing to rely on, but to begin with.
    """
    A_inverse, B_inverse = (torch.linalg.inv_ex(blocks)[0] for blocks in (A, B))
    if not (torch.isfinite(A_inverse).all() and torch.isfinite(B_inverse).all()):
        return S, M
    inner = of_core(H, more, B)
    found = sparsegpt(right(left(A_inverse, W), B_inverse), LayerStats(inner, inner.diagonal().clone(), 0), keep)
    return found, keep.mask(found.abs())


def refit_A(WH: Tensor, H: Tensor, more: Tensor, A: Tensor, S: Tensor, B: Tensor) -> Tensor:
    """A_m = W_m H P_m^T (P_m H P_m^T)^-1 with P = S B."""
    P = right(S, B)
    P_blocks = P.view(len(A), A.shape[1], -1)
    gram = P_blocks @ (P @ H).addcmul_(P, more).view_as(P_blocks).transpose(1, 2)
    target = WH.view_as(P_blocks) @ P_blocks.transpose(1, 2)
    del P, P_blocks
    A = solve_psd((gram + gram.transpose(1, 2)) / 2, target.transpose(1, 2), A.transpose(1, 2)).transpose(1, 2)
    return A.contiguous()


def refit_S(WH: Tensor, H: Tensor, more: Tensor, A: Tensor, S: Tensor, M: Tensor, B: Tensor, steps: int) -> Tensor:
    """Steps towards (A^T A) S (B H B^T) = A^T W H B^T, restricted to the kept entries."""
    Q = of_core(H, more, B)
    AtA = A.transpose(1, 2) @ A
    diagonal = AtA.diagonal(dim1=1, dim2=2).reshape(-1, 1) * Q.diagonal()
    inverse_diagonal = M / diagonal.clamp_min(1e-30)
    del diagonal
    residual = left(A.transpose(1, 2), right(WH, B.transpose(1, 2)).sub_(left(A, S @ Q))).mul_(M)
    return conjugate_gradients(S, residual, lambda X: left(AtA, X @ Q).mul_(M), inverse_diagonal, steps)


def refit_B(WH: Tensor, H: Tensor, more: Tensor, A: Tensor, S: Tensor, B: Tensor, steps: int) -> Tensor:
    """Steps towards T_n^T (T B H)_n = T_n^T (W H)_n with T = A S, for every block n of B."""
    T = left(A, S)
    T_blocks = columns(T, B).transpose(1, 2)  # (d_in/b, b, d_out)

    def image(X: Tensor) -> Tensor:
        TX = right(T, X)
        return torch.bmm(T_blocks, columns((TX @ H).addcmul_(TX, more), X))

    norms = T_blocks.square().sum(2)[..., None]
    inverse_diagonal = 1 / (norms * H.diagonal().add(more).view(len(B), 1, -1)).clamp_min(1e-30)
    residual = torch.bmm(T_blocks, columns(WH, B)).sub_(image(B))
    return conjugate_gradients(B, residual, image, inverse_diagonal, steps)


def conjugate_gradients(
    X: Tensor, residual: Tensor, image: Callable[[Tensor], Tensor], inverse_diagonal: Tensor, steps: int
) -> Tensor:
    """X after `steps` steps towards image(X) = image(X) + residual, Jacobi-preconditioned; `residual` is used up."""
    X = X.clone()
    direction = residual * inverse_diagonal
    rz = torch.sum(residual * direction)
    for _ in range(steps):
        moved = image(direction)
        curvature = torch.sum(direction * moved)
        if not curvature > 0 or not rz > 0:  # converged to the last bit, or nothing to fit
            break
        step = (rz / curvature).item()
        X.add_(direction, alpha=step)
        residual.sub_(moved, alpha=step)
        z = torch.mul(residual, inverse_diagonal, out=moved)
        rz, previous = torch.sum(residual * z), rz
        direction.mul_(rz / previous).add_(z)
    return X
