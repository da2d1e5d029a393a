"""The loop that compresses a model matrix by matrix from calibration statistics, streamed block by block.

A recipe of this loop gives `compress` (one matrix) and `baseline_methods`; the loop itself is in streaming.py, and this
mixin turns what it stores into checkpoints, models to measure and rows of the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.common.core.recipe import Recipe
from recipes.common.core.run import Run
from recipes.common.core.state import matmul_flops
from recipes.common.data.texts import calibration_windows
from recipes.common.domains.language import BATCH
from recipes.common.export import check_export
from recipes.common.loops.streaming import MatrixStore, Method, StreamedModel, Variant, compress_blocks, select_linears
from recipes.common.parts.pruners import LayerStats
from zoo.checkpoint import write_checkpoint
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.layers.packing import row_bytes


@dataclass
class StreamedRun(Run):
    """The model as the loop sees it, and what it stored."""

    @cached_property
    def streamed(self) -> StreamedModel:
        return StreamedModel(self.domain.base.path, self.recipe.device)

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the blocks to compress, by full name (shapes only: they are on the meta device)."""
        found = {}
        for index in range(len(self.streamed)):
            found |= select_linears(self.streamed, index, self.recipe.include, self.recipe.ignored)
        return found

    @cached_property
    def modules(self) -> dict[str, nn.Linear]:
        """All that the checkpoint holds packed."""
        return self.recipe.modules(self)

    def tokens(self, seed: int) -> Tensor:
        """Calibration windows (N, T)."""
        recipe, domain = self.recipe, self.domain
        return calibration_windows(domain.text, domain.tokenizer, recipe.nsamples, recipe.seqlen, seed)

    def store(self, seed: int) -> MatrixStore:
        return MatrixStore(self.state / f"seed-{seed}")

    def compress(self, seed: int, methods: list[Method], **options) -> None:
        """Runs methods over all blocks (`compress_blocks`); afterwards the seed's store holds every (method, matrix)."""
        compress_blocks(
            self.streamed,
            self.tokens(seed),
            methods,
            self.store(seed),
            include=self.recipe.include,
            ignore=self.recipe.ignored,
            batch=BATCH,
            workers=self.recipe.workers or torch.get_num_threads(),
            rank=self.processes.rank,
            world=self.processes.size,
            barrier=self.processes.barrier,
            **options,
        )


@dataclass(frozen=True)
class Streamed(Recipe):
    """Flags and verbs shared by recipes that compress matrix by matrix; mixed in before a domain's flags."""

    include: str = field(
        default="", metadata={"help": "compress only linears whose name matches this regex", "regex": True}
    )
    ignore: list[str] = field(
        default_factory=lambda: ["lm_head"],
        metadata={"help": "leave linears alone whose name contains one of these", "empty": True},
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
    workers: int = field(
        default=0,
        metadata={
            "help": "matrices compressed side by side, or 0 = one per torch thread",
            "at_least": 0,
            "at_most": 1024,
        },
    )

    run_type = StreamedRun

    # ------------------------------------------------------------------------------------- what a recipe of this loop gives

    def check_matrix(self, name: str, d_out: int, d_in: int) -> None:
        """Raises UserError when a matrix cannot be compressed."""

    def compress(self, run: StreamedRun, seed: int, name: str, weight: Tensor, stats: LayerStats) -> dict[str, Variant]:
        """One matrix (d_out, d_in) fp32 -> {variant: result}; the recipe's own variant is called `self.method`."""
        raise NotImplementedError

    def baseline_methods(self, run: StreamedRun, seed: int) -> list[Method]:
        """The baselines that compress matrices too, in the order of the report."""
        return []

    def compression_config(self, run: StreamedRun, seed: int) -> dict:
        """The method's own part of `compression_config`."""
        return {}

    def baseline_rows(self, run: StreamedRun, names: list[str]) -> dict[str, list[dict]]:
        """How each baseline's matrices would be packed, for the sizes in the report; those without a row are left out."""
        return {}

    def method_flops(self, weights: int) -> float:
        """Floating-point operations of the method itself on `weights` weights."""
        return 0.0

    def modules(self, run: StreamedRun) -> dict[str, nn.Linear]:
        return run.linears

    # ------------------------------------------------------------------------------------------------------- the verbs

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def ignored(self) -> list[str]:
        """`--ignore`, as far as it concerns the blocks."""
        return self.ignore

    def check_base(self, run: StreamedRun) -> None:
        if not run.linears:
            raise UserError(f"--include {self.include!r}: no linear layer of the model is selected.")
        for name, module in run.modules.items():
            self.check_matrix(name, module.out_features, module.in_features)
        run.tokens(self.seed)
        for kind in self.export:
            check_export(kind, open_folder(run.domain.base.path), self.planned(run))

    def planned(self, run: StreamedRun) -> dict[str, dict]:
        """{module: what config.json will say of it}, where that is known beforehand."""
        return {}

    def methods(self, run: StreamedRun, seed: int) -> list[Method]:
        """The recipe's own method first, then the chosen baselines that are methods."""
        own = Method(self.method, partial(self.compress, run, seed), self.inputs(), packed=(self.method,))
        chosen = self.chosen_baselines()
        return [own] + [method for method in self.baseline_methods(run, seed) if method.name in chosen]

    def inputs(self) -> str:
        """What the recipe's own method is calibrated on (`Method.inputs`)."""
        return "compressed" if self.sequential else "dense"

    def produce(self, run: StreamedRun, seed: int) -> None:
        run.compress(seed, self.methods(run, seed))

    def needs(self, run: StreamedRun) -> tuple[float, float, float]:
        """From shapes and a quick measurement of this machine."""
        config, methods = run.domain.config.get_text_config(), self.methods(run, self.seed)
        tokens = self.nsamples * self.seqlen
        streams = 2 + sum(method.inputs != "dense" for method in methods)
        hidden = 4 * tokens * config.hidden_size * streams
        sizes = [(module.out_features, module.in_features) for module in run.linears.values()]
        per_block = len(sizes) // len(run.streamed)
        block = sum(4 * d_out * d_in for d_out, d_in in sizes[:per_block])
        hessians = sum(8 * d_in * d_in for d_in in {d_in for _, d_in in sizes})
        largest = max(d_out * d_in for d_out, d_in in sizes)
        workers = self.workers or torch.get_num_threads()
        embedding = 4 * config.vocab_size * config.hidden_size
        ram = hidden + 3 * block + 3 * hessians + 14 * 4 * largest * workers + embedding + 2**30
        weights = sum(d_out * d_in for d_out, d_in in sizes)
        disk = 2 * weights * self.seeds * (len(methods) + 2) + 2 * embedding
        forward = 2 * weights * tokens
        squares = sum(2 * d_in * d_in * tokens for d_in in {d for _, d in sizes[:per_block]}) * len(run.streamed)
        work = streams * (2 * forward + squares) + self.method_flops(weights)
        evaluation = 2 * (weights + embedding / 4) * self.eval_windows * self.eval_seqlen * 3 * (len(methods) + 2)
        return ram, disk, self.seeds * 2 * (work + evaluation) / matmul_flops() / 60

    def write(self, run: StreamedRun, seed: int, folder: Path) -> None:
        write_checkpoint(
            folder,
            base=run.domain.base.path,
            compression=self.full_compression_config(run, seed),
            tensors=self.packed_tensors(run, seed),
            dtype=self.torch_dtype,
            extra_files=run.recipe_yaml,
        )

    def packed_tensors(self, run: StreamedRun, seed: int) -> Iterator[tuple[str, Tensor]]:
        for name in run.modules:
            for key, tensor in run.store(seed).tensors(self.method, name, self.method).items():
                yield f"{name}.{key}", tensor

    def full_compression_config(self, run: StreamedRun, seed: int) -> dict:
        """`compression_config` of config.json."""
        facts = {name: run.store(seed).facts(self.method, name)[self.method] for name in run.modules}
        text = {key: getattr(run.domain.text, key) for key in ("name", "version", "sha256")}
        return {
            "method": self.method,
            "format_version": 1,
            **self.compression_config(run, seed),
            "calibration": text | {"nsamples": self.nsamples, "seqlen": self.seqlen, "seed": seed},
            "ignore": self.ignored,
            "proxy_loss": {
                name: [fact["loss_init"], fact["loss_final"]]
                for name, fact in facts.items()
                if fact["loss_init"] is not None
            },
            "modules": {name: fact["spec"] for name, fact in facts.items()},
        }

    def variants(self, run: StreamedRun) -> list[str]:
        """Every variant that the methods stored: a method may have by-products."""
        return ["dense", self.method, *(name for name in self.stored(run) if name != self.method)]

    def stored(self, run: StreamedRun) -> dict[str, str]:
        """{variant: method that made it}."""
        first, store = next(iter(run.linears)), run.store(run.seeds[0])
        methods = [method.name for method in self.methods(run, run.seeds[0])]
        return {variant: method for method in methods for variant in store.facts(method, first)}

    @contextmanager
    def open(self, run: StreamedRun, variant: str, seed: int) -> Iterator[nn.Module]:
        """The own variant as its checkpoint holds it; of the others the dense model with their weights."""
        if variant == self.method:
            yield run.domain.load(run.checkpoint(seed))
            return
        model = run.domain.load(run.domain.base.path)
        if variant != "dense":
            method = self.stored(run)[variant]
            for name in run.linears:
                model.get_submodule(name).weight.data.copy_(run.store(seed).weight(method, name, variant))
        yield model

    def layers(self, run: StreamedRun, folder: Path) -> list[dict]:
        rows, store = [], run.store(run.seeds[0])
        for name, module in run.modules.items():
            fact = store.facts(self.method, name)[self.method]
            row = {"name": name, **fact["spec"], "d_out": module.out_features, "d_in": module.in_features}
            rows.append(row | {key: fact[key] for key in ("loss_init", "loss_final", "output_error")})
        return rows

    def sizes(self, run: StreamedRun, folder: Path) -> dict:
        """With those of the baselines, were they packed; a correction of rank r stands as wrappers of r x r."""
        size, itemsize = open_folder(folder).sizes(), self.torch_dtype.itemsize
        rest = size["compressed_bytes"] - sum(row_bytes(row, itemsize) for row in self.layers(run, folder))
        rows = self.baseline_rows(run, self.variants(run)[2:])
        if rows:
            size["baselines"] = {
                name: rest + sum(row_bytes(row, itemsize) for row in found) for name, found in rows.items()
            }
        return size
