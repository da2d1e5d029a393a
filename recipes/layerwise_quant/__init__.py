"""Layer-wise quantisation: two bit widths, the lower one for the blocks that matter least.   arXiv 2406.17415.

For decoder blocks i = 1..L with N_i linear weights each, widths h > l and a target average b:

    1. LIM_i = -mean_t cos(X_t, Y_t)                     X, Y (tokens, d): residual stream before and after block i
       ZD_i  = |{w : (w - mu_i) / sigma_i > 1}| / N_i    over all linear weights of the block, no data
       sensitivity_i = mean_t KL(p_t || p_t with block i alone at l bits)                        ours, not the paper's
    2. order: least important first, that is by rising LIM or sensitivity, by falling ZD; of equals the later block
    3. the first k blocks of the order get l, the others h, with the smallest k that brings sum N_i b_i / sum N_i to b;
       of three widths (ours) the two cuts that meet b with the least loss on calibration text that nothing else has seen
    4. every linear of block i is quantised to b_i bits by RTN, HQQ, GPTQ or AWQ, in groups along its inputs; on demand the
       output head to bits of its own, by RTN, which do not count in b

Orders are compared on one set of matrices: each linear is quantised once per width, on inputs of the all-h model, and an
(order, k) is a choice among them. The checkpoint itself is quantised anew, on inputs of its own true mixture.

Deviates from the paper in: widths adjacent to b by default (4 and 3 for 3.5 bits; `--levels 4,2` is the paper's); LIM
leaves out position 0, where attention sinks sit; `--importance sensitivity`, since both scores can miss a fragile block;
AWQ by default, which lost least at 3 and 4 bits where it was compared (`--paper` takes GPTQ, with neither act-order nor
searched ranges, which ours has).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from recipes.common.core.plots import layer_index
from recipes.common.core.report import merged
from recipes.common.loops.streaming import InputStatistics, MatrixStore, Method, Variant
from recipes.common.metrics.language import perplexity
from recipes.common.parts.pruners import LayerStats, PerGroup, sparsegpt
from recipes.common.parts.quantizers import GPTQ_TOKENS, Quantized, awq, awq_scales, gptq, hqq, rtn, strong_gptq
from recipes.layerwise_quant.claims import claims_table
from recipes.layerwise_quant.evidence import curve_evidence, importance_evidence
from recipes.layerwise_quant.flags import BACKENDS, QuantFlags
from recipes.layerwise_quant.folding import Fold, block_scales, sources
from recipes.layerwise_quant.importance import block_damage, kendall_tau, score_block
from recipes.layerwise_quant.mixtures import QuantRun, notes
from recipes.layerwise_quant.plans import (
    ORDERS,
    cut_plans,
    mixture_digest,
    parse_levels,
)
from zoo.checkpoint import HEAD, ties_head
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.kernels.packed_linear.reference import check_format, pack_codes
from zoo.layers.packing import row_bytes

HEAD_ROWS = 8192  # of the head that are quantised at once
PRUNED_GROUP = 64  # weights of which the sparse baseline keeps the same number everywhere, unless it must be fewer


@dataclass(frozen=True)
class LayerwiseQuant(QuantFlags):
    """Quantise every decoder linear to a mixture of two bit widths that meets any average."""

    paper_title = (
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels"
    )
    arxiv = "2406.17415"
    run_type = QuantRun

    # -------------------------------------------------------------------------------------------- before any work

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bits, the highest first."""
        return parse_levels(self.levels, self.avg_bits)

    @cached_property
    def zeros(self) -> dict[str, str]:
        """Kind of zero points of each backend."""
        kinds = {"rtn": "integer", "gptq": "integer", "awq": "integer", "hqq": "float"}
        return kinds | dict.fromkeys(("rtn", "gptq", "awq"), "none") if self.symmetric else kinds

    @property
    def own_order(self) -> str:
        return self.importance if self.importance in ORDERS else "file"

    @property
    def ignored(self) -> list[str]:
        """With --head_bits the head is none of the blocks' business."""
        return [part for part in self.ignore if part != HEAD] if self.head_bits else self.ignore

    def check(self) -> None:
        super().check()
        self.widths  # noqa: B018 (parsed now)
        if self.symmetric and self.backend == "hqq":
            raise UserError("--symmetric: HQQ searches zero points; use --backend rtn, gptq or awq.")
        if self.group_size != -1 and (self.group_size < 32 or self.group_size % 32):
            raise UserError(f"--group_size {self.group_size}: a multiple of 32, or -1 for whole rows, is needed.")
        if self.model == "smollm2-135m-instruct" and self.group_size == 32 and not self.symmetric:
            raise UserError(
                f"--group_size 32: the weights of {self.model} lie on that very grid, so 4 bits would seem lossless; "
                f"use --model {self.model}-degridded, the default."
            )
        if self.importance not in ORDERS and not self.importance.endswith(".json"):
            raise UserError(f"--importance {self.importance}: one of {', '.join(ORDERS)} or a .json file is needed.")
        if self.seqlen < 3:
            raise UserError(f"--seqlen {self.seqlen}: windows of 3 tokens at least are needed.")

    def check_matrix(self, name: str, d_out: int, d_in: int) -> None:
        """Refuses a matrix that the widths or groups do not fit."""
        for bits in (self.head_bits,) if name == HEAD else self.widths:
            try:
                check_format(d_in, bits, self.group_size)
            except ValueError as error:
                raise UserError(f"{name}: {error} (--group_size, or --ignore for this matrix).") from None
        if self.backend == "gptq" and self.nsamples * self.seqlen < d_in:
            raise UserError(
                f"--nsamples {self.nsamples}: {self.nsamples * self.seqlen} calibration tokens are fewer than the {d_in}"
                f" inputs of {name}, too few for GPTQ; use at least {math.ceil(GPTQ_TOKENS * d_in / self.seqlen)}."
            )

    def check_base(self, run: QuantRun) -> None:
        super().check_base(run)
        free = [block for block in run.blocks if block not in run.kept]
        cut_plans(free, run.weights, self.avg_bits, self.widths)  # is the average within reach?
        if self.own_order == "file":
            run.given  # noqa: B018 (read now)
        if "pruned" in self.baselines and not self.can_prune(run):
            raise UserError("--baselines pruned: no sparse matrix is as small as these bits; leave it out.")
        run.unseen(self.seed)

    def planned(self, run: QuantRun) -> dict[str, dict]:
        """As if all blocks had the high width: those of one block have the same one."""
        return {name: self.spec(self.backend, self.widths[0]) for name in run.linears}

    def modules(self, run: QuantRun) -> dict[str, nn.Linear]:
        """The linears of the blocks, and the head last."""
        if self.head_bits is None:
            return run.linears
        config = run.domain.config.get_text_config()
        return run.linears | {HEAD: nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")}

    # ------------------------------------------------------------------------------------------- step 4: quantisers

    def quantiser(
        self, run: QuantRun, name: str, backend: str, forms: Callable[[int], dict[str, int]], packed: tuple[str, ...]
    ) -> Method:
        """A method that quantises the matrices of a block to forms(block) = {variant: bits}, all stored packed."""
        scaled: dict[
            int, dict
        ] = {}  # AWQ: {bits: {linear: (columns, rows)}} of the block in work, which matrices share

        def search(bits: int, weights: list[Tensor], stats: LayerStats, fold: Fold) -> Tensor:
            d = fold.to_source(stats.second_moment)
            return awq_scales(weights, stats, d, *self.options(bits), to_inputs=fold.to_inputs)

        def prepare(weights: dict[str, Tensor], stats: InputStatistics) -> None:
            block = layer_index(next(iter(weights)), 0)
            norm = lambda name: run.streamed.tensors.get(f"{name}.weight").float()  # noqa: E731
            arguments = run.folds[block], weights, stats.stats, norm, self.torch_dtype
            for bits in set(forms(block).values()):
                scaled[bits] = block_scales(*arguments, partial(search, bits))

        def compress(matrix: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
            return {
                variant: self.quantise(backend, weight, stats, bits, scaled[bits][matrix] if scaled else None)
                for variant, bits in forms(layer_index(matrix, 0)).items()
            }

        prepared = {"prepare": prepare} if backend == "awq" else {}
        return Method(name, compress, self.inputs(backend), packed=packed, **prepared)

    def quantise(self, backend: str, weight: Tensor, stats: LayerStats, bits: int, scales: tuple | None) -> Variant:
        """One matrix (d_out, d_in) fp32 by one backend; scales: AWQ's (columns (d_in,), rows (d_out,))."""
        options = self.options(bits)
        if backend == "awq":
            columns, rows = scales
            variant = self.pack(awq(weight, stats, columns, rows, *options), backend)
            variant.dense, variant.folded = variant.dense * rows[:, None] / columns, {"columns": columns, "rows": rows}
            return variant
        if backend == "hqq":
            quantized = hqq(weight, *options)
        elif backend == "rtn":
            quantized = rtn(weight, *options, search=self.scale_search)
        elif self.act_order:
            quantized = strong_gptq(weight, stats, *options)
        else:
            quantized = gptq(weight, stats, *options, search=self.scale_search)
        return self.pack(quantized, backend)

    def options(self, bits: int) -> tuple:
        """What all quantisers take."""
        return bits, self.group_size, self.symmetric, self.torch_dtype

    def pack(self, quantized: Quantized, backend: str) -> Variant:
        """The tensors of the checkpoint."""
        tensors = {
            "qweight": pack_codes(quantized.codes, quantized.bits, self.group_size),
            "scales": quantized.scales.to(self.torch_dtype),
        }
        if quantized.zeros is not None:
            zeros = quantized.zeros
            tensors["zeros"] = zeros if zeros.dtype == torch.uint8 else zeros.to(self.torch_dtype)
        return Variant(tensors, None, quantized.dequantize(), self.spec(backend, quantized.bits))

    def spec(self, backend: str, bits: int) -> dict:
        """What config.json says of one matrix."""
        return {"format": "packed", "bits": bits, "group_size": self.group_size, "zeros": self.zeros[backend]}

    def pack_head(self, run: QuantRun, store: MatrixStore) -> None:
        """The head, of tied embeddings a copy of their table, to `store` as a matrix of the method."""
        if self.head_bits is None or store.has(self.method, HEAD):
            return
        source = open_folder(run.domain.base.path)
        table = f"{run.streamed.decoder_prefix}embed_tokens"
        weight = source.tensors[f"{table if ties_head(source) else HEAD}.weight"]
        options = (*self.options(self.head_bits), self.scale_search)
        parts = [self.pack(rtn(rows.float(), *options), "rtn") for rows in weight.split(HEAD_ROWS)]
        packed = {key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors}
        head = Variant(packed, None, torch.cat([part.dense for part in parts]), parts[0].spec)
        own = Method(self.method, lambda *_: {}, packed=(self.method,))
        facts = dict.fromkeys(("loss_init", "loss_final", "output_error", "seconds"))
        store.save(own, HEAD, {self.method: head}, {self.method: facts})

    # ------------------------------------------------------------------------------------ methods, in their two passes

    def inputs(self, backend: str | None = None) -> str:
        """Only GPTQ depends on its inputs enough for the order of work to matter."""
        return "sequential" if self.sequential and (backend or self.backend) == "gptq" else "dense"

    def methods(self, run: QuantRun, seed: int) -> list[Method]:
        """The own one by the plan; candidates at every width, on inputs of the model that has the high one everywhere; the
        other quantisers, at the same widths block by block, and a pruner.
        """

        def planned(name: str, backend: str) -> Method:
            return self.quantiser(run, name, backend, lambda block: {name: run.plan(seed).bits[block]}, (name,))

        names = {f"{bits}-bit": bits for bits in self.widths}
        candidates = self.quantiser(run, next(iter(names)), self.backend, lambda _: names, tuple(names))
        chosen = self.chosen(run)
        others = [planned(name, name) for name in BACKENDS if name in chosen]
        if "pruned" in chosen:
            others.append(Method("pruned", partial(self.prune, run, seed), self.inputs("gptq")))
        return [planned(self.method, self.backend), candidates, *others]

    def sparse_row(self, row: dict) -> dict:
        """In place of a packed matrix one of 16-bit weights and a bitmask in as many bytes: N of every M, M = 64 or less."""
        size, itemsize = row["d_out"] * row["d_in"], self.torch_dtype.itemsize
        m = math.gcd(row["d_in"], PRUNED_GROUP)
        n = int(m * (row_bytes(row, itemsize) / size - 1 / 8) / itemsize)
        return {"format": "bitmask", "d_out": row["d_out"], "d_in": row["d_in"], "pattern": (n, m)}

    def can_prune(self, run: QuantRun) -> bool:
        """Whether the bytes of the low width hold any weight at all in a sparse matrix."""
        low = run.rows(dict.fromkeys(run.blocks, self.widths[-1]), self.backend)
        return all(self.sparse_row(row)["pattern"][0] > 0 for row in low)

    def prune(self, run: QuantRun, seed: int, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """SparseGPT in place of fewer bits: one matrix in as many bytes."""
        d_out, d_in = weight.shape
        packed = {"d_out": d_out, "d_in": d_in} | self.spec(self.backend, run.plan(seed).bits[layer_index(name, 0)])
        return {"pruned": Variant({}, None, sparsegpt(weight, stats, PerGroup(*self.sparse_row(packed)["pattern"])))}

    def produce(self, run: QuantRun, seed: int) -> None:
        """Candidates and scores of all blocks; from them the plan; the checkpoint and the other quantisers by the plan."""
        (own, candidates, *others), store = self.methods(run, seed), run.store(seed)
        run.compress(seed, [candidates], observe=partial(score_block, store.folder / "blocks"))
        if run.processes.rank == 0:
            run.once(f"seed-{seed}/plan", partial(self.make_plan, run, seed))
            self.pack_head(run, store)
        run.processes.barrier()
        run.compress(seed, [own, *others])

    # ------------------------------------------------------------------------------------------------- steps 1 to 3

    def make_plan(self, run: QuantRun, seed: int) -> dict:
        """The plan as JSON: scores of the blocks, and the bits that meet the average."""
        facts = {i: run.once(f"seed-{seed}/blocks/{i}", dict) for i in run.blocks}
        free = ["lim", "zd", *(["zd-two-sided"] if self.importance == "zd-two-sided" else [])]
        scores = {name: {i: facts[i][name] for i in run.blocks} for name in free}
        if "sensitivity" in (self.own_order, *self.chosen_baselines()):
            scores["sensitivity"] = self.sensitivity(run, seed)
        if self.own_order == "file":
            scores["file"] = run.given
        order = run.order(self.own_order, scores, seed)
        plans = cut_plans(order, run.weights, self.avg_bits, self.widths)
        return {
            "seed": seed,
            "scores": scores,
            "stability": kendall_tau(*([facts[i]["halves"][half] for i in run.blocks] for half in (0, 1))),
            "bits": plans[0] if len(plans) == 1 else min(plans, key=partial(self.held_loss, run, seed)),
        }

    def held_loss(self, run: QuantRun, seed: int, bits: dict[int, int]) -> float:
        """Perplexity of a mixture of candidates on unseen calibration text."""

        def make() -> dict:
            found = perplexity(run.mixture(seed, bits), run.unseen(seed))
            counts = ", ".join(f"{list(bits.values()).count(width)} x {width} bits" for width in self.widths)
            print(f"plan of {counts}: perplexity {found['value']:.6g} on unseen calibration text", flush=True)
            return found

        return run.once(f"seed-{seed}/plans/{mixture_digest(bits)}", make)["value"]

    def sensitivity(self, run: QuantRun, seed: int) -> dict[int, float]:
        """Damage of each block alone at the lowest width, on unseen calibration text."""
        names = [f"{bits}-bit" for bits in self.widths]
        model, rows, windows = run.domain.load(run.domain.base.path), [], run.unseen(seed)
        for number, window in enumerate(windows):
            print(f"sensitivity, window {number + 1}/{len(windows)}", flush=True)
            lowered = partial(run.store(seed).weight, names[0], variant=names[-1])
            make = partial(block_damage, model, window, run.linears, lowered)
            rows.append(run.once(f"seed-{seed}/sensitivity/{number}", make))
        return {i: statistics.fmean(row[str(i)] for row in rows) for i in run.blocks}

    # --------------------------------------------------------------------------------------------------- measuring

    def baseline_names(self) -> list[str]:
        """The uniform widths, all orders, whole blocks dropped, the other quantisers."""
        orders = [name for name in self.orders() if name != self.own_order or self.inputs() != "dense"]
        quantisers = [name for name in BACKENDS if name != self.backend and not (self.symmetric and name == "hqq")]
        return [*(f"{bits}-bit" for bits in self.widths), *orders, "dropped", *quantisers, "pruned"]

    def orders(self) -> list[str]:
        """The chosen order, its reverse, and the others."""
        others = [name for name in ORDERS if name not in (self.own_order, "zd-two-sided")]
        return [self.own_order, "reversed", *others]

    def chosen(self, run: QuantRun) -> list[str]:
        """The baselines of this run."""
        return [name for name in self.chosen_baselines() if name != "pruned" or self.can_prune(run)]

    def variants(self, run: QuantRun) -> list[str]:
        return ["dense", self.method, *self.chosen(run)]

    @contextmanager
    def open(self, run: QuantRun, variant: str, seed: int) -> Iterator[nn.Module]:
        if variant in (*BACKENDS, "pruned"):
            yield run.assemble(run.store(seed), variant, dict.fromkeys(run.blocks, variant))
        else:
            with super().open(run, variant, seed) as model:
                yield model

    def measure(self, run: QuantRun, variant: str) -> list[dict[str, dict]]:
        if variant in ("dense", self.method, *BACKENDS, "pruned"):
            return super().measure(run, variant)
        return [run.measure_mixtures(seed, run.mixtures(variant, run.plan(seed))) for seed in run.seeds]

    def baseline_rows(self, run: QuantRun, names: list[str]) -> dict[str, list[dict]]:
        """All models have the same head."""
        plan, rows = run.plan(run.seeds[0]), {}
        head = [row for row in self.layers(run, run.state) if row["name"] == HEAD]
        for name in names:
            bits = plan.bits if name in (*BACKENDS, "pruned") else run.mixtures(name, plan)[0]
            rows[name] = run.rows(bits, name if name in BACKENDS else self.backend)
            if name == "pruned":
                rows[name] = [self.sparse_row(row) for row in rows[name]]
            rows[name] += head
        return rows

    def packed_tensors(self, run: QuantRun, seed: int) -> Iterator[tuple[str, Tensor]]:
        """With AWQ also the norms and biases that make up for the scales."""
        yield from super().packed_tensors(run, seed)
        if self.backend == "awq":
            folds = [fold for block in run.folds.values() for fold in block]
            yield from sources(
                folds, run.streamed.tensors, partial(run.store(seed).folded, self.method, variant=self.method)
            )

    def compression_config(self, run: QuantRun, seed: int) -> dict:
        """The method's own part of `compression_config`."""
        plan = run.plan(seed)
        return {
            "backend": self.backend,
            "importance": self.own_order,
            "levels": list(self.widths),
            "head_bits": self.head_bits,
            "average_bits": run.average(plan.bits),
            "average_bits_with_overhead": 8 * run.bytes_of(plan.bits) / sum(run.weights.values()),
            "bits_by_layer": {str(block): bits for block, bits in plan.bits.items()},
        }

    def findings(self, run: QuantRun) -> dict:
        """Importance of the blocks, curves of quality against bits, and what the reader of the card must know."""
        plan, parts = run.plan(run.seeds[0]), []
        if self.curve_points:
            names = [self.own_order, *(name for name in self.chosen(run) if name in self.orders())]
            curves = {name: run.curve(plan, name) for name in names}
            own = run.measure_mixtures(plan.seed, run.mixtures(self.own_order, plan))
            smaller = {name: self.measure(run, name)[0] for name in self.chosen(run) if name in ("dropped", "pruned")}
            claims = claims_table(curves, self.own_order, own, smaller, self.backend)
            parts = [curve_evidence(curves), {"tables": {"The paper's claims": claims}}]
        parts.append(importance_evidence(plan.scores, plan.bits, plan.stability))
        found = merged(*parts) | {"notes": notes(run, plan)}
        fixed = [*(f"{bits}-bit" for bits in self.widths), "zd", "depth", "ends"]  # whether they were measured or not
        same = [name for name in fixed if name != self.own_order and run.mixtures(name, plan)[0] == plan.bits]
        return found | ({"same_as": same} if same else {})
