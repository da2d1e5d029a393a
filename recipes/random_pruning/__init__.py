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
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.common.core import report as reports
from recipes.common.core.recipe import cached_json, module_seed
from recipes.common.data.architectures import fresh_model
from recipes.common.data.images import ImageData
from recipes.common.loops.trained import VisionRecipe, VisionRun
from recipes.common.loops.training import Masks, apply_masks
from recipes.common.parts.densities import (
    FORMULAS,
    RATIOS,
    Layer,
    layer_counts,
    layer_densities,
    mac_ratio,
    prunable_layers,
)
from recipes.common.parts.scores import grasp_scores, keep_fractions, snip_scores, synflow_scores, top_masks
from recipes.common.parts.width_fit import Budget, check_floor, fit_widths, width_limits
from recipes.common.parts.width_graph import CHANNEL_GROUPS, width_graph
from zoo.errors import UserError
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.random_mask import GENERATOR, SEEDS, bernoulli_count, digest, random_mask

logger = logging.get_logger(__name__)

SMALL, MAGNITUDE, POSITIONS = "small-dense", "magnitude", "snip-positions"
CONTROLS = (SMALL, MAGNITUDE, POSITIONS)
DEFAULT_RIVALS = ("uniform", "uniform_plus", "erk", "balanced", "snip", "grasp", *CONTROLS)
SNIP_BATCH = 128
TUNING = 4  # magnitude: fine-tuned for a quarter of the epochs at a tenth of the rate (40 of 160 at 0.01)
NUMBER_BYTES = 4  # checkpoints are fp32


@dataclass
class RandomPruning(VisionRecipe):
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
            "help": "side of the model's input; the small default is for CPUs, the paper's CIFAR networks take 32"
        },
    )
    epochs: int = field(default=6, metadata={"help": "passes over the training images"})
    attacked: int = field(default=250, metadata={"help": "test images that fgsm and pgd attack, evenly spread"})
    density: float = field(default=0.05, metadata={"help": "fraction of the weights that stays, above 0 and up to 1"})
    ratio: str = field(
        default="erk", metadata={"help": "how the density is spread over the layers", "choices": list(RATIOS)}
    )
    fc_density: float = field(default=1.0, metadata={"help": "density of the classifier with erk_plus"})
    mask_sampling: str = field(
        default="exact",
        metadata={"help": "exact numbers per layer, or a coin for each weight", "choices": ["exact", "bernoulli"]},
    )
    mask_seed: int | None = field(default=None, metadata={"help": "seed of the masks (default: that of each run)"})
    scaled_init: bool = field(default=False, metadata={"help": "initial weights times 1 / sqrt(density of the layer)"})
    exclude: str = field(
        default="", metadata={"help": "leave weights whose name matches this regex dense, and out of the budget"}
    )
    snip_batches: int = field(
        default=1, metadata={"help": f"batches of {SNIP_BATCH} training images that snip scores on"}
    )
    snip_reinit: str = field(
        default="none",
        metadata={"help": "weights that snip scores: none = the initial ones", "choices": ["none", "xavier"]},
    )
    grasp_samples_per_class: int = field(default=25, metadata={"help": "training images of each class, for grasp"})
    grasp_temp: float = field(default=200.0, metadata={"help": "the logits are divided by it, for grasp"})
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
            "choices": ["seed", "bitmask", "dense"],
        },
    )
    more_densities: list[float] = field(
        default_factory=lambda: [0.02, 0.1],
        metadata={"help": "further densities at which --ratio and uniform are compared; 0 for none"},
    )
    more_models: list[str] = field(
        default_factory=lambda: ["resnet-14-4", "resnet-14-16"],
        metadata={"help": "further architectures in which dense and pruned are compared; 'none' for none"},
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

    def rivals(self) -> list[str]:
        return [*(name for name in RATIOS if name != self.ratio), *CONTROLS]

    def chosen(self) -> list[str]:
        names = super().chosen()
        if self.baselines:
            return names
        return [name for name in names if name in ("dense", self.method, *DEFAULT_RIVALS)]

    def check(self) -> None:
        super().check()
        for name, value in (("density", self.density), ("fc_density", self.fc_density)):
            if not 0 < value <= 1:
                raise UserError(f"--{name} {value}: a fraction above 0 and at most 1 is needed.")
        if self.fc_density != 1 and self.ratio != "erk_plus":
            raise UserError(f"--fc_density {self.fc_density}: it is for --ratio erk_plus, not {self.ratio}.")
        if self.mask_seed is not None and not 0 <= self.mask_seed < SEEDS:
            raise UserError(f"--mask_seed {self.mask_seed}: a whole number from 0 to {SEEDS - 1} is needed.")
        for name in ("snip_batches", "grasp_samples_per_class"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: 1 or more is needed.")
        if not self.grasp_temp > 0:
            raise UserError(f"--grasp_temp {self.grasp_temp}: more than 0 is needed.")
        wrong = [density for density in self.more_densities if not 0 <= density <= 1]
        if wrong:
            raise UserError(f"--more_densities {wrong[0]}: fractions above 0 and at most 1, or 0 for none, are needed.")

    def check_data(self, data: ImageData) -> None:
        """Every budget is within reach of its rule, and grasp finds its images."""
        layers = self.layers(self.fresh(data, self.seed))
        sizes = {name: layer.size for name, layer in layers.items()}
        rules = {name: self.density for name in (self.ratio, *self.chosen()) if name in FORMULAS}
        for ratio, density in [*rules.items(), *((self.ratio, d) for d in self.more_densities if d)]:
            if ratio in FORMULAS:
                layer_counts(self.formula(layers, ratio, density), sizes)
        if "grasp" in (self.ratio, *self.chosen()):
            labels = data.train["label"][:]
            fewest = min(labels.count(label) for label in range(len(data.classes)))
            if fewest < self.grasp_samples_per_class and self.train_items is None:
                raise UserError(
                    f"--grasp_samples_per_class {self.grasp_samples_per_class}: a class has {fewest} training images."
                )
        if SMALL in self.chosen():
            self.small(data, self.seed)

    def needs(self, run: VisionRun, variants: list[str]) -> tuple[float, float, float]:
        """With what is trained for the sweeps."""
        return super().needs(run, [*variants, *(point.key for point in self.points())])

    # ------------------------------------------------------------------------------------- step 1: layer-wise ratio

    def layers(self, model: PreTrainedModel) -> dict[str, Layer]:
        """The weights that can be pruned, by name, in the order in which the layers run."""
        config, empty = model.config, copy.deepcopy(model).to("meta")
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
        return prunable_layers(empty, pixels, self.exclude)

    def formula(self, layers: dict[str, Layer], ratio: str, density: float) -> dict[str, float]:
        shapes = {name: layer.shape for name, layer in layers.items()}
        return layer_densities(shapes, density, ratio, self.fc_density)

    def kept(self, run: VisionRun, model: PreTrainedModel, ratio: str, density: float, seed: int, key: str) -> dict:
        """{"densities": {weight: d_l}, "counts": {weight: k_l}}, found once in a run; `model` as it is initialised."""

        def make() -> dict:
            layers = self.layers(model)
            if ratio in FORMULAS:
                densities = self.formula(layers, ratio, density)
            else:
                scores = self.scores(run, model, ratio, seed)
                densities = keep_fractions({name: scores[name] for name in layers}, density)
            return {"densities": densities, "counts": self.counts(layers, densities, seed)}

        return cached_json(run.state / "masks" / f"{key}-{seed}.json", make)

    def scores(self, run: VisionRun, model: PreTrainedModel, ratio: str, seed: int) -> dict[str, Tensor]:
        """SNIP's or GraSP's scores of single weights, on training images, in fp32 and on the CPU."""
        if ratio == "snip":
            if self.snip_reinit == "xavier":
                model = xavier(copy.deepcopy(model), seed)
            return snip_scores(model, snip_batches(run, self.snip_batches, seed))
        with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
            return grasp_scores(model, list(self.grasp_sample(run, seed)), self.grasp_temp)

    def grasp_sample(self, run: VisionRun, seed: int) -> Iterator[dict[str, Tensor]]:
        """Two batches that together have `grasp_samples_per_class` images of every class."""
        labels, count = run.train_images.labels, self.grasp_samples_per_class
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(module_seed(seed, "grasp")))
        rows = []
        for label in range(len(run.data.classes)):
            members = order[labels[order] == label][:count].tolist()
            if len(members) < count:
                raise UserError(f"--grasp_samples_per_class {count}: a class has {len(members)} training images.")
            rows.append(members)
        if self.grasp_halves == "sorted":
            flat = sum(rows, [])
            halves = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        else:
            halves = tuple(sum((members[half::2] for members in rows), []) for half in (0, 1))
        return (batch_of(run, half) for half in halves if half)

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

    def fresh(self, data: ImageData, seed: int, name: str | None = None) -> PreTrainedModel:
        """The dense model, untrained; `name` is another architecture than --model."""
        return kaiming(fresh_model(name or self.model, data.classes, self.image_size or data.image_size, seed), seed)

    def make(self, run: VisionRun, variant: str, seed: int) -> PreTrainedModel:
        if variant == self.method:
            for point in self.points():  # here, because every process comes here
                self.trained_point(run, point, seed)
        if variant == MAGNITUDE:
            model = run.trained("dense", seed)
            return run.train(model, variant, seed, masks=self.chosen_masks(run, variant, seed), schedule=self.tuning)
        if variant == SMALL:
            return run.train(self.small(run.data, seed), variant, seed)
        model = self.fresh(run.data, seed)
        if variant == "dense":
            return run.train(model, variant, seed)
        return self.train_masked(run, model, self.chosen_masks(run, variant, seed), variant, seed)

    def train_masked(
        self, run: VisionRun, model: PreTrainedModel, masks: Masks, key: str, seed: int
    ) -> PreTrainedModel:
        if self.scaled_init:
            for name, mask in masks.items():
                model.get_parameter(name).data.div_(mask.double().mean().sqrt())
        return run.train(model, key, seed, masks=masks)

    def chosen_masks(self, run: VisionRun, variant: str, seed: int) -> Masks:
        """The masks of any pruned variant."""
        if variant == MAGNITUDE:
            dense = run.trained("dense", seed)
            layers = self.layers(dense)
            return top_masks({name: dense.get_parameter(name).detach().abs() for name in layers}, self.budget(layers))
        model = self.fresh(run.data, seed)
        layers = self.layers(model)
        if variant == POSITIONS:
            scores = self.scores(run, model, "snip", seed)
            return top_masks({name: scores[name] for name in layers}, self.budget(layers))
        ratio = self.ratio if variant == self.method else variant
        return self.masks(layers, self.kept(run, model, ratio, self.density, seed, variant)["counts"], seed)

    def budget(self, layers: dict[str, Layer]) -> int:
        return round(self.density * sum(layer.size for layer in layers.values()))

    @property
    def tuning(self):
        """How a network that was pruned after training is trained on."""
        shorter = {
            "epochs": math.ceil(self.epochs / TUNING),
            "schedule": "cosine",
            "lr_drops": (),
            "warmup_epochs": 0.0,
        }
        return replace(self.training, lr=self.lr / 10, **shorter)

    def small(self, data: ImageData, seed: int) -> PreTrainedModel:
        """A dense network with the weights of the sparse one: all widths times sqrt(D), then tuned to the number."""
        base = self.fresh(data, seed)
        if base.config.model_type.removeprefix("slim_") not in CHANNEL_GROUPS:
            raise UserError(f"--baselines {SMALL}: {self.model} has no widths to reduce; name other baselines.")
        graph = width_graph(base, base.config.image_size)
        limits = width_limits(graph, multiple=1, min_width=1, min_ratio=0.0)
        budget = Budget(params=self.budget(self.layers(base)), macs=None)
        check_floor(graph, budget, limits)
        shrunk = dict.fromkeys(graph.widths, math.log(self.density) / 2)
        config = copy.deepcopy(base.config)
        config.widths = fit_widths(graph, shrunk, budget, limits, shift=True)
        torch.manual_seed(seed)
        return kaiming(type(base)(config), seed)

    # --------------------------------------------------------------------------------------------- the checkpoint

    def pack(self, run: VisionRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        layers = self.layers(model)
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

    def layer_rows(self, run: VisionRun, packed: PreTrainedModel) -> list[dict]:
        rows = []
        for name, spec in packed.config.compression_config["modules"].items():
            layer = packed.get_submodule(name)
            d_out, d_in = layer.matrix_shape
            row = {"name": name, **spec, "d_out": d_out, "d_in": d_in}
            if isinstance(layer, nn.Conv2d):
                row |= {"kernel": list(layer.kernel_size), "groups": layer.groups}
            rows.append(row | {"loss_init": None, "loss_final": None, "output_error": None})
        return rows

    def baseline_bytes(self, run: VisionRun) -> dict[str, int]:
        """Random masks stored as the checkpoint's, chosen positions as bits, dense networks as they are."""
        found = {}
        for variant in self.chosen()[2:]:
            model = run.trained(variant, run.seeds[0])
            if variant != SMALL:
                storage = "bitmask" if variant in CONTROLS and self.storage == "seed" else self.storage
                masks = self.chosen_masks(run, variant, run.seeds[0])
                model = pack_masked(
                    model, masks, storage, self.seed_of_masks(run.seeds[0]), {}, drawn=variant in RATIOS
                )
            found[variant] = sum(tensor.nbytes for tensor in model.state_dict().values())
        return found

    # ------------------------------------------------------------------------------------------------ the findings

    def points(self) -> list[Point]:
        """The networks that are trained for the sweeps alone."""
        densities = [density for density in self.more_densities if density not in (0, 1, self.density)]
        points = [Point(self.model, ratio, d) for ratio in self.swept_ratios() for d in densities]
        for name in self.other_models():
            points += [Point(name, None, 1.0), Point(name, self.ratio, self.density)]
        return points

    def swept_ratios(self) -> list[str]:
        return list(dict.fromkeys((self.ratio, "uniform")))

    def other_models(self) -> list[str]:
        return [name for name in self.more_models if name not in ("none", self.model)]

    def trained_point(self, run: VisionRun, point: Point, seed: int) -> PreTrainedModel:
        model = self.fresh(run.data, seed, point.model)
        if point.ratio is None:
            return run.train(model, point.key, seed)
        counts = self.kept(run, model, point.ratio, point.density, seed, point.key)["counts"]
        return self.train_masked(run, model, self.masks(self.layers(model), counts, seed), point.key, seed)

    def accuracy(self, run: VisionRun, what: str | Point) -> dict[str, dict]:
        """{"accuracy": M over the seeds} of a variant or of a point of a sweep."""
        key = what if isinstance(what, str) else what.key
        make = partial(run.trained, what) if isinstance(what, str) else partial(self.trained_point, run, what)
        found = [run.measure(f"accuracy-{key}-{seed}", partial(make, seed), ["accuracy"]) for seed in run.seeds]
        return {"accuracy": reports.over_seeds(found)["accuracy"]}

    def findings(self, run: VisionRun) -> dict:
        """Accuracy by density and by network, where the weights went, and what they take in each storage."""
        sweeps, dense = {}, {"x": 1.0, "metrics": self.accuracy(run, "dense")}
        series: dict[str, list[dict]] = {ratio: [dense] for ratio in self.swept_ratios()}
        for point in self.points():
            if point.model == self.model:
                series[point.ratio].append({"x": point.density, "metrics": self.accuracy(run, point)})
        for ratio in series:
            variant = self.method if ratio == self.ratio else ratio
            if variant in self.chosen() and self.density < 1:
                series[ratio].append({"x": self.density, "metrics": self.accuracy(run, variant)})
            series[ratio].sort(key=lambda point: point["x"])
        if len(series[self.ratio]) > 2:
            sweeps["Accuracy by density"] = {"x": "fraction of the weights kept", "log": True, "series": series}
        if self.other_models():
            sweeps["Accuracy by size of the network"] = self.by_network(run)
        tables = {"Where the weights are": self.where(run), "Density of every layer": self.by_layer(run)}
        findings = {"tables": tables | {"Bytes of the pruned weights": self.by_storage(run)}}
        if sweeps:
            findings["sweeps"] = sweeps
        if MAGNITUDE in self.chosen():
            epochs = self.tuning.epochs
            findings["notes"] = [f"{MAGNITUDE} was trained for {epochs} epochs more than all others, after pruning"]
        return findings

    def by_network(self, run: VisionRun) -> dict:
        """Dense and pruned networks, by the number of weights of the dense one."""
        sparse = f"{self.ratio}, {self.density:g} of the weights"
        series: dict[str, list[dict]] = {"dense": [], sparse: []}
        for name in (self.model, *self.other_models()):
            layers = self.layers(self.fresh(run.data, self.seed, name))
            pair = (Point(name, None, 1.0), Point(name, self.ratio, self.density))
            if name == self.model:
                pair = ("dense", self.method)
            for title, what in zip(series, pair, strict=True):
                x = float(sum(layer.size for layer in layers.values()))
                series[title].append({"x": x, "metrics": self.accuracy(run, what)})
        for points in series.values():
            points.sort(key=lambda point: point["x"])
        return {"x": "weights of the dense network", "log": True, "series": series}

    def where(self, run: VisionRun) -> dict:
        """Weights, multiplications, and how many of the weights are on a path from the pixels to the labels."""
        seed, rows = run.seeds[0], []
        for variant in self.chosen():
            model = self.fresh(run.data, seed) if variant != SMALL else self.small(run.data, seed)
            layers = self.layers(model)
            masks = {} if variant in ("dense", SMALL) else self.chosen_masks(run, variant, seed)
            kept = {name: masks[name].double().mean().item() if masks else 1.0 for name in layers}
            macs = mac_ratio(kept, layers) * sum(layer.macs for layer in layers.values())
            count = sum(round(kept[name] * layer.size) for name, layer in layers.items())
            live = live_weights(model, masks)
            rows.append([variant, f"{count:,}", f"{macs:,.0f}", live / count])
        return {"header": ["network", "weights", "multiplications an image", "of the weights, on a path"], "rows": rows}

    def by_layer(self, run: VisionRun) -> dict:
        """d_l of the first seed under every ratio of this run."""
        seed, variants = run.seeds[0], [name for name in self.chosen() if name in RATIOS or name == self.method]
        model = self.fresh(run.data, seed)
        layers = self.layers(model)
        densities = {}
        for variant in variants:
            ratio = self.ratio if variant == self.method else variant
            densities[variant] = self.kept(run, model, ratio, self.density, seed, variant)["densities"]
        header = ["weight", "size", *(f"{self.ratio} (this model)" if v == self.method else v for v in variants)]
        rows = [[n, f"{layer.size:,}", *(densities[v][n] for v in variants)] for n, layer in layers.items()]
        return {"header": header, "rows": rows}

    def by_storage(self, run: VisionRun) -> dict:
        """What the checkpoint's pruned weights take in each storage, and would take as compressed rows (CSR)."""
        seed = run.seeds[0]
        model = run.trained(self.method, seed)
        masks, rows = self.chosen_masks(run, self.method, seed), []
        for storage in ("dense", "bitmask", "seed"):
            packed = pack_masked(model, masks, storage, self.seed_of_masks(seed), {})
            names = {name.rpartition(".")[0] for name in masks}
            state = packed.state_dict().items()
            used = [t.nbytes for n, t in state if n.rpartition(".")[0] in names and not n.endswith(".bias")]
            rows.append([storage, f"{sum(used):,}"])
        columns = sum(int(mask.sum()) * (NUMBER_BYTES + 2) + 4 * (len(mask) + 1) for mask in masks.values())
        rows.insert(2, ["compressed rows, 16-bit columns (not offered)", f"{columns:,}"])
        return {"header": ["storage", "bytes"], "rows": rows}


@dataclass(frozen=True)
class Point:
    """A network of a sweep; ratio None is dense."""

    model: str
    ratio: str | None
    density: float

    @property
    def key(self) -> str:
        return f"{self.model.replace('/', '-')}-{self.ratio or 'dense'}-{self.density:g}"


# ------------------------------------------------------------------------------------------------- weights and batches


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def kaiming(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """w ~ N(0, 2 / fan_in), in place, every weight from a stream of its own; biases and norms stay as they are."""
    for name, weight in weights_of(model).items():
        generator = torch.Generator().manual_seed(module_seed(seed, name))
        std = math.sqrt(2 / weight[0].numel())
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def xavier(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """w ~ N(0, 2 / (fan_in + fan_out)), in place."""
    for name, weight in weights_of(model).items():
        generator = torch.Generator().manual_seed(module_seed(seed, f"xavier/{name}"))
        nn.init.xavier_normal_(weight.data, generator=generator)
    return model


def snip_batches(run: VisionRun, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of training images, not augmented, without repetition while there are enough."""
    total = len(run.train_images)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(module_seed(seed, "snip"))).tolist()
    size = min(SNIP_BATCH, total)
    return [batch_of(run, [order[(size * k + i) % total] for i in range(size)]) for k in range(count)]


def batch_of(run: VisionRun, rows: list[int]) -> dict[str, Tensor]:
    items = run.train_images.__getitems__(rows)
    return {key: torch.stack([item[key] for item in items]) for key in ("pixel_values", "labels")}


def live_weights(model: PreTrainedModel, masks: Masks) -> int:
    """How many of the kept weights are on a path of kept weights from the pixels to the labels.

    Those with a SynFlow score above 0: with |w| > 0, nothing cancels.
    """
    model = copy.deepcopy(model)
    for weight in weights_of(model).values():
        weight.data.fill_(weight[0].numel() ** -0.5)
    config = model.config
    scores = synflow_scores(model, (config.num_channels, config.image_size, config.image_size), masks)
    return sum(int((score > 0).sum()) for score in scores.values())


def pack_masked(
    model: PreTrainedModel, masks: Masks, storage: str, seed: int, about: dict, drawn: bool = True
) -> PreTrainedModel:
    """The model with its masked layers packed where that takes fewer bytes, its config saying how.

    Args:
        masks: {weight: bool}, in the order of the layers' places, which with `seed` and their counts name them.
        storage: seed, bitmask or dense (zeros in place). about: what else `compression_config` says.
        drawn: whether the masks are those that the seed names; only then can they be stored as it.
    """
    assert drawn or storage != "seed"
    apply_masks(model, masks)
    state, modules = model.state_dict(), {}
    for index, (name, mask) in enumerate(masks.items()):
        module, weight = name.removesuffix(".weight"), state[name]
        values, bits, row_offsets = pack_bitmask(weight.flatten(1), mask.flatten(1))
        tensors = {"values": values}
        if storage == "seed":
            spec = {"seed": seed, "layer": index, "generator": GENERATOR, "sha256": digest(bits)}
            spec = {"format": "seeded_bitmask", "nnz": len(values), **spec}
        else:
            tensors |= {"mask": bits, "row_offsets": row_offsets}
            spec = {"format": "bitmask", "nnz": len(values)}
        if storage == "dense" or sum(tensor.nbytes for tensor in tensors.values()) >= weight.nbytes:
            continue
        del state[name]
        state |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
        modules[module] = spec
    config = copy.deepcopy(model.config)
    config.compression_config = {"format_version": 1, **about, "modules": modules}
    packed = type(model)(config)
    packed.load_state_dict(state)
    for name in modules:
        packed.get_submodule(name).validate(name)
    return packed.eval()
