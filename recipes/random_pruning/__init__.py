"""Random pruning at initialisation: a network as it is born, cut at random, layer by layer as much as it bears.
ICLR 2022, arXiv 2202.02643.

The weights of all convolutions and linear layers, n_l of them in layer l of shape s_l and N together; a fraction D stays.

    1. d_l, sum_l d_l n_l = D N: how much of each layer stays                                       layer-wise ratio
         uniform  d_l = D                    uniform_plus  first layer 1, last max(D, 0.2), others alike
         er, erk  d_l = min(1, eps sum(s_l) / prod(s_l)), er with (out, in) only
         erk_plus the classifier given, erk on the rest              balanced  d_l = min(1, lambda / n_l)
         snip     share of layer l among the D N largest |w dL/dw|   grasp     the same of w (H g)
    2. mask_l = k_l positions of layer l by lot, k_l = d_l n_l rounded so that sum_l k_l = round(D N)        sampling
    3. w ~ N(0, 2 / fan_in) of the dense layer, times the mask                                         initialisation
    4. training as for a dense network; after every step w <- w * mask, which never changes                  training
    5. beyond accuracy: calibration (ECE, NLL, Brier), foreign images, adversarial images                  evaluation

With snip and grasp only the numbers k_l are taken from the scores; the positions that they chose are thrown away.

Deviates from the paper, whose code is the source of much of this: exact counts (2) where the code tosses a coin for each
weight (`--mask_sampling bernoulli`); snip scores the true initial weights where the code draws new ones (`--snip_reinit
xavier`); uniform_plus meets its budget, the code's does not; a tenth of the training images is held out for the choice of
the epoch on every data set. Ours: balanced (after Gadhikar et al. 2023), masks that are stored as a seed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.common.core.state import module_seed
from recipes.common.data.image_batches import ImageTensors
from recipes.common.domains.classification import ClassificationRecipe
from recipes.common.loops.trained import Trained, TrainedRun
from recipes.common.loops.training import Masks
from recipes.common.parts.densities import (
    FORMULAS,
    RATIOS,
    Layer,
    layer_counts,
    layer_densities,
    prunable_layers,
)
from recipes.common.parts.scores import grasp_scores, keep_fractions, snip_scores, top_masks
from recipes.common.parts.width_graph import CHANNEL_GROUPS
from recipes.random_pruning.networks import kaiming, narrowed, xavier
from recipes.random_pruning.packing import STORAGES, pack_masked, storage_table
from recipes.random_pruning.sweeps import Point, density_table, path_table, sweep_points, sweeps, train_point
from zoo.errors import UserError
from zoo.random_mask import SEEDS, bernoulli_count, random_mask

logger = logging.get_logger(__name__)

SMALL, MAGNITUDE, POSITIONS = "small-dense", "magnitude", "snip-positions"
CONTROLS = (SMALL, MAGNITUDE, POSITIONS)
DEFAULT = ("uniform", "uniform_plus", "erk", "balanced", "snip", "grasp", *CONTROLS)
SNIP_BATCH = 128


@dataclass(frozen=True)
class RandomPruning(Trained, ClassificationRecipe):
    """Train an image classifier of which all but a few weights were removed, at random, before training."""

    model: str = field(
        default="resnet-14-8",
        metadata={
            "help": "architecture: resnet-N and resnet-N-W, vgg-11..19, resnet-18..101, wrn-50-2, or a folder or Hub id"
        },
    )
    image_size: int | None = field(
        default=16,
        metadata={
            "help": "side of the model's input; the small default is for CPUs, the paper's CIFAR networks take 32",
            "at_least": 1,
            "at_most": 1024,
        },
    )
    epochs: int = field(
        default=6, metadata={"help": "passes over the training images", "at_least": 0, "at_most": 10000}
    )
    attacked: int = field(
        default=250,
        metadata={"help": "test images that fgsm and pgd attack, evenly spread", "at_least": 1, "at_most": 10**6},
    )
    density: float = field(
        default=0.05,
        metadata={"help": "fraction of the weights that stays", "at_most": 1, "above": 0},
    )
    ratio: str = field(
        default="erk", metadata={"help": "how the density is spread over the layers", "choices": list(RATIOS)}
    )
    fc_density: float = field(
        default=1.0, metadata={"help": "density of the classifier with erk_plus", "at_most": 1, "above": 0}
    )
    mask_sampling: str = field(
        default="exact",
        metadata={"help": "exact numbers per layer, or a coin for each weight", "choices": ["exact", "bernoulli"]},
    )
    mask_seed: int | None = field(
        default=None,
        metadata={"help": "seed of the masks (default: that of each run)", "at_least": 0, "at_most": SEEDS - 1},
    )
    scaled_init: bool = field(default=False, metadata={"help": "initial weights times 1 / sqrt(density of the layer)"})
    exclude: str = field(
        default="",
        metadata={"help": "leave weights whose name matches this regex dense, and out of the budget", "regex": True},
    )
    snip_batches: int = field(
        default=1,
        metadata={
            "help": f"batches of {SNIP_BATCH} training images that snip scores on",
            "at_least": 1,
            "at_most": 10000,
        },
    )
    snip_reinit: str = field(
        default="none",
        metadata={"help": "weights that snip scores: none = the initial ones", "choices": ["none", "xavier"]},
    )
    grasp_samples_per_class: int = field(
        default=25, metadata={"help": "training images of each class, for grasp", "at_least": 1, "at_most": 10**6}
    )
    grasp_temp: float = field(
        default=200.0, metadata={"help": "the logits are divided by it, for grasp", "at_most": 10**6, "above": 0}
    )
    grasp_halves: str = field(
        default="stratified",
        metadata={
            "help": "the two halves of grasp's sample: all classes in both, or half of the classes in each",
            "choices": ["stratified", "sorted"],
        },
    )
    storage: str = field(
        default="seed",
        metadata={
            "help": "of the checkpoint: values alone, positions drawn again from the seed; one bit a position; or zeros"
            " in place",
            "choices": list(STORAGES),
        },
    )
    more_densities: list[float] = field(
        default_factory=lambda: [0.02, 0.1],
        metadata={
            "help": "further densities at which --ratio and uniform are compared; 0 for none",
            "at_least": 0,
            "at_most": 1,
            "empty": True,
        },
    )
    more_models: list[str] = field(
        default_factory=lambda: ["resnet-14-4", "resnet-14-16"],
        metadata={
            "help": "further architectures in which dense and pruned are compared; 'none' for none",
            "empty": True,
        },
    )
    eval: list[str] = field(
        default_factory=lambda: ["accuracy", "nll", "brier", "ece", "auroc", "fgsm", "pgd"],
        metadata={"help": "accuracy, nll, brier, ece, ece_scaled, auroc, fpr95, auroc_energy, fpr95_energy, fgsm, pgd"},
    )

    paper_title = (
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training"
    )
    arxiv = "2202.02643"

    # -------------------------------------------------------------------------------------------- before any work

    def baseline_names(self) -> list[str]:
        return [*(name for name in RATIOS if name != self.ratio), *CONTROLS]

    def default_baselines(self) -> list[str]:
        return list(DEFAULT)

    def check(self) -> None:
        super().check()
        if self.fc_density != 1 and self.ratio != "erk_plus":
            raise UserError(f"--fc_density {self.fc_density}: it is for --ratio erk_plus, not {self.ratio}.")

    def check_base(self, run: TrainedRun) -> None:
        """Every budget is within reach of its rule in every network, and grasp finds its images."""
        ratios = [ratio for ratio in (self.ratio, *self.chosen_baselines()) if ratio in RATIOS]
        for point in [*(Point(self.model, ratio, self.density) for ratio in ratios), *sweep_points(self)]:
            try:
                with torch.device("meta"):
                    layers = self.prunable(run.domain.fresh(self.seed, point.model))
            except UserError as error:
                flag = "--model" if point.model == self.model else "--more_models"
                raise UserError(str(error).replace("--model", flag, 1)) from None
            if point.ratio:
                rule = point.ratio if point.ratio in FORMULAS else "uniform"  # scores keep as many weights in all
                sizes = {name: layer.size for name, layer in layers.items()}
                layer_counts(self.formula(layers, rule, point.density), sizes)
        if "grasp" in ratios:
            self.grasp_sample(run, self.seed)
        if SMALL in self.chosen_baselines():
            self.small(run, self.seed)

    def trainings(self, run: TrainedRun) -> int:
        return super().trainings(run) + len(sweep_points(self))

    # ------------------------------------------------------------------------------------- step 1: layer-wise ratio

    def prunable(self, model: PreTrainedModel) -> dict[str, Layer]:
        """The weights that can be pruned, by name, in the order in which the layers run."""
        config, empty = model.config, copy.deepcopy(model).to("meta")
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
        return prunable_layers(empty, pixels, self.exclude)

    def formula(self, layers: dict[str, Layer], ratio: str, density: float) -> dict[str, float]:
        shapes = {name: layer.shape for name, layer in layers.items()}
        return layer_densities(shapes, density, ratio, self.fc_density)

    def kept(self, run: TrainedRun, model: PreTrainedModel, ratio: str, density: float, seed: int, key: str) -> dict:
        """{"densities": {weight: d_l}, "counts": {weight: k_l}}, found once in a run; `model` as it is initialised."""

        def make() -> dict:
            layers = self.prunable(model)
            if ratio in FORMULAS:
                densities = self.formula(layers, ratio, density)
            else:
                scores = self.scores(run, model, ratio, seed)
                densities = keep_fractions({name: scores[name] for name in layers}, density)
            return {"densities": densities, "counts": self.counts(layers, densities, seed)}

        return run.once(f"masks/{key}-{seed}", make)

    def scores(self, run: TrainedRun, model: PreTrainedModel, ratio: str, seed: int) -> dict[str, Tensor]:
        """SNIP's or GraSP's scores of single weights, on training images, in fp32 and on the CPU."""
        if ratio == "snip":
            if self.snip_reinit == "xavier":
                model = xavier(copy.deepcopy(model), seed)
            return snip_scores(model, snip_batches(run.domain.train_images, self.snip_batches, seed))
        with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
            return grasp_scores(model, list(self.grasp_sample(run, seed)), self.grasp_temp)

    def grasp_sample(self, run: TrainedRun, seed: int) -> Iterator[dict[str, Tensor]]:
        """Two batches that together have `grasp_samples_per_class` images of every class."""
        images, count = run.domain.train_images, self.grasp_samples_per_class
        labels = images.labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(module_seed(seed, "grasp")))
        rows = []
        for label in range(len(run.domain.data.classes)):
            members = order[labels[order] == label][:count].tolist()
            if len(members) < count:
                raise UserError(f"--grasp_samples_per_class {count}: a class has {len(members)} training images.")
            rows.append(members)
        if self.grasp_halves == "sorted":
            flat = sum(rows, [])
            halves = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        else:
            halves = tuple(sum((members[half::2] for members in rows), []) for half in (0, 1))
        return (images.batch(half) for half in halves if half)

    # -------------------------------------------------------------------------------------------- step 2: sampling

    def counts(self, layers: dict[str, Layer], densities: dict[str, float], seed: int) -> dict[str, int]:
        """{weight: k_l >= 1}."""
        sizes = {name: layer.size for name, layer in layers.items()}
        starved = [name for name in layers if densities[name] * sizes[name] < 1]
        if starved:
            logger.warning(f"{starved[0]} and {len(starved) - 1} more layers would keep no weight: one each is kept.")
        if self.mask_sampling == "exact":
            return layer_counts(densities, sizes)
        return {
            name: max(1, bernoulli_count(self.seed_of_masks(seed), index, sizes[name], densities[name]))
            for index, name in enumerate(layers)
        }

    def seed_of_masks(self, seed: int) -> int:
        return seed if self.mask_seed is None else self.mask_seed

    def masks(self, layers: dict[str, Layer], counts: dict[str, int], seed: int) -> Masks:
        """{weight: bool, True = kept}; a mask is named by the seed, the layer's place and its number of weights."""
        seed = self.seed_of_masks(seed)
        return {
            name: random_mask(seed, index, layer.size, counts[name]).view(layer.shape)
            for index, (name, layer) in enumerate(layers.items())
        }

    # ---------------------------------------------------------------------------- steps 3 and 4: initialise and train

    def fresh(self, run: TrainedRun, seed: int, name: str | None = None) -> PreTrainedModel:
        """The dense model, untrained; `name` is another architecture than --model."""
        return kaiming(run.domain.fresh(seed, name), seed)

    def untrained(self, run: TrainedRun, variant: str, seed: int) -> PreTrainedModel:
        """The network of a variant before its masks."""
        return self.small(run, seed) if variant == SMALL else self.fresh(run, seed)

    def produce(self, run: TrainedRun, seed: int) -> None:
        super().produce(run, seed)
        for point in sweep_points(self):
            train_point(self, run, point, seed)

    def make(self, run: TrainedRun, variant: str, seed: int) -> PreTrainedModel:
        masks = self.chosen_masks(run, variant, seed)
        if variant == MAGNITUDE:
            return run.train(run.trained("dense", seed), variant, seed, masks=masks)
        return self.train_masked(run, self.untrained(run, variant, seed), masks, variant, seed)

    def train_masked(
        self, run: TrainedRun, model: PreTrainedModel, masks: Masks, key: str, seed: int
    ) -> PreTrainedModel:
        """Steps 3 and 4."""
        if self.scaled_init:
            for name, mask in masks.items():
                model.get_parameter(name).data.div_(mask.double().mean().sqrt())
        return run.train(model, key, seed, masks=masks)

    def chosen_masks(self, run: TrainedRun, variant: str, seed: int) -> Masks:
        """The masks of a variant; none of a dense one."""
        if variant in ("dense", SMALL):
            return {}
        if variant == MAGNITUDE:
            dense = run.trained("dense", seed)
            layers = self.prunable(dense)
            return top_masks({name: dense.get_parameter(name).detach().abs() for name in layers}, self.budget(layers))
        model = self.fresh(run, seed)
        layers = self.prunable(model)
        if variant == POSITIONS:
            scores = self.scores(run, model, "snip", seed)
            return top_masks({name: scores[name] for name in layers}, self.budget(layers))
        ratio = self.ratio if variant == self.method else variant
        return self.masks(layers, self.kept(run, model, ratio, self.density, seed, variant)["counts"], seed)

    def budget(self, layers: dict[str, Layer]) -> int:
        return round(self.density * sum(layer.size for layer in layers.values()))

    def small(self, run: TrainedRun, seed: int) -> PreTrainedModel:
        """A dense network with the weights of the sparse one."""
        base = self.fresh(run, seed)
        if base.config.model_type.removeprefix("slim_") not in CHANNEL_GROUPS:
            raise UserError(f"--baselines {SMALL}: {self.model} has no widths to reduce; name other baselines.")
        return narrowed(base, self.budget(self.prunable(base)), self.density, seed)

    # --------------------------------------------------------------------------------------------- the checkpoint

    def pack(self, run: TrainedRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        layers = self.prunable(model)
        kept = self.kept(run, model, self.ratio, self.density, seed, self.method)
        about = {
            "method": self.name,
            "ratio": self.ratio,
            "density": self.density,
            "mask_sampling": self.mask_sampling,
            "mask_seed": self.seed_of_masks(seed),
            "scaled_init": self.scaled_init,
            "densities": kept["densities"],
        }
        if self.ratio == "erk_plus":
            about["fc_density"] = self.fc_density
        masks = self.masks(layers, kept["counts"], seed)
        return pack_masked(model, masks, self.storage, self.seed_of_masks(seed), about)

    def baseline_bytes(self, run: TrainedRun) -> dict[str, int]:
        """Random masks stored as the checkpoint's, chosen positions as bits, dense networks as they are."""
        found = {}
        for variant in self.chosen_baselines():
            model = run.trained(variant, run.seeds[0])
            if variant != SMALL:
                storage = "bitmask" if variant in CONTROLS and self.storage == "seed" else self.storage
                masks = self.chosen_masks(run, variant, run.seeds[0])
                model = pack_masked(
                    model, masks, storage, self.seed_of_masks(run.seeds[0]), {}, drawn=variant in RATIOS
                )
            found[variant] = sum(tensor.nbytes for tensor in model.state_dict().values())
        return found

    def findings(self, run: TrainedRun) -> dict:
        """Accuracy by density and by network, where the weights went, and what they take in each storage."""
        seed = run.seeds[0]
        own, masks = run.trained(self.method, seed), self.chosen_masks(run, self.method, seed)
        findings = {
            "tables": {
                "Where the weights are": path_table(self, run),
                "Density of every layer": density_table(self, run),
                "Bytes of the pruned weights": storage_table(own, masks, self.seed_of_masks(seed)),
            }
        }
        if found := sweeps(self, run):
            findings["sweeps"] = found
        if MAGNITUDE in self.chosen_baselines():
            findings["notes"] = [f"{MAGNITUDE} was trained twice, {self.epochs} epochs dense and as many after pruning"]
        return findings


def snip_batches(images: ImageTensors, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of training images, not augmented, without repetition while there are enough."""
    total = len(images)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(module_seed(seed, "snip"))).tolist()
    size = min(SNIP_BATCH, total)
    return [images.batch([order[(size * k + i) % total] for i in range(size)]) for k in range(count)]
