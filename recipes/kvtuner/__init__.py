"""KVTuner: a width of its own for the cached keys and values of every layer.   ICML 2025, arXiv 2502.04420.

Inside a layer one width for keys and one for values, so that ordinary kernels work; which pair (K bits, V bits) of
{8, 4, 2}^2 a layer gets is searched offline, and is a table in config.json. Weights stay as they are.

    1. quantiser   x^ = s code + m, m = min, s = (max - m) / (2^b - 1) per group, after RoPE       section 3.1
                   per_token: a group is one token of one head; kivi: values in groups of 32 along the head, keys in
                   groups of 32 tokens of one channel, the newest S mod 32 tokens in 16 bits
    2. errors      e_o(l, p) = ||o - o^|| / ||o||, o = softmax(q K^T / sqrt(D)) V, q of decoded tokens,
                   every layer alone, for each pair p                              (L, pairs)      section 3.2
    3. pruning     layer l keeps p unless some q has bits(q) <= bits(p), e_o(q) <= e_o(p), one strict;
                   bits = (K + V) / 2                                                              section 3.3
    4. clustering  layers with the same candidates: DBSCAN on their e_o; a group shares one pair   section 3.4
    5. search      NSGA-II over one choice per group: f_a = KL(p || p^) on calibration text,
                   f_m = sum_l (K_l + V_l) / 2L, soft constraint f_m <= max_bits                   section 3.5
    6. pick        the two best within max_bits go to held-out text, the better one becomes the table

Deviates from the authors' code in: the float minimum instead of an integer zero point; blocks of keys never straddle
channels; noise layers of DBSCAN are groups of their own, and groups are merged down to `max_groups`; own NSGA-II;
KL instead of GSM8K accuracy unless `--objective gsm8k`, and windows of text instead of its prompts for the errors; the
pick is made on text that was not searched on; no sink tokens, and scales always in fp16.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from recipes.common.core import report as reports
from recipes.common.core.recipe import Recipe, World, cached_json, check_resources, open_state, pin_inputs, world
from recipes.common.data.base_models import BaseModel, check_finite, open_tensors, resolve_model
from recipes.common.data.texts import CalibrationText, Text, calibration_windows, load_text
from recipes.common.loops.streamed import EVALUATION_TEXTS, held_out_windows, load_fp32
from recipes.common.metrics.language import check_tasks, over_runs, perplexity, run_tasks
from recipes.kvtuner.allocation import Group, cluster, pareto_pairs, print_layers, singles
from recipes.kvtuner.baselines import ASIDE, RANDOM_TABLES, WIDER, check_rivals, rival_names, rival_tables
from recipes.kvtuner.measuring import (
    cache_findings,
    measure_cache,
    measure_cache_speed,
    packed_layers,
    remeasure,
)
from recipes.kvtuner.retrieving import hidden_codes
from recipes.kvtuner.searching import Archive, Evaluations, best, front, held_out_scores, load_objective, search
from recipes.kvtuner.simulation import greedy, log_probabilities, mean_kl, measure_errors, quantised_cache
from recipes.kvtuner.tables import (
    FORMATS,
    CacheFormat,
    Pair,
    Table,
    cache_shape,
    effective_bits,
    equivalent_bits,
    official_yaml,
    pair_bits,
    pair_name,
    parse_pairs,
    read_table,
)
from zoo.cache import layer_types
from zoo.checkpoint import load_compression, read_checkpoint_sizes, write_checkpoint
from zoo.errors import UserError
from zoo.models import slim_class_for
from zoo.record.hub import publish

__all__ = ["KVTuner", "remeasure"]  # `verify` measures a checkpoint of this recipe by `remeasure`

ANSWER = 64  # greedy tokens per calibration prompt, at most half a window (section 3.5: "64 greedy tokens")
HELD = 16  # windows to choose on, at most: log-probabilities over the whole vocabulary stay in memory


@dataclass
class KVTuner(CalibrationText, Recipe):
    """Search the widths of the KV cache layer by layer; the weights stay as they are."""

    mode: str = field(
        default="per_token",
        metadata={
            "help": "what shares a scale: one token of a head, or KIVI's channels (keys) and groups of 32 (values)",
            "choices": list(FORMATS),
        },
    )
    group_size: int | None = field(
        default=None, metadata={"help": "numbers per scale; -1 = a whole token (default: -1, with kivi 32)"}
    )
    residual_length: int | None = field(
        default=None, metadata={"help": "kivi: tokens kept in 16 bits until a block is full (default: 0, with kivi 32)"}
    )
    pairs: list[str] = field(
        default_factory=lambda: [pair_name((k, v)) for k in (8, 4, 2) for v in (8, 4, 2)],
        metadata={"help": "widths to choose from, such as KV8 K8V4 K4V2; 2, 4, 8 or 16 bits"},
    )
    max_bits: float = field(default=4.0, metadata={"help": "mean width allowed, scales not counted"})
    evals: int = field(default=200, metadata={"help": "tables to evaluate at most, the uniform ones included"})
    population: int = field(default=40, metadata={"help": "of the genetic search"})
    objective: str = field(
        default="kl",
        metadata={
            "help": "what the search lowers: kl (to the 16-bit model), ppl, gsm8k (share of wrong answers; needs a"
            " hub), or module:function called with model and tokenizer"
        },
    )
    calib_samples: int = field(default=20, metadata={"help": "prompts on which the errors of the layers are measured"})
    nsamples: int = field(
        default=4,
        metadata={
            "help": "windows (gsm8k: questions) of the search; as many others, 16 at most, choose from what it found"
        },
    )
    seqlen: int = field(default=512, metadata={"help": "tokens per calibration window"})
    eps: float = field(default=0.05, metadata={"help": "DBSCAN's radius in e_o"})
    min_samples: int = field(default=2, metadata={"help": "DBSCAN's neighbours that make a cluster"})
    max_groups: int = field(default=8, metadata={"help": "groups of layers at most"})
    prune: bool = field(default=True, metadata={"help": "keep only the pairs on each layer's Pareto front"})
    cluster: bool = field(default=True, metadata={"help": "let like layers share a pair; else every layer has its own"})
    prefill: str = field(
        default="exact",
        metadata={
            "help": "what a prompt attends to: its own keys and values, or the quantised ones",
            "choices": ["exact", "quantized"],
        },
    )
    load_table: str | None = field(
        default=None, metadata={"help": "take this table instead of searching: a YAML or JSON file, or a preset's name"}
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={"help": "baselines to measure beside it; 'none' for none (default: all but unclustered)"},
    )
    eval_windows: int = field(default=4, metadata={"help": "held-out windows of each of the texts A, B and C"})
    eval_seqlen: int = field(default=1024, metadata={"help": "tokens per held-out window"})
    tasks: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "lm-eval tasks, local or from a hub; 'none' for none"}
    )
    task_limit: int = field(default=100, metadata={"help": "items per task"})
    retrieval_items: int = field(default=20, metadata={"help": "long prompts from which a code is retrieved; 0 = none"})
    retrieval_tokens: int = field(default=1024, metadata={"help": "tokens of such a prompt"})
    speed_tokens: int = field(
        default=1024, metadata={"help": "prompt after which decoding is timed; 0 = do not measure speed"}
    )

    paper_title = "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization"
    arxiv = "2502.04420"

    # ------------------------------------------------------------------------------------------------------ checking

    def check(self) -> None:
        """Refuses impossible values before any work."""
        self.menu = parse_pairs(self.pairs)
        self.form = self.check_format()
        for name, lowest in (
            ("calib_samples", 1),
            ("nsamples", 1),
            ("seqlen", 16),
            ("min_samples", 1),
            ("max_groups", 1),
            ("population", 2),
            ("task_limit", 1),
            ("retrieval_items", 0),
            ("speed_tokens", 0),
            ("seeds", 1),
        ):
            if getattr(self, name) < lowest:
                raise UserError(f"--{name} {getattr(self, name)}: {lowest} or more is needed.")
        if not self.eps > 0:
            raise UserError(f"--eps {self.eps}: a radius above 0 is needed. Try --eps 0.05, the default.")
        smallest = min(map(pair_bits, self.menu))
        if not smallest <= self.max_bits <= 16:
            raise UserError(
                f"--max-bits {self.max_bits:g}: from {smallest:g}, the smallest of --pairs, to 16 is possible."
            )
        if self.evals < max(self.population, len(self.menu) + 2):
            raise UserError(
                f"--evals {self.evals}: at least --population, which is {self.population}, and {len(self.menu) + 2}"
                " for the uniform tables are needed; raise it or lower --population."
            )
        if self.seqlen < self.form.residual_length:
            raise UserError(
                f"--seqlen {self.seqlen}: with --residual-length {self.form.residual_length} nothing would be quantised;"
                f" {self.form.residual_length} or more is needed."
            )
        if self.objective not in ("kl", "ppl", "gsm8k"):
            self.own_objective = load_objective(self.objective)
        if self.objective == "gsm8k" and any(task.startswith("gsm8k") for task in self.tasks):
            raise UserError("--tasks gsm8k: the search of --objective gsm8k sees its items; measure another task.")
        if self.export:
            raise UserError("--export: the weights are the base model's, any engine loads them; leave it out.")
        known = [*rival_names(self.menu, self.mode), *ASIDE]
        unknown = [name for name in self.baselines if name not in (*known, "none")]
        if unknown:
            raise UserError(f"--baselines {unknown[0]}: one of {', '.join(known)} or none is needed.")
        self.rivals = self.baselines or rival_names(self.menu, self.mode)
        self.loaded = self.check_loaded() if self.load_table else None

    def check_format(self) -> CacheFormat:
        """The numbers that share a scale."""
        usual = FORMATS[self.mode]
        group = usual.group_size if self.group_size is None else self.group_size
        residual = usual.residual_length if self.residual_length is None else self.residual_length
        if self.mode == "per_token" and (group, residual) != (-1, 0):
            raise UserError(
                f"--mode per_token: --group-size {group} and --residual-length {residual} are for --mode kivi; a token"
                " and head is one group, and there is no residual."
            )
        if self.mode == "kivi" and (group < 8 or group % 8):
            raise UserError(f"--group-size {group}: a multiple of 8 is needed with --mode kivi. Try 32, the default.")
        if self.mode == "kivi" and (residual < group or residual % group):
            raise UserError(
                f"--residual-length {residual}: a multiple of --group-size {group} is needed with --mode kivi."
            )
        return CacheFormat(self.mode, group, residual)

    def check_loaded(self) -> Table:
        """The table of --load-table, if it is for this mode."""
        mode, table = read_table(self.load_table)
        if mode not in (None, self.mode):
            raise UserError(
                f"--load-table {self.load_table}: it is for mode {mode}, not {self.mode}; pass --mode {mode}."
            )
        if (bits := equivalent_bits(table)) > self.max_bits:
            raise UserError(
                f"--load-table {self.load_table}: it has {bits:.4g} bits, --max-bits is {self.max_bits:g}; raise that."
            )
        return table

    def check_model(self, base: BaseModel) -> None:
        """Refuses a model whose cache cannot be quantised so, or windows that are longer than it takes."""
        config = AutoConfig.from_pretrained(base.path)
        self.layers, self.kv_heads, self.head_dim = cache_shape(config)
        if getattr(config, "kv_cache_quantization", None):
            raise UserError(
                f"--model {self.model}: its cache has a table already; name the model that it was searched for."
            )
        odd = [i for i, kind in enumerate(layer_types(config)) if kind != "full_attention"]
        if odd:
            raise UserError(
                f"--model {self.model}: layers {', '.join(map(str, odd))} do not attend to all tokens"
                f" ({layer_types(config)[odd[0]]}); a model with full attention in every layer is needed."
            )
        step = max(1, 8 // min(bits for pair in self.menu for bits in pair))
        for divisor, what in ((step, f"{step} codes in a byte"), (self.form.group(self.head_dim), "--group-size")):
            if self.head_dim % divisor:
                raise UserError(
                    f"--model {self.model}: its head size {self.head_dim} is no multiple of {divisor} ({what})."
                )
        if self.loaded and len(self.loaded) != self.layers:
            raise UserError(
                f"--load-table {self.load_table}: it has {len(self.loaded)} layers, {self.model} has {self.layers}."
            )
        unfit = check_rivals(self.rivals, self.mode, self.head_dim)
        if unfit and self.baselines:
            raise UserError(
                f"--baselines {unfit[0]}: its groups do not divide the head size {self.head_dim}; leave it out."
            )
        self.rivals = [name for name in self.rivals if name not in unfit]
        used = ("seqlen", "eval_seqlen", "speed_tokens", *(["retrieval_tokens"] if self.retrieval_items else []))
        for name in used:
            if getattr(self, name) > config.max_position_embeddings:
                raise UserError(
                    f"--{name} {getattr(self, name)}: {self.model} takes {config.max_position_embeddings} tokens at most."
                )

    # -------------------------------------------------------------------------------------------------- the method

    @property
    def answer(self) -> int:
        """Tokens of a window that are the model's own answer."""
        return min(ANSWER, self.seqlen // 2)

    def candidates(self, errors: list[dict[Pair, float]]) -> list[tuple[Pair, ...]]:
        """Step 3: the pairs each layer may have, by falling bits."""
        if not self.prune:
            return [tuple(sorted(self.menu, key=lambda p: (-pair_bits(p), -p[0])))] * len(errors)
        return [pareto_pairs(row) for row in errors]

    def groups(self, errors: list[dict[Pair, float]], candidates: list[tuple[Pair, ...]]) -> list[Group]:
        """Step 4; with --no-cluster one group per layer."""
        if not self.cluster:
            return singles(candidates)
        return cluster(errors, candidates, self.eps, self.min_samples, self.max_groups)

    def tune(self, model: nn.Module, tokenizer, windows: Tensor, folder: Path, processes: World) -> dict:
        """Steps 2 to 6 for one seed, and the tables of the rivals; what is measured on the way is kept in `folder`."""
        prompts, searched, held = windows.split([self.calib_samples, self.nsamples, min(self.nsamples, HELD)])
        prompt = self.seqlen - self.answer

        def measure() -> dict:
            sequences = greedy(model, prompts[:, :prompt], self.answer)
            return {
                "sequences": sequences.tolist(),
                **measure_errors(model, sequences, prompt, self.menu, self.form)._asdict(),
            }

        if processes.rank == 0:
            cached_json(folder / "errors.json", measure)
        processes.barrier()  # all group the layers by the same numbers
        measured = cached_json(folder / "errors.json", measure)
        errors = [dict(zip(self.menu, row, strict=True)) for row in measured["output"]]
        candidates = self.candidates(errors)
        groups = self.groups(errors, candidates)
        print_layers(measured, self.menu, candidates, groups)
        evaluate = Evaluations(model, self.form, self.objective_of(model, tokenizer, searched), folder, processes)
        if self.loaded:
            tables = [self.loaded, *((pair,) * self.layers for pair in self.menu)]
            archive = dict(zip(tables, evaluate(tables), strict=True))
            picks = {self.max_bits: [self.loaded]}
        else:
            archive = self.search(groups, errors, evaluate)
            picks = {limit: best(archive, limit) for limit in (self.max_bits, max(self.max_bits, WIDER))}
        if processes.rank == 0:
            tables = {table for kept in picks.values() for table in kept}
            sequences = torch.tensor(measured["sequences"])
            scores = held_out_scores(model, self.form, tables, held, sequences, prompt, folder / "held-out.json")
            picks = {limit: sorted(kept, key=scores.__getitem__) for limit, kept in picks.items()}
        table = picks[self.max_bits][0]
        rivals = {}
        if self.seed == self.first_seed:
            rivals = rival_tables(
                self.rivals,
                table,
                errors,
                candidates,
                evaluate,
                form=self.form,
                menu=self.menu,
                seed=self.seed,
                unclustered=lambda alone: best(self.search(alone, errors, evaluate), self.max_bits)[0],
            )
        return {
            "table": table,
            "picks": picks,
            "archive": archive,
            "groups": groups,
            "errors": errors,
            "rivals": rivals,
            "held": held,
            "seconds": sum(evaluate.seconds[table] for table in archive),
        }

    def search(self, groups: list[Group], errors: list[dict[Pair, float]], evaluate: Evaluations) -> Archive:
        """Step 5."""
        settings = {key: getattr(self, key) for key in ("menu", "max_bits", "evals", "population", "seed")}
        return search(groups, errors, evaluate, **settings)

    def objective_of(self, model: nn.Module, tokenizer, windows: Tensor) -> Callable[[], float]:
        """What the search lowers, for the model as it is when called."""
        if self.objective == "kl":
            return partial(mean_kl, model, windows, log_probabilities(model, windows))
        if self.objective == "ppl":
            return lambda: perplexity(model, windows)["value"]
        if self.objective == "gsm8k":
            score = "exact_match-flexible-extract/gsm8k_cot"
            return lambda: 1 - run_tasks(model, tokenizer, ["gsm8k_cot"], self.nsamples)[score]["value"]
        return partial(self.own_objective, model, tokenizer)

    # ---------------------------------------------------------------------------------------------- the whole run

    def run(self) -> Path:
        processes = world(self.device)
        base = resolve_model(self.model, self.revision, compressed=True)
        slim_class_for(base.model_type)  # a family that no checkpoint can be written for is refused now, not at the end
        self.check_model(base)
        if self.tasks != ["none"]:
            check_tasks(self.tasks)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        text = self.calibration_text()
        seeds = list(range(self.seed, self.seed + self.seeds))
        total = self.calib_samples + self.nsamples + min(self.nsamples, HELD)
        windows = {seed: calibration_windows(text, tokenizer, total, self.seqlen, seed) for seed in seeds}
        if processes.rank == 0:
            check_resources(*self.needs(base), self.output_path.absolute())
            check_finite(base.path)
            texts = {name: load_text(name) for name in EVALUATION_TEXTS}
            held_out = held_out_windows(texts, tokenizer, self.settings())
            items = hidden_codes(tokenizer, self.retrieval_items, self.retrieval_tokens)
            pin_inputs(open_state(self), base_model=base.sha256, calibration_text=text.sha256)
        processes.barrier()
        model = load_fp32(base.path).to(self.device).eval()
        tuned, self.first_seed = [], self.seed
        for self.seed in seeds:
            folder = self.state_path / f"seed-{self.seed}"
            folder.mkdir(exist_ok=True)
            tuned.append(self.tune(model, tokenizer, windows[self.seed], folder, processes))
        self.seed = self.first_seed
        if processes.rank != 0:
            return self.output_path
        metrics = partial(measure_cache, model, tokenizer, held_out, items, self.settings())
        return self.finish(base, model, text, texts, metrics, tuned, seeds)

    def needs(self, base: BaseModel) -> tuple[float, float, float]:
        """(bytes of memory, bytes of disk, minutes) of the run."""
        vocabulary = AutoConfig.from_pretrained(base.path).get_text_config().vocab_size
        logits = 4 * vocabulary
        kept = self.nsamples * (self.objective == "kl") + min(self.nsamples, HELD)  # windows with log-probabilities
        ram = 5 * base.parameters + logits * (kept * self.seqlen + 3 * max(2048, 4 * self.eval_seqlen)) + 2**30
        disk = 4 * base.parameters + 2**24
        a = torch.rand(1024, 1024)
        a @ a
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        flops = 4 * 2 * 1024**3 / (time.perf_counter() - begin)
        rivals = len(self.rivals) + RANDOM_TABLES
        tables = self.seeds * self.evals + 5 * self.layers  # and the knapsack's
        tokens = tables * self.nsamples * self.seqlen
        tokens += rivals * (3 * self.eval_windows * self.eval_seqlen + self.retrieval_items * self.retrieval_tokens)
        return ram, disk, 2 * 2 * base.parameters * tokens / flops / 60

    def finish(
        self,
        base: BaseModel,
        model: nn.Module,
        text: Text,
        texts: dict[str, Text],
        metrics: Callable[[], dict],
        tuned: list[dict],
        seeds: list[int],
    ) -> Path:
        """Checkpoint, evaluation (`metrics`, of the model as it is when called), report, card; then the output appears."""
        state, first = self.state_path, tuned[0]
        folder = state / "checkpoint"
        if not folder.exists():
            files = {"recipe.yaml": yaml.safe_dump(self.settings(), sort_keys=False)}
            for limit, tables in first["picks"].items():
                for place, table in enumerate(tables):
                    files[f"kv_table_{limit:g}_{place}.yaml"] = official_yaml(table)
            write_checkpoint(
                folder,
                base=base.path,
                compression={"method": "kvtuner", "format_version": 1, "modules": {}},
                tensors=(),
                dtype=stored_dtype(base.path),
                extra_files=files,
                settings={"kv_cache_quantization": self.cache_config(first, text)},
            )
        reference = None

        def measure(key: str, table: Table | None = None, form: CacheFormat = self.form) -> dict:
            def make() -> dict:
                nonlocal reference
                print(f"measuring {key}", flush=True)
                if reference is None:
                    reference = log_probabilities(model, first["held"])
                with quantised_cache(model, table, form) if table else nullcontext():
                    return {"metrics": metrics(), "kl": mean_kl(model, first["held"], reference)}

            return cached_json(state / "measured" / f"{key}.json", make)

        dense = measure("dense")
        own = [measure(f"kvtuner-{seed}", found["table"]) for seed, found in zip(seeds, tuned, strict=True)]
        rivals = {**first["rivals"], **self.other_picks(first)}
        runs = {
            name: [measure(f"{name}-{place}", *tables[place]) for place in range(len(tables))]
            for name, tables in rivals.items()
        }
        speed = {}
        if self.speed_tokens:
            speed = cached_json(
                state / "measured" / "speed.json", partial(measure_cache_speed, base.path, folder, self.speed_tokens)
            )
        kls = {name: statistics.fmean(run["kl"] for run in found) for name, found in runs.items()}
        kls["kvtuner"] = own[0]["kl"]
        report = reports.build(
            recipe=self,
            base_model=reports.base_row(base),
            data=reports.text_data(self, text, texts, dense["metrics"]),
            dense=dense["metrics"],
            compressed=[run["metrics"] for run in own],
            baselines={name: [over_runs([run["metrics"] for run in found])] for name, found in runs.items()},
            size=read_checkpoint_sizes(folder),
            speed=speed,
            layers=packed_layers(folder),
            seconds=time.time() - (state / "recipe.yaml").stat().st_mtime,  # from the very start, resumed or not
            seeds=seeds,
            notes=base.notes,
            findings={
                "cache": cache_findings(
                    first,
                    {"kvtuner": (first["table"], self.form)} | {name: tables[0] for name, tables in rivals.items()},
                    kls,
                    menu=self.menu,
                    objective=self.objective,
                    kv_heads=self.kv_heads,
                    head_dim=self.head_dim,
                ),
                "notes": self.notes(first["table"], load_compression(folder)),
            },
        )
        reports.write(report, folder)
        print(reports.render_table(report))
        if self.output_path.exists():
            shutil.rmtree(self.output_path)
        folder.rename(self.output_path)
        shutil.rmtree(state)
        if self.push_to_hub:
            print(publish(self.output_path, self.push_to_hub))
        return self.output_path

    def other_picks(self, found: dict) -> dict[str, list[tuple[Table, CacheFormat]]]:
        """The second table within max_bits and the first within the paper's other budget, where there are such."""
        tables = {"second": found["picks"][self.max_bits][1:2], f"within-{WIDER:g}": found["picks"].get(WIDER, [])[:1]}
        return {
            name: [(table[0], self.form)]
            for name, table in tables.items()
            if name in self.rivals and table and table[0] != found["table"]
        }

    def cache_config(self, found: dict, text: Text) -> dict:
        """`kv_cache_quantization` of config.json (section 4)."""
        table = found["table"]
        return {
            "method": "kvtuner",
            "version": 1,
            "mode": self.form.mode,
            "group_size": self.form.group_size,
            "residual_length": self.form.residual_length,
            "prefill": self.prefill,
            "scale_dtype": "float16",
            "layers": [list(pair) for pair in table],
            "equivalent_bits": equivalent_bits(table),
            "effective_bits": effective_bits(table, self.form, self.head_dim),
            "search": {
                "seed": self.seed,
                "evals": len(found["archive"]),
                "objective": self.objective,
                "data": {**text.facts(), "nsamples": self.nsamples, "seqlen": self.seqlen},
                "front": front(found["archive"]),
            },
        }

    def notes(self, table: Table, compression: dict) -> list[str]:
        """What a reader must know besides the numbers."""
        nearest = [
            min((b for b in (4, 8, 16) if b >= sum(bits) / len(table)), default=16) for bits in zip(*table, strict=True)
        ]
        lines = [
            "quality was measured with quantised keys and values already inside prefill, so that errors cross layers;"
            f" the checkpoint's default for prompts is `prefill: {self.prefill}`",
            "engines without widths per layer ignore the table; the nearest uniform cache without fewer bits is"
            f" {pair_name(tuple(nearest))}",
        ]
        if compression["modules"]:
            lines.append(
                f"the weights of the base model are packed already ({compression['method']}); the row dense is that model"
                " with a 16-bit cache"
            )
        if self.loaded:
            lines.append(f"the table was not searched but given, as --load-table {self.load_table}")
        if self.objective == "gsm8k":
            lines.append(
                f"the first {self.nsamples} test items of GSM8K were searched on, so no score on it is reported"
            )
        return lines


# --------------------------------------------------------------------------------------------------------- helpers


def stored_dtype(base: Path) -> torch.dtype:
    """A dtype that holds all of the base's weights, or what is not packed of them, as they are."""
    tensors = open_tensors(base)
    return reduce(torch.promote_types, {t.dtype for t in map(tensors.get, tensors) if t.is_floating_point()})
