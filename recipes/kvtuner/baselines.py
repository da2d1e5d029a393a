"""What a searched table of KV-cache widths is measured against: uniform tables and other rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from recipes.kvtuner.allocation import Group, depth_table, knapsack, ladder, random_table, singles, table_of
from recipes.kvtuner.genetic import Genome, Point
from recipes.kvtuner.tables import FORMATS, CacheFormat, Pair, Table, equivalent_bits, pair_name

RANDOM_TABLES = 5
WIDER = 6.0  # bits: the paper's other budget; what was found within it is reported too
ASIDE = ("unclustered",)  # runs only if it is named: as many evaluations again


def table_names(menu: Sequence[Pair], mode: str) -> list[str]:
    """In the order of the report: uniform tables, those of the other mode, other rules, other finds of the search."""
    uniform = [pair_name(pair) for pair in menu if pair != (16, 16)]
    chosen = ["ladder", "reversed", "depth", "random", "knapsack", "second", f"within-{WIDER:g}"]
    return [*uniform, *_other_mode(mode), *chosen]


def unfit_baselines(names: Sequence[str], mode: str, head_dim: int) -> list[str]:
    """Those of `names` that do not fit the head size: KIVI's groups of 32 do not divide every one."""
    unfit = head_dim % FORMATS[_other(mode)].group(head_dim)
    return [name for name in names if unfit and name in _other_mode(mode)]


def baseline_tables(
    names: Sequence[str],
    table: Table,
    errors: Sequence[dict[Pair, float]],
    candidates: Sequence[tuple[Pair, ...]],
    evaluate: Callable[[Sequence[Table]], list[Point]],
    *,
    form: CacheFormat,
    menu: Sequence[Pair],
    seed: int,
    unclustered: Callable[[list[Group]], Table],
) -> dict[str, list[tuple[Table, CacheFormat]]]:
    """The tables of every named baseline that is not a find of the search: uniform ones, and what other rules give for the
    bits of `table`. unclustered: the search's pick for the groups it is given.
    """
    bits, alone, layers = equivalent_bits(table), singles(candidates), len(table)

    def down_to(steps: list[Genome]) -> Table:
        tables = (table_of(genome, alone) for genome in steps)
        return next((t for t in tables if equivalent_bits(t) <= bits), table_of(steps[-1], alone))

    makers = {pair_name(pair): lambda pair=pair: (pair,) * layers for pair in menu}
    makers |= {
        "ladder": lambda: down_to(ladder(alone, errors)),
        "reversed": lambda: down_to(ladder(alone, errors, reverse=True)),
        "depth": lambda: depth_table(layers, bits),
        "knapsack": lambda: isolated_knapsack(alone, bits, evaluate),
        "unclustered": lambda: unclustered(alone),
    }
    tables = {}
    for name in names:
        if name in makers:
            tables[name] = [(makers[name](), form)]
        elif name == "random":
            tables[name] = [(random_table(candidates, bits, seed + i), form) for i in range(RANDOM_TABLES)]
        elif width := _other_mode(form.mode).get(name):
            tables[name] = [(((width, width),) * layers, FORMATS[_other(form.mode)])]
    return tables


def isolated_knapsack(
    groups: Sequence[Group], bits: float, evaluate: Callable[[Sequence[Table]], list[Point]]
) -> Table:
    """The cheapest sum of losses within `bits`, each loss measured with one group quantised and the rest in 16 bits."""
    layers = sum(len(group.layers) for group in groups)
    tables = [
        tuple(pair if layer in group.layers else (16, 16) for layer in range(layers))
        for group in groups
        for pair in group.candidates
    ]
    losses = iter(evaluate(tables))
    costs = [[next(losses)[0] for _ in group.candidates] for group in groups]
    weights = [[sum(pair) * len(group.layers) for pair in group.candidates] for group in groups]
    capacity = math.floor(2 * bits * layers + 1e-6)  # the mean of integers over layers, taken back
    return table_of(knapsack(costs, weights, capacity), groups)


def _other(mode: str) -> str:
    return next(name for name in FORMATS if name != mode)


def _other_mode(mode: str) -> dict[str, int]:
    """{name: bits} of the uniform tables of the other mode."""
    return {f"{_other(mode).replace('_', '-')}-{bits}": bits for bits in (8, 4, 2)}
