"""How many blocks each layer loses: costs of blocks, modelled energy, and allocations that meet a budget to a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from recipes.lpvit.blocks import Block, block_sizes, block_sums
from zoo.errors import UserError

ROUNDS = 80  # of the bisection over log2 of the multiplier, from -100 to 100
GRID = 100  # points of the curve that the derivative allocation looks at
SMOOTHING = 0.5  # weight of the past in the moving average over them
HALF_WIDTH = 4  # of the five-point stencil, in grid points
TILE = 16  # inputs that the code's power term counts as one


@dataclass
class Layer:
    """A layer as an allocation sees it. Its n blocks are in the order in which they go.

    distortion: float64 (n + 1,), of the model with the first k of them gone; never falling.
    price: float64 (n,), what keeping each costs in the trade against distortion.
    cost: float64 (n,), what keeping each takes from the budget.
    most: how many may go.
    """

    distortion: Tensor
    price: Tensor
    cost: Tensor
    most: int

    def __post_init__(self):
        self.gone = torch.nn.functional.pad(self.cost.cumsum(0), (1, 0)).tolist()  # of the budget, by blocks removed


# ------------------------------------------------------------------------------------------------------- cost and energy


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules an operation; survey figures for 45 nm by default, for comparing layers and masks, not for a device."""

    fp16_mac: float = 1.5
    fp32_mac: float = 4.6
    int8_mac: float = 0.23
    sram_32bit: float = 5.0
    dram_32bit: float = 640.0

    @classmethod
    def read(cls, path: str) -> EnergyTable:
        """From a YAML file with exactly these keys."""
        from recipes.common.core.flags import read_yaml

        values, names = read_yaml(Path(path), "--energy_table"), {field.name for field in fields(cls)}
        for key in sorted(map(str, names ^ values.keys())):
            raise UserError(f"--energy_table {path}: {key} is {'missing' if key in names else 'unknown'}.")
        for key, value in values.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"--energy_table {path}: {key} is {value!r}; picojoules, more than 0, are needed.")
        return cls(**values)

    def block_energy(self, shape: tuple[int, int], block: Block, tokens: int, bits: int) -> Tensor:
        """float64 (R, C): picojoules an image of keeping each block.

        Its weights come from DRAM once and meet every token; the inputs that it reads come from SRAM, so an input is
        read as often as blocks of its column are kept: b_r b_c (T e_mac + e_dram) + T b_c e_sram, per `bits` wide number.
        """
        mac = self.fp32_mac if bits == 32 else self.fp16_mac
        sizes = block_sizes(shape, block).double()
        columns = block_sums(torch.ones(1, shape[1], dtype=torch.float64), (1, block[1]))  # inputs of each block-column
        words = bits / 32
        return sizes * (tokens * mac + words * self.dram_32bit) + tokens * columns * words * self.sram_32bit

    def fixed_energy(self, d_out: int, tokens: int, bits: int) -> float:
        """Picojoules an image of writing a layer's outputs, pruned or not."""
        return tokens * d_out * bits / 32 * self.sram_32bit


def official_power(layers: dict[str, Layer], d_in: dict[str, int]) -> dict[str, Tensor]:
    """{layer: beta P (n + 1,)}, the code's power term: P(k) = k floor(d_in / 16), added to the distortion.

    beta = mean over layers of the steepest distortion / mean of the steepest P, both by the fraction removed. P grows
    with what is *removed*, so layers with many blocks and inputs are pruned less, as in the code and its figure.
    """
    steepest = [stencil(smooth(sampled(layer.distortion))).max().item() for layer in layers.values()]
    slopes = [len(layer.cost) * (d_in[name] // TILE) for name, layer in layers.items()]
    beta = sum(steepest) / sum(slopes)
    return {
        name: beta * (d_in[name] // TILE) * torch.arange(len(layer.cost) + 1, dtype=torch.float64)
        for name, layer in layers.items()
    }


# ------------------------------------------------------------------------------------------------------------ allocation


def total_cost(layers: dict[str, Layer], removed: dict[str, int]) -> float:
    """What the kept blocks take from the budget."""
    return sum(layer.gone[-1] - layer.gone[removed[name]] for name, layer in layers.items())


def find_budget(layers: dict[str, Layer], target: float, fixed: float = 0.0) -> float:
    """What the kept blocks may cost so that, with the `fixed` cost of any mask, the fraction `target` is met.

    Raises: UserError when the floors of the layers alone cost more.
    """
    total = total_cost(layers, dict.fromkeys(layers, 0))
    least = total_cost(layers, {name: layer.most for name, layer in layers.items()})
    budget = total if target == 1 else target * (total + fixed) - fixed
    if least > budget:
        reachable = math.ceil((least + fixed) / (total + fixed) * 1e4) / 1e4
        raise UserError(
            f"--target {target}: {reachable} is the least that this --min_density and --budget allow; raise --target or"
            " lower --min_density."
        )
    return budget


def lower_hull(x: Tensor, y: Tensor) -> list[int]:
    """Vertices, from the first point to the last, of the lower convex hull of points with rising x."""
    xs, ys, hull = x.tolist(), y.tolist(), []
    for k in range(len(xs)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (ys[b] - ys[a]) * (xs[k] - xs[a]) < (ys[k] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def allocate_lagrangian(layers: dict[str, Layer], budget: float) -> dict[str, int]:
    """{layer: blocks to remove}: min of the summed distortion within the budget, by one multiplier.

    k_l(lambda) = argmin_k delta_l(k) + lambda price_l(kept) lies on the lower convex hull of (price removed, delta). The
    multiplier is bisected; what is left of the budget then goes to the next hull step in turn, block by block.
    """
    steps = {}  # {layer: [(slope, blocks gone after the step)]}, slopes rising
    for name, layer in layers.items():
        x = torch.nn.functional.pad(layer.price.cumsum(0), (1, 0))[: layer.most + 1]
        y = layer.distortion[: layer.most + 1]
        hull = lower_hull(x, y)
        steps[name] = [((y[b] - y[a]) / (x[b] - x[a]), b) for a, b in zip(hull, hull[1:], strict=False)]
        steps[name] = [(slope.item(), b) for slope, b in steps[name]]

    def removed(power: float) -> dict[str, int]:
        return {name: max((b for slope, b in rows if slope <= 2.0**power), default=0) for name, rows in steps.items()}

    if total_cost(layers, dict.fromkeys(layers, 0)) <= budget:
        return dict.fromkeys(layers, 0)
    low, high = -100.0, 100.0  # too much is kept at low
    if total_cost(layers, removed(low)) <= budget:
        return removed(low)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if total_cost(layers, removed(middle)) > budget:
            low = middle
        else:
            high = middle
    counts = removed(low)
    between = sorted(
        (slope, name, b) for name, rows in steps.items() for slope, b in rows if 2.0**low < slope <= 2.0**high
    )
    spent = total_cost(layers, counts)
    for _, name, b in between:
        while counts[name] < b and spent > budget:
            spent -= layers[name].gone[counts[name] + 1] - layers[name].gone[counts[name]]
            counts[name] += 1
    return counts


def allocate_derivative(layers: dict[str, Layer], budget: float) -> dict[str, int]:
    """The code's rule: every layer takes the fraction whose numerical slope is nearest to one common lambda.

    The slope is by the fraction removed, whatever that saves, of the curve sampled at GRID points and smoothed. A budget
    that no lambda meets is met by the blocks whose slope is nearest.
    """
    slopes = {name: stencil(smooth(sampled(layer.distortion))) for name, layer in layers.items()}
    limits = {name: layer.most / len(layer.cost) for name, layer in layers.items()}

    def removed(power: float) -> dict[str, int]:
        counts = {}
        for name, layer in layers.items():
            allowed = slopes[name][: int(limits[name] * GRID) + 1]
            place = (allowed - 2.0**power).abs().argmin().item()
            counts[name] = min(round(place / GRID * len(layer.cost)), layer.most)
        return counts

    low, high = -100.0, 100.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if total_cost(layers, removed(middle)) > budget:
            low = middle
        else:
            high = middle

    def slope(name: str, k: int) -> float:
        return slopes[name][min(round(k / len(layers[name].cost) * GRID), GRID)].item()

    return settle(layers, removed(high), budget, slope)


def allocate_threshold(layers: dict[str, Layer], scores: dict[str, Tensor], budget: float) -> dict[str, int]:
    """One threshold on the scores (n,), which rise in the order of removal, for all layers, within their floors."""
    rows = [(score, name) for name, layer in layers.items() for score in scores[name].tolist()[: layer.most]]
    counts, spent = dict.fromkeys(layers, 0), total_cost(layers, dict.fromkeys(layers, 0))
    for _, name in sorted(rows, key=lambda row: row[0]):
        if spent <= budget:
            break
        spent -= layers[name].gone[counts[name] + 1] - layers[name].gone[counts[name]]
        counts[name] += 1
    return counts


def allocate_density(layers: dict[str, Layer], weights: dict[str, float], budget: float) -> dict[str, int]:
    """Densities in the ratio of `weights`, capped at 1 and floored by `most`; equal weights make it uniform."""

    def removed(scale: float) -> dict[str, float]:
        wanted = {name: (1 - min(scale * weights[name], 1)) * len(layer.cost) for name, layer in layers.items()}
        return {name: min(wanted[name], layer.most) for name, layer in layers.items()}

    def rounded(wanted: dict[str, float]) -> dict[str, int]:
        return {name: min(math.ceil(k - 1e-9), layers[name].most) for name, k in wanted.items()}

    low, high = 0.0, 1 / min(weights.values())  # within the budget at low
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if total_cost(layers, rounded(removed(middle))) <= budget:
            low = middle
        else:
            high = middle
    wanted = removed(low)
    return settle(layers, rounded(wanted), budget, lambda name, k: k - wanted[name])


def lamp_scores(squares: Tensor) -> Tensor:
    """LAMP of blocks whose mean squares (n,) come in the order of removal: each over the sum of those that go no sooner; 0
    where all of these are 0."""
    return torch.where(squares > 0, squares / squares.flip(0).cumsum(0).flip(0), 0)


def settle(
    layers: dict[str, Layer], counts: dict[str, int], budget: float, loss: Callable[[str, int], float]
) -> dict[str, int]:
    """Removes and puts back single blocks until the budget is met and no block that fits is missing.

    loss(layer, k): how much it hurts to have its k-th block gone; the least goes first, the most comes back first.
    """
    counts, spent = dict(counts), total_cost(layers, counts)
    while spent > budget:
        can = [name for name, layer in layers.items() if counts[name] < layer.most]
        name = min(can, key=lambda name: loss(name, counts[name] + 1))
        spent -= layers[name].cost[counts[name]].item()
        counts[name] += 1
    while True:
        can = [name for name in layers if counts[name] and spent + layers[name].cost[counts[name] - 1].item() <= budget]
        if not can:
            return counts
        name = max(can, key=lambda name: loss(name, counts[name]))
        counts[name] -= 1
        spent += layers[name].cost[counts[name]].item()


# ------------------------------------------------------------------------------------- numerical slopes, as in the code


def sampled(curve: Tensor) -> Tensor:
    """A curve over n + 1 counts at the fractions 0, 1/GRID, ..., 1."""
    places = (torch.arange(GRID + 1) * (len(curve) - 1) / GRID).round().long()
    return curve[places]


def smooth(curve: Tensor) -> Tensor:
    """Exponential moving average, debiased: the first value stays as it is."""
    average, result = 0.0, []
    for place, value in enumerate(curve.tolist(), start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        result.append(average / (1 - SMOOTHING**place))
    return torch.tensor(result, dtype=torch.float64)


def stencil(curve: Tensor) -> Tensor:
    """Slope by the fraction removed, five points HALF_WIDTH apart at most, fewer near the ends; plain differences there."""
    values, last, slopes = curve.tolist(), len(curve) - 1, []
    for k in range(last + 1):
        step = min(HALF_WIDTH, k, last - k) // 2
        if step:
            outer, inner = values[k + 2 * step] - values[k - 2 * step], values[k + step] - values[k - step]
            slopes.append((8 * inner - outer) / (12 * step))
        else:
            a, b = max(k - 1, 0), min(k + 1, last)
            slopes.append((values[b] - values[a]) / (b - a))
    return torch.tensor(slopes, dtype=torch.float64) * last
