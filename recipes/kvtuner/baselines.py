"""What a searched table of KV-cache widths is measured against: uniform tables and other rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recipes.kvtuner.allocation import (
    depth_table,
    isolated_losses,
    knapsack_genome,
    ladder,
    random_table,
    singles,
    table_of,
)
from recipes.kvtuner.genetic import Genome, Point
from recipes.kvtuner.tables import FORMATS, CacheFormat, Pair, Table, equivalent_bits, pair_name

RANDOM_TABLES = 3
BUDGETS = (3.0, 3.25, 3.5, 4.0, 6.0)  # bits: where uniform tables are far apart, and the paper's two
ASIDE = {True: "unclustered", False: "clustered"}  # by --cluster: the other search; only if named: as many tables again


def wider(bits: float) -> float:
    """The paper's next budget above `bits`; what was found within it is reported too."""
    return next((budget for budget in BUDGETS if budget >= 4 and budget > bits), bits)


def table_names(menu: Sequence[Pair], mode: str, max_bits: float) -> list[str]:
    """In the order of the report: uniform tables, those of the other mode, other rules, other finds of the search."""
    uniform = [pair_name(pair) for pair in menu if pair != (16, 16)]
    chosen = ["ladder", "reversed", "depth", "random", "knapsack", "second", f"within-{wider(max_bits):g}"]
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
    other_search: Callable[[], Table],
) -> dict[str, list[tuple[Table, CacheFormat]]]:
    """The tables of every named baseline that is not a find of the search: uniform ones, and what other rules give for the
    bits of `table`. other_search: the pick of the search with groups where the own one has none, or without.
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
        "knapsack": lambda: table_of(knapsack_genome(alone, isolated_losses(alone, evaluate), bits), alone),
        **dict.fromkeys(ASIDE.values(), other_search),
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


def _other(mode: str) -> str:
    return next(name for name in FORMATS if name != mode)


def _other_mode(mode: str) -> dict[str, int]:
    """{name: bits} of the uniform tables of the other mode."""
    return {f"{_other(mode).replace('_', '-')}-{bits}": bits for bits in (8, 4, 2)}
