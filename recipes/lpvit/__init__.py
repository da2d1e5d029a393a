"""LPViT: low-power block-sparse pruning of vision transformers.   ECCV 2024, arXiv 2407.02068 (earlier title: LSP).

Every weight matrix W of the encoder is cut into blocks b_r x b_c; whole blocks go, the others stay dense tiles.

    1. S_n[b]  = sum over block b of (G_n^T X_n) * W, per calibration image n, no labels; X_n the layer's input, G_n the
                 gradient at its output of v . logits, v ~ N(0, I)                              block statistics    [3.2]
    2. phi_b   = mean_n S_n[b]^2; the blocks of a layer go in rising order of it                order               [3.3]
    3. delta_l(k) = mean_n (sum of S_n over the first k blocks)^2 / 2                           distortion curve    [3.3]
    4. cost_l  = (1 - rho) MACs + rho modelled energy, each as a share of the whole model       power               [3.4]
    5. min sum_l delta_l(k_l) + lambda cost_l(k_l), lambda such that the budget is met          allocation          [3.5]
    6. W_p,c   = argmin |X_c W^T - Y_p|^2 + mu |W - W_old|^2, layer after layer                 least squares       [3.6]
    7. optionally: training with masks fixed, towards the dense model                           fine-tuning         [3.7]

Deviates from the paper, whose code is the source of what follows (`--paper` turns it back): statistics are of single images
and of the logits (1), where the code averages one gradient of mean(logits^2) over all images before it squares; curves are
exact sums (3), where the code smooths 100 samples; the multiplier is found on the convex hull of the curves (5), where the
code matches numerical derivatives and misses the budget by up to 2 %; power makes a layer *more* likely to be pruned
(4), where the code's term does the opposite; step 6 is ours. The code ranks blocks one way for the curves and another way
for the masks; here it is one order. Fine-tuning starts from the pruned weights, the code's from random ones.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from recipes.common.core import report as reports
from recipes.common.core.recipe import cached_json
from recipes.common.data.base_models import BaseModel, resolve_model
from recipes.common.data.image_batches import ImageTensors
from recipes.common.data.images import ImageData, calibration_images
from recipes.common.export.images import unpack
from recipes.common.loops.trained import VisionRecipe, VisionRun
from recipes.common.loops.training import Schedule
from recipes.lpvit.allocation import EnergyTable
from recipes.lpvit.blocks import block_sums, count_macs, grid, matrix, pack_model, reconstruct
from recipes.lpvit.selection import (
    Calibrated,
    Choice,
    apply_masks,
    choose_in_rounds,
    magnitude_masks,
    parse_block,
    select_layers,
    wanda_masks,
    weight_masks,
)
from zoo.errors import UserError
from zoo.models import slim_class_for

TINY = "vit-tiny"  # trained by the run itself
TINY_SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "patch_size": 16,
}
TINY_SCHEDULE = Schedule(epochs=40, batch_size=32, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup_epochs=5)
CALIBRATION_BATCH = 64
BITS = 32  # of the numbers in the energy model: checkpoints of image models are fp32

# What each rival changes of the flags, and the rivals that remove single weights.
L1 = {"rank": "l1", "power_mode": "off", "rounds": 1, "reconstruct": "none"}
VARIANTS = {
    "lpvit-no-ls": {"reconstruct": "none"},
    "lpvit-one-round": {"rounds": 1},
    "uniform-l1": L1 | {"alloc": "uniform"},
    "uniform-l1+ls": L1 | {"alloc": "uniform", "reconstruct": "ls"},
    "global-l1": L1 | {"alloc": "global"},
    "block-lamp": L1 | {"alloc": "lamp"},
    "block-erk": L1 | {"alloc": "erk"},
    "global-fisher": {
        "target_fn": "out",
        "rank": "fisher",
        "alloc": "global",
        "power_mode": "off",
        "reconstruct": "none",
    },
    "global-fisher+ls": {
        "target_fn": "out",
        "rank": "fisher",
        "alloc": "global",
        "power_mode": "off",
        "reconstruct": "ls",
    },
    "lpvit-code": {
        "target_fn": "sq",
        "rank": "taylor",
        "alloc": "derivative",
        "power_mode": "official",
        "rounds": 1,
        "reconstruct": "none",
    },
}
UNSTRUCTURED = {"magnitude": magnitude_masks, "wanda": wanda_masks}
SWEPT = ("lpvit-no-ls", "uniform-l1", "uniform-l1+ls", "global-l1", "global-fisher", "global-fisher+ls")


@dataclass
class LPViT(VisionRecipe):
    """Prune blocks of a vision transformer's weights, layer by layer as much as its outputs bear, and refit the rest."""

    model: str = field(
        default="vit-tiny",
        metadata={
            "help": "vit-tiny (trained first, on the data set), or a ViT, DeiT or Swin classifier: folder or Hub id"
        },
    )
    dataset: str = field(
        default="easy-vqa",
        metadata={"help": "images to calibrate, train and measure on: cifar10, easy-vqa, a folder, or a Hub data set"},
    )
    nsamples: int = field(default=1024, metadata={"help": "calibration images, without labels, for the least squares"})
    curve_samples: int = field(default=256, metadata={"help": "images, of those, for the statistics of the blocks"})
    block: str = field(default="16,16", metadata={"help": "rows,columns of a block, multiples of 4 from 4 to 128"})
    target: float = field(
        default=0.5, metadata={"help": "what the pruned layers may still cost, as a fraction of dense"}
    )
    budget: str = field(
        default="flops",
        metadata={"help": "what --target is a fraction of", "choices": ["flops", "params", "energy"]},
    )
    min_density: float = field(default=0.05, metadata={"help": "fraction of blocks that every layer keeps at least"})
    target_fn: str = field(
        default="out",
        metadata={
            "help": "what should not change: the logits (out), their cross-entropy with their own argmax (ce), or, as"
            " the paper's code, mean(logits^2) averaged over all images first (sq)",
            "choices": ["out", "ce", "sq"],
        },
    )
    probes: int = field(default=1, metadata={"help": "random directions of the logits for each image, with out"})
    rank: str = field(
        default="fisher",
        metadata={
            "help": "order of a layer's blocks: mean square of their slopes, |W g| (needs --target_fn sq), or mean |W|",
            "choices": ["fisher", "taylor", "l1"],
        },
    )
    alloc: str = field(
        default="lagrangian",
        metadata={
            "help": "blocks per layer: one multiplier on the curves' hull, the code's numerical derivatives, or without"
            " curves: equal shares, one threshold on the scores, LAMP, Erdos-Renyi",
            "choices": ["lagrangian", "derivative", "uniform", "global", "lamp", "erk"],
        },
    )
    rounds: int = field(
        default=16, metadata={"help": "steps towards the target, each on statistics of the model as pruned so far"}
    )
    power_mode: str = field(
        default="physical",
        metadata={
            "help": "modelled energy in the price of a block, the code's term (which spares large layers), or none",
            "choices": ["physical", "official", "off"],
        },
    )
    power_weight: float = field(default=0.5, metadata={"help": "share of energy in the price, 0..1, with physical"})
    energy_table: str | None = field(default=None, metadata={"help": "YAML file of picojoules an operation"})
    reconstruct: str = field(
        default="ls", metadata={"help": "least squares for the blocks that remain, or none", "choices": ["ls", "none"]}
    )
    finetune: bool = field(default=False, metadata={"help": "train the checkpoint itself after pruning, for --epochs"})
    epochs: int = field(default=10, metadata={"help": "of fine-tuning, for the rows called finetuned"})
    batch_size: int = field(
        default=64, metadata={"help": "images per step of fine-tuning, over all processes together"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "of fine-tuning", "choices": ["sgd", "adamw"]})
    lr: float = field(default=3e-4, metadata={"help": "peak learning rate of fine-tuning"})
    weight_decay: float = field(default=0.05, metadata={"help": "not applied to biases and normalisation"})
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs in which the learning rate rises"})
    distill: str = field(
        default="soft",
        metadata={"help": "half of fine-tuning's loss is the divergence from the teacher", "choices": ["none", "soft"]},
    )
    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id (default: the dense model)"})
    include: str = field(default="", metadata={"help": "prune only layers whose name matches this regex"})
    exclude: str = field(default="", metadata={"help": "leave layers alone whose name matches this regex"})
    include_embed: bool = field(default=False, metadata={"help": "prune the patch embedding too; stays unpacked"})
    include_head: bool = field(default=False, metadata={"help": "prune the classifier too"})
    ragged: bool = field(default=False, metadata={"help": "allow blocks that do not divide a layer; padded with zeros"})
    densities: list[float] = field(
        default_factory=lambda: [0.7, 0.4], metadata={"help": "other targets to measure the main variants at; 1 = none"}
    )

    method = "lpvit"
    trains = False
    _calibrated = None  # of the seed in work
    paper_title = "LPViT: Low-Power Semi-structured Pruning for Vision Transformers"
    arxiv = "2407.02068"

    # ------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        super().check()
        self.blocks = parse_block(self.block)
        for name in ("target", "min_density", "power_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a fraction from 0 to 1 is needed.")
        for target in (self.target, *self.densities):
            if not self.min_density <= target <= 1 or target == 0:
                raise UserError(
                    f"--target {target}: more than 0, at least --min_density {self.min_density} and at most 1 are needed."
                )
        for name in ("probes", "rounds", "curve_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: 1 or more is needed.")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs}: fewer than --epochs {self.epochs} are needed.")
        if self.nsamples < self.curve_samples:
            raise UserError(f"--nsamples {self.nsamples}: at least --curve_samples {self.curve_samples} are needed.")
        if self.rank == "taylor" and self.target_fn != "sq":
            raise UserError(
                "--rank taylor: the mean gradient of --target_fn sq is needed; other gradients average to 0."
            )
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise UserError(f"--{name} {getattr(self, name)}: no regular expression ({error}).") from None
        self.table = EnergyTable.read(self.energy_table) if self.energy_table else EnergyTable()

    def check_data(self, data: ImageData) -> None:
        """The base must be a classifier of these images whose layers the blocks fit."""
        calibration_images(data, self.nsamples, self.seed)
        base = self.fresh(data, self.seed) if self.base is None else load_classifier(self.base.path)
        if base.config.num_labels != len(data.classes):
            raise UserError(
                f"--model {self.model}: it knows {base.config.num_labels} classes, --dataset {self.dataset} has"
                f" {len(data.classes)}; a classifier trained on that data set is needed."
            )
        self.layers_of(base)

    # -------------------------------------------------------------------------------------------------- models

    @cached_property
    def base(self) -> BaseModel | None:
        """The given base model; None for the tiny one that the run trains."""
        if self.model == TINY:
            return None
        base = resolve_model(self.model, self.revision)
        slim_class_for(base.model_type, "AutoModelForImageClassification")
        return base

    def fresh(self, data: ImageData, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        if self.base is not None:
            return load_classifier(self.base.path)
        labels = dict(enumerate(data.classes))
        config = ViTConfig(**TINY_SHAPE, image_size=self.image_size or data.image_size, id2label=labels)
        config.label2id = {label: index for index, label in labels.items()}
        return ViTForImageClassification(config)

    def processor(self, data: ImageData):
        """The base model's own: calibration with other means than it was trained with misjudges its first layers."""
        if self.base is None:
            return super().processor(data)
        return AutoImageProcessor.from_pretrained(self.base.path, backend="pil")

    def base_row(self, run: VisionRun) -> dict:
        return super().base_row(run) if self.base is None else reports.base_row(self.base)

    @property
    def keeps_dense(self) -> bool:
        return self.base is None  # nobody else has it

    @property
    def images_used(self) -> int:
        return self.nsamples

    def layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        return select_layers(
            model,
            self.blocks,
            include=self.include,
            exclude=self.exclude,
            embed=self.include_embed,
            head=self.include_head,
            ragged=self.ragged,
        )

    def needs(self, run: VisionRun, variants: list[str]) -> tuple[float, float, float]:
        """(bytes of memory, bytes of disk, minutes), from one forward and backward pass on this machine."""
        model = self.fresh(run.data, run.seeds[0])
        layers, size = self.layers_of(model), 4 * model.num_parameters()
        pixels = self.pixels(run, run.seeds[0], min(self.nsamples, CALIBRATION_BATCH))[0]
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            model(pixel_values=pixels).logits.sum().backward()
            seconds = (time.perf_counter() - begin) / len(pixels)  # an image
        targets = 1 + len({*self.densities} - {1.0, self.target})
        pruned = [v for v in variants if v in (self.method, *VARIANTS)]
        measured = {v: targets if v == self.method or v in SWEPT else 1 for v in pruned}
        refits = sum(n for v, n in measured.items() if self.choice(v).reconstruct == "ls")
        rounds = sum(n * self.choice(v).rounds for v, n in measured.items() if self.choice(v).rank != "l1")
        images = rounds * self.curve_samples
        images += refits * self.nsamples * len(layers) / 4  # a wave has 1.5 layers; half of two models, forward only
        trainings = any("finetuned" in v for v in variants) + self.finetune
        images += len(run.data.train) * (trainings * self.epochs + (TINY_SCHEDULE.epochs if self.base is None else 0))
        images += len(run.data.test) * (sum(measured.values()) + 3) / 3
        statistics = (
            4
            * self.curve_samples
            * self.probes
            * sum(math.prod(grid(tuple(matrix(layer).shape), self.blocks)) for layer in layers.values())
        )
        inputs = 2 * self.nsamples * pixels[0].nbytes
        widest = max(matrix(layer).shape[1] for layer in layers.values())
        ram = 2**30 + 8 * size + 2 * statistics + inputs + 5 * 8 * widest**2 + 400 * pixels.nbytes
        return ram, 2 * size * len(variants) * self.seeds + 2**26, 1.2 * self.seeds * images * seconds / 60

    # ------------------------------------------------------------------------------------------------ variants

    def rivals(self) -> list[str]:
        own = ["lpvit-no-finetune"] if self.finetune else ["lpvit-finetuned"] if self.epochs else []
        return [*own, *VARIANTS, *UNSTRUCTURED]

    def choice(self, variant: str) -> Choice:
        own = Choice(self.target_fn, self.rank, self.alloc, self.power_mode, self.rounds, self.reconstruct)
        return replace(own, **VARIANTS.get(variant, {}))

    def make(self, run: VisionRun, variant: str, seed: int) -> PreTrainedModel:
        """Dense: the base model. All others: it pruned, and fine-tuned where the name says so."""
        if variant == "dense":
            model = self.fresh(run.data, seed)
            return model if self.base else run.train(model, "dense", seed, schedule=TINY_SCHEDULE)
        if variant == "lpvit-finetuned":
            return self.train_blocks(run, run.trained(self.method, seed), seed)
        model, errors = self.prune(run, variant, seed, self.target)
        if variant == self.method and run.processes.rank == 0:
            cached_json(run.state / "errors" / f"{seed}.json", lambda: errors)
        return self.train_blocks(run, model, seed) if self.finetune and variant == self.method else model

    def prune(self, run: VisionRun, variant: str, seed: int, target: float) -> tuple[PreTrainedModel, dict]:
        """A variant at a target, and the relative output error of its layers before and after the least squares."""
        calibrated = self.calibrated(run, seed)
        if variant in UNSTRUCTURED:
            return apply_masks(calibrated.model, UNSTRUCTURED[variant](calibrated, target)), {}
        choice = self.choice(variant)
        key = (replace(choice, reconstruct="none"), target)
        if key not in calibrated.chosen:
            settings = {"budget": self.budget, "min_density": self.min_density, "power_weight": self.power_weight}
            calibrated.chosen[key] = choose_in_rounds(calibrated, choice, target, table=self.table, **settings)
        masks = weight_masks(calibrated.chosen[key], calibrated)
        model, errors = apply_masks(calibrated.model, masks), {}
        if choice.reconstruct == "ls":
            with tqdm(total=len(masks), desc=f"{variant} at {target:g}: refitting", unit="layer", disable=None) as bar:
                images = self.pixels(run, seed, self.nsamples)
                errors = reconstruct(model, calibrated.model, masks, images, calibrated.block[0], bar.update)
        return model, errors

    def calibrated(self, run: VisionRun, seed: int) -> Calibrated:
        """The dense model of a seed with its calibration images; the last one is kept."""
        if self._calibrated is None or self._calibrated.seed != seed:
            model = run.trained("dense", seed).to(self.device)
            images = self.pixels(run, seed, self.curve_samples)
            self._calibrated = Calibrated(model, self.layers_of(model), self.blocks, images, seed, self.probes)
        return self._calibrated

    def pixels(self, run: VisionRun, seed: int, count: int) -> list[Tensor]:
        """Calibration images as the model's input, in batches."""
        images = ImageTensors(calibration_images(run.data, count, seed), run.processor)
        return [images.normalize(pixels) for pixels, _ in images.batches(CALIBRATION_BATCH)]

    def train_blocks(self, run: VisionRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """Fine-tuned on its kept blocks: they are the parameters, so nothing that was pruned has a value, a gradient or a
        moment in the optimiser   [3.7]"""
        packed = self.pack(run, model, seed)
        for parameter in packed.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        teacher = None
        if self.distill != "none":
            teacher = load_classifier(self.teacher) if self.teacher else run.trained("dense", seed)
        trained = run.train(packed, "finetuned", seed, teacher=teacher)
        return unpack(trained)

    def pack(self, run: VisionRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        weights = {name: matrix(layer).detach() for name, layer in self.layers_of(model).items()}
        keeps = {name: block_sums(weight.abs(), self.blocks) > 0 for name, weight in weights.items()}
        masks = {name: weight != 0 for name, weight in weights.items()}
        errors = run.state / "errors" / f"{seed}.json"
        about = {
            "method": self.method,
            "block": list(self.blocks),
            "target": self.target,
            "budget": self.budget,
            "multiply_adds": count_macs(model, self.pixels(run, seed, 1)[0], masks),
            "densities": {name: round(keep.double().mean().item(), 4) for name, keep in keeps.items()},
            "power_mode": self.power_mode,
            "power_weight": self.power_weight,
            "picojoules": asdict(self.table),
            "reconstruct": self.reconstruct,
            "finetuned_epochs": self.epochs if self.finetune else 0,
            "calibration": {"name": run.data.name, "sha256": run.data.sha256, "nsamples": self.nsamples, "seed": seed},
            "proxy_loss": cached_json(errors, dict) if errors.exists() else {},
        }
        return pack_model(model, keeps, self.blocks, about)

    # -------------------------------------------------------------------------------------------------- report

    def layer_rows(self, run: VisionRun, packed: PreTrainedModel) -> list[dict]:
        """What was packed; losses are relative output errors on the calibration images, before and after least squares."""
        compression, rows = packed.config.compression_config, []
        for name, spec in compression["modules"].items():
            layer = packed.get_submodule(name)
            before, after = compression["proxy_loss"].get(name, (None, None))
            row = {"name": name, **spec, "d_out": layer.out_features, "d_in": layer.in_features}
            rows.append(row | {"loss_init": before, "loss_final": after, "output_error": None})
        return rows

    def findings(self, run: VisionRun) -> dict:
        macs, table = self.costs(run)
        notes = [
            "Joules are modelled from operation counts and the energies of `--energy_table`, not measured.",
            f"Multiply-adds for an image, kept of dense: {macs['pruned'] / macs['pruned_dense']:.4f} in the pruned layers,"
            f" {macs['linear'] / macs['linear_dense']:.4f} in all linear and convolution layers (the paper's count),"
            f" {(macs['linear'] + macs['attention']) / (macs['linear_dense'] + macs['attention']):.4f} with the products"
            " of attention.",
            "magnitude and wanda remove single weights: a ceiling for accuracy at these multiply-adds, but no faster.",
            "lpvit sees no label and takes no gradient step; rows called finetuned saw the training labels.",
        ]
        if self.base is None:
            notes.append(
                f"{self.model} was trained on the training images of {run.data.name} first, anew for every seed."
            )
        else:
            notes.append("Every seed prunes the same base model: seeds choose calibration images and probes.")
        findings = {"notes": notes, "tables": {"Cost of an image": table}}
        targets = sorted({self.target, *self.densities} - {1.0}, reverse=True)
        if targets != [self.target]:
            findings["sweeps"] = {"Accuracy by what is kept of the pruned layers": self.sweep(run, targets)}
        return findings

    def sweep(self, run: VisionRun, targets: list[float]) -> dict:
        """The own variant, and those of the main rivals that ran, at all targets."""
        names = [self.method, *(name for name in SWEPT if name in self.chosen())]
        series = {name: [{"x": target, "metrics": []} for target in targets] for name in names}
        for seed in run.seeds:  # outermost: the statistics of one seed are kept at a time
            for name, points in series.items():
                for point in points:
                    key = f"{name}-{seed}" if point["x"] == self.target else f"{name}-{seed}-at-{point['x']:g}"
                    point["metrics"].append(run.measure(key, partial(self.pruned, run, name, seed, point["x"])))
        for points in series.values():
            for point in points:
                point["metrics"] = {"accuracy": reports.over_seeds(point["metrics"])["accuracy"]}
        return {"x": f"fraction of {self.budget} kept", "log": False, "series": series}

    def pruned(self, run: VisionRun, variant: str, seed: int, target: float) -> PreTrainedModel:
        return self.prune(run, variant, seed, target)[0]

    def costs(self, run: VisionRun) -> tuple[dict[str, int], dict]:
        """Multiply-adds of the checkpoint, and the table of what an image costs dense and pruned."""
        seed = run.seeds[0]
        calibrated, own = self.calibrated(run, seed), run.trained(self.method, seed)
        masks = {name: matrix(layer).detach() != 0 for name, layer in self.layers_of(own).items()}
        macs = count_macs(own, calibrated.batches[0][:1], masks)
        fixed, energies = calibrated.fixed_energy(self.table, BITS), calibrated.energies(self.table, BITS)
        kept = sum(
            (energies[name] * (block_sums(mask.float(), self.blocks) > 0)).sum().item() for name, mask in masks.items()
        )
        dense = sum(energy.sum().item() for energy in energies.values())
        rows = [
            ["multiply-adds of the pruned layers, M", macs["pruned_dense"] / 1e6, macs["pruned"] / 1e6],
            ["of all linear and convolution layers, M", macs["linear_dense"] / 1e6, macs["linear"] / 1e6],
            ["of attention's products, M", macs["attention"] / 1e6, macs["attention"] / 1e6],
            ["energy of the pruned layers, modelled, uJ", (dense + fixed) / 1e6, (kept + fixed) / 1e6],
        ]
        return macs, {"header": ["", "dense", self.method], "rows": rows}


def load_classifier(name: str | Path) -> PreTrainedModel:
    """An image classifier in fp32."""
    return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
