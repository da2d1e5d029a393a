"""KVTuner: a width of its own for the cached keys and values of every layer.   ICML 2025, arXiv 2502.04420.

Inside a layer one width for keys and one for values, so that ordinary kernels work; which pair (K bits, V bits) of
{8, 4, 2}^2 a layer gets is searched offline, and is a table in config.json. Weights stay as they are.

    1. quantiser   x^ = s code + m, m = min, s = (max - m) / (2^b - 1) per group, after RoPE
                   per_token: a group is one token of one head; kivi: values in groups of 32 along the head, keys in
                   groups of 32 tokens of one channel, the newest S mod 32 tokens in 16 bits. By token and at 2
                   bits m is the nearest multiple of s in the groups that lose less so: values cluster around 0
    2. errors      e_o(l, p) = ||o - o^|| / ||o||, o = softmax(q K^T / sqrt(D)) V, q of decoded tokens,
                   every layer alone, for each pair p                              (L, pairs)
    3. pruning     layer l keeps p unless some q has bits(q) <= bits(p), e_o(q) <= e_o(p), one strict;
                   bits = (K + V) / 2
    4. clustering  layers with the same candidates: DBSCAN on their e_o; a group shares one pair. Without --cluster,
                   which is the default, every layer is a group of its own
    5. search      NSGA-II over one choice per group: f_a = KL(p || p^) on calibration text,
                   f_m = sum_l (K_l + V_l) / 2L, soft constraint f_m <= max_bits. Without --cluster it starts from the
                   tables of least sum_l KL(p || p^ with layer l alone quantised), exact knapsacks at several budgets
    6. pick        the two best within max_bits go to held-out text, the better one becomes the table; so do the best
                   uniform table and the best found at each other budget, which a table of the report compares

Deviates from the authors' code in: the float minimum instead of an integer zero point, except at 2 bits by token; blocks
of keys never straddle channels; noise layers of DBSCAN are groups of their own, and groups are merged down to
`max_groups`; own NSGA-II; KL instead of GSM8K accuracy unless `--objective gsm8k`, and windows of text instead of its
prompts for the errors; the pick is made on text that was not searched on; no sink tokens, and scales always in fp16. By
default single layers in place of groups, the knapsacks to start from, and 3.25 bits, where uniform tables lose much;
`--paper` takes groups, no knapsacks, 4 bits and GSM8K.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.common.core.state import matmul_flops
from recipes.common.data.texts import calibration_windows
from recipes.common.metrics.metric import over_runs
from recipes.kvtuner.allocation import Group, cluster, pareto_pairs, print_layers, singles
from recipes.kvtuner.baselines import (
    ASIDE,
    BUDGETS,
    RANDOM_TABLES,
    baseline_tables,
    table_names,
    unfit_baselines,
    wider,
)
from recipes.kvtuner.evidence import cache_findings, same_tables
from recipes.kvtuner.flags import KVFlags
from recipes.kvtuner.measuring import (
    CacheLanguage,
    check_cache,
    measure_cache_speed,
    notes,
    packed_layers,
    stored_dtype,
)
from recipes.kvtuner.searching import (
    Archive,
    Evaluations,
    best,
    best_uniform,
    check_objective,
    front,
    held_out_scores,
    make_objective,
    search,
)
from recipes.kvtuner.simulation import greedy, mean_kl, measure_errors, quantised_cache
from recipes.kvtuner.state import KVRun, Tuned
from recipes.kvtuner.tables import (
    CacheFormat,
    Pair,
    Table,
    cache_format,
    effective_bits,
    equivalent_bits,
    given_table,
    official_yaml,
    pair_bits,
    pair_name,
    parse_pairs,
)
from zoo.checkpoint import write_checkpoint
from zoo.errors import UserError
from zoo.folder import open_folder

ANSWER = 64  # greedy tokens per calibration prompt, at most half a window (step 2)
HELD = 16  # windows to choose on, at most: log-probabilities over the whole vocabulary stay in memory
ALONE = 2.5  # evaluations' worth of a layer's candidates alone: five, each of half the blocks on average


@dataclass(frozen=True)
class KVTuner(KVFlags):
    """Search the widths of the KV cache layer by layer; the weights stay as they are."""

    paper_title = "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization"
    arxiv = "2502.04420"
    run_type = KVRun

    # -------------------------------------------------------------------------------------------- before any work

    def domain(self) -> CacheLanguage:
        return CacheLanguage(self.settings())

    @cached_property
    def menu(self) -> tuple[Pair, ...]:
        return parse_pairs(self.pairs)

    @cached_property
    def form(self) -> CacheFormat:
        """The numbers that share a scale."""
        return cache_format(self.mode, self.group_size, self.residual_length)

    @cached_property
    def loaded(self) -> Table | None:
        """The table of --load-table, if it is for this mode."""
        return None if self.load_table is None else given_table(self.load_table, self.mode, self.max_bits)

    def check(self) -> None:
        super().check()
        menu, form = self.menu, self.form
        smallest = min(map(pair_bits, menu))
        if not smallest <= self.max_bits <= 16:
            raise UserError(
                f"--max-bits {self.max_bits:g}: from {smallest:g}, the smallest of --pairs, to 16 is possible."
            )
        if self.evals < max(self.population, len(menu) + 2):
            raise UserError(
                f"--evals {self.evals}: at least --population, which is {self.population}, and {len(menu) + 2}"
                " for the uniform tables are needed; raise it or lower --population."
            )
        if self.seqlen < form.residual_length:
            raise UserError(
                f"--seqlen {self.seqlen}: with --residual-length {form.residual_length} nothing would be quantised;"
                f" {form.residual_length} or more is needed."
            )
        check_objective(self.objective)
        self.loaded  # noqa: B018 (read now)
        if self.objective == "gsm8k" and any(task.startswith("gsm8k") for task in self.tasks):
            raise UserError("--tasks gsm8k: the search of --objective gsm8k sees its items; measure another task.")

    def baseline_names(self) -> list[str]:
        return [*table_names(self.menu, self.mode, self.max_bits), ASIDE[self.cluster]]

    def default_baselines(self) -> list[str]:
        """Every rule, and of the uniform tables those of few bits: the others cost minutes and are near 16 bits."""
        few = [pair_name(pair) for pair in self.menu if pair_bits(pair) <= 4 and pair != (2, 4)]
        named = [name for name in table_names(self.menu, self.mode, self.max_bits) if name not in ASIDE.values()]
        uniform = {pair_name(pair) for pair in self.menu}
        aside = {"reversed", "second", "kivi-8", "per-token-8"}
        return [name for name in named if name in few or name not in uniform | aside]

    def check_base(self, run: KVRun) -> None:
        """Refuses a model whose cache cannot be quantised so."""
        layers, _, head_dim = run.shape
        check_cache(run.domain.config, self.model, self.menu, self.form)
        if self.loaded and len(self.loaded) != layers:
            raise UserError(
                f"--load-table {self.load_table}: it has {len(self.loaded)} layers, {self.model} has {layers}."
            )
        unfit = self.unfit(run)
        if unfit and self.baselines:
            raise UserError(f"--baselines {unfit[0]}: its groups do not divide the head size {head_dim}; leave it out.")
        self.windows(run, self.seed)

    def unfit(self, run: KVRun) -> list[str]:
        """Baselines whose groups do not divide the head size."""
        return unfit_baselines(self.chosen_baselines(), self.mode, run.shape[2])

    def needs(self, run: KVRun) -> tuple[float, float, float]:
        logits, parameters = 4 * run.domain.config.get_text_config().vocab_size, run.domain.base.parameters
        kept = self.nsamples * (self.objective == "kl") + self.held  # windows with log-probabilities
        ram = 5 * parameters + logits * (kept * self.seqlen + 3 * max(2048, 4 * self.eval_seqlen)) + 2**30
        width = run.domain.config.get_text_config().hidden_size
        ram += 4 * run.shape[0] * width * self.nsamples * self.seqlen * (self.objective == "kl")
        disk = 4 * parameters + 2**24
        baselines = len(self.chosen_baselines()) + RANDOM_TABLES
        tables = self.seeds * (self.evals + ALONE * run.shape[0])
        tokens = tables * self.nsamples * self.seqlen + self.seeds * 2 * len(BUDGETS) * self.held * self.seqlen
        tokens += baselines * (3 * self.eval_windows * self.eval_seqlen + self.retrieval_items * self.retrieval_tokens)
        return ram, disk, 2 * 2 * parameters * tokens / matmul_flops() / 60

    # -------------------------------------------------------------------------------------------------- the method

    @property
    def answer(self) -> int:
        """Tokens of a window that are the model's own answer."""
        return min(ANSWER, self.seqlen // 2)

    @property
    def held(self) -> int:
        """Windows held back from the search."""
        return min(2 * self.nsamples, HELD)

    def windows(self, run: KVRun, seed: int) -> tuple[Tensor, ...]:
        """Calibration windows for the errors, for the search, and held back from it."""
        parts = [self.calib_samples, self.nsamples, self.held]
        return calibration_windows(run.domain.text, run.domain.tokenizer, sum(parts), self.seqlen, seed).split(parts)

    def produce(self, run: KVRun, seed: int) -> None:
        """Steps 2 to 6, and the tables of the baselines; what is measured on the way is kept in the state folder."""
        model, (prompts, searched, held) = run.model, self.windows(run, seed)
        prompt, folder = self.seqlen - self.answer, run.state / f"seed-{seed}"
        folder.mkdir(exist_ok=True)

        def measure() -> dict:
            sequences = greedy(model, prompts[:, :prompt], self.answer)
            errors = measure_errors(model, sequences, prompt, self.menu, self.form)
            return {"sequences": sequences.tolist(), **errors._asdict()}

        if run.processes.rank == 0:
            run.once(f"seed-{seed}/errors", measure)
        run.processes.barrier()  # all group the layers by the same numbers
        measured = run.once(f"seed-{seed}/errors", measure)
        errors = [dict(zip(self.menu, row, strict=True)) for row in measured["output"]]
        candidates = self.candidates(errors)
        groups = self.groups(errors, candidates)
        print_layers(measured, self.menu, candidates, groups)
        objective = make_objective(self.objective, model, run.domain.tokenizer, searched)
        evaluate = Evaluations(model, self.form, objective, folder, run.processes)
        if self.loaded:
            tables = [self.loaded, *((pair,) * len(errors) for pair in self.menu)]
            archive = dict(zip(tables, evaluate(tables), strict=True))
            picks = {self.max_bits: [self.loaded]}
        else:
            archive = self.search(groups, errors, evaluate, seed)
            picks = {limit: best(archive, limit)[:1] for limit in BUDGETS} | {
                self.max_bits: best(archive, self.max_bits)
            }
        held_out: dict[Table, float] = {}
        if run.processes.rank == 0:
            tables = {table for kept in picks.values() for table in kept}
            tables |= {table for limit in picks for table in best_uniform(archive, limit)}
            sequences = torch.tensor(measured["sequences"])
            scores = held_out_scores(model, self.form, tables, held, sequences, prompt, folder / "held-out.json")
            picks = {limit: sorted(kept, key=scores.__getitem__) for limit, kept in picks.items()}
            held_out = {table: score[-1] for table, score in scores.items()}
        table, baselines, seconds = picks[self.max_bits][0], {}, sum(evaluate.seconds.values())
        if seed == run.seeds[0]:
            baselines = baseline_tables(
                [name for name in self.chosen_baselines() if name not in self.unfit(run)],
                table,
                errors,
                candidates,
                evaluate,
                form=self.form,
                menu=self.menu,
                seed=seed,
                other_search=partial(self.other_search, errors, candidates, evaluate, seed),
            )
        run.tuned[seed] = Tuned(table, picks, archive, groups, errors, baselines, held, held_out, seconds)

    def candidates(self, errors: list[dict[Pair, float]]) -> list[tuple[Pair, ...]]:
        """Step 3: the pairs each layer may have, by falling bits."""
        if not self.prune:
            return [tuple(sorted(self.menu, key=lambda p: (-pair_bits(p), -p[0])))] * len(errors)
        return [pareto_pairs(row) for row in errors]

    def groups(self, errors: list[dict[Pair, float]], candidates: list[tuple[Pair, ...]]) -> list[Group]:
        """Step 4; without --cluster one group per layer."""
        if not self.cluster:
            return singles(candidates)
        return cluster(errors, candidates, self.eps, self.min_samples, self.max_groups)

    def search(self, groups: list[Group], errors: list[dict[Pair, float]], evaluate: Evaluations, seed: int) -> Archive:
        """Step 5."""
        settings = {key: getattr(self, key) for key in ("menu", "max_bits", "evals", "population")}
        return search(groups, errors, evaluate, seed=seed, isolated=not self.cluster, **settings)

    def other_search(
        self, errors: list[dict[Pair, float]], candidates: list[tuple[Pair, ...]], evaluate: Evaluations, seed: int
    ) -> Table:
        """What the search with groups finds where the own one has none, and without where it has."""
        other = replace(self, cluster=not self.cluster)
        archive = other.search(other.groups(errors, candidates), errors, evaluate, seed)
        return best(archive, self.max_bits)[0]

    # ------------------------------------------------------------------------------------ the checkpoint, and measuring

    def write(self, run: KVRun, seed: int, folder: Path) -> None:
        found, base = run.tuned[seed], run.domain.base.path
        tables = {
            f"kv_table_{limit:g}_{place}.yaml": official_yaml(table)
            for limit, tables in found.picks.items()
            for place, table in enumerate(tables)
        }
        write_checkpoint(
            folder,
            base=base,
            compression={"method": "kvtuner", "format_version": 1, "modules": {}},
            tensors=(),
            dtype=stored_dtype(base),
            extra_files=run.recipe_yaml | tables,
            settings={"kv_cache_quantization": self.cache_config(run, seed)},
        )

    def cache_config(self, run: KVRun, seed: int) -> dict:
        """`kv_cache_quantization` of config.json."""
        found, text = run.tuned[seed], run.domain.text
        return {
            "method": "kvtuner",
            "version": 1,
            "mode": self.form.mode,
            "group_size": self.form.group_size,
            "residual_length": self.form.residual_length,
            "prefill": self.prefill,
            "scale_dtype": "float16",
            "layers": [list(pair) for pair in found.table],
            "equivalent_bits": equivalent_bits(found.table),
            "effective_bits": effective_bits(found.table, self.form, run.shape[2]),
            "search": {
                "seed": seed,
                "evals": len(found.archive),
                "objective": self.objective,
                "data": {**text.facts(), "nsamples": self.nsamples, "seqlen": self.seqlen},
                "front": front(found.archive),
            },
        }

    def tables(self, run: KVRun) -> dict[str, list[tuple[Table, CacheFormat]]]:
        """The tables of every variant but dense: of the method one a seed, of a random baseline several."""
        found, wanted = run.first, self.chosen_baselines()
        own = {self.method: [(run.tuned[seed].table, self.form) for seed in run.seeds]}
        above = wider(self.max_bits)
        others = {"second": found.picks[self.max_bits][1:2], f"within-{above:g}": found.picks.get(above, [])[:1]}
        finds = {
            name: [(table[0], self.form)]
            for name, table in others.items()
            if name in wanted and table and table[0] != found.table
        }
        return own | found.baselines | finds

    def variants(self, run: KVRun) -> list[str]:
        return ["dense", *self.tables(run)]

    @contextmanager
    def open(self, run: KVRun, variant: str, place: int) -> Iterator[nn.Module]:
        """The model with a variant's table of that place."""
        as_if = nullcontext() if variant == "dense" else quantised_cache(run.model, *self.tables(run)[variant][place])
        with as_if:
            yield run.model

    def measure(self, run: KVRun, variant: str) -> list[dict[str, dict]]:
        """Dense once, the own tables seed by seed, a baseline as the mean over its tables."""
        if variant == "dense":
            return super().measure(run, variant)
        places = range(len(self.tables(run)[variant]))
        found = [run.measure(f"{variant}-{place}", partial(self.open, run, variant, place)) for place in places]
        return found if variant == self.method else [over_runs(found)]

    @contextmanager
    def reopen(self, folder: Path) -> Iterator[nn.Module]:
        config = open_folder(folder).config["kv_cache_quantization"]
        form = CacheFormat(config["mode"], config["group_size"], config["residual_length"])
        model = self.domain().load(folder).eval()
        with quantised_cache(model, tuple(map(tuple, config["layers"])), form):
            yield model

    def speed(self, run: KVRun, folder: Path) -> dict[str, dict[str, dict]]:
        return measure_cache_speed(run.domain.base.path, folder, self.speed_tokens) if self.speed_tokens else {}

    def layers(self, run: KVRun, folder: Path) -> list[dict]:
        return packed_layers(folder)

    def divergence(self, run: KVRun, variant: str) -> float:
        """KL to the 16-bit model on the windows held back from the search; the mean over a baseline's tables."""
        reference = run.held_predictions  # before any table rounds the model's cache

        def of(place: int) -> dict:
            with self.open(run, variant, place) as model:
                return {"kl": mean_kl(model, run.first.held, reference)}

        places = range(1 if variant == self.method else len(self.tables(run)[variant]))
        return statistics.fmean(run.once(f"divergence/{variant}-{place}", partial(of, place))["kl"] for place in places)

    def findings(self, run: KVRun) -> dict:
        """The table, how it was found, what the cache of every model takes, and what a reader must know."""
        tables = {name: tables[0] for name, tables in self.tables(run).items()}
        _, kv_heads, head_dim = run.shape
        found = cache_findings(
            run.first,
            tables,
            {name: self.divergence(run, name) for name in tables},
            menu=self.menu,
            objective=self.objective,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )
        compression = open_folder(run.checkpoint(run.seeds[0])).compression
        lines = notes(run.first.table, self.prefill, compression["method"] if compression["modules"] else None)
        if self.loaded:
            lines.append(f"the table was not searched but given, as --load-table {self.load_table}")
        elif same := same_tables(tables, self.method):
            found["same_as"] = same
        if self.objective == "gsm8k":
            lines.append(
                f"the first {self.nsamples} test items of GSM8K were searched on, so no score on it is reported"
            )
        return found | {"notes": lines}
