"""ARMOR: 2:4 pruning as a factorisation W_hat = A S B with block-diagonal wrappers.   ICLR 2026, arXiv 2510.05528.

For each linear weight W in R^{d_out x d_in} of every decoder layer (matrices are independent, all arithmetic in fp32):

    1. d_j    = mean over calibration tokens of x_j^2                                    (d_in,)    importance
    2. W_bar  = diag(1/r2) W diag(1/r1), columns to unit norm first, then rows           (d_out, d_in)   NoWag
    3. L      = sum_ij d_j (W_bar - A S B)_ij^2 / sum_ij d_j W_bar_ij^2                  proxy loss, 1 at W_hat = 0
    4. init   A = I, B = I, S = W_bar * M with the 2 largest d_j W_bar_ij^2 of every 4   = NoWag-P
    5. repeat: one joint Adam step on A, B, S; then in every block pair (m, n) re-solve groups of 4 entries of S
       exactly: support and values by trying all 6 supports                              sparse-core step
       and return the best (A, S, B) seen, so that L_final <= L_init is a postcondition
    6. A' = diag(r2) A,  B' = B diag(r1);  W_hat = A' S B'
    7. refit with the full Hessian H = mean x x^T, all but its diagonal shrunk by 0.3, in turns that each lower
       tr((W_hat - W) H (W_hat - W)^T): a new mask by SparseGPT of A'^-1 W B'^-1, as long as that leads to less; A' in
       closed form; S, then B', by conjugate gradients

A holds d_out/b_out blocks of (b_out, b_out), B holds d_in/b_in blocks of (b_in, b_in), S is strictly N:M along d_in.

Deviates from the paper in: the best iterate is kept (Adam gives no descent guarantee); `groups_per_block` groups are
re-solved per iteration with rank-1 updates of the residual, their selection gradient being the one of the Adam step;
Adam's moments are zeroed where a support changes; step 7, which is ours and on by default (`--paper` turns all
of it off: block 128, 20 000 iterations, constant rate 1e-4, one group, no refit).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from recipes.armor.evidence import Point, checks_table, minutes_evidence
from recipes.armor.factorisation import (
    Factors,
    block_diag_product,
    denormalise,
    init_nowag,
    optimise,
    rebalance,
    refit,
)
from recipes.common.core.report import merged
from recipes.common.core.state import matmul_flops, module_seed
from recipes.common.domains.language import LanguageRecipe
from recipes.common.loops.streamed import Streamed, StreamedRun
from recipes.common.loops.streaming import Method, Variant
from recipes.common.parts.pruners import (
    LayerStats,
    PerGroup,
    magnitude,
    normalize,
    nowag,
    rank_correction,
    sanitize,
    sparsegpt,
    wanda,
)
from recipes.common.parts.quantizers import strong_gptq
from zoo.errors import UserError
from zoo.kernels.bitmask_linear.reference import pack_bitmask

PRUNERS = {"magnitude": magnitude, "wanda": wanda, "nowag": nowag, "sparsegpt": sparsegpt}
QUANTISED, QUANTISED_BITS, QUANTISED_GROUP = "gptq-4", 4, 64  # a baseline of fewer bytes without any sparsity


@dataclass(frozen=True)
class Armor(Streamed, LanguageRecipe):
    """Compress every decoder linear into block-diagonal x 2:4 x block-diagonal."""

    method: str = field(
        default="armor",
        metadata={"help": "what the checkpoint holds: armor, or a plain N:M pruner", "choices": ["armor", *PRUNERS]},
    )
    block: str = field(
        default="64",
        metadata={"help": "wrapper block: a power of two 4..256, 'out,in', or 'auto' (largest within --max-overhead)"},
    )
    max_overhead: float = field(
        default=0.10,
        metadata={"help": "with --block auto: wrapper parameters as a fraction of the matrix", "above": 0, "below": 1},
    )
    iters: int = field(
        default=200, metadata={"help": "iterations of the main loop; 0 gives NoWag-P", "at_least": 0, "at_most": 10**7}
    )
    curve: list[int] = field(
        default_factory=lambda: [0],
        metadata={
            "help": "show also what the refit makes of the loop after so many iterations",
            "empty": True,
            "at_least": 0,
            "at_most": 10**7,
        },
    )
    lr: float = field(default=1e-3, metadata={"help": "Adam's learning rate", "at_most": 10, "above": 0})
    schedule: str = field(
        default="cosine", metadata={"help": "learning rate over the run", "choices": ["cosine", "constant"]}
    )
    groups_per_block: int = field(
        default=4,
        metadata={
            "help": "groups of S re-solved per block pair and iteration, 1..b_out*b_in/M",
            "at_least": 1,
            "at_most": 2**16,
        },
    )
    select: str = field(
        default="l1",
        metadata={
            "help": "how groups are picked: by the norm of their gradient (l1, l2, linf), greedily, or uniformly",
            "choices": ["l1", "l2", "linf", "greedy", "uniform"],
        },
    )
    pattern: str = field(default="2:4", metadata={"help": "N:M, keep N of every M inputs"})
    continuous: str = field(
        default="adam",
        metadata={
            "help": "continuous step: adam, or gd / als, whose loss provably never rises",
            "choices": ["adam", "gd", "als"],
        },
    )
    refit: str = field(
        default="M+A+S+B",
        metadata={
            "help": "what is refit with the full Hessian after the loop (M: the mask)",
            "choices": ["M+A+S+B", "A+S+B", "A+S", "A", "none"],
        },
    )
    refit_rounds: int = field(
        default=2,
        metadata={"help": "turns of a refit that has M or B", "at_least": 1, "at_most": 1000},
    )
    refit_steps: int = field(
        default=15,
        metadata={"help": "conjugate-gradient steps of each refit of S or B", "at_least": 1, "at_most": 10000},
    )

    baselines: list[str] = field(
        default_factory=list,
        metadata={"help": "baselines to run beside it; 'none' for none (default: all but magnitude)"},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "lm-eval tasks, local or from a hub; 'none' for none"}
    )

    paper_title = "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization"
    arxiv = "2510.05528"

    # -------------------------------------------------------------------------------------------- before any work

    @cached_property
    def keep(self) -> PerGroup:
        """N and M of --pattern."""
        return parse_pattern(self.pattern)

    @cached_property
    def requested(self) -> tuple[int, int] | None:
        """Block sizes of --block; None with auto."""
        return None if self.block == "auto" else parse_block(self.block)

    def check(self) -> None:
        super().check()
        self.keep, self.requested  # noqa: B018 (parsed now)

    def check_matrix(self, name: str, d_out: int, d_in: int) -> None:
        """Refuses a matrix that the pattern or the wrapper blocks do not divide."""
        if d_in % self.keep.m:
            raise UserError(f"{name}: {d_in} inputs are not a multiple of {self.keep.m}, which {self.pattern} needs.")
        if self.method != "armor":
            return
        b_out, b_in = self.blocks(d_out, d_in)
        for size, b, what in ((d_out, b_out, "outputs"), (d_in, b_in, "inputs")):
            if size % b:
                raise UserError(
                    f"{name}: block {b} does not divide its {size} {what}; use --block auto or a power of two that does."
                )
        if b_in % self.keep.m:
            raise UserError(f"{name}: block {b_in} is not a multiple of {self.keep.m}, which {self.pattern} needs.")
        if self.groups_per_block > b_out * b_in // self.keep.m:
            raise UserError(
                f"--groups-per-block {self.groups_per_block}: {name} has {b_out * b_in // self.keep.m} groups per block."
            )

    @cached_property
    def earlier(self) -> list[int]:
        """Iterations before the last one at which the curve has points."""
        return sorted({step for step in self.curve if step < self.iters}) if self.method == "armor" else []

    def blocks(self, d_out: int, d_in: int) -> tuple[int, int]:
        """Block sizes (b_out, b_in) of one matrix."""
        return self.requested or auto_block(d_out, d_in, self.max_overhead, self.keep.m)

    # -------------------------------------------------------------------------------------------------- the method

    def compress(self, run: StreamedRun, seed: int, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """One matrix. weight (d_out, d_in) fp32 -> the packed result, and to compare with, ARMOR without refit and, for the
        first seed, what fewer iterations give.
        """
        if self.method != "armor":
            pruned = PRUNERS[self.method](weight, stats, self.keep)
            return {self.method: self.pack_pruned(pruned)}
        d = sanitize(stats.second_moment)
        b_out, b_in = self.blocks(*weight.shape)
        generator = torch.Generator(weight.device).manual_seed(module_seed(seed, name))
        W_bar, r1, r2 = normalize(weight)
        factors = init_nowag(W_bar, d, b_out, b_in, self.keep.n, self.keep.m)
        begin, earlier = time.perf_counter(), {}
        asked = self.earlier if seed == self.seed else []

        def watch(step: int, best: Factors, loss: float) -> None:
            if step in asked:
                earlier[step] = best, loss, time.perf_counter() - begin

        losses = optimise(factors, W_bar, d, self, generator, watch)
        took = time.perf_counter() - begin
        earlier |= {step: (factors, losses[1], took) for step in asked if step not in earlier}  # it stopped before

        def fitted(found: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
            """(A, S, M, B, seconds) after steps 6 and 7."""
            begin = time.perf_counter()
            A, S, B = denormalise(found, r1, r2)
            M = found.M
            if self.refit != "none":
                A, S, M, B = refit(weight, stats.hessian, A, S, M, B, self.keep, self)
            return A, S, M, B, time.perf_counter() - begin

        variants = {}
        if self.refit != "none":
            plain = block_diag_product(*denormalise(factors, r1, r2))
            variants["armor-no-refit"] = Variant({}, losses, plain, seconds=took)
        for step, (found, loss, seconds) in earlier.items():
            A, S, _, B, more = fitted(found)
            product = block_diag_product(A, S, B)
            variants[f"iterations-{step}"] = Variant({}, (losses[0], loss), product, seconds=seconds + more)
        A, S, M, B, more = fitted(factors)
        spec = {"format": "armor", "block_out": b_out, "block_in": b_in, "pattern": [self.keep.n, self.keep.m]}
        product = block_diag_product(A, S, B)
        variants["armor"] = Variant(self.pack(A, S, M, B), losses, product, spec, seconds=took + more)
        return variants

    def pack(self, A: Tensor, S: Tensor, M: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint, powers of two moved into S and cast to the checkpoint's dtype."""
        A, S, B = rebalance(A, S, B)
        values, mask, _ = pack_bitmask(S, M, per_row=S.shape[1] * self.keep.n // self.keep.m)
        A, B, values = (tensor.to(self.torch_dtype) for tensor in (A, B, values))
        return {"core_values": values, "core_mask": mask, "wrap_out": A, "wrap_in": B}

    def pack_pruned(self, pruned: Tensor) -> Variant:
        """A plain N:M weight in the bitmask format."""
        per_row = pruned.shape[1] * self.keep.n // self.keep.m
        values, mask, _ = pack_bitmask(pruned, self.keep.mask(pruned.abs()), per_row=per_row)
        spec = {"format": "bitmask", "pattern": [self.keep.n, self.keep.m]}
        return Variant({"values": values.to(self.torch_dtype), "mask": mask}, None, pruned, spec)

    def baseline_names(self) -> list[str]:
        return [*PRUNERS, *(["sparsegpt+rank", QUANTISED] if self.method == "armor" else [])]

    def default_baselines(self) -> list[str]:
        """All but the hopeless one."""
        return [name for name in self.baseline_names() if name != "magnitude"]

    def baseline_methods(self, run: StreamedRun, seed: int) -> list[Method]:
        """SparseGPT and Wanda prune one block after the other, on the inputs of the pruned blocks."""

        def plain(name: str, prune, inputs: str) -> Method:
            def compress(_: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
                return {name: Variant({}, None, prune(weight, stats, self.keep))}

            return Method(name, compress, inputs, hessian=name == "sparsegpt")

        def corrected(_: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
            b_out, b_in = self.blocks(*weight.shape)
            d_out, d_in = weight.shape
            rank = round((b_out * d_out + b_in * d_in) / (d_out + d_in))  # as many parameters as A and B
            pruned = sparsegpt(weight, stats, self.keep)
            return {"sparsegpt+rank": Variant({}, None, rank_correction(weight, pruned, stats, rank))}

        methods = [
            plain("magnitude", magnitude, "dense"),
            plain("wanda", wanda, "compressed"),
            plain("nowag", nowag, "dense"),
            plain("sparsegpt", sparsegpt, "compressed"),
        ]
        if self.method == "armor":
            methods.append(Method("sparsegpt+rank", corrected, "compressed"))
            methods.append(Method(QUANTISED, self.quantise, "compressed"))
        return methods

    def quantise(self, _: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """All weights at few bits instead of half of them at 16."""
        group = group_of(weight.shape[1])
        found = strong_gptq(weight, stats, QUANTISED_BITS, group, False, self.torch_dtype)
        return {QUANTISED: Variant({}, None, found.dequantize())}

    def baseline_rows(self, run: StreamedRun, names: list[str]) -> dict[str, list[dict]]:
        """Plain N:M weights; with A and B, or as many parameters of a low-rank correction, where the name says so."""
        rows = {name: [] for name in names}
        for name in names:
            for module in run.modules.values():
                d_out, d_in = module.out_features, module.in_features
                row = {"format": "bitmask", "d_out": d_out, "d_in": d_in, "pattern": [self.keep.n, self.keep.m]}
                if name == "armor-no-refit" or name.endswith("+rank"):
                    b_out, b_in = self.blocks(d_out, d_in)
                    row |= {"format": "armor", "block_out": b_out, "block_in": b_in}
                if name == QUANTISED:
                    row = {"format": "packed", "d_out": d_out, "d_in": d_in, "zeros": "integer"}
                    row |= {"bits": QUANTISED_BITS, "group_size": group_of(d_in)}
                rows[name].append(row)
        return rows

    def method_flops(self, weights: int) -> float:
        """3 forward equivalents of 2 (b_out + b_in) per weight and iteration, as much again element-wise."""
        b_out, b_in = self.requested or (64, 64)
        return 2 * self.iters * 3 * 2 * (b_out + b_in) * weights if self.method == "armor" else 0.0

    def needs(self, run: StreamedRun) -> tuple[float, float, float]:
        """With the refits, and with what the curve keeps and measures."""
        ram, disk, minutes = super().needs(run)
        shapes, points = [(m.out_features, m.in_features) for m in run.linears.values()], len(self.earlier)
        weights = sum(d_out * d_in for d_out, d_in in shapes)
        products = (
            0 if self.refit == "none" or self.method != "armor" else self.refit_rounds * (2 * self.refit_steps + 6)
        )
        work = (self.seeds + points) * products * sum(2 * d_out * d_in**2 for d_out, d_in in shapes)
        work += points * 2 * weights * 3 * self.eval_windows * self.eval_seqlen
        return ram, disk + 2 * weights * points, minutes + 2 * work / matmul_flops() / 60

    def variants(self, run: StreamedRun) -> list[str]:
        """Without the points of the curve."""
        return [variant for variant in super().variants(run) if not variant.startswith("iterations-")]

    def findings(self, run: StreamedRun) -> dict:
        """What is expected of the models; quality against minutes, of fewer iterations, the baselines and the own model."""
        if self.method != "armor":
            return {}
        found = {name: self.measure(run, name)[0] for name in self.variants(run)}
        checks = {"tables": {"Checks": checks_table(found, self.method)}}
        return merged(checks, minutes_evidence(self.points(run, found), self.method, self.iters))

    def points(self, run: StreamedRun, found: dict[str, dict]) -> list[Point]:
        """All models that the run made, with what their matrices cost, for the first seed. found: metrics by variant."""
        seed, stored, points = run.seeds[0], self.stored(run), []
        for name in [*(f"iterations-{step}" for step in self.earlier), *self.variants(run)[1:]]:
            metrics = found.get(name) or run.once(f"measured/{name}", partial(self.measure_texts, run, name, seed))
            facts = [run.store(seed).facts(stored[name], linear)[name] for linear in run.linears]
            points.append(Point(name, sum(fact["seconds"] for fact in facts) / 60, facts, metrics))
        return points

    def measure_texts(self, run: StreamedRun, variant: str, seed: int) -> dict[str, dict]:
        with self.open(run, variant, seed) as model:
            return run.domain.text_metrics(model, None)

    def compression_config(self, run: StreamedRun, seed: int) -> dict:
        """The method's own part of `compression_config`."""
        config = {"pattern": [self.keep.n, self.keep.m]}
        if self.method == "armor":
            b_out, b_in = self.requested or (None, None)
            config |= {"block_out": b_out, "block_in": b_in, "n_iters": self.iters, "lr": self.lr, "refit": self.refit}
        return config


# ---------------------------------------------------------------------------------------------- sizes and patterns


def parse_pattern(text: str) -> PerGroup:
    """'2:4' -> PerGroup(2, 4)."""
    try:
        n, m = (int(part) for part in text.split(":"))
    except ValueError:
        n = m = 0
    if not 0 < n < m:
        raise UserError(f"--pattern {text}: N:M with 0 < N < M is needed. Try --pattern 2:4, the default.")
    return PerGroup(n, m)


def parse_block(text: str) -> tuple[int, int]:
    """'64' -> (64, 64); '64,32' -> (b_out, b_in)."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or any(b not in (4, 8, 16, 32, 64, 128, 256) for b in sizes):
        raise UserError(f"--block {text}: a power of two from 4 to 256, a pair 'out,in' of them, or 'auto' is needed.")
    return sizes[0], sizes[-1]


def group_of(d_in: int) -> int:
    """Inputs that share a scale in the quantised baseline: QUANTISED_GROUP, or fewer that divide d_in, or all."""
    group = math.gcd(d_in, QUANTISED_GROUP)
    return group if group >= 32 else -1


def wrapper_overhead(d_out: int, d_in: int, b_out: int, b_in: int) -> float:
    """Parameters of A and B as a fraction of the dense matrix: (b_out d_out + b_in d_in) / (d_out d_in)."""
    return (b_out * d_out + b_in * d_in) / (d_out * d_in)


def auto_block(d_out: int, d_in: int, max_overhead: float, m: int) -> tuple[int, int]:
    """The largest power of two <= 256 that divides both sides and keeps the overhead within budget."""
    for b in (256, 128, 64, 32, 16, 8, 4):
        if d_out % b == 0 and d_in % b == 0 and b % m == 0 and wrapper_overhead(d_out, d_in, b, b) <= max_overhead:
            return b, b
    raise UserError(
        f"--block auto: no power of two from 4 divides ({d_out}, {d_in}) within --max-overhead {max_overhead}; raise it."
    )
