"""Which blocks of a dense model go: from its calibration images to masks, in the order of LPViT (arXiv 2407.02068)."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from recipes.common.core.state import module_seed
from recipes.lpvit.allocation import (
    EnergyTable,
    Layer,
    allocate_density,
    allocate_derivative,
    allocate_lagrangian,
    allocate_threshold,
    find_budget,
    lamp_scores,
    official_power,
)
from recipes.lpvit.blocks import (
    Block,
    block_sizes,
    block_statistics,
    block_sums,
    captured,
    distortion_curve,
    fisher_scores,
    magnitude_scores,
    matrix,
    mean_gradients,
    removal_order,
    spread_blocks,
    taylor_scores,
    tokens,
)
from zoo.errors import UserError


@dataclass(frozen=True)
class Choice:
    """What distinguishes one way of pruning blocks from another: the flags of the same names, and the order of the masks."""

    target_fn: str
    rank: str
    alloc: str
    power_mode: str
    rounds: int
    reconstruct: str
    mask_rank: str | None = None  # by which blocks go in the end, if not by `rank`: as many of each layer


# -------------------------------------------------------------------------------------------------------------- blocks


def select_layers(
    model: nn.Module, block: Block, *, include: str, exclude: str, embed: bool, head: bool, ragged: bool
) -> dict[str, nn.Module]:
    """The layers to prune: the linears of the encoder, the patch embedding and the heads on request.

    Raises: UserError when none is left, or the blocks do not fit one.
    """
    base, layers = f"{model.base_model_prefix}.", {}
    for name, module in model.named_modules():
        inside = name.startswith(base)
        wanted = isinstance(module, nn.Linear) and (inside or head)
        wanted |= isinstance(module, nn.Conv2d) and inside and embed and module.groups == 1
        if wanted and re.search(include, name) and not (exclude and re.search(exclude, name)):
            layers[name] = module
    if not layers:
        raise UserError(f"--include {include!r} --exclude {exclude!r}: no layer of the model is selected.")
    for name, layer in layers.items():
        shape = tuple(matrix(layer).shape)
        if block[0] > shape[0] or block[1] > shape[1]:
            raise UserError(f"--block {block[0]},{block[1]}: {name} has only {shape[0]}x{shape[1]} weights.")
        if not ragged and (shape[0] % block[0] or shape[1] % block[1]):
            raise UserError(
                f"--block {block[0]},{block[1]}: it does not divide {name}, {shape[0]}x{shape[1]}; pass --ragged to pad"
                " the last blocks, or --exclude the layer."
            )
    return layers


def parse_block(text: str) -> Block:
    """'16,16' or '16' -> (16, 16)."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or any(b % 4 or not 4 <= b <= 128 for b in sizes):
        raise UserError(f"--block {text}: 'out,in', multiples of 4 from 4 to 128, is needed. Try --block 16,16.")
    return sizes[0], sizes[-1]


# --------------------------------------------------------------------------------------------- the method on one model


@dataclass
class Calibrated:
    """A dense model with what calibration images say of its blocks; every baseline takes its numbers from here.

    batches: normalised pixels of the calibration images. Statistics are made when first asked for, and kept.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    block: Block
    batches: list[Tensor]
    seed: int
    probes: int = 1
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # {target: {layer: S}}
    gradients: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[tuple[Choice, float], dict[str, Tensor]] = field(
        default_factory=dict
    )  # blocks kept, by choice and target

    def __post_init__(self):
        with torch.no_grad(), captured(self.layers) as seen:
            self.model.eval()(pixel_values=self.batches[0][:1].to(self.model.device))
        self.tokens = {name: tokens(self.layers[name], x, 1).shape[1] for name, (x, _) in seen.items()}
        for name in self.layers.keys() - seen.keys():
            raise UserError(f"{name} takes no part in classification; leave it out with --exclude.")
        self.shapes = {name: tuple(matrix(layer).shape) for name, layer in self.layers.items()}

    def block_slopes(self, target: str) -> dict[str, Tensor]:
        """{layer: S (N, R, C)}; one row for "sq", the mean gradient's   (step 1)"""
        if target not in self.statistics and target == "sq":
            g = self.mean_gradients()
            self.statistics[target] = {
                name: block_sums(g[name] * matrix(layer).detach(), self.block)[None]
                for name, layer in self.layers.items()
            }
        elif target not in self.statistics:
            self.statistics[target] = block_statistics(
                self.model, self.batches, self.layers, self.block, target, self.probes, self.seed
            )
        return self.statistics[target]

    def mean_gradients(self) -> dict[str, Tensor]:
        if not self.gradients:
            self.gradients = mean_gradients(self.model, self.batches, self.layers)
        return self.gradients

    def scores(self, choice: Choice) -> dict[str, Tensor]:
        """{layer: importance (R, C)} by which its blocks go (step 2); -1 for what is gone already, so that it goes first."""
        weights = {name: matrix(layer).detach() for name, layer in self.layers.items()}
        if choice.alloc == "lamp":  # by squares, whatever the rank
            sizes = {name: block_sizes(w.shape, self.block) for name, w in weights.items()}
            scores = {name: block_sums(w.square(), self.block).cpu() / sizes[name] for name, w in weights.items()}
        elif choice.rank == "l1":
            scores = {name: magnitude_scores(w, self.block).cpu() for name, w in weights.items()}
        elif choice.rank == "taylor":
            g = self.mean_gradients()
            scores = {name: taylor_scores(w, g[name], self.block).cpu() for name, w in weights.items()}
        else:
            scores = {name: fisher_scores(s).cpu() for name, s in self.block_slopes(choice.target_fn).items()}
        gone = {name: (magnitude_scores(w, self.block) == 0).cpu() for name, w in weights.items()}
        return {name: score.masked_fill(gone[name], -1.0) for name, score in scores.items()}

    def macs(self) -> dict[str, Tensor]:
        """{layer: float64 (R, C)}: multiplications of each block for one image."""
        return {n: block_sizes(shape, self.block).double() * self.tokens[n] for n, shape in self.shapes.items()}

    def costs(self, budget: str, table: EnergyTable, bits: int) -> tuple[dict[str, Tensor], float]:
        """({layer: float64 (R, C), what keeping each block takes from the budget}, what no mask saves)."""
        if budget == "energy":
            return self.energies(table, bits), self.fixed_energy(table, bits)
        sizes = {name: block_sizes(shape, self.block).double() for name, shape in self.shapes.items()}
        return (self.macs() if budget == "flops" else sizes), 0.0

    def energies(self, table: EnergyTable, bits: int) -> dict[str, Tensor]:
        """{layer: float64 (R, C)}: modelled picojoules of keeping each block for one image   (step 4)"""
        return {n: table.block_energy(shape, self.block, self.tokens[n], bits) for n, shape in self.shapes.items()}

    def fixed_energy(self, table: EnergyTable, bits: int) -> float:
        """Modelled picojoules for one image that no mask saves: the outputs of the layers."""
        return sum(table.fixed_energy(shape[0], self.tokens[n], bits) for n, shape in self.shapes.items())


def choose_blocks(
    calibrated: Calibrated,
    choice: Choice,
    target: float,
    *,
    budget: str = "flops",
    min_density: float = 0.05,
    power_weight: float = 0.5,
    table: EnergyTable = EnergyTable(),  # noqa: B008 (frozen)
    bits: int = 32,
) -> dict[str, Tensor]:
    """{layer: blocks to keep, bool (R, C)}   (steps 2 to 5)

    Args:
        target: what may remain, as a fraction of what the dense layers cost in the unit of `budget`: "flops", "params",
            or modelled "energy", there with what is spent on outputs, pruned or not.
        power_weight: rho, the share of energy in the price of a block, with power mode "physical".
        bits: width of a number, for the energy model.
    """
    energies, (costs, fixed) = calibrated.energies(table, bits), calibrated.costs(budget, table, bits)
    rho = power_weight if choice.power_mode == "physical" else 0.0
    all_cost, all_energy = (sum(each.sum() for each in values.values()) for values in (costs, energies))

    scores = calibrated.scores(choice)
    orders, layers = {name: removal_order(score) for name, score in scores.items()}, {}
    for name, order in orders.items():
        distortion = torch.zeros(len(order) + 1, dtype=torch.float64)
        if choice.alloc in ("lagrangian", "derivative"):
            distortion = distortion_curve(calibrated.block_slopes(choice.target_fn)[name].cpu(), order)
        price = (1 - rho) * costs[name] / all_cost + rho * energies[name] / all_energy
        most = removable(len(order), min_density)
        layers[name] = Layer(distortion, price.flatten()[order], costs[name].flatten()[order], most)
    if choice.power_mode == "official":
        power = official_power(layers, {name: calibrated.shapes[name][1] for name in layers})
        layers = {name: replace(layer, distortion=layer.distortion + power[name]) for name, layer in layers.items()}

    limit = find_budget(layers, target, fixed)
    ranked = {name: scores[name].flatten()[orders[name]] for name in layers}
    if choice.alloc == "lagrangian":
        removed = allocate_lagrangian(layers, limit)
    elif choice.alloc == "derivative":
        removed = allocate_derivative(layers, limit)
    elif choice.alloc == "global":
        removed = allocate_threshold(layers, ranked, limit)
    elif choice.alloc == "lamp":
        removed = allocate_threshold(
            layers, {name: lamp_scores(row.clamp(min=0)) for name, row in ranked.items()}, limit
        )
    else:
        shapes = calibrated.shapes
        erk = {name: sum(shapes[name]) / math.prod(shapes[name]) for name in layers}
        removed = allocate_density(layers, erk if choice.alloc == "erk" else dict.fromkeys(layers, 1.0), limit)

    if choice.mask_rank:
        final = calibrated.scores(replace(choice, rank=choice.mask_rank))
        orders = {name: removal_order(score) for name, score in final.items()}
    keeps = {}
    for name, order in orders.items():
        keep = torch.ones(len(order), dtype=torch.bool)
        keep[order[: removed[name]]] = False
        keeps[name] = keep.view(scores[name].shape)
    return keeps


def removable(blocks: int, min_density: float) -> int:
    """How many of the blocks of a layer may go."""
    return blocks - math.ceil(min_density * blocks - 1e-9)


def check_targets(
    calibrated: Calibrated, targets: list[float], budget: str, min_density: float, table: EnergyTable, bits: int = 32
) -> None:
    """Raises: UserError for a target that no masks meet, as `choose_blocks` does; here without any statistics."""
    costs, fixed = calibrated.costs(budget, table, bits)
    layers = {}
    for name, cost in costs.items():
        cost = cost.flatten().sort(descending=True).values  # at best the dearest go
        layers[name] = Layer(torch.zeros(len(cost) + 1), cost, cost, removable(len(cost), min_density))
    for target in targets:
        find_budget(layers, target, fixed)


def choose_in_rounds(calibrated: Calibrated, choice: Choice, target: float, **settings) -> dict[str, Tensor]:
    """`choose_blocks` in `choice.rounds` equal steps towards the target, each on the model as pruned so far.

    Curves are second-order around the model that they are taken at: a softmax that saturates has no slope, so that all
    queries and keys seem to be free at first, and cost much once some of them are gone. What is gone has slope 0, goes
    first again, and stays gone.
    """
    current = calibrated
    for step in range(1, choice.rounds + 1):
        share = step / choice.rounds
        keeps = choose_blocks(current, choice, 1 - (1 - target) * share if step < choice.rounds else target, **settings)
        if step < choice.rounds:
            model = apply_masks(calibrated.model, weight_masks(keeps, calibrated))
            layers = {name: model.get_submodule(name) for name in calibrated.layers}
            seed = module_seed(calibrated.seed, f"round {step}")
            current = replace(calibrated, model=model, layers=layers, seed=seed, statistics={}, gradients={})
    return keeps


def weight_masks(keeps: dict[str, Tensor], calibrated: Calibrated) -> dict[str, Tensor]:
    """{layer: bool (d_out, d_in)} of the blocks to keep."""
    return {name: spread_blocks(keep, calibrated.shapes[name], calibrated.block) for name, keep in keeps.items()}


def apply_masks(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with zeros where the masks (d_out, d_in) are False."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = matrix(model.get_submodule(name))
            weight.mul_(mask.to(weight.device))
    return model


# ---------------------------------------------------------------------------------------------- unstructured baselines


def magnitude_masks(calibrated: Calibrated, target: float) -> dict[str, Tensor]:
    """Single weights by one threshold on |W| over all layers, at the same multiplications: a ceiling without blocks."""
    names = list(calibrated.layers)
    weights = [matrix(calibrated.layers[name]).detach().abs().flatten().cpu() for name in names]
    macs = torch.cat([torch.full((len(w),), float(calibrated.tokens[n])) for n, w in zip(names, weights, strict=True)])
    order = torch.cat(weights).argsort(stable=True)
    gone = macs.double()[order].cumsum(0) <= (1 - target) * macs.double().sum()
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[gone]] = False
    parts = keep.split([len(w) for w in weights])
    return {name: part.view(calibrated.shapes[name]) for name, part in zip(names, parts, strict=True)}


@torch.no_grad()
def wanda_masks(calibrated: Calibrated, target: float) -> dict[str, Tensor]:
    """Single weights by |W_ij| |X_j|, the same share in every row (Wanda, arXiv 2306.11695)."""
    squares = dict.fromkeys(calibrated.layers, 0)
    for pixels in calibrated.batches:
        with captured(calibrated.layers) as seen:
            calibrated.model.eval()(pixel_values=pixels.to(calibrated.model.device))
        for name, (x, _) in seen.items():
            squares[name] += tokens(calibrated.layers[name], x, len(pixels)).square().sum((0, 1))
    masks = {}
    for name, layer in calibrated.layers.items():
        scores = (matrix(layer).abs() * squares[name].sqrt()).cpu()
        kept = scores.topk(round(target * scores.shape[1]), dim=1).indices
        masks[name] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
    return masks
