"""NSGA-II with constraint domination over short integer genomes: minimise two objectives, one of them limited.

Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002: non-dominated sorting, crowding
distance, binary tournaments, parents and children compete. A genome is a tuple of choices, gene i in 0..sizes[i]-1;
neighbouring choices are expected to be alike, so a mutation is a step of one as often as a random choice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

Genome = tuple[int, ...]
Point = tuple[float, float]  # (loss, cost), both to be minimised

ATTEMPTS = 50  # to make a child that was never evaluated, before one is drawn at random
STEP = 0.5  # probability that a mutation is a step of one
CROSSOVER = 0.9  # probability that a child has two parents


def dominates(a: Point, b: Point) -> bool:
    """Whether a is nowhere worse than b and somewhere better."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def constrained_dominates(a: Point, b: Point, limit: float) -> bool:
    """Deb's rule for cost <= limit: what meets it dominates what does not, which is ordered by how far it is over."""
    over_a, over_b = max(0.0, a[1] - limit), max(0.0, b[1] - limit)
    return over_a < over_b if over_a or over_b else dominates(a, b)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by rising cost; of equal points the first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0])):
        if not front or points[index][0] < points[front[-1]][0]:
            front.append(index)
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate, within the rectangle up to `reference`."""
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    front = [inside[i] for i in pareto_front(inside)]
    ends = [*(cost for _, cost in front), reference[1]][1:]
    return sum((end - cost) * (reference[0] - loss) for (loss, cost), end in zip(front, ends, strict=True))


def nsga2(
    sizes: Sequence[int],
    evaluate: Callable[[list[Genome]], list[Point]],
    *,
    seeds: Sequence[Genome],
    budget: int,
    population: int,
    limit: float,
    reference: Point,
    seed: int,
    patience: int,
) -> dict[Genome, Point]:
    """Every genome evaluated, in order, with its (loss, cost).

    Args:
        sizes: number of choices of each gene.
        evaluate: genomes never seen before -> their points; called with a whole generation.
        seeds: first members of the first population, which random genomes fill up.
        budget: evaluations at most. population: members kept from one generation to the next.
        limit: cost allowed; a soft constraint (see `constrained_dominates`).
        reference: corner of the hypervolume. patience: evaluations without any gain of it after which to stop.
        seed: of all random choices; the same seed and points give the same run.
    """
    rng = random.Random(seed)
    space = math.prod(sizes)
    archive: dict[Genome, Point] = {}

    def add(genomes: list[Genome]) -> list[Genome]:
        genomes = genomes[: budget - len(archive)]
        archive.update(zip(genomes, evaluate(genomes), strict=True))
        return genomes

    def volume() -> float:
        return hypervolume([point for point in archive.values() if point[1] <= limit], reference)

    first = list(dict.fromkeys(seeds))[:population]
    while len(first) < min(population, space):
        first.append(_unseen(rng, sizes, set(first)))
    members = add(first)
    best, idle = volume(), 0
    while len(archive) < min(budget, space) and idle < patience:
        order = rank(members, archive, limit)
        children: list[Genome] = []
        while len(children) < min(population, space - len(archive)):
            children.append(_child(rng, sizes, members, order, archive.keys() | set(children)))
        children = add(children)
        everyone = members + children
        order = rank(everyone, archive, limit)
        members = sorted(everyone, key=order.__getitem__)[:population]
        now = volume()
        idle = 0 if now > best else idle + len(children)
        best = max(best, now)
    return archive


def rank(members: list[Genome], points: dict[Genome, Point], limit: float) -> dict[Genome, tuple[int, float]]:
    """{genome: (front number, minus crowding distance)}; the smaller, the fitter."""
    order: dict[Genome, tuple[int, float]] = {}
    left, number = list(members), 0
    while left:
        front = [
            a for a in left if not any(constrained_dominates(points[b], points[a], limit) for b in left if b is not a)
        ]
        distance = crowding([points[genome] for genome in front])
        order |= {genome: (number, -space) for genome, space in zip(front, distance, strict=True)}
        left = [genome for genome in left if genome not in order]
        number += 1
    return order


def crowding(front: list[Point]) -> list[float]:
    """For each point the distance between its neighbours, summed over objectives, each scaled to 1; ends are infinite."""
    distance = [0.0] * len(front)
    for axis in (0, 1):
        order = sorted(range(len(front)), key=lambda i: front[i][axis])
        width = front[order[-1]][axis] - front[order[0]][axis]
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, here, after in zip(order, order[1:], order[2:], strict=False):
            distance[here] += (front[after][axis] - front[before][axis]) / width if width else 0.0
    return distance


def _child(rng: random.Random, sizes: Sequence[int], members: list[Genome], order: dict, seen: set[Genome]) -> Genome:
    """A genome that was not seen: uniform crossover of two tournament winners, then mutation of one gene on average."""
    mother, father = (min(rng.choices(members, k=2), key=order.__getitem__) for _ in range(2))
    child = mother
    if rng.random() < CROSSOVER:
        child = tuple(rng.choice(pair) for pair in zip(mother, father, strict=True))
    for _ in range(ATTEMPTS):
        child = _mutate(rng, sizes, child)
        if child not in seen:
            return child
    return _unseen(rng, sizes, seen)


def _mutate(rng: random.Random, sizes: Sequence[int], genome: Genome) -> Genome:
    genes = list(genome)
    for index, size in enumerate(sizes):
        if rng.random() < 1 / len(sizes):
            step = genes[index] + rng.choice((-1, 1)) if rng.random() < STEP else rng.randrange(size)
            genes[index] = min(max(step, 0), size - 1)
    return tuple(genes)


def _unseen(rng: random.Random, sizes: Sequence[int], seen: set[Genome]) -> Genome:
    """A random genome that was not seen; there has to be one."""
    for _ in range(ATTEMPTS):
        genome = tuple(rng.randrange(size) for size in sizes)
        if genome not in seen:
            return genome
    genome = list(genome)  # a nearly exhausted space: count on from here
    while tuple(genome) in seen:
        for index, size in enumerate(sizes):
            genome[index] = (genome[index] + 1) % size
            if genome[index]:
                break
    return tuple(genome)
