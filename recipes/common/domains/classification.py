"""Image classifiers: trained or calibrated on labelled images, measured on test images that nothing else sees."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import datasets
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from recipes.common.core.recipe import Recipe
from recipes.common.data.architectures import fresh_model
from recipes.common.data.base_models import BaseModel, check_finite, check_loads, hash_weights, resolve_model
from recipes.common.data.image_batches import ImageTensors, make_processor
from recipes.common.data.images import ImageData, load_images, training_subset
from recipes.common.domains import Domain
from recipes.common.metrics.fidelity import Reference
from recipes.common.metrics.images import METRICS, check_metrics, evaluation_rows, measure_images, predict
from recipes.common.metrics.speed import ratio
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.models import slim_class_for

SPEED_BATCHES = (1, 32)
SPEED_ROUNDS = 9


@dataclass(frozen=True)
class ClassificationRecipe(Recipe):
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
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the model's input (default: the images')", "at_least": 1, "at_most": 1024},
    )
    train_items: int | None = field(
        default=None, metadata={"help": "train on this many images only", "at_least": 1, "at_most": 10**9}
    )
    eval: list[str] = field(default_factory=lambda: ["accuracy", "nll", "ece"], metadata={"help": ", ".join(METRICS)})
    attacked: int = field(
        default=500,
        metadata={"help": "test images that fgsm and pgd attack, evenly spread", "at_least": 1, "at_most": 10**6},
    )
    seeds: int = field(
        default=3,
        metadata={
            "help": "measure with this many seeds (seed, seed+1, …); the checkpoint is the first one's",
            "at_least": 1,
            "at_most": 100,
        },
    )

    def domain(self) -> Domain:
        return Classification(self.settings())


def accuracy(predicted: EvalPrediction) -> float:
    """Fraction of the labels (N,) that are where the logits (N, C) are largest."""
    logits, labels = torch.as_tensor(predicted.predictions), torch.as_tensor(predicted.label_ids)
    return (logits.argmax(-1) == labels).double().mean().item()


@dataclass
class Classification(Domain):
    """pretrained: --model is a base model; else an architecture, which the run trains. calibrated_on: how many training
    images are looked at, without their labels; None where a method trains on all that --train_items names.
    """

    pretrained: bool = False
    calibrated_on: int | None = None

    pipeline_tag: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    exports: ClassVar[tuple[str, ...]] = ("dense",)
    score: ClassVar = ("accuracy", accuracy)  # chooses the epoch

    @cached_property
    def base(self) -> BaseModel | None:
        return resolve_model(self.settings["model"], self.settings["revision"]) if self.pretrained else None

    @cached_property
    def data(self) -> ImageData:
        names = ("train_split", "validation_split", "test_split", "label_column")
        splits = {name: self.settings[name] for name in names}
        return load_images(self.settings["dataset"], config=self.settings["dataset_config"], **splits)

    @property
    def side(self) -> int:
        """Of the square images that models are given, in pixels."""
        return self.settings["image_size"] or self.data.image_size

    @cached_property
    def processor(self):
        """The checkpoint's or the base model's own, since means other than those it was trained with mislead its first
        layers; of what is trained here, one with the statistics of these images.
        """
        source = self.folder or (self.base.path if self.base else None)
        if source is None:
            return make_processor(self.data, self.settings["image_size"])
        try:
            return AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError):
            raise UserError(f"{source} holds no image processor: a preprocessor_config.json is needed.") from None

    @cached_property
    def training(self) -> datasets.Dataset:
        """The training images that --train_items leaves."""
        return training_subset(self.data, self.settings["train_items"])

    @cached_property
    def train_images(self) -> ImageTensors:
        """Not augmented."""
        return ImageTensors(self.training, self.processor)

    def training_items(self, seed: int) -> ImageTensors:
        """What one training sees."""
        return self.train_images.augmented(seed) if self.settings["augment"] else self.train_images

    @cached_property
    def validation(self) -> ImageTensors:
        return ImageTensors(self.data.validation, self.processor)

    def check(self) -> None:
        check_metrics(self.settings["eval"])
        if self.settings["revision"] is not None and not self.pretrained:
            raise UserError(
                f"--revision {self.settings['revision']}: of --model {self.settings['model']} only the shape is taken, the"
                " weights are trained; leave it out."
            )
        self.training  # noqa: B018 (read now, not after the work)
        if self.base:
            slim_class_for(self.base.model_type, self.auto_class)  # a family that no checkpoint can be written for
            check_loads(self.base.path, self.auto_class)
        for images in (self.train_images, self.validation, ImageTensors(self.data.test, self.processor)):
            images.check()

    def pins(self) -> dict[str, str]:
        images = {"images": self.data.sha256 or self.data.version}
        return images | ({"base_model": self.base.sha256} if self.base else {})

    def check_weights(self) -> None:
        if self.base:
            check_finite(self.base.path)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.base.notes if self.base else ()

    def fresh(self, seed: int, name: str | None = None) -> PreTrainedModel:
        """A dense model with untrained weights, of the architecture `name` (default: --model)."""
        return fresh_model(name or self.settings["model"], self.data.classes, self.side, seed)

    def load(self, folder: Path) -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def base_row(self) -> dict:
        return self.base.row()

    def trained_row(self, dense: Path) -> dict:
        """`base_model` of a report whose dense model the run trained: the one in the folder."""
        return {
            "id": f"{self.settings['model']} on {self.settings['dataset']}",
            "revision": None,
            "sha256": hash_weights(open_folder(dense).files),
            "parameters": self.load(dense).num_parameters(),
            "license": "apache-2.0",
            "language": [],
        }

    def data_rows(self, metrics: dict[str, dict]) -> dict:
        used, items = "training", self.settings["train_items"]
        if self.calibrated_on is not None:
            used, items = "calibration", self.calibrated_on
        return {
            used: self.data.row("train", items),
            "validation": self.data.row("validation"),
            "evaluation": evaluation_rows(self.data, metrics),
        }

    def example(self, items: int) -> dict[str, Tensor]:
        """A batch of blank images: {"pixel_values": (B, 3, H, W), "labels": (B,)}."""
        return {
            "pixel_values": torch.zeros(items, 3, self.side, self.side),
            "labels": torch.zeros(items, dtype=torch.long),
        }

    @property
    def data_bytes(self) -> int:
        """Of the images that are kept decoded in memory."""
        return 3 * self.side**2 * (len(self.training) + len(self.data.test))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.training_loss(model, batch)[0]

    @staticmethod
    def training_loss(
        model: nn.Module, batch: dict[str, Tensor], smoothing: float = 0.0, teacher: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean cross-entropy, {"logits": (B, C)}) of {"pixel_values": (B, 3, H, W), "labels": (B,)}.

        teacher: while `model` trains, its predictions are half of the loss (KL divergence, mean over the batch,
            temperature 1); in eval mode.
        """
        pixels = batch["pixel_values"]
        logits = model(pixel_values=pixels).logits
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
        if teacher is not None and model.training:
            with torch.no_grad():
                target = teacher.to(pixels.device)(pixel_values=pixels).logits.log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
            loss = 0.5 * loss + 0.5 * divergence
        return loss, {"logits": logits}

    def metrics(
        self, model: nn.Module, reference: Reference | None = None, which: list[str] | None = None
    ) -> dict[str, dict]:
        """Those of --eval and the fidelity to the reference, on the test images; or only `which`."""
        options = {"attacked": min(self.settings["attacked"], len(self.data.test)), "seed": 0}
        if which is None:
            which, options = self.settings["eval"], options | {"reference": reference}
        return measure_images(model.eval(), self.data, which, self.processor, **options)

    def predictions(self, model: nn.Module, folder: Path) -> Reference:
        logits = predict(model.eval(), ImageTensors(self.data.test, self.processor))
        Reference(folder, writing=True).compare("test", logits)
        return Reference(folder)

    @property
    def prediction_bytes(self) -> int:
        return 2 * len(self.data.test) * (len(self.data.classes) + 2)

    def speed(self, dense: Path, packed: Path) -> dict[str, dict[str, dict]]:
        """Time of the dense model in fp32 over that of the checkpoint, for single images and batches, in turns."""
        blank = Image.new("RGB", (256, 256), (127, 127, 127))
        probe = self.processor([blank], return_tensors="pt").pixel_values
        models, speed = {"packed": self.load(packed), "dense": self.load(dense)}, {}
        for batch in SPEED_BATCHES:
            pixels = probe.repeat(batch, 1, 1, 1)
            calls = max(1, 64 // batch)  # so that a turn is long enough to time
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(SPEED_ROUNDS + 1):
                for name in list(models)[:: 1 if turn % 2 else -1]:  # nobody is always first
                    begin = time.perf_counter()
                    with torch.inference_mode():
                        for _ in range(calls):
                            models[name](pixel_values=pixels)
                    seconds[name].append(time.perf_counter() - begin)
            found = ratio(seconds["dense"][1:], seconds["packed"][1:])  # the first turn warms up
            speed[f"batch {batch}"] = {"ratio_to_dense_fp32": found}
        return speed
