"""From a wish for widths to whole numbers that meet budgets: a small convex program, and rounding with repair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recipes.common.parts.width_graph import WidthGraph
from zoo.errors import UserError

GAP = 1e-10  # of the objective to its optimum, at most
ARMIJO, SHRINK = 0.25, 0.5  # of the line search


@dataclass(frozen=True)
class Budget:
    """At most this many weights and this many MACs per image; None = no limit."""

    params: float | None
    macs: float | None

    def holds(self, cost: tuple[float, float]) -> bool:
        return all(limit is None or value <= limit for value, limit in zip(cost, (self.params, self.macs), strict=True))

    def excess(self, cost: tuple[float, float]) -> np.ndarray:
        """(2,) fraction of each limit by which the cost is over it; negative where there is room, 0 without limit."""
        limits = (self.params, self.macs)
        return np.array([0.0 if b is None else c / b - 1 for c, b in zip(cost, limits, strict=True)])


def geometric_program(
    gain: np.ndarray,
    exponents: np.ndarray,
    constraints: list[tuple[np.ndarray, float]],
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """argmax over u of gain @ u subject to log(sum_l c_l exp(exponents_l @ u)) <= log(b) for each (c, b), and bounds.

    Convex; solved by Newton's method on the logarithmic barrier, to within GAP of the optimum.

    Args:
        gain: (n,), not negative.
        exponents: (m, n). constraints: (c of shape (m,), b) each. lower, upper: (n,), lower < upper.
    Returns: (n,). A point at `lower` has to fit every constraint.
    """

    def values(u):
        terms = [c * np.exp(exponents @ u) / b for c, b in constraints]
        return [math.log(term.sum()) for term in terms], [term / term.sum() for term in terms]

    if max(values(upper)[0]) <= 0:
        return upper.copy()
    share = 0.5
    while max(values(lower + share * (upper - lower))[0]) >= 0:
        share *= SHRINK
    u = lower + share * (upper - lower)

    def barrier(u, t):
        slack = [-g for g in values(u)[0]] + list(u - lower) + list(upper - u)
        return math.inf if min(slack) <= 0 else -t * (gain @ u) - np.log(slack).sum()

    t, final = 1.0, (len(constraints) + 2 * len(u)) / GAP
    while True:
        for _ in range(100):
            gradient = -t * gain - 1 / (u - lower) + 1 / (upper - u)
            hessian = np.diag(1 / (u - lower) ** 2 + 1 / (upper - u) ** 2)
            for g, weights in zip(*values(u), strict=True):
                slope = exponents.T @ weights
                gradient += slope / -g
                curve = (exponents.T * weights) @ exponents - np.outer(slope, slope)
                hessian += curve / -g + np.outer(slope, slope) / g**2
            step = -np.linalg.solve(hessian, gradient)
            decrement = -(gradient @ step)
            if decrement < 1e-10:
                break
            size, now = 1.0, barrier(u, t)
            while barrier(u + size * step, t) > now - ARMIJO * size * decrement and size > 1e-12:
                size *= SHRINK
            if size <= 1e-12:  # rounding, not the function, decides from here on
                break
            u = u + size * step
        if t >= final:
            return u
        t = min(10 * t, final)


def width_limits(
    graph: WidthGraph, *, multiple: int, min_width: int, min_ratio: float, max_ratio: float = 1.0
) -> dict[str, tuple[int, int]]:
    """{group: (smallest, largest width)}; both are multiples, but for a base width that is none and stays reachable.

    Trunks never grow beyond their base: wide trunks between thin insides are what the objective likes best and
    training least.
    """
    limits = {}
    for group, base in graph.widths.items():
        low = multiple * math.ceil(max(min_width, min_ratio * base) / multiple)
        high = base if group in graph.trunks else max(base, multiple * math.floor(max_ratio * base / multiple))
        limits[group] = (min(low, base), high)
    return limits


def fit_widths(
    graph: WidthGraph,
    log_fractions: dict[str, float],
    budget: Budget,
    limits: dict[str, tuple[int, int]],
    *,
    multiple: int = 1,
    shift: bool = False,
) -> dict[str, int]:
    """Whole widths near exp(log_fraction) of the base ones that use the budget up and do not pass it.

    Rounded to multiples; then, while a budget is passed, the group shrinks by one step that loses least of
    sum_l log p_l per unit saved of what is over; then the group grows that gains most per unit spent, as long as one
    fits. Of equals the first group. Groups without a log_fraction stay at their base width.

    Args:
        shift: add one number to all log_fractions first, such that the budget is just met before rounding.
    Raises: UserError naming the floor if even the smallest widths pass the budget.
    """
    bounds = {group: limits[group] for group in graph.groups if group in log_fractions}
    check_floor(graph, budget, bounds)
    wish = _shifted(graph, log_fractions, budget, bounds) if shift else log_fractions
    widths = dict(graph.widths)
    for group, (low, high) in bounds.items():
        steps = math.exp(wish[group]) * graph.widths[group] / multiple
        widths[group] = min(max(multiple * round(steps), low), high)
    incidence = dict(zip(graph.groups, graph.incidence.sum(0), strict=True))

    def moves(direction: int):
        for group in bounds:
            moved = widths | {group: _step(widths[group], direction, multiple, bounds[group])}
            if moved[group] != widths[group]:
                change = abs(incidence[group] * math.log(moved[group] / widths[group]))
                yield group, moved[group], change, graph.cost(moved)

    while not budget.holds(now := graph.cost(widths)):
        over = budget.excess(now).clip(0)

        def loss_per_saving(move, over=over):
            _, _, change, cost = move
            return change / max((over - budget.excess(cost).clip(0)).sum(), 1e-300)

        group, width, *_ = min(moves(-1), key=loss_per_saving)
        widths[group] = width
    while True:
        now = budget.excess(graph.cost(widths))
        fitting = [move for move in moves(1) if budget.holds(move[3])]
        if not fitting:
            return widths
        group, width, *_ = max(fitting, key=lambda move: move[2] / max((budget.excess(move[3]) - now).sum(), 1e-300))
        widths[group] = width


def check_floor(graph: WidthGraph, budget: Budget, limits: dict[str, tuple[int, int]]) -> None:
    """Raises: UserError naming what is least if even the smallest widths pass the budget."""
    params, macs = graph.cost(graph.widths | {group: low for group, (low, _) in limits.items()})
    if not budget.holds((params, macs)):
        raise UserError(
            f"--budget_params, --budget_flops: even the smallest widths need {params:,} weights and {macs:,} MACs, which"
            " is more; raise the budget, or lower --min_width, --min_ratio or --width_multiple."
        )


def _step(width: int, direction: int, multiple: int, bounds: tuple[int, int]) -> int:
    """The next multiple below or above, within bounds."""
    down, up = multiple * math.ceil(width / multiple) - multiple, multiple * math.floor(width / multiple) + multiple
    return min(max(up if direction > 0 else down, bounds[0]), bounds[1])


def _shifted(
    graph: WidthGraph, wish: dict[str, float], budget: Budget, limits: dict[str, tuple[int, int]]
) -> dict[str, float]:
    """wish + delta within limits, with the largest delta whose cost, at fractional widths, is within the budget."""
    logs = {group: [math.log(width / graph.widths[group]) for width in limits[group]] for group in wish}

    def moved(delta: float) -> dict[str, float]:
        return {group: min(max(value + delta, logs[group][0]), logs[group][1]) for group, value in wish.items()}

    def fits(delta: float) -> bool:
        log_d = moved(delta)
        p = np.exp(graph.incidence @ [log_d.get(group, 0.0) for group in graph.groups])
        return budget.holds((float(graph.params @ p), float(graph.macs @ p)))

    low, high = -50.0, 50.0
    if fits(high):
        return moved(high)
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return moved(low)
