"""Which pair of widths each layer may get and does get: pruning, clustering, and the rules that a search is held against.

Pairs are (key bits, value bits). A genome holds one choice per group: an index into the group's candidates, which are
sorted by falling bits. Errors are e_o of step 2, one per layer and pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recipes.kvtuner.genetic import Genome, Point
from recipes.kvtuner.tables import Pair, Table, equivalent_bits, pair_bits, pair_name

GROWTH = 1.25  # of DBSCAN's eps while there are too many groups
ATTEMPTS = 20_000  # to bring a random table to the wanted bits


@dataclass(frozen=True)
class Group:
    """Layers that share one pair, and the pairs that they may share, by falling bits."""

    layers: tuple[int, ...]
    candidates: tuple[Pair, ...]


def table_of(genome: Genome, groups: Sequence[Group]) -> Table:
    """The pair of every layer."""
    pairs = {
        layer: group.candidates[choice] for group, choice in zip(groups, genome, strict=True) for layer in group.layers
    }
    return tuple(pairs[layer] for layer in range(len(pairs)))


def singles(candidates: Sequence[tuple[Pair, ...]]) -> list[Group]:
    """Every layer as a group of its own."""
    return [Group((layer,), kept) for layer, kept in enumerate(candidates)]


# ----------------------------------------------------------------------------------------------------- pruning, step 3


def pareto_pairs(errors: dict[Pair, float]) -> tuple[Pair, ...]:
    """The pairs that no other beats or equals in both bits and error, by falling bits.

    Of pairs equal in both, the one with more key bits stays.
    """
    kept: list[Pair] = []
    for pair in sorted(errors, key=lambda p: (pair_bits(p), errors[p], -p[0])):
        if not kept or errors[pair] < errors[kept[-1]]:
            kept.append(pair)
    return tuple(reversed(kept))


# -------------------------------------------------------------------------------------------------- clustering, step 4


def cluster(
    errors: Sequence[dict[Pair, float]],
    candidates: Sequence[tuple[Pair, ...]],
    eps: float,
    min_samples: int,
    max_groups: int,
) -> list[Group]:
    """Groups of layers with the same candidates and near errors (L dicts, L tuples), ordered by their first layer.

    DBSCAN on the errors over the candidates, Euclidean, unscaled; noise layers stay alone. With more than `max_groups`,
    eps grows by `GROWTH` as long as that leaves no fewer; then the two nearest groups (by their mean errors) with the same
    candidates are merged until the number is met or no two have the same candidates.
    """

    def vectors(layers: Sequence[int]) -> np.ndarray:
        return np.array([[errors[layer][pair] for pair in candidates[layer]] for layer in layers])

    parts: dict[tuple[Pair, ...], list[int]] = {}
    for layer, kept in enumerate(candidates):
        parts.setdefault(kept, []).append(layer)

    def scan(eps: float) -> list[Group]:
        groups = []
        for kept, layers in parts.items():
            for members in dbscan(vectors(layers), eps, min_samples):
                groups.append(Group(tuple(layers[i] for i in members), kept))
        return sorted(groups, key=lambda group: group.layers)

    groups = scan(eps)
    widest = max(np.linalg.norm(np.ptp(vectors(layers), axis=0)) for layers in parts.values())
    while len(groups) > max_groups and eps < widest and len(coarser := scan(eps * GROWTH)) >= max_groups:
        groups, eps = coarser, eps * GROWTH
    while len(groups) > max_groups:
        pairs = [(a, b) for a in groups for b in groups if a.layers < b.layers and a.candidates == b.candidates]
        if not pairs:
            break
        centre = {group: vectors(group.layers).mean(0) for group in groups}
        a, b = min(pairs, key=lambda pair: (np.linalg.norm(centre[pair[0]] - centre[pair[1]]), pair[0].layers))
        merged = Group(tuple(sorted(a.layers + b.layers)), a.candidates)
        groups = sorted([g for g in groups if g not in (a, b)] + [merged], key=lambda group: group.layers)
    return groups


def dbscan(points: np.ndarray, eps: float, min_samples: int) -> list[list[int]]:
    """Indices of each cluster of points (n, d); points that DBSCAN calls noise are clusters of their own."""
    from sklearn.cluster import DBSCAN

    clusters: dict[tuple, list[int]] = {}
    for index, label in enumerate(DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points)):
        clusters.setdefault((label, index if label == -1 else None), []).append(index)
    return list(clusters.values())


# --------------------------------------------------------------------------------------- starting points and baselines


def ladder(groups: Sequence[Group], errors: Sequence[dict[Pair, float]], reverse: bool = False) -> list[Genome]:
    """Genomes from the most bits to the fewest: each step demotes the group that loses least error per bit saved.

    A group goes to the next smaller number of bits, and of several pairs with that many to the one of least error.
    `reverse`: the group that loses most goes first, which is what a good allocation has to beat.
    """

    def error(group: Group, choice: int) -> float:
        return sum(errors[layer][group.candidates[choice]] for layer in group.layers) / len(group.layers)

    def step(index: int) -> tuple[float, int] | None:
        """(error per bit saved, choice), or None at the end."""
        group, at = groups[index], genome[index]
        bits = [pair_bits(pair) for pair in group.candidates]
        below = max((b for b in bits if b < bits[at]), default=None)
        if below is None:
            return None
        choice = min((c for c, b in enumerate(bits) if b == below), key=lambda c: error(group, c))
        return (error(group, choice) - error(group, at)) / (bits[at] - below), choice

    genome = [0] * len(groups)
    steps = [tuple(genome)]
    while able := {i: found for i in range(len(groups)) if (found := step(i))}:
        index = (max if reverse else min)(able, key=lambda i: able[i][0])
        genome[index] = able[index][1]
        steps.append(tuple(genome))
    return steps


def uniform_genome(pair: Pair, groups: Sequence[Group]) -> Genome:
    """The pair itself in groups that may have it, elsewhere the candidate of nearest bits, more keys first."""

    def distance(other: Pair) -> tuple:
        return other != pair, abs(pair_bits(other) - pair_bits(pair)), -other[0]

    return tuple(min(range(len(g.candidates)), key=lambda i: distance(g.candidates[i])) for g in groups)


def random_table(candidates: Sequence[tuple[Pair, ...]], bits: float, seed: int) -> Table:
    """A random candidate for every layer, then random changes that bring the mean width to `bits`, or nearest to it."""
    rng = random.Random(seed)
    table = [rng.choice(kept) for kept in candidates]
    wanted = round(2 * bits * len(table))
    for _ in range(ATTEMPTS):
        distance = abs(sum(map(sum, table)) - wanted)
        if not distance:
            break
        layer = rng.randrange(len(table))
        before, table[layer] = table[layer], rng.choice(candidates[layer])
        if abs(sum(map(sum, table)) - wanted) > distance:
            table[layer] = before
    return tuple(table)


def depth_table(layers: int, bits: float) -> Table:
    """K8V8 for as many first and last layers as `bits` allow, K4V2 for the others."""
    table = ((4, 2),) * layers
    for ends in range(1, layers // 2 + 1):
        more = tuple((8, 8) if min(i, layers - 1 - i) < ends else (4, 2) for i in range(layers))
        if equivalent_bits(more) > bits:
            break
        table = more
    return table


def knapsack(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], capacity: int) -> tuple[int, ...]:
    """One choice per item with the least total cost and at most `capacity` of integer weight, exactly.

    Multiple-choice knapsack by dynamic programming over weight. Raises ValueError if nothing fits.
    """
    best = {0: (0.0, ())}  # weight: (cost, choices)
    for cost, weight in zip(costs, weights, strict=True):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (total, choices) in best.items():
            for choice, (c, w) in enumerate(zip(cost, weight, strict=True)):
                found = (total + c, (*choices, choice))
                if used + w <= capacity and (used + w not in reached or found < reached[used + w]):
                    reached[used + w] = found
        best = reached
    if not best:
        raise ValueError(f"capacity {capacity} is below the smallest weights")
    return min(best.values())[1]


def isolated_losses(groups: Sequence[Group], evaluate: Callable[[Sequence[Table]], list[Point]]) -> list[list[float]]:
    """The loss of each group's candidates, each measured with that group quantised and the rest in 16 bits."""
    layers = sum(len(group.layers) for group in groups)
    tables = [
        tuple(pair if layer in group.layers else (16, 16) for layer in range(layers))
        for group in groups
        for pair in group.candidates
    ]
    losses = iter(evaluate(tables))
    return [[next(losses)[0] for _ in group.candidates] for group in groups]


def knapsack_genome(groups: Sequence[Group], losses: Sequence[Sequence[float]], bits: float) -> Genome:
    """The least sum of `isolated_losses` within `bits`, exactly. Raises ValueError if nothing fits."""
    layers = sum(len(group.layers) for group in groups)
    weights = [[sum(pair) * len(group.layers) for pair in group.candidates] for group in groups]
    return knapsack(losses, weights, math.floor(2 * bits * layers + 1e-6))  # the mean of integers, taken back


def print_layers(measured: dict, menu: tuple[Pair, ...], candidates: list, groups: list[Group]) -> None:
    """One line a layer: its error, the element-wise one for reference, and the pairs that it keeps."""
    shown = sorted(menu, key=pair_bits)[len(menu) // 2]
    at = menu.index(shown)
    number = {layer: place for place, group in enumerate(groups) for layer in group.layers}
    for layer, kept in enumerate(candidates):
        error, single = measured["output"][layer][at], measured["elementwise"][layer][at]
        print(
            f"layer {layer + 1}/{len(candidates)}  e_o {pair_name(shown)} {error:.3f} (element-wise {single:.2f})"
            f"  group {number[layer] + 1}/{len(groups)}  {' '.join(map(pair_name, kept))}",
            flush=True,
        )
