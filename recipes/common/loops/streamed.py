"""The kind of recipe that compresses a causal LM matrix by matrix from calibration statistics.

A recipe of this kind gives `compress` (one matrix) and `baselines`; this class does everything around it: preflight,
calibration, the streamed loop over blocks, the checkpoint, evaluation of dense, compressed and baselines on held-out
texts, and the report, card and plots.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.common.core import report as reports
from recipes.common.core.cli import export_as
from recipes.common.core.recipe import Recipe, World, cached_json, check_resources, open_state, pin_inputs, world
from recipes.common.data.base_models import BaseModel, check_finite, resolve_model
from recipes.common.data.texts import CalibrationText, Text, calibration_windows, evaluation_windows, load_text
from recipes.common.loops.streaming import MatrixStore, Method, StreamedModel, Variant, compress_blocks, select_linears
from recipes.common.metrics.language import check_tasks, compare_speed, perplexity, ratio, run_tasks
from recipes.common.parts.pruners import LayerStats
from zoo.checkpoint import write_checkpoint
from zoo.errors import UserError
from zoo.models import slim_class_for
from zoo.record.hub import publish

EVALUATION_TEXTS = ("A", "B", "C")
BATCH = 4  # calibration windows that run through a block together


@dataclass
class LayerwiseRecipe(CalibrationText, Recipe):
    """Flags shared by recipes that compress a causal LM matrix by matrix."""

    nsamples: int = field(default=32, metadata={"help": "calibration windows"})
    seqlen: int = field(default=512, metadata={"help": "tokens per calibration window"})
    include: str = field(default="", metadata={"help": "compress only linears whose name matches this regex"})
    ignore: list[str] = field(
        default_factory=lambda: ["lm_head"], metadata={"help": "leave linears alone whose name contains one of these"}
    )
    sequential: bool = field(
        default=False,
        metadata={
            "help": "calibrate each block on the outputs of the compressed blocks before it, not of the dense ones"
        },
    )
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "dtype of the checkpoint", "choices": ["bfloat16", "float16", "float32"]},
    )
    workers: int = field(default=0, metadata={"help": "matrices compressed side by side; 0 = one per torch thread"})
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "baselines to run beside it; 'none' for none (default: all)"}
    )
    eval_windows: int = field(default=12, metadata={"help": "held-out windows of each of the texts A, B and C"})
    eval_seqlen: int = field(default=512, metadata={"help": "tokens per held-out window"})
    tasks: list[str] = field(
        default_factory=lambda: ["step_inference"],
        metadata={"help": "lm-eval tasks: the local ones, or any task name when a hub is reachable; 'none' for none"},
    )
    task_limit: int = field(default=100, metadata={"help": "items per task"})

    # ---------------------------------------------------------------------- what a recipe of this kind gives

    def check_matrix(self, name: str, d_out: int, d_in: int) -> None:
        """Raises UserError when a matrix cannot be compressed."""

    def compress(self, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """One matrix (d_out, d_in) fp32 -> {variant: result}; the recipe's own variant is called `self.method`."""
        raise UserError(f"{self.name} compresses nothing.")

    def baseline_methods(self) -> list[Method]:
        """The rivals, in the order of the report."""
        return []

    def produce(self, run: Run, store: MatrixStore, compress: Callable[..., None]) -> None:
        """Fills `store` for the seed `self.seed`; compress(methods) runs them over all blocks (`compress_blocks`)."""
        compress(run.methods)

    def compression_config(self, store: MatrixStore) -> dict:
        """The method's own part of `compression_config`."""
        return {}

    def baseline_rows(
        self, modules: dict[str, nn.Linear], names: list[str], store: MatrixStore
    ) -> dict[str, list[dict]]:
        """How each baseline's matrices would be packed, for the sizes in the report; those without a row are left out."""
        return {}

    def findings(self, run: Run) -> dict:
        """What else the report holds, once all else is measured."""
        return {}

    # ------------------------------------------------------------------------------------------ the whole run

    def run(self) -> Path:
        processes = world(self.device)
        base = resolve_model(self.model, self.revision)
        slim_class_for(base.model_type)  # a family that no checkpoint can be written for is refused now, not at the end
        if self.tasks != ["none"]:
            check_tasks(self.tasks)
        streamed = StreamedModel(base.path, self.device)
        modules = self.modules(streamed)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        text = self.calibration_text()
        tokens = {
            seed: calibration_windows(text, tokenizer, self.nsamples, self.seqlen, seed)
            for seed in range(self.seed, self.seed + self.seeds)
        }
        methods = self.methods()
        if processes.rank == 0:
            check_resources(*self.needs(streamed, modules, methods), self.output_path.absolute())
            check_finite(base.path)
            pin_inputs(open_state(self), base_model=base.sha256, calibration_text=text.sha256)
        processes.barrier()
        seeds, settings = list(tokens), self.settings()
        run = Run(base, streamed, tokenizer, text, modules, methods, self.state_path, seeds, settings, processes)
        for seed, windows in tokens.items():
            self.seed = seed
            compress = partial(
                compress_blocks,
                streamed,
                windows,
                store=run.store(seed),
                include=self.include,
                ignore=self.ignore,
                batch=BATCH,
                workers=self.workers or torch.get_num_threads(),
                rank=processes.rank,
                world=processes.size,
                barrier=processes.barrier,
            )
            self.produce(run, run.store(seed), compress)
        self.seed = min(tokens)
        if processes.rank != 0:
            return self.output_path
        return self.finish(run)

    def modules(self, streamed: StreamedModel) -> dict[str, nn.Linear]:
        """The linears to compress, checked one by one (shapes only: they are on the meta device)."""
        modules = {}
        for index in range(len(streamed)):
            modules |= select_linears(streamed, index, self.include, self.ignore)
        if not modules:
            raise UserError(f"--include {self.include!r}: no linear layer of the model is selected.")
        for name, module in modules.items():
            self.check_matrix(name, module.out_features, module.in_features)
        return modules

    def methods(self) -> list[Method]:
        """The recipe's own method first, then the chosen baselines that are methods."""
        own = Method(self.method, self.compress, self.inputs(), packed=(self.method,))
        chosen = self.chosen_baselines()
        return [own] + [method for method in self.baseline_methods() if method.name in chosen]

    def inputs(self) -> str:
        """What the recipe's own method is calibrated on (`Method.inputs`)."""
        return "compressed" if self.sequential else "dense"

    def baseline_names(self) -> list[str]:
        """Every name that --baselines takes."""
        return [method.name for method in self.baseline_methods()]

    def chosen_baselines(self) -> list[str]:
        known = [name for name in self.baseline_names() if name != self.method]
        unknown = [name for name in self.baselines if name not in known and name != "none"]
        if unknown:
            raise UserError(f"--baselines {unknown[0]}: one of {', '.join(known)} or none is needed.")
        return [name for name in known if name in self.baselines or not self.baselines]

    def needs(self, streamed: StreamedModel, modules: dict[str, nn.Linear], methods: list[Method]) -> tuple:
        """(bytes of memory, bytes of disk, minutes) of the run, from shapes and a quick measurement of this machine."""
        config = streamed.config.get_text_config()
        tokens = self.nsamples * self.seqlen
        streams = 2 + sum(method.inputs != "dense" for method in methods)
        hidden = 4 * tokens * config.hidden_size * streams
        sizes = [(module.out_features, module.in_features) for module in modules.values()]
        per_block = len(sizes) // len(streamed)
        block = sum(4 * d_out * d_in for d_out, d_in in sizes[:per_block])
        hessians = sum(8 * d_in * d_in for d_in in {d_in for _, d_in in sizes})
        largest = max(d_out * d_in for d_out, d_in in sizes)
        workers = self.workers or torch.get_num_threads()
        embedding = 4 * config.vocab_size * config.hidden_size
        ram = hidden + 3 * block + 3 * hessians + 14 * 4 * largest * workers + embedding + 2**30
        weights = sum(d_out * d_in for d_out, d_in in sizes)
        disk = 2 * weights * self.seeds * (len(methods) + 2) + 2 * embedding
        a = torch.rand(1024, 1024)
        a @ a
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        flops = 4 * 2 * 1024**3 / (time.perf_counter() - begin)
        forward = 2 * weights * tokens
        squares = sum(2 * d_in * d_in * tokens for d_in in {d for _, d in sizes[:per_block]}) * len(streamed)
        work = streams * (2 * forward + squares) + self.method_flops(weights)
        evaluation = 2 * (weights + embedding / 4) * self.eval_windows * self.eval_seqlen * 3 * (len(methods) + 2)
        return ram, disk, self.seeds * 2 * (work + evaluation) / flops / 60

    def method_flops(self, weights: int) -> float:
        """Floating-point operations of the method itself on `weights` weights."""
        return 0.0

    def finish(self, run: Run) -> Path:
        """Checkpoints, evaluation, report, card; then the output appears."""
        for seed in run.seeds:
            if not run.checkpoint(seed).exists():
                write_checkpoint(
                    run.checkpoint(seed),
                    base=run.base.path,
                    compression=self.full_compression_config(run, seed),
                    tensors=self.packed_tensors(run.modules, run.store(seed)),
                    dtype=getattr(torch, self.dtype),
                    extra_files={"recipe.yaml": yaml.safe_dump(run.settings, sort_keys=False)},
                )
        dense = run.measure("dense", partial(load_fp32, run.base.path))
        compressed = [
            run.measure(f"{self.method}-{seed}", partial(load_fp32, run.checkpoint(seed))) for seed in run.seeds
        ]
        baselines = self.measure_baselines(run)
        folder, store = run.checkpoint(run.seeds[0]), run.store(run.seeds[0])
        speed = cached_json(run.state / "measured" / "speed.json", partial(measure_speed, run.base.path, folder))
        layers = self.layer_rows(run.modules, store)
        rivals = self.baseline_rows(run.modules, list(baselines), store)
        report = reports.build(
            recipe=self,
            base_model=reports.base_row(run.base),
            data=reports.text_data(self, run.text, run.texts, dense),
            dense=dense,
            compressed=compressed,
            baselines=baselines,
            size=reports.packed_size(folder, layers, rivals, getattr(torch, self.dtype).itemsize),
            speed=speed,
            layers=layers,
            seconds=time.time() - (run.state / "recipe.yaml").stat().st_mtime,  # from the very start, resumed or not
            seeds=run.seeds,
            notes=run.base.notes,
            findings=self.findings(run),
        )
        reports.write(report, folder)
        print(reports.render_table(report))
        output = self.output_path
        for kind in self.export:
            export_as(folder, output.with_name(f"{output.name}-{kind}" + (".gguf" if "gguf" in kind else "")), kind)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
        shutil.rmtree(run.state)
        if self.push_to_hub:
            print(publish(output, self.push_to_hub))
        return output

    def measure_baselines(self, run: Run) -> dict[str, list[dict]]:
        """{baseline: its metrics, one dict per seed}: every variant that the methods stored, but the checkpoint's own."""
        measured = {}
        first = next(iter(run.modules))
        for method in run.methods:
            for variant in run.store(run.seeds[0]).facts(method.name, first):
                if (method.name, variant) == (self.method, self.method):
                    continue
                measured[variant] = [
                    run.measure(f"{variant}-{seed}", partial(load_variant, run, seed, method.name, variant))
                    for seed in run.seeds
                ]
        return measured

    def packed_tensors(self, modules: dict[str, nn.Linear], store: MatrixStore) -> Iterator[tuple[str, Tensor]]:
        for name in modules:
            for key, tensor in store.tensors(self.method, name, self.method).items():
                yield f"{name}.{key}", tensor

    def full_compression_config(self, run: Run, seed: int) -> dict:
        """`compression_config` of config.json."""
        store = run.store(seed)
        facts = {name: store.facts(self.method, name)[self.method] for name in run.modules}
        return {
            "method": self.method,
            "format_version": 1,
            **self.compression_config(store),
            "calibration": {
                "name": run.text.name,
                "version": run.text.version,
                "sha256": run.text.sha256,
                "nsamples": self.nsamples,
                "seqlen": self.seqlen,
                "seed": seed,
            },
            "ignore": self.ignore,
            "proxy_loss": {
                name: [fact["loss_init"], fact["loss_final"]]
                for name, fact in facts.items()
                if fact["loss_init"] is not None
            },
            "modules": {name: fact["spec"] for name, fact in facts.items()},
        }

    def layer_rows(self, modules: dict[str, nn.Linear], store: MatrixStore) -> list[dict]:
        """`layers` of the report: what was packed, and how its loss fell."""
        rows = []
        for name, module in modules.items():
            fact = store.facts(self.method, name)[self.method]
            row = {"name": name, **fact["spec"], "d_out": module.out_features, "d_in": module.in_features}
            rows.append(row | {key: fact[key] for key in ("loss_init", "loss_final", "output_error")})
        return rows


@dataclass
class Run:
    """What the steps of one run share."""

    base: BaseModel
    streamed: StreamedModel
    tokenizer: object
    text: Text  # calibrated on
    modules: dict[str, nn.Linear]  # to compress
    methods: list[Method]
    state: Path
    seeds: list[int]
    settings: dict
    processes: World

    def store(self, seed: int) -> MatrixStore:
        return MatrixStore(self.state / f"seed-{seed}")

    def checkpoint(self, seed: int) -> Path:
        return self.state / f"checkpoint-{seed}"

    @cached_property
    def texts(self) -> dict[str, Text]:
        return {name: load_text(name) for name in EVALUATION_TEXTS}

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        return held_out_windows(self.texts, self.tokenizer, self.settings)

    def measure(self, key: str, load: Callable[[], nn.Module]) -> dict[str, dict]:
        """The metrics of a model, measured once in a run, resumed or not; `key` names it."""

        def make() -> dict:
            print(f"measuring {key}", flush=True)
            return measure_model(load(), self.tokenizer, self.windows, self.settings)

        return cached_json(self.state / "measured" / f"{key}.json", make)


# ------------------------------------------------------------------------------------------------------- measuring


def load_fp32(path: Path) -> nn.Module:
    """A model folder, packed or not, in fp32: what is measured is the weights, not the rounding of activations."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_variant(run: Run, seed: int, method: str, variant: str) -> nn.Module:
    """The dense model with the weights of one stored variant."""
    model = load_fp32(run.base.path)
    for name in run.modules:
        model.get_submodule(name).weight.data.copy_(run.store(seed).weight(method, name, variant))
    return model


def held_out_windows(texts: dict[str, Text], tokenizer, settings: dict) -> dict[str, Tensor]:
    """Token windows of the held-out texts, as the settings say."""
    return {
        name: evaluation_windows(text, tokenizer, settings["eval_seqlen"], settings["eval_windows"])
        for name, text in texts.items()
    }


def measure_model(model: nn.Module, tokenizer, windows: dict[str, Tensor], settings: dict) -> dict[str, dict]:
    """The metrics that a report claims: perplexity on every held-out text, and the tasks of the settings."""
    metrics = {f"perplexity/{name}": perplexity(model, rows, batch_size=BATCH) for name, rows in windows.items()}
    if settings["tasks"] != ["none"]:
        metrics |= run_tasks(model, tokenizer, settings["tasks"], settings["task_limit"])
    return metrics


def remeasure(folder: Path, report: dict) -> dict[str, dict]:
    """Measures a finished checkpoint again as its report says it was measured: what `verify` compares with."""
    texts, tokenizer = {name: load_text(name) for name in EVALUATION_TEXTS}, AutoTokenizer.from_pretrained(folder)
    windows = held_out_windows(texts, tokenizer, report["config"])
    return measure_model(load_fp32(folder), tokenizer, windows, report["config"])


def measure_speed(base: Path, packed: Path) -> dict[str, dict[str, dict]]:
    """Decode and prefill speed of the checkpoint against dense bf16 and fp32, interleaved in this process."""
    models = {
        "packed": AutoModelForCausalLM.from_pretrained(packed),
        "dense_bf16": AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        "dense_fp32": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    }
    raw = compare_speed(models, prompt_tokens=512, new_tokens=32, repeats=3)
    speed = {"decode": {}, "prefill": {}}
    for rival in ("dense_bf16", "dense_fp32"):
        own, other = raw["packed"], raw[rival]
        speed["decode"][f"ratio_to_{rival}"] = ratio(own["decode_tokens_per_s"], other["decode_tokens_per_s"])
        speed["prefill"][f"ratio_to_{rival}"] = ratio(other["prefill_seconds"], own["prefill_seconds"])
    return speed
