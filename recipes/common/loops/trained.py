"""The kind of recipe that trains or prunes an image classifier.

A recipe of this kind names its variants (dense, its own method, the rivals), gives `make` (one variant trained or pruned
for one seed) and `pack` (its own variant as a checkpoint's model); this class does everything around it: data, preflight,
resume, training, evaluation of every variant on held-out images, speed, and the checkpoint with report, card and plots.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

import zoo  # noqa: F401 (registers our classes)
from recipes.common.core import report as reports
from recipes.common.core.recipe import Recipe, World, cached_json, check_resources, open_state, pin_inputs, world
from recipes.common.data.architectures import fresh_model
from recipes.common.data.image_batches import ImageTensors, make_processor
from recipes.common.data.images import ImageData, load_images
from recipes.common.loops.training import Masks, Schedule, train
from recipes.common.metrics.images import METRICS, check_metrics, evaluation_rows, measure_images
from recipes.common.metrics.language import ratio
from zoo.checkpoint import atomic_folder, read_checkpoint_sizes, save_checkpoint
from zoo.errors import UserError
from zoo.record.hub import publish

SPEED_BATCHES = (1, 32)
SPEED_ROUNDS = 9


@dataclass
class VisionRecipe(Recipe):
    """Flags shared by recipes for image classifiers."""

    model: str = field(
        default="resnet-20",
        metadata={"help": "architecture, such as resnet-20 or resnet-20-8 (width 8), or a folder or Hub id"},
    )
    dataset: str = field(
        default="cifar10",
        metadata={"help": "images: cifar10, easy-vqa, a folder, or a Hub data set of labelled images"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    train_split: str = field(default="train", metadata={"help": "split of a folder or Hub data set to train on"})
    validation_split: str | None = field(
        default=None, metadata={"help": "split to choose the epoch by (default: held out of the training images)"}
    )
    test_split: str | None = field(default=None, metadata={"help": "split to measure on (default: test)"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels, if there are several"})
    image_size: int | None = field(default=None, metadata={"help": "side of the model's input (default: the images')"})
    train_items: int | None = field(default=None, metadata={"help": "train on this many images only"})
    epochs: int = field(default=8, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=128, metadata={"help": "images per step, over all processes together"})
    lr: float = field(default=0.1, metadata={"help": "peak learning rate"})
    optimizer: str = field(
        default="sgd", metadata={"help": "sgd with Nesterov momentum 0.9, or adamw", "choices": ["sgd", "adamw"]}
    )
    weight_decay: float = field(default=5e-4, metadata={"help": "not applied to biases and normalisation"})
    schedule: str = field(
        default="cosine", metadata={"help": "of the learning rate: cosine, or step", "choices": ["cosine", "step"]}
    )
    lr_drops: list[int] = field(default_factory=list, metadata={"help": "epochs at which step divides the rate by 10"})
    warmup_epochs: float = field(default=0.0, metadata={"help": "epochs in which the learning rate rises"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of every label spread over all classes"})
    augment: bool = field(default=True, metadata={"help": "shift or crop, and mirror, the training images"})
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "baselines to run beside it; 'none' for none (default: all)"}
    )
    eval: list[str] = field(default_factory=lambda: ["accuracy", "nll", "ece"], metadata={"help": ", ".join(METRICS)})
    attacked: int = field(default=500, metadata={"help": "test images that fgsm and pgd attack, evenly spread"})
    seeds: int = field(
        default=3,
        metadata={"help": "measure with this many seeds (seed, seed+1, …); the checkpoint is the first one's"},
    )

    trains = True  # whether the report's models are trained on `dataset`, rather than only calibrated

    # ---------------------------------------------------------------------- what a recipe of this kind gives

    @property
    def method(self) -> str:
        """Name of the recipe's own variant."""
        return self.name

    def rivals(self) -> list[str]:
        """Every name that --baselines takes, in the order of the report."""
        return []

    def check_data(self, data: ImageData) -> None:
        """Raises UserError when the model, the images and the flags do not go together, before any work."""

    def fresh(self, data: ImageData, seed: int) -> PreTrainedModel:
        """The dense model, untrained."""
        return fresh_model(self.model, data.classes, self.image_size or data.image_size, seed)

    def processor(self, data: ImageData):
        """The image processor of all models; by default one with the statistics of these images."""
        return make_processor(data, self.image_size)

    def make(self, run: VisionRun, variant: str, seed: int) -> PreTrainedModel:
        """A variant for one seed, trained or pruned, pruned weights as zeros in place. Called once; the result is kept."""
        raise UserError(f"{self.name} makes nothing.")

    def pack(self, run: VisionRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The recipe's own variant with its weights packed, as the checkpoint holds it."""
        return model

    def layer_rows(self, run: VisionRun, packed: PreTrainedModel) -> list[dict]:
        """`layers` of the report."""
        return []

    def baseline_bytes(self, run: VisionRun) -> dict[str, int]:
        """What the baselines' weights would take, for the plot."""
        return {}

    def base_row(self, run: VisionRun) -> dict:
        """`base_model` of the report: by default the dense model that was trained beside the others."""
        seed = run.seeds[0]
        weights = run.folder("dense", seed) / "model.safetensors"
        return {
            "id": f"{self.model} on {self.dataset}",
            "revision": None,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "parameters": run.trained("dense", seed).num_parameters(),
            "license": "apache-2.0",
            "language": [],
        }

    def findings(self, run: VisionRun) -> dict:
        """What else the report holds, once all else is measured: "sweeps", "tables", "notes"."""
        return {}

    # ------------------------------------------------------------------------------------------ the whole run

    def check(self) -> None:
        """Refuses impossible values before any work; a recipe adds its own."""
        self.training.check()
        check_metrics(self.eval)
        for name in ("seeds", "attacked", "train_items", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: 1 or more is needed.")
        if self.export:
            raise UserError("--export: image models have no exports yet but `export FOLDER OUTPUT --format dense`.")
        self.chosen()

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

    def chosen(self) -> list[str]:
        """The variants of this run: dense, the recipe's own, the chosen baselines."""
        known = [name for name in self.rivals() if name != self.method]
        unknown = [name for name in self.baselines if name not in known and name != "none"]
        if unknown:
            raise UserError(f"--baselines {unknown[0]}: one of {', '.join(known)} or none is needed.")
        return ["dense", self.method, *(name for name in known if name in self.baselines or not self.baselines)]

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense model is kept beside the checkpoint."""
        return self.trains

    @property
    def images_used(self) -> int | None:
        """Training images that the method looks at; None for all."""
        return self.train_items

    def load_data(self) -> ImageData:
        return load_data(self.settings())

    def run(self) -> Path:
        processes = world(self.device)
        data = self.load_data()
        self.check_data(data)
        variants, settings = self.chosen(), self.settings()
        seeds = list(range(self.seed, self.seed + self.seeds))
        run = VisionRun(self, data, self.state_path, seeds, settings, processes)
        if self.keeps_dense and self.dense_path.exists() and not (self.overwrite or self.resume):
            raise UserError(
                f"{self.dense_path}: it exists, and the dense model goes there; pass --overwrite to replace it."
            )
        if processes.rank == 0:
            check_resources(*self.needs(run, variants), self.output_path.absolute())
            pin_inputs(open_state(self), images=data.sha256 or data.version or "")
        processes.barrier()
        for seed in seeds:
            for variant in variants:
                run.trained(variant, seed)
        if processes.rank != 0:
            return self.output_path
        return self.finish(run)

    def needs(self, run: VisionRun, variants: list[str]) -> tuple[float, float, float]:
        """(bytes of memory, bytes of disk, minutes) of the run, from one step of training on this machine."""
        model = self.fresh(run.data, 0)
        size = 4 * model.num_parameters()
        side = self.image_size or run.data.image_size
        batch = torch.zeros(self.batch_size, 3, side, side)
        seconds = []
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            model(pixel_values=batch).logits.sum().backward()
            seconds.append(time.perf_counter() - begin)
        images = self.train_items or len(run.data.train)
        steps = images / self.batch_size * self.epochs * len(variants) * self.seeds
        ram = 2**30 + 8 * size + 3 * side**2 * (len(run.data.train) + len(run.data.test)) + 400 * batch.nbytes
        return ram, 2 * size * len(variants) * self.seeds + 2**26, 1.3 * steps * seconds[-1] / 60

    def finish(self, run: VisionRun) -> Path:
        """Evaluation of all variants, checkpoint, report, card; then the output appears."""
        first, folder = run.seeds[0], run.state / "checkpoint"
        measured = {
            variant: [run.measure(f"{variant}-{seed}", partial(run.final, variant, seed)) for seed in run.seeds]
            for variant in self.chosen()
        }
        if not folder.exists():
            files = {"recipe.yaml": yaml.safe_dump(run.settings, sort_keys=False)}
            save_checkpoint(folder, run.final(self.method, first), processor=run.processor, extra_files=files)
        packed = AutoModelForImageClassification.from_pretrained(folder).eval()
        dense = run.trained("dense", first)
        speed = cached_json(run.state / "measured" / "speed.json", partial(measure_speed, packed, dense, run.processor))
        dense_runs, own = measured.pop("dense"), measured.pop(self.method)
        size = read_checkpoint_sizes(folder)
        if baselines := self.baseline_bytes(run):
            size["baselines"] = baselines
        used = "training" if self.trains else "calibration"
        report = reports.build(
            recipe=self,
            base_model=self.base_row(run),
            data={
                used: run.data.row("train", self.images_used),
                "validation": run.data.row("validation"),
                "evaluation": evaluation_rows(run.data, own[0]),
            },
            dense=reports.over_seeds(dense_runs),
            compressed=own,
            baselines=measured,
            size=size,
            speed=speed,
            layers=self.layer_rows(run, packed),
            seconds=time.time() - (run.state / "recipe.yaml").stat().st_mtime,  # from the very start, resumed or not
            seeds=run.seeds,
            findings=self.findings(run),
        )
        reports.write(report, folder)
        print(reports.render_table(report))
        if self.keeps_dense:
            self.keep_dense(run)
        if self.output_path.exists():
            shutil.rmtree(self.output_path)
        folder.rename(self.output_path)
        shutil.rmtree(run.state)
        if self.push_to_hub:
            print(publish(self.output_path, self.push_to_hub))
        return self.output_path

    @property
    def dense_path(self) -> Path:
        return self.output_path.with_name(f"{self.output_path.name}-dense")

    def keep_dense(self, run: VisionRun) -> None:
        """<output>-dense: the dense model of the first seed, which nobody could get elsewhere."""
        if self.dense_path.exists():
            shutil.rmtree(self.dense_path)
        save_checkpoint(self.dense_path, run.trained("dense", run.seeds[0]), processor=run.processor, extra_files={})


@dataclass
class VisionRun:
    """What the steps of one run share; what they make is kept in the state folder and found there again."""

    recipe: VisionRecipe
    data: ImageData
    state: Path
    seeds: list[int]
    settings: dict
    processes: World

    @cached_property
    def processor(self):
        return self.recipe.processor(self.data)

    @cached_property
    def validation(self) -> ImageTensors:
        return ImageTensors(self.data.validation, self.processor)

    @cached_property
    def train_images(self) -> ImageTensors:
        """The training images as evaluated, not augmented; `train` augments views of them."""
        return ImageTensors(training_subset(self.data, self.recipe.train_items), self.processor)

    def train(
        self,
        model: PreTrainedModel,
        key: str,
        seed: int,
        *,
        masks: Masks | None = None,
        schedule: Schedule | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> PreTrainedModel:
        """`model` trained in place on the training images, resumed if it was interrupted, done only once under `key`."""
        done = self.state / "training" / f"{key}-{seed}.safetensors"
        if not done.exists():
            folder = done.with_suffix("")
            print(f"training {key}, seed {seed}", flush=True)
            images = self.train_images.augmented(seed) if self.recipe.augment else self.train_images
            train(
                model,
                images,
                self.validation,
                schedule or self.recipe.training,
                folder,
                seed=seed,
                masks=masks,
                teacher=teacher,
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
        return AutoModelForImageClassification.from_pretrained(folder).eval()

    def final(self, variant: str, seed: int) -> PreTrainedModel:
        """As `trained`; the recipe's own variant as its checkpoint holds it, so that what is measured is what is saved."""
        model = self.trained(variant, seed)
        return self.recipe.pack(self, model, seed).eval() if variant == self.recipe.method else model

    def measure(self, key: str, model: Callable[[], nn.Module], which: list[str] | None = None) -> dict[str, dict]:
        """Metrics (default: those of --eval) of a model on the test images, measured once; `key` names it."""

        def make() -> dict:
            print(f"measuring {key}", flush=True)
            return measure(model(), self.data, self.processor, self.settings, which)

        return cached_json(self.state / "measured" / f"{key}.json", make)


# ------------------------------------------------------------------------------------------------------- measuring


def load_data(settings: dict) -> ImageData:
    """The images that a recipe's settings name."""
    splits = {key: settings[key] for key in ("train_split", "validation_split", "test_split", "label_column")}
    return load_images(settings["dataset"], config=settings["dataset_config"], **splits)


def training_subset(data: ImageData, items: int | None):
    """The first `items` training images of a fixed shuffle; all of them by default."""
    if items is None:
        return data.train
    if items > len(data.train):
        raise UserError(f"--train_items {items}: there are {len(data.train)} training images.")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    return data.train.select(order[:items].tolist())


def measure(
    model: nn.Module, data: ImageData, processor, settings: dict, which: list[str] | None = None
) -> dict[str, dict]:
    """The metrics that a report claims, on the test images."""
    attacked = min(settings["attacked"], len(data.test))
    return measure_images(model.eval(), data, which or settings["eval"], processor, attacked=attacked, seed=0)


def remeasure(folder: Path, report: dict) -> dict[str, dict]:
    """Measures a finished checkpoint again as its report says it was measured: what `verify` compares with."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    return measure(model, load_data(report["config"]), AutoImageProcessor.from_pretrained(folder), report["config"])


@torch.inference_mode()
def measure_speed(packed: nn.Module, dense: nn.Module, processor) -> dict[str, dict[str, dict]]:
    """Time of the dense model in fp32 over that of the checkpoint, for single images and batches, in turns."""
    probe = processor([_blank()], return_tensors="pt").pixel_values
    models, speed = {"packed": packed.eval(), "dense": dense.eval()}, {}
    for batch in SPEED_BATCHES:
        pixels = probe.repeat(batch, 1, 1, 1)
        calls = max(1, 64 // batch)  # so that a turn is long enough to time
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(SPEED_ROUNDS + 1):
            for name in list(models)[:: 1 if turn % 2 else -1]:  # nobody is always first
                begin = time.perf_counter()
                for _ in range(calls):
                    models[name](pixel_values=pixels)
                seconds[name].append(time.perf_counter() - begin)
        found = ratio(seconds["dense"][1:], seconds["packed"][1:])  # the first turn warms up
        speed[f"batch {batch}"] = {"ratio_to_dense_fp32": found}
    return speed


def _blank():
    from PIL import Image

    return Image.new("RGB", (256, 256), (127, 127, 127))
