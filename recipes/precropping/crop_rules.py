"""Which widths a network should have: SynExp's optimum, and the square-root rule for densities from elsewhere.

p_l is the fraction of layer l's weights that stays, d_g the fraction of group g's channels; log p = A log d with the
incidence A of the width graph.
"""

from __future__ import annotations

import math

import numpy as np

from recipes.common.parts.width_fit import Budget, geometric_program
from recipes.common.parts.width_graph import LayerCost, WidthGraph

COLLAPSED = 0.05  # a projection below this density is bypassed by its branch and says nothing about its trunks
RULES = ("geomean", "producer", "ls")


def synexp_weights(graph: WidthGraph, budget: Budget, most: float = 1.0) -> dict[str, float]:
    """{layer: p_l}, the weight-level optimum: argmax sum_l log p_l, sum_l alpha_l p_l <= B_P, sum_l beta_l p_l <= B_F.

    p_l = min(most, 1 / (mu alpha_l + nu beta_l)). With one budget every layer that is not full keeps equally many
    weights (or MACs); with two, the ratio of mu and nu is bisected.
    """
    alpha, beta = graph.params, graph.macs
    full = np.full(len(alpha), most)

    def only(price: np.ndarray, cost: np.ndarray, limit: float | None) -> np.ndarray:
        return full if limit is None else _water_filling(price, cost, limit, most)

    by_params, by_macs = only(alpha, alpha, budget.params), only(beta, beta, budget.macs)
    fits_macs = budget.macs is None or beta @ by_params <= budget.macs * (1 + 1e-12)
    fits_params = budget.params is None or alpha @ by_macs <= budget.params * (1 + 1e-12)
    if budget.params is not None and fits_macs:
        p = by_params
    elif budget.macs is not None and fits_params:
        p = by_macs
    else:
        low, high = 0.0, 1.0
        for _ in range(200):
            share = (low + high) / 2
            p = only(share * alpha / budget.params + (1 - share) * beta / budget.macs, alpha, budget.params)
            low, high = (low, share) if beta @ p > budget.macs else (share, high)
    return {layer.name: float(value) for layer, value in zip(graph.layers, p, strict=True)}


def _water_filling(price: np.ndarray, cost: np.ndarray, limit: float, most: float) -> np.ndarray:
    """p_l = min(most, level / price_l) with sum_l cost_l p_l = limit: layers fill up from the cheapest on."""
    order = np.argsort(price, kind="stable")
    for full in range(len(order) + 1):
        rest = order[full:]
        left = limit - most * cost[order[:full]].sum()
        level = left / (cost[rest] / price[rest]).sum() if len(rest) else 0.0
        if not len(rest) or level <= most * price[rest[0]]:
            break
    p = np.full(len(price), most)
    p[rest] = level / price[rest]
    return p


def synexp_channels(
    graph: WidthGraph, budget: Budget, limits: dict[str, tuple[int, int]], keep_trunk: bool = False
) -> dict[str, float]:
    """{group: log d_g}, the channel-level optimum: argmax sum_l log p_l = sum_g n_g u_g under the same budgets.

    u_g = log d_g within limits; n_g counts the layers that group g touches; log sum_l alpha_l exp(A_l u) <= log B is
    convex. With `keep_trunk` the trunks keep their base widths and have no entry.
    """
    free = [
        i
        for i, group in enumerate(graph.groups)
        if not (keep_trunk and group in graph.trunks) and limits[group][0] < limits[group][1]
    ]
    groups = [graph.groups[i] for i in free]
    pinned = {} if keep_trunk else dict.fromkeys(graph.trunks - set(groups), 0.0)
    if not free:
        return pinned
    lower, upper = (
        np.array([math.log(limits[group][side] / graph.widths[group]) for group in groups]) for side in (0, 1)
    )
    a = graph.incidence[:, free]
    costs = ((graph.params, budget.params), (graph.macs, budget.macs))
    u = geometric_program(a.sum(0), a, [(c, b) for c, b in costs if b is not None], lower, upper)
    return pinned | dict(zip(groups, u.tolist(), strict=True))


def crop_wish(
    graph: WidthGraph, p: dict[str, float], rule: str = "geomean", keep_trunk: bool = False
) -> dict[str, float]:
    """{group: log d_g} from densities p_l: p = d^2 when both sides keep the same fraction, so d is a root of p.

    geomean: the mean of log p_l / 2 over all layers that touch the group (of log p_l where the group is both sides, as
    in depth-wise layers). producer: over the layers that write the group only. ls: least squares of
    A log d = log p. With `keep_trunk` only groups inside blocks get an entry, log p_l without the root, since only one
    side of their layers shrinks. Projections below COLLAPSED are left out.
    """
    used = [layer for layer in graph.layers if not (layer.parallel and p[layer.name] < COLLAPSED)]
    log_p = {layer.name: math.log(max(p[layer.name], 1 / layer.params)) for layer in used}
    groups = [group for group in graph.groups if not (keep_trunk and group in graph.trunks)]
    if rule == "ls" and not keep_trunk:
        rows = [i for i, layer in enumerate(graph.layers) if layer in used]
        found = np.linalg.lstsq(graph.incidence[rows], [log_p[layer.name] for layer in used], rcond=None)[0]
        return dict(zip(groups, found.tolist(), strict=True))

    def votes(group: str) -> list[float]:
        return [
            log_p[layer.name] * (1.0 if keep_trunk or _is_depthwise(layer) else 0.5)
            for layer in used
            if group in layer.groups and (rule != "producer" or layer.target == group)
        ]

    return {group: float(np.mean(votes(group))) for group in groups}


def _is_depthwise(layer: LayerCost) -> bool:
    return layer.source == layer.target
