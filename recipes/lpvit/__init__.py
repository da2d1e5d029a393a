"""LPViT: low-power block-sparse pruning of vision transformers.   ECCV 2024, arXiv 2407.02068 (earlier title: LSP).

Every weight matrix W of the encoder is cut into blocks b_r x b_c; whole blocks go, the others stay dense tiles.

    1. S_n[b]  = sum over block b of (G_n^T X_n) * W, per calibration image n, no labels; X_n the layer's input, G_n the
                 gradient at its output of v . logits, v ~ N(0, I)                              block statistics
    2. phi_b   = mean_n S_n[b]^2; the blocks of a layer go in rising order of it                order
    3. delta_l(k) = mean_n (sum of S_n over the first k blocks)^2 / 2                           distortion curve
    4. cost_l  = (1 - rho) MACs + rho modelled energy, each as a share of the whole model       power
    5. min sum_l delta_l(k_l) + lambda cost_l(k_l), lambda such that the budget is met          allocation
    6. W_p,c   = argmin |X_c W^T - Y_p|^2 + mu |W - W_old|^2, layer after layer                 least squares
    7. optionally: training with masks fixed, towards the dense model                           fine-tuning

Deviates from the paper, whose code is the source of what follows (`--paper` turns it back): statistics are of single images
and of the logits (1), where the code averages one gradient of mean(logits^2) over all images before it squares; curves are
exact sums (3), where the code smooths 100 samples; the multiplier is found on the convex hull of the curves (5), where the
code matches numerical derivatives and misses the budget by up to 2 %; power makes a layer *more* likely to be pruned
(4), where the code's term does the opposite; step 6 is ours. The code ranks blocks one way for the curves and by mean |W|
for the masks (its caller passes `rank`, `ranking` is read); here it is one order, but for the baseline lpvit-code.
Fine-tuning starts from the pruned weights, the code's from random ones.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from recipes.common.core.state import check_memory
from recipes.common.data.base_models import BaseModel, resolve_model
from recipes.common.data.image_batches import ImageTensors
from recipes.common.data.images import calibration_images
from recipes.common.domains.classification import Classification, ClassificationRecipe
from recipes.common.export.dense import unpack
from recipes.common.loops.trained import Trained, TrainedRun
from recipes.common.loops.training import Schedule
from recipes.lpvit.allocation import EnergyTable
from recipes.lpvit.baselines import BASELINES, SWEPT, UNSTRUCTURED
from recipes.lpvit.blocks import Block, block_sums, count_macs, grid, matrix, pack_model, reconstruct
from recipes.lpvit.evidence import image_costs, notes, target_sweep
from recipes.lpvit.selection import (
    Calibrated,
    Choice,
    apply_masks,
    check_targets,
    choose_in_rounds,
    parse_block,
    select_layers,
    weight_masks,
)
from zoo.errors import UserError

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


@dataclass
class LPViTRun(TrainedRun):
    last: Calibrated | None = None  # of the seed in work

    @cached_property
    def teacher(self) -> BaseModel | None:
        """As --teacher names it, if anything is trained with it."""
        name = self.recipe.teacher if self.recipe.distill != "none" and self.recipe.tunes else None
        try:
            return resolve_model(name, compressed=True) if name else None
        except UserError as error:
            raise UserError(f"--teacher {str(error).removeprefix('--model ')}") from None

    def pixels(self, seed: int, count: int) -> list[Tensor]:
        """Calibration images as the model's input, in batches."""
        images = ImageTensors(calibration_images(self.domain.data, count, seed), self.domain.processor)
        return [images.normalize(pixels) for pixels, _ in images.batches(CALIBRATION_BATCH)]

    def calibrated(self, seed: int) -> Calibrated:
        """The dense model of a seed with its calibration images; the last one is kept."""
        recipe = self.recipe
        if self.last is None or self.last.seed != seed:
            model = self.trained("dense", seed).to(recipe.device)
            images = self.pixels(seed, recipe.curve_samples)
            self.last = Calibrated(model, recipe.layers_of(model), recipe.blocks, images, seed, recipe.probes)
        return self.last


@dataclass(frozen=True)
class LPViT(Trained, ClassificationRecipe):
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
    nsamples: int = field(
        default=1024,
        metadata={"help": "calibration images, without labels, for the least squares", "at_least": 1, "at_most": 10**6},
    )
    curve_samples: int = field(
        default=256,
        metadata={"help": "images, of those, for the statistics of the blocks", "at_least": 1, "at_most": 10**6},
    )
    block: str = field(default="16,16", metadata={"help": "rows,columns of a block, multiples of 4 from 4 to 128"})
    target: float = field(
        default=0.5,
        metadata={"help": "what the pruned layers may still cost, as a fraction of dense", "at_most": 1, "above": 0},
    )
    budget: str = field(
        default="flops",
        metadata={"help": "what --target is a fraction of", "choices": ["flops", "params", "energy"]},
    )
    min_density: float = field(
        default=0.05,
        metadata={"help": "fraction of blocks that every layer keeps at least", "at_least": 0, "at_most": 1},
    )
    target_fn: str = field(
        default="out",
        metadata={
            "help": "what should not change: the logits (out), their cross-entropy with their own argmax (ce), or, as"
            " the paper's code, mean(logits^2) averaged over all images first (sq)",
            "choices": ["out", "ce", "sq"],
        },
    )
    probes: int = field(
        default=1,
        metadata={"help": "random directions of the logits for each image, with out", "at_least": 1, "at_most": 1000},
    )
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
        default=16,
        metadata={
            "help": "steps towards the target, each on statistics of the model as pruned so far",
            "at_least": 1,
            "at_most": 1000,
        },
    )
    power_mode: str = field(
        default="physical",
        metadata={
            "help": "modelled energy in the price of a block, the code's term (which spares large layers), or none",
            "choices": ["physical", "official", "off"],
        },
    )
    power_weight: float = field(
        default=0.5, metadata={"help": "share of energy in the price, with physical", "at_least": 0, "at_most": 1}
    )
    energy_table: str | None = field(default=None, metadata={"help": "YAML file of picojoules an operation"})
    reconstruct: str = field(
        default="ls", metadata={"help": "least squares for the blocks that remain, or none", "choices": ["ls", "none"]}
    )
    finetune: bool = field(default=False, metadata={"help": "train the checkpoint itself after pruning, for --epochs"})
    epochs: int = field(
        default=10, metadata={"help": "of fine-tuning, for the rows called finetuned", "at_least": 0, "at_most": 10000}
    )
    batch_size: int = field(
        default=64,
        metadata={
            "help": "images per step of fine-tuning, over all processes together",
            "at_least": 1,
            "at_most": 2**16,
        },
    )
    optimizer: str = field(default="adamw", metadata={"help": "of fine-tuning", "choices": ["sgd", "adamw"]})
    lr: float = field(default=3e-4, metadata={"help": "peak learning rate of fine-tuning", "at_most": 100, "above": 0})
    weight_decay: float = field(
        default=0.05, metadata={"help": "not applied to biases and normalisation", "at_least": 0, "at_most": 10}
    )
    warmup_epochs: float = field(
        default=1.0, metadata={"help": "epochs in which the learning rate rises", "at_least": 0, "at_most": 10000}
    )
    distill: str = field(
        default="soft",
        metadata={"help": "half of fine-tuning's loss is the divergence from the teacher", "choices": ["none", "soft"]},
    )
    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id (default: the dense model)"})
    include: str = field(
        default="", metadata={"help": "prune only layers whose name matches this regex", "regex": True}
    )
    exclude: str = field(
        default="", metadata={"help": "leave layers alone whose name matches this regex", "regex": True}
    )
    include_embed: bool = field(default=False, metadata={"help": "prune the patch embedding too; stays unpacked"})
    include_head: bool = field(default=False, metadata={"help": "prune the classifier too"})
    ragged: bool = field(default=False, metadata={"help": "allow blocks that do not divide a layer; padded with zeros"})
    densities: list[float] = field(
        default_factory=lambda: [0.7, 0.4],
        metadata={
            "help": "other targets to measure the main variants at; 1 = none",
            "at_most": 1,
            "above": 0,
            "empty": True,
        },
    )

    paper_title = "LPViT: Low-Power Semi-structured Pruning for Vision Transformers"
    arxiv = "2407.02068"
    run_type = LPViTRun

    # ------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        super().check()
        self.blocks, self.table  # noqa: B018 (parsed now)
        for target in (self.target, *self.densities):
            if target < self.min_density:
                flag = "target" if target == self.target else "densities"
                raise UserError(f"--{flag} {target}: at least --min_density {self.min_density} is needed.")
        if self.nsamples < self.curve_samples:
            raise UserError(f"--nsamples {self.nsamples}: at least --curve_samples {self.curve_samples} are needed.")
        if self.rank == "taylor" and self.target_fn != "sq":
            raise UserError(
                "--rank taylor: the mean gradient of --target_fn sq is needed; other gradients average to 0."
            )

    def check_base(self, run: LPViTRun) -> None:
        """The base must be a classifier of these images whose layers the blocks fit and can be pruned so far."""
        data = run.domain.data
        calibration_images(data, self.nsamples, self.seed)
        base = self.fresh(run, self.seed)
        known = [("model", self.model, base.config.num_labels)]
        if run.teacher:
            known.append(("teacher", self.teacher, AutoConfig.from_pretrained(run.teacher.path).num_labels))
        for flag, name, classes in known:
            if classes != len(data.classes):
                raise UserError(
                    f"--{flag} {name}: it knows {classes} classes, --dataset {self.dataset} has {len(data.classes)}; a"
                    " classifier trained on that data set is needed."
                )
        calibrated = Calibrated(base, self.layers_of(base), self.blocks, run.pixels(self.seed, 1), self.seed)
        check_targets(calibrated, [self.target, *self.densities], self.budget, self.min_density, self.table)

    # -------------------------------------------------------------------------------------------------- models

    @cached_property
    def blocks(self) -> Block:
        return parse_block(self.block)

    @cached_property
    def table(self) -> EnergyTable:
        return EnergyTable.read(self.energy_table) if self.energy_table else EnergyTable()

    @property
    def keeps_dense(self) -> bool:
        return self.model == TINY

    def domain(self) -> Classification:
        return Classification(self.settings(), pretrained=not self.keeps_dense, calibrated_on=self.nsamples)

    def fresh(self, run: LPViTRun, seed: int) -> PreTrainedModel:
        """The base model; the tiny one untrained."""
        torch.manual_seed(seed)
        if not self.keeps_dense:
            return run.domain.load(run.domain.base.path)
        labels = dict(enumerate(run.domain.data.classes))
        config = ViTConfig(**TINY_SHAPE, image_size=run.domain.side, id2label=labels)
        config.label2id = {label: index for index, label in labels.items()}
        return ViTForImageClassification(config)

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

    def needs(self, run: LPViTRun) -> tuple[float, float, float]:
        """From one forward and backward pass on this machine."""
        model, variants = self.fresh(run, run.seeds[0]), self.variants(run)
        layers, size = self.layers_of(model), 4 * model.num_parameters()
        pixels = run.pixels(run.seeds[0], min(self.nsamples, CALIBRATION_BATCH))[0]
        statistics = (
            4
            * self.curve_samples
            * self.probes
            * sum(math.prod(grid(tuple(matrix(layer).shape), self.blocks)) for layer in layers.values())
        )
        inputs = 2 * self.nsamples * pixels[0].nbytes
        widest = max(matrix(layer).shape[1] for layer in layers.values())
        ram = 2**30 + 8 * size + 2 * statistics + inputs + 5 * 8 * widest**2 + 400 * pixels.nbytes
        check_memory(ram)  # before any of it is taken
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            model(pixel_values=pixels).logits.sum().backward()
            seconds = (time.perf_counter() - begin) / len(pixels)  # an image
        targets = 1 + len({*self.densities} - {1.0, self.target})
        pruned = [v for v in variants if v in (self.method, *BASELINES)]
        measured = {v: targets if v in self.swept() else 1 for v in pruned}
        refits = sum(n for v, n in measured.items() if self.choice(v).reconstruct == "ls")
        rounds = sum(n * self.choice(v).rounds for v, n in measured.items() if self.choice(v).rank != "l1")
        images = rounds * self.curve_samples
        images += refits * self.nsamples * len(layers) / 4  # a wave has 1.5 layers; half of two models, forward only
        epochs = self.tunes * self.epochs + self.keeps_dense * TINY_SCHEDULE.epochs
        images += len(run.domain.training) * epochs
        images += len(run.domain.data.test) * (sum(measured.values()) + 3) / 3
        return ram, 2 * size * len(variants) * self.seeds + 2**26, 1.2 * self.seeds * images * seconds / 60

    # ------------------------------------------------------------------------------------------------ variants

    def baseline_names(self) -> list[str]:
        own = ["lpvit-no-finetune"] if self.finetune else ["lpvit-finetuned"] if self.epochs else []
        return [*own, *BASELINES, *UNSTRUCTURED]

    @property
    def tunes(self) -> bool:
        """Whether anything is fine-tuned."""
        return self.finetune or "lpvit-finetuned" in self.chosen_baselines()

    def swept(self) -> list[str]:
        """The variants that are measured at every target."""
        return [self.method, *(name for name in SWEPT if name in self.chosen_baselines())]

    def choice(self, variant: str) -> Choice:
        own = Choice(self.target_fn, self.rank, self.alloc, self.power_mode, self.rounds, self.reconstruct)
        return replace(own, **BASELINES.get(variant, {}))

    def make(self, run: LPViTRun, variant: str, seed: int) -> PreTrainedModel:
        """Dense: the base model. All others: it pruned, and fine-tuned where the name says so."""
        if variant == "dense":
            model = self.fresh(run, seed)
            return run.train(model, "dense", seed, schedule=TINY_SCHEDULE) if self.keeps_dense else model
        if variant == "lpvit-finetuned":
            return self.train_blocks(run, run.trained(self.method, seed), seed)
        model, errors = self.prune(run, variant, seed, self.target)
        if variant == self.method:
            run.once(f"errors/{seed}", lambda: errors)
        return self.train_blocks(run, model, seed) if self.finetune and variant == self.method else model

    def prune(self, run: LPViTRun, variant: str, seed: int, target: float) -> tuple[PreTrainedModel, dict]:
        """A variant at a target, and the relative output error of its layers before and after the least squares."""
        calibrated = run.calibrated(seed)
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
                images = run.pixels(seed, self.nsamples)
                errors = reconstruct(model, calibrated.model, masks, images, calibrated.block[0], bar.update)
        return model, errors

    def train_blocks(self, run: LPViTRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """Step 7, on the kept blocks: they are the parameters, so nothing that was pruned has a value, a gradient or a
        moment in the optimiser.
        """
        packed = self.pack(run, model, seed)
        for parameter in packed.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        teacher = None
        if self.distill != "none":
            teacher = run.domain.load(run.teacher.path) if run.teacher else run.trained("dense", seed)
        return unpack(run.train(packed, "finetuned", seed, loss=partial(run.domain.training_loss, teacher=teacher)))

    def pack(self, run: LPViTRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        weights = {name: matrix(layer).detach() for name, layer in self.layers_of(model).items()}
        keeps = {name: block_sums(weight.abs(), self.blocks) > 0 for name, weight in weights.items()}
        masks, data = {name: weight != 0 for name, weight in weights.items()}, run.domain.data
        about = {
            "method": self.method,
            "block": list(self.blocks),
            "target": self.target,
            "budget": self.budget,
            "multiply_adds": count_macs(model, run.pixels(seed, 1)[0], masks),
            "densities": {name: round(keep.double().mean().item(), 4) for name, keep in keeps.items()},
            "power_mode": self.power_mode,
            "power_weight": self.power_weight,
            "picojoules": asdict(self.table),
            "reconstruct": self.reconstruct,
            "finetuned_epochs": self.epochs if self.finetune else 0,
            "calibration": {"name": data.name, "sha256": data.sha256, "nsamples": self.nsamples, "seed": seed},
            "proxy_loss": run.once(f"errors/{seed}", dict),  # found when it was pruned
        }
        return pack_model(model, keeps, self.blocks, about)

    def findings(self, run: LPViTRun) -> dict:
        macs, table = image_costs(self, run)
        findings = {"notes": notes(self, run, macs), "tables": {"Cost of an image": table}}
        targets = sorted({self.target, *self.densities} - {1.0}, reverse=True)
        if targets != [self.target]:
            findings["sweeps"] = {"Accuracy by what is kept of the pruned layers": target_sweep(self, run, targets)}
        return findings
