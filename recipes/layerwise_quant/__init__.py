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
AWQ by default, which lost least at 3 and 4 bits where it was compared (`--paper` takes GPTQ).
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from recipes.common.core.plots import layer_index
from recipes.common.core.recipe import cached_json
from recipes.common.data.texts import calibration_windows
from recipes.common.loops.streamed import LayerwiseRecipe, Run, load_fp32
from recipes.common.loops.streaming import InputStatistics, MatrixStore, Method, Variant
from recipes.common.metrics.language import over_runs, perplexity
from recipes.common.parts.pruners import LayerStats, sparsegpt
from recipes.layerwise_quant.claims import claims_table
from recipes.layerwise_quant.folding import Fold, block_scales, folds_of, sources
from recipes.layerwise_quant.importance import block_damage, kendall_tau, least_first, score_block
from recipes.layerwise_quant.plans import WIDTHS, cut_plans, parse_levels, pinned, read_scores, step_down
from recipes.layerwise_quant.quantizers import Quantized, awq, awq_scales, gptq, hqq, rtn
from zoo.checkpoint import HEAD
from zoo.errors import UserError
from zoo.kernels.packed_linear.reference import check_format, pack_codes
from zoo.record.verify import layer_bytes

BACKENDS = ("rtn", "hqq", "gptq", "awq")
MEASURED = ("lim", "zd", "zd-two-sided", "sensitivity")
ORDERS = (*MEASURED, "random", "depth", "ends")
RANDOM_ORDERS = 3
SENSITIVITY_TOKENS = 4096
STABLE = 0.9  # Kendall's tau between two halves of the text that LIM should reach (section 3.1)
HEAD_ROWS = 8192  # of the head that are quantised at once
PRUNED_GROUP = 64  # weights of which the rival of equal bytes keeps the same number everywhere, unless it must be fewer
GPTQ_TOKENS = 20  # calibration tokens per input feature below which GPTQ may lose to rounding (section 6)


@dataclass
class LayerwiseQuant(LayerwiseRecipe):
    """Quantise every decoder linear to a mixture of two bit widths that meets any average."""

    model: str = field(
        default="smollm2-135m-instruct-degridded",
        metadata={"help": "base model: a Hub id, a folder, or an offline alias"},
    )
    sequential: bool = field(
        default=True,
        metadata={
            "help": "GPTQ calibrates each matrix on the outputs of the quantised ones before it, not of the dense"
        },
    )
    nsamples: int = field(default=64, metadata={"help": "calibration windows"})
    avg_bits: float = field(default=3.5, metadata={"help": "average bits of the quantised weights, 1..8"})
    levels: str = field(
        default="auto",
        metadata={
            "help": f"'high,low' or 'high,middle,low' of {', '.join(map(str, WIDTHS))}; auto: the closest two around"
            " --avg_bits"
        },
    )
    importance: str = field(
        default="lim",
        metadata={
            "help": f"which blocks keep more bits: {', '.join(ORDERS)} (depth: the first, ends: the first and last), or"
            " a .json list of one number per block, larger = more important"
        },
    )
    backend: str = field(
        default="awq",
        metadata={"help": "quantiser of one matrix; the paper has rtn (Quanto) and gptq", "choices": list(BACKENDS)},
    )
    group_size: int = field(
        default=64, metadata={"help": "inputs that share a scale: a multiple of 32 that divides them, -1 = all"}
    )
    symmetric: bool = field(default=False, metadata={"help": "no zero points"})
    scale_search: bool = field(
        default=False, metadata={"help": "RTN and GPTQ: search each group's range, not its extremes"}
    )
    keep: list[str] = field(
        default_factory=list, metadata={"help": "blocks that stay at the high width: first, last, or numbers from 0"}
    )
    head_bits: int | None = field(
        default=None,
        metadata={"help": "bits of the output head; tied embeddings keep their table beside it (default: left alone)"},
    )
    curve_points: int = field(
        default=2, metadata={"help": "points of each order's curve of quality against bits, besides its ends; 0 = none"}
    )

    method = "layerwise-quant"
    paper_title = (
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels"
    )
    arxiv = "2406.17415"

    # -------------------------------------------------------------------------------------------- before any work

    def check(self) -> None:
        """Refuses impossible values before any work."""
        self.widths = parse_levels(self.levels, self.avg_bits)
        self.zeros = {"rtn": "integer", "gptq": "integer", "awq": "integer", "hqq": "float"}
        if self.symmetric:
            self.zeros |= dict.fromkeys(("rtn", "gptq", "awq"), "none")
            if self.backend == "hqq":
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
        self.own_order = self.importance if self.importance in ORDERS else "file"
        if self.head_bits not in (None, *WIDTHS):
            raise UserError(f"--head_bits {self.head_bits}: one of {', '.join(map(str, WIDTHS))} is needed.")
        if self.head_bits:
            self.ignore = [part for part in self.ignore if part != HEAD]
        if self.curve_points < 0:
            raise UserError(f"--curve_points {self.curve_points}: 0 or more is needed.")
        if self.seqlen < 3 or self.nsamples < 2:
            raise UserError(f"--nsamples {self.nsamples} --seqlen {self.seqlen}: 2 windows of 3 tokens at least.")

    def check_matrix(self, name: str, d_out: int, d_in: int) -> None:
        """Refuses a matrix that the widths or groups do not fit, before any work."""
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

    def modules(self, streamed) -> dict[str, nn.Linear]:
        """The linears, the head last; also reads what of the flags depends on the number of blocks."""
        self.linears, self.streamed, self.scaled = super().modules(streamed), streamed, {}
        config = streamed.config.get_text_config()
        self.folds = {
            i: folds_of(f"{streamed.prefix}.{i}", streamed.layers[i], config, set(self.linears))
            for i in range(len(streamed))
        }
        self.blocks = sorted({layer_index(name, 0) for name in self.linears})
        self.weights = dict.fromkeys(self.blocks, 0)
        for name, module in self.linears.items():
            self.weights[layer_index(name, 0)] += module.in_features * module.out_features
        self.kept = pinned(self.keep, self.blocks)
        free = [block for block in self.blocks if block not in self.kept]
        cut_plans(free, self.weights, self.avg_bits, self.widths)  # is the average within reach?
        self.given = read_scores(self.importance, self.blocks) if self.own_order == "file" else None
        if self.head_bits is None:
            return self.linears
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self.check_matrix(HEAD, head.out_features, head.in_features)
        return self.linears | {HEAD: head}

    def needs(self, streamed, modules: dict[str, nn.Linear], methods: list[Method]) -> tuple:
        """As of the blocks: the head is quantised by parts, with nothing else in memory."""
        return super().needs(streamed, self.linears, methods)

    # -------------------------------------------------------------------------------------------------- quantising

    def quantise(self, backend: str, name: str, weight: Tensor, stats: LayerStats, bits: int) -> Variant:
        """One matrix (d_out, d_in) fp32 by one backend."""
        options = self.options(bits)
        if backend == "awq":
            columns, rows = self.scaled[bits][name]
            variant = self.pack(awq(weight, stats, columns, rows, *options), backend)
            variant.dense, variant.folded = variant.dense * rows[:, None] / columns, {"columns": columns, "rows": rows}
            return variant
        if backend == "hqq":
            quantized = hqq(weight, *options)
        elif backend == "rtn":
            quantized = rtn(weight, *options, search=self.scale_search)
        else:
            quantized = gptq(weight, stats, *options, search=self.scale_search)
        return self.pack(quantized, backend)

    def options(self, bits: int) -> tuple:
        """What all quantisers take."""
        return bits, self.group_size, self.symmetric, getattr(torch, self.dtype)

    def preparation(self, backend: str, widths: Callable[[int], Iterable[int]]) -> dict:
        """`Method.prepare` of a backend: AWQ's scales, which matrices share, at the widths of each block."""

        def search(bits: int, weights: list[Tensor], stats: LayerStats, fold: Fold) -> Tensor:
            d = fold.to_source(stats.second_moment)
            return awq_scales(weights, stats, d, *self.options(bits), to_inputs=fold.to_inputs)

        def prepare(weights: dict[str, Tensor], stats: InputStatistics) -> None:
            block = layer_index(next(iter(weights)), 0)
            norm = lambda name: self.streamed.tensors.get(f"{name}.weight").float()  # noqa: E731
            arguments = self.folds[block], weights, stats.stats, norm, getattr(torch, self.dtype)
            self.scaled = {bits: block_scales(*arguments, partial(search, bits)) for bits in widths(block)}

        return {"prepare": prepare} if backend == "awq" else {}

    def pack(self, quantized: Quantized, backend: str) -> Variant:
        """The tensors of section 4."""
        dtype = getattr(torch, self.dtype)
        tensors = {
            "qweight": pack_codes(quantized.codes, quantized.bits, self.group_size),
            "scales": quantized.scales.to(dtype),
        }
        if quantized.zeros is not None:
            zeros = quantized.zeros
            tensors["zeros"] = zeros if zeros.dtype == torch.uint8 else zeros.to(dtype)
        return Variant(tensors, None, quantized.dequantize(), self.spec(backend, quantized.bits))

    def pack_head(self, run: Run, store: MatrixStore) -> None:
        """The head, of tied embeddings a copy of their table, to `store` as a matrix of the method."""
        if self.head_bits is None or store.has(self.method, HEAD):
            return
        tied, tensors = run.streamed.config.get_text_config().tie_word_embeddings, run.streamed.tensors
        weight = tensors.get(f"{run.streamed.decoder_prefix}embed_tokens.weight" if tied else f"{HEAD}.weight")
        options = (*self.options(self.head_bits), self.scale_search)
        parts = [self.pack(rtn(rows.float(), *options), "rtn") for rows in weight.split(HEAD_ROWS)]
        packed = {key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors}
        head = Variant(packed, None, torch.cat([part.dense for part in parts]), parts[0].spec)
        own = Method(self.method, self.compress, packed=(self.method,))
        facts = dict.fromkeys(("loss_init", "loss_final", "output_error", "seconds"))
        store.save(own, HEAD, {self.method: head}, {self.method: facts})

    def spec(self, backend: str, bits: int) -> dict:
        """What config.json says of one matrix."""
        return {"format": "packed", "bits": bits, "group_size": self.group_size, "zeros": self.zeros[backend]}

    def inputs(self, backend: str | None = None) -> str:
        """Only GPTQ depends on its inputs enough for the order of work to matter."""
        return "sequential" if self.sequential and (backend or self.backend) == "gptq" else "dense"

    def compress(self, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """One matrix of the checkpoint, at the width of its block."""
        return {self.method: self.quantise(self.backend, name, weight, stats, self.bits[layer_index(name, 0)])}

    def candidates(self) -> Method:
        """Every matrix at both widths, on inputs of the model that has the high one everywhere (section 3.6)."""
        names = {f"{bits}-bit": bits for bits in self.widths}

        def compress(matrix: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
            return {name: self.quantise(self.backend, matrix, weight, stats, bits) for name, bits in names.items()}

        prepare = self.preparation(self.backend, lambda _: names.values())
        return Method(next(iter(names)), compress, self.inputs(), packed=tuple(names), **prepare)

    def baseline_methods(self) -> list[Method]:
        """The other quantisers, at the same widths block by block."""

        def method(backend: str) -> Method:
            def compress(name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
                return {backend: self.quantise(backend, name, weight, stats, self.bits[layer_index(name, 0)])}

            prepare = self.preparation(backend, lambda block: (self.bits[block],))
            return Method(backend, compress, self.inputs(backend), packed=(backend,), **prepare)

        rivals = [name for name in BACKENDS if name != self.backend and not (self.symmetric and name == "hqq")]
        return [
            *map(method, rivals),
            *([Method("pruned", self.prune, self.inputs("gptq"))] if self.can_prune() else []),
        ]

    def sparse_row(self, row: dict) -> dict:
        """In place of a packed matrix one of 16-bit weights and a bitmask in as many bytes: N of every M, M = 64 or less."""
        size, itemsize = row["d_out"] * row["d_in"], getattr(torch, self.dtype).itemsize
        m = math.gcd(row["d_in"], PRUNED_GROUP)
        n = int(m * (layer_bytes(row, itemsize) / size - 1 / 8) / itemsize)
        return {"d_out": row["d_out"], "d_in": row["d_in"], "pattern": (n, m)}

    def can_prune(self) -> bool:
        """Whether the bytes of the low width hold any weight at all in a sparse matrix."""
        low = self.rows(dict.fromkeys(self.blocks, self.widths[-1]), self.backend)
        return all(self.sparse_row(row)["pattern"][0] > 0 for row in low)

    def prune(self, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """SparseGPT in place of fewer bits: one matrix in as many bytes."""
        d_out, d_in = weight.shape
        packed = {"d_out": d_out, "d_in": d_in} | self.spec(self.backend, self.bits[layer_index(name, 0)])
        return {"pruned": Variant({}, None, sparsegpt(weight, stats, self.sparse_row(packed)["pattern"]))}

    # ---------------------------------------------------------------------------------------------- the two passes

    def methods(self) -> list[Method]:
        own, *rivals = super().methods()
        own = replace(own, **self.preparation(self.backend, lambda block: (self.bits[block],)))
        return [own, self.candidates(), *rivals]

    def produce(self, run: Run, store: MatrixStore, compress) -> None:
        """Candidates and scores of all blocks; from them the plan; the checkpoint and the other quantisers by the plan."""
        own, candidates, *rivals = run.methods
        compress([candidates], observe=partial(score_block, store.folder / "blocks"))
        if run.processes.rank == 0:
            cached_json(store.folder / "plan.json", partial(self.make_plan, run, store))
            self.pack_head(run, store)
        run.processes.barrier()
        self.bits = Plan.read(store).bits
        compress([own, *rivals])

    def make_plan(self, run: Run, store: MatrixStore) -> dict:
        """The plan as JSON: scores of the blocks, their weights, and the bits that meet the average."""
        facts = {i: json.loads((store.folder / "blocks" / f"{i}.json").read_text()) for i in self.blocks}
        free = ["lim", "zd", *(["zd-two-sided"] if self.importance == "zd-two-sided" else [])]
        scores = {name: {i: facts[i][name] for i in self.blocks} for name in free}
        if "sensitivity" in (self.own_order, *self.chosen_baselines()):
            scores["sensitivity"] = self.sensitivity(run, store)
        if self.given is not None:
            scores["file"] = self.given
        plans = cut_plans(self.order(self.own_order, scores, self.seed), self.weights, self.avg_bits, self.widths)
        halves = ([facts[i]["halves"][half] for i in self.blocks] for half in (0, 1))
        return {
            "seed": self.seed,
            "scores": scores,
            "stability": kendall_tau(*halves),
            "bits": plans[0] if len(plans) == 1 else min(plans, key=partial(self.held_loss, run, store)),
        }

    def unseen(self, run: Run) -> list[Tensor]:
        """Windows (T,) of calibration text that nothing is calibrated on: blocks and cuts are judged by them."""
        count = max(1, SENSITIVITY_TOKENS // self.seqlen)
        windows = calibration_windows(run.text, run.tokenizer, self.nsamples + count, self.seqlen, self.seed)
        return list(windows[self.nsamples :])

    def held_loss(self, run: Run, store: MatrixStore, bits: dict[int, int]) -> float:
        """Perplexity of a mixture of candidates on unseen calibration text."""
        digest = mixture_digest(bits)

        def make() -> dict:
            found = perplexity(self.mixture(run, store, bits), torch.stack(self.unseen(run)))
            counts = ", ".join(f"{list(bits.values()).count(width)} x {width} bits" for width in self.widths)
            print(f"plan of {counts}: perplexity {found['value']:.6g} on unseen calibration text", flush=True)
            return found

        return cached_json(store.folder / "plans" / f"{digest}.json", make)["value"]

    def sensitivity(self, run: Run, store: MatrixStore) -> dict[int, float]:
        """Damage of each block alone at the lowest width, on unseen calibration text."""
        names = [f"{bits}-bit" for bits in self.widths]
        model, rows, windows = load_fp32(run.base.path), [], self.unseen(run)
        for number, window in enumerate(windows):
            print(f"sensitivity, window {number + 1}/{len(windows)}", flush=True)
            lowered = partial(store.weight, names[0], variant=names[-1])
            make = partial(block_damage, model, window, self.linears, lowered)
            rows.append(cached_json(store.folder / "sensitivity" / f"{number}.json", make))
        return {i: statistics.fmean(row[str(i)] for row in rows) for i in self.blocks}

    def order(self, name: str, scores: dict[str, dict[int, float]], seed: int) -> list[int]:
        """The blocks, least important first, without those that --keep pins."""
        if name == "reversed":
            return self.order(self.own_order, scores, seed)[::-1]
        blocks = self.blocks
        if name.startswith("zd"):
            importance = {i: -scores[name][i] for i in blocks}
        elif name == "random":
            shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
            importance = dict(zip(blocks, shuffled, strict=True))
        elif name == "depth":
            importance = {i: -i for i in blocks}
        elif name == "ends":
            importance = {i: abs(i - (blocks[0] + blocks[-1]) / 2) for i in blocks}
        else:
            importance = scores[name]
        return [i for i in least_first(importance) if i not in self.kept]

    # --------------------------------------------------------------------------------------------------- measuring

    def baseline_names(self) -> list[str]:
        """The uniform widths, all orders, whole blocks dropped, the other quantisers."""
        orders = [name for name in self.orders() if name != self.own_order or self.inputs() != "dense"]
        rivals = [method.name for method in self.baseline_methods()]
        return [*(f"{bits}-bit" for bits in self.widths), *orders, "dropped", *rivals]

    def orders(self) -> list[str]:
        """The chosen order, its reverse, and the others."""
        others = [name for name in ORDERS if name not in (self.own_order, "zd-two-sided")]
        return [self.own_order, "reversed", *others]

    def measure_baselines(self, run: Run) -> dict[str, list[dict]]:
        measured = {}
        for name in self.chosen_baselines():
            for seed in run.seeds:
                plan = Plan.read(run.store(seed))
                if name in (*BACKENDS, "pruned"):
                    variants = dict.fromkeys(self.blocks, name)
                    metrics = run.measure(f"{name}-{seed}", partial(load_mixture, run, run.store(seed), name, variants))
                else:
                    metrics = self.measure_mixtures(run, seed, self.mixtures(name, plan))
                measured.setdefault(name, []).append(metrics)
        return measured

    def mixtures(self, name: str, plan: Plan, steps: int | None = None) -> list[dict[int, int]]:
        """{block: bits} of a baseline that swaps candidates, several of a random order; a missing block is dropped.

        steps: how far along an order blocks are lowered (`step_down`); None means to as many of each width as the
        checkpoint has.
        """
        high = dict.fromkeys(self.blocks, self.widths[0])
        if name.endswith("-bit"):
            return [dict.fromkeys(self.blocks, int(name.removesuffix("-bit")))]
        if name == "dropped":
            for block in least_first(plan.scores["lim"]):
                if self.bytes_of(high) <= self.bytes_of(plan.bits):
                    break
                del high[block]
            return [high]
        draws = range(plan.seed, plan.seed + RANDOM_ORDERS) if name == "random" else [plan.seed]
        orders = [self.order(name, plan.scores, draw) for draw in draws]
        if steps is not None:
            return [high | step_down(order, steps, self.widths) for order in orders]
        return [high | dict(zip(order, sorted(plan.bits.values()), strict=False)) for order in orders]

    def mixture(self, run: Run, store: MatrixStore, bits: dict[int, int]) -> nn.Module:
        """The dense model with these candidates swapped in."""
        variants = {block: f"{width}-bit" for block, width in bits.items()}
        return load_mixture(run, store, f"{self.widths[0]}-bit", variants)

    def measure_mixtures(self, run: Run, seed: int, mixtures: list[dict[int, int]]) -> dict[str, dict]:
        """The mean over mixtures; each is measured once, whichever order leads to it."""
        runs = {}
        for bits in mixtures:
            digest = mixture_digest(bits)
            runs[digest] = run.measure(f"mixture-{seed}-{digest}", partial(self.mixture, run, run.store(seed), bits))
        return over_runs(list(runs.values()))

    def rows(self, bits: dict[int, int], backend: str) -> list[dict]:
        """The shape and format of every matrix of the blocks in `bits`, as in the report's `layers`."""
        shapes = {name: {"d_out": m.out_features, "d_in": m.in_features} for name, m in self.linears.items()}
        places = {name: layer_index(name, 0) for name in shapes}
        return [
            shape | self.spec(backend, bits[places[name]]) for name, shape in shapes.items() if places[name] in bits
        ]

    def average(self, bits: dict[int, int]) -> float:
        """Bits per weight, counted by weights, not by blocks."""
        return sum(self.weights[block] * b for block, b in bits.items()) / sum(self.weights.values())

    def bytes_of(self, bits: dict[int, int]) -> int:
        itemsize = getattr(torch, self.dtype).itemsize
        return sum(layer_bytes(row, itemsize) for row in self.rows(bits, self.backend))

    def baseline_rows(
        self, modules: dict[str, nn.Linear], names: list[str], store: MatrixStore
    ) -> dict[str, list[dict]]:
        """All models have the same head."""
        plan, rows = Plan.read(store), {}
        head = [row for row in self.layer_rows(modules, store) if row["name"] == HEAD]
        for name in names:
            bits = plan.bits if name in (*BACKENDS, "pruned") else self.mixtures(name, plan)[0]
            rows[name] = self.rows(bits, name if name in BACKENDS else self.backend)
            if name == "pruned":
                rows[name] = [self.sparse_row(row) for row in rows[name]]
            rows[name] += head
        return rows

    def packed_tensors(self, modules: dict[str, nn.Linear], store: MatrixStore) -> Iterator[tuple[str, Tensor]]:
        """With AWQ also the norms and biases that make up for the scales."""
        yield from super().packed_tensors(modules, store)
        if self.backend == "awq":
            folds = [fold for block in self.folds.values() for fold in block]
            yield from sources(folds, self.streamed.tensors, partial(store.folded, self.method, variant=self.method))

    def compression_config(self, store: MatrixStore) -> dict:
        """The method's own part of `compression_config` (section 4)."""
        plan = Plan.read(store)
        return {
            "backend": self.backend,
            "importance": self.own_order,
            "levels": list(self.widths),
            "head_bits": self.head_bits,
            "average_bits": self.average(plan.bits),
            "average_bits_with_overhead": 8 * self.bytes_of(plan.bits) / sum(self.weights.values()),
            "bits_by_layer": {str(block): bits for block, bits in plan.bits.items()},
        }

    def findings(self, run: Run) -> dict:
        """Importance of the blocks, curves of quality against bits, and what the reader of the card must know."""
        plan = Plan.read(run.store(run.seeds[0]))
        blocks = [
            {"index": i, "bits": plan.bits[i], "scores": {name: values[i] for name, values in plan.scores.items()}}
            for i in self.blocks
        ]
        found = {"importance": {"stability": plan.stability, "blocks": blocks}, "notes": self.notes(plan)}
        if self.curve_points:
            names = [self.own_order, *(name for name in self.chosen_baselines() if name in self.orders())]
            found["curves"] = {name: self.curve(run, plan, name) for name in names}
            own = self.measure_mixtures(run, plan.seed, self.mixtures(self.own_order, plan))
            rivals = {
                name: rows[0] for name, rows in self.measure_baselines(run).items() if name in ("dropped", "pruned")
            }
            claims = claims_table(found["curves"], self.own_order, own, rivals, self.backend)
            found["tables"] = {"The paper's claims": claims}
        return found

    def curve(self, run: Run, plan: Plan, name: str) -> list[dict]:
        """Quality as more and more blocks of an order are lowered, from all at the highest width to all at the lowest."""
        count = (len(self.blocks) - len(self.kept)) * (len(self.widths) - 1)
        steps = {round(count * point / (self.curve_points + 1)) for point in range(self.curve_points + 2)}
        if len(self.widths) == 2:  # of three, the checkpoint's own plan is not on this path
            steps.add(sum(bits == self.widths[-1] for bits in plan.bits.values()))
        points = []
        for lowered in sorted(steps):
            mixtures = self.mixtures(name, plan, lowered)
            metrics = self.measure_mixtures(run, plan.seed, mixtures)
            points.append({"lowered": lowered, "bits": self.average(mixtures[0]), "metrics": metrics})
        return points

    def notes(self, plan: Plan) -> list[str]:
        config = {
            "nominal": self.average(plan.bits),
            "stored": 8 * self.bytes_of(plan.bits) / sum(self.weights.values()),
        }
        notes = [
            f"the quantised weights of the blocks take {config['nominal']:.2f} bits on average, {config['stored']:.2f} with"
            f" scales and zero points; embeddings{'' if self.head_bits else ', head'} and norms are not quantised"
        ]
        if self.head_bits:
            notes.append(
                f"the output head takes {self.head_bits} bits, by round-to-nearest, here and in the compressed models that"
                " are compared with, not in the dense one"
            )
        if self.backend == "awq":
            notes.append(
                "AWQ's scales are folded into the norms before q, k, v, gate and up, and into the rows of v and up, so these"
                " differ from the base model's beyond rounding, and cancel out"
            )
        if plan.stability < STABLE:
            notes.append(
                f"the ranking by LIM is not stable: Kendall's tau between halves of the calibration text is"
                f" {plan.stability:.2f}, and {STABLE} is wanted; more --nsamples would settle it"
            )
        widest = max(module.in_features for module in self.linears.values())
        tokens = self.nsamples * self.seqlen
        if self.backend == "gptq" and tokens < GPTQ_TOKENS * widest:
            notes.append(
                f"GPTQ saw {tokens} tokens, fewer than {GPTQ_TOKENS} for each of {widest} inputs, which it wants"
            )
        return notes


@dataclass
class Plan:
    """What was decided for one seed; all maps are by number of block."""

    seed: int
    scores: dict[str, dict[int, float]]
    stability: float  # of LIM: Kendall's tau between two halves of the calibration text
    bits: dict[int, int]

    @classmethod
    def read(cls, store: MatrixStore) -> Plan:
        plan = json.loads((store.folder / "plan.json").read_text())
        numbered = lambda values: {int(block): value for block, value in values.items()}  # noqa: E731
        scores = {name: numbered(values) for name, values in plan["scores"].items()}
        return cls(plan["seed"], scores, plan["stability"], numbered(plan["bits"]))


# --------------------------------------------------------------------------------------------------------- measuring


def load_mixture(run: Run, store: MatrixStore, method: str, variants: dict[int, str]) -> nn.Module:
    """The dense model with a variant of each block, and the packed head, swapped in; a block without one hands its input
    on."""
    model = load_fp32(run.base.path)
    missing = set()
    for name in run.modules:
        block = layer_index(name, 0)
        if name == HEAD:
            own = LayerwiseQuant.method
            model.get_submodule(name).weight = nn.Parameter(store.weight(own, name, own))  # the table stays as it is
        elif block in variants:
            model.get_submodule(name).weight.data.copy_(store.weight(method, name, variants[block]))
        else:
            missing.add(block)
    for block in missing:
        model.get_decoder().layers[block].forward = lambda hidden_states, **_: hidden_states
    return model


def mixture_digest(bits: dict[int, int]) -> str:
    """A short name of a mixture."""
    return hashlib.sha256(json.dumps(sorted(bits.items())).encode()).hexdigest()[:12]
