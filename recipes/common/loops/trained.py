"""The loop that trains every variant, dense and sparse, with the same schedule.

A recipe of this loop gives `make` (one variant trained or pruned for one seed) and `pack` (its own variant as a
checkpoint's model); this mixin turns that into checkpoints, models to measure and rows of the report. Its domain also
gives what Classification does for it: `fresh`, `training_items`, `validation`, `training_loss`, `score`, `trained_row`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from recipes.common.core.run import Run
from recipes.common.core.state import check_memory
from recipes.common.data.base_models import hash_weights
from recipes.common.loops.training import Groups, Loss, Masks, Schedule, train
from zoo.checkpoint import save_checkpoint
from zoo.errors import UserError
from zoo.folder import atomic_folder, open_folder


@dataclass
class TrainedRun(Run):
    """The models of a run, each trained once."""

    def train(
        self,
        model: PreTrainedModel,
        key: str,
        seed: int,
        *,
        schedule: Schedule | None = None,
        loss: Loss | None = None,
        masks: Masks | None = None,
        groups: Groups | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> PreTrainedModel:
        """`model` trained in place (`training.train`), resumed if it was interrupted, done only once under `key`.

        schedule, loss: the recipe's and the domain's by default.
        """
        done = self.state / "training" / f"{key}-{seed}.safetensors"
        if not done.exists():
            folder, domain = done.with_suffix(""), self.domain
            print(f"training {key}, seed {seed}", flush=True)
            train(
                model,
                domain.training_items(seed),
                domain.validation,
                schedule or self.recipe.training,
                folder,
                loss=loss or domain.training_loss,
                score=domain.score,
                seed=seed,
                masks=masks,
                groups=groups,
                callbacks=callbacks,
                device=self.recipe.device,
            )
            if self.processes.rank == 0:
                done.parent.mkdir(parents=True, exist_ok=True)
                partial_file = done.with_suffix(".part")
                save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial_file)
                partial_file.replace(done)
                shutil.rmtree(folder, ignore_errors=True)
            self.processes.barrier()
        model.load_state_dict(load_file(done))
        return model.eval()

    def folder(self, variant: str, seed: int) -> Path:
        return self.state / "models" / f"{variant}-{seed}"

    def trained(self, variant: str, seed: int) -> PreTrainedModel:
        """The finished model of a variant, made on first use."""
        folder = self.folder(variant, seed)
        if not folder.exists():
            model = self.recipe.make(self, variant, seed)
            if self.processes.rank == 0:
                with atomic_folder(folder) as partial_folder:
                    model.save_pretrained(partial_folder)
            self.processes.barrier()
        return self.domain.load(folder)


@dataclass(frozen=True)
class Trained:
    """Flags and verbs shared by recipes that train; mixed in before a domain's flags, whose defaults stand."""

    epochs: int = field(
        default=8, metadata={"help": "passes over the training images", "at_least": 0, "at_most": 10000}
    )
    batch_size: int = field(
        default=128, metadata={"help": "images per step, over all processes together", "at_least": 1, "at_most": 2**16}
    )
    lr: float = field(default=0.1, metadata={"help": "peak learning rate", "at_most": 100, "above": 0})
    optimizer: str = field(
        default="sgd", metadata={"help": "sgd with Nesterov momentum 0.9, or adamw", "choices": ["sgd", "adamw"]}
    )
    weight_decay: float = field(
        default=5e-4, metadata={"help": "not applied to biases and normalisation", "at_least": 0, "at_most": 10}
    )
    schedule: str = field(
        default="cosine", metadata={"help": "of the learning rate: cosine, or step", "choices": ["cosine", "step"]}
    )
    lr_drops: list[int] = field(
        default_factory=list,
        metadata={"help": "epochs at which step divides the rate by 10", "at_least": 1, "at_most": 10000},
    )
    warmup_epochs: float = field(
        default=0.0, metadata={"help": "epochs in which the learning rate rises", "at_least": 0, "at_most": 10000}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of every label spread over all classes", "at_least": 0, "below": 1}
    )
    augment: bool = field(default=True, metadata={"help": "shift or crop, and mirror, the training images"})

    run_type: ClassVar[type[Run]] = TrainedRun

    # ------------------------------------------------------------------------------------- what a recipe of this loop gives

    @property
    def keeps_dense(self) -> bool:
        """Whether the run trains the dense model too, and leaves it beside the output: nobody else has it."""
        return True

    def fresh(self, run: TrainedRun, seed: int) -> PreTrainedModel:
        """The dense model, untrained."""
        return run.domain.fresh(seed)

    def make(self, run: TrainedRun, variant: str, seed: int) -> PreTrainedModel:
        """A variant for one seed, trained or pruned, pruned weights as zeros in place; on every process, and only once."""
        raise NotImplementedError

    def pack(self, run: TrainedRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The recipe's own variant with its weights packed, as the checkpoint holds it."""
        return model

    def trainings(self, run: TrainedRun) -> int:
        """How many models are trained for a seed."""
        return len(self.variants(run))

    def baseline_bytes(self, run: TrainedRun) -> dict[str, int]:
        """What the baselines' weights would take, for the plot."""
        return {}

    # ------------------------------------------------------------------------------------------------------- the verbs

    @property
    def training(self) -> Schedule:
        """How everything is trained."""
        return Schedule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            lr_drops=tuple(self.lr_drops),
            warmup_epochs=self.warmup_epochs,
            label_smoothing=self.label_smoothing,
        )

    def check(self) -> None:
        super().check()
        self.training.check()
        if not 0 <= self.seed <= 2**32 - self.seeds:
            raise UserError(
                f"--seed {self.seed}: from 0 to {2**32 - self.seeds} is possible where something is trained."
            )

    def needs(self, run: TrainedRun) -> tuple[float, float, float]:
        """From one step of training on this machine."""
        domain, model = run.domain, self.fresh(run, 0)
        size, items = 4 * model.num_parameters(), min(self.batch_size, len(domain.training))
        item = sum(tensor.nbytes for tensor in domain.example(1).values())
        ram = 2**30 + 8 * size + domain.data_bytes + 400 * items * item
        check_memory(ram)  # before any of it is taken
        batch = domain.example(items)
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            domain.loss(model, batch).backward()
            seconds = time.perf_counter() - begin
        models = self.trainings(run) * self.seeds
        steps = len(domain.training) / items * self.epochs * models
        checkpoints = 3 * 3 * size  # Trainer's, each with AdamW's moments
        return ram, 2 * size * models + checkpoints + 2**26, 1.3 * steps * seconds / 60

    def produce(self, run: TrainedRun, seed: int) -> None:
        for variant in self.variants(run):
            run.trained(variant, seed)

    def write(self, run: TrainedRun, seed: int, folder: Path) -> None:
        packed = self.pack(run, run.trained(self.method, seed), seed)
        save_checkpoint(folder, packed, processor=run.domain.processor, extra_files=run.recipe_yaml)

    @contextmanager
    def open(self, run: TrainedRun, variant: str, seed: int) -> Iterator[nn.Module]:
        """The own variant as its checkpoint holds it."""
        yield run.domain.load(run.checkpoint(seed)) if variant == self.method else run.trained(variant, seed)

    def dense_seeds(self, run: TrainedRun) -> list[int]:
        return run.seeds if self.keeps_dense else super().dense_seeds(run)

    def dense_at_hand(self, folder: Path, sha256: str) -> Path | None:
        if not self.keeps_dense:
            return super().dense_at_hand(folder, sha256)
        kept = folder.resolve().with_name(f"{folder.resolve().name}-dense")
        there = (kept / "config.json").exists()
        return kept if there and hash_weights(open_folder(kept).files) == sha256 else None

    def exports(self) -> tuple[str, ...]:
        """None where the dense model is kept, since a dense export would have its place."""
        return () if self.keeps_dense else super().exports()

    def beside(self) -> dict[str, Callable[[Run, Path], None]]:
        return super().beside() | ({"-dense": self.keep_dense} if self.keeps_dense else {})

    def keep_dense(self, run: TrainedRun, path: Path) -> None:
        """The dense model of the first seed."""
        save_checkpoint(path, run.trained("dense", run.seeds[0]), processor=run.domain.processor, extra_files={})

    def dense_folder(self, run: TrainedRun) -> Path:
        return run.folder("dense", run.seeds[0])

    def base_row(self, run: TrainedRun) -> dict:
        return run.domain.trained_row(self.dense_folder(run)) if self.keeps_dense else super().base_row(run)

    def sizes(self, run: TrainedRun, folder: Path) -> dict:
        baselines = self.baseline_bytes(run)
        return super().sizes(run, folder) | ({"baselines": baselines} if baselines else {})

    def layers(self, run: TrainedRun, folder: Path) -> list[dict]:
        """What is packed, and the losses that config.json tells of it."""
        source, rows = open_folder(folder), []
        for name, spec in source.modules.items():
            layer = source.empty_model.get_submodule(name)
            d_out, d_in = layer.matrix_shape
            row = {"name": name, **spec, "d_out": d_out, "d_in": d_in}
            if isinstance(layer, nn.Conv2d):
                row |= {"kernel": list(layer.kernel_size), "groups": layer.groups}
            before, after = source.compression.get("proxy_loss", {}).get(name, (None, None))
            rows.append(row | {"loss_init": before, "loss_final": after, "output_error": None})
        return rows
