"""The search for a table of KV-cache widths: evaluations kept on file, NSGA-II over groups of layers, and the pick."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.core.state import World, cached_json
from recipes.common.metrics.language import perplexity, run_tasks
from recipes.kvtuner.allocation import (
    Group,
    isolated_losses,
    knapsack_genome,
    ladder,
    table_of,
    uniform_genome,
)
from recipes.kvtuner.baselines import BUDGETS
from recipes.kvtuner.genetic import Point, nsga2, pareto_front
from recipes.kvtuner.simulation import block_inputs, first_divergence, log_probabilities, mean_kl, quantised_cache
from recipes.kvtuner.tables import CacheFormat, Pair, Table, equivalent_bits, pair_bits, parse_table, table_text
from zoo.errors import UserError

PATIENCE = 60  # evaluations without gain of hypervolume before the search stops
SHIPPED = 2  # tables per budget that go to held-out text (step 6)
Archive = dict[Table, Point]  # every table evaluated, in order, with its (loss, bits)


class Evaluations:
    """Losses of tables under one objective, kept in `folder` by table, so that a killed search continues where it was.

    The tables of one call are split over the processes; afterwards each of them knows all results. `seconds`: what each
    table took. Raises: UserError for an objective that is no finite number.
    """

    def __init__(
        self, model: nn.Module, form: CacheFormat, objective: Callable[[Table], float], folder: Path, processes: World
    ):
        self.model, self.form, self.objective = model, form, objective
        self.folder, self.processes = folder, processes
        self.known: dict[Table, float] = {}
        self.seconds: dict[Table, float] = {}
        self.read()

    def read(self) -> None:
        """Takes over all results on file; a last line that a kill cut off is left out.

        No process goes on, and writes more, before all have read: they split the next tables by what is known.
        """
        self.processes.barrier()
        for path in sorted(self.folder.glob("evaluations-*.jsonl")):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    row = json.loads(line)
                    table = parse_table(row["table"])
                    self.known[table], self.seconds[table] = row["loss"], row["seconds"]
        self.processes.barrier()

    def __call__(self, tables: Sequence[Table]) -> list[Point]:
        """[(loss, bits)] of the tables, in order."""
        todo = [table for table in dict.fromkeys(tables) if table not in self.known]
        mine = todo[self.processes.rank :: self.processes.size]
        path = self.folder / f"evaluations-{self.processes.rank}.jsonl"
        begin = time.perf_counter()
        drop_torn_line(path)
        with path.open("a") as stream:
            for table in tqdm(mine, desc="tables", unit="table", leave=False):
                start = time.perf_counter()
                with quantised_cache(self.model, table, self.form):
                    loss = float(self.objective(table))
                if not math.isfinite(loss):
                    raise UserError(
                        f"--objective: it is {loss} with the table {table_text(table)}, a number is needed."
                    )
                row = {"table": table_text(table), "loss": loss, "seconds": time.perf_counter() - start}
                stream.write(json.dumps(row) + "\n")
                stream.flush()
        self.read()
        points = [(self.known[table], equivalent_bits(table)) for table in tables]
        if mine and self.processes.rank == 0:
            (loss, bits), seconds = min(points), time.perf_counter() - begin
            print(
                f"tables {len(self.known)}  new {len(todo)}  best of them {loss:.4g} at {bits:.2f} bits  {seconds:.0f} s",
                flush=True,
            )
        return points


def drop_torn_line(path: Path) -> None:
    """Cuts off what a kill left of the last line, so that the next one starts afresh."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def check_objective(name: str) -> Callable | None:
    """The function that 'module:function' names; None for kl, ppl and gsm8k."""
    if name in ("kl", "ppl", "gsm8k"):
        return None
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"--objective {name}: kl, ppl, gsm8k or module:function is needed.")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--objective {name}: there is no such function ({error}).") from None


def make_objective(name: str, model: nn.Module, tokenizer, windows: Tensor) -> Callable[[Table], float]:
    """What the search lowers, for the model as it is when called, with the table that it has then; windows (N, T) are
    searched on. The blocks before the first one that is quantised are not computed again for the KL.
    """
    if name == "kl":
        divergence = partial(mean_kl, model, windows, log_probabilities(model, windows), block_inputs(model, windows))
        return lambda table: divergence(min(first_quantised(table), len(table) - 1))
    if name == "ppl":
        return lambda _: perplexity(model, windows)["value"]
    if name == "gsm8k":
        score = "exact_match-flexible-extract/gsm8k_cot"
        return lambda _: 1 - run_tasks(model, tokenizer, ["gsm8k_cot"], len(windows))[score]["value"]
    return lambda _: check_objective(name)(model, tokenizer)


def first_quantised(table: Table) -> int:
    """The first layer that is not left in 16 bits; the number of layers if there is none."""
    return next((layer for layer, pair in enumerate(table) if pair != (16, 16)), len(table))


def search(
    groups: Sequence[Group],
    errors: Sequence[dict[Pair, float]],
    evaluate: Callable[[Sequence[Table]], list[Point]],
    *,
    menu: Sequence[Pair],
    max_bits: float,
    evals: int,
    population: int,
    seed: int,
    isolated: bool,
) -> Archive:
    """Step 5: the uniform tables of the menu, then NSGA-II over one choice per group, `evals` tables in all.

    The first population: what comes nearest to the uniform tables, and the steps of the greedy ladder nearest to
    `max_bits`; with `isolated` before them the knapsack's tables at `max_bits` and at the other `BUDGETS`, from the
    loss of every group alone, which takes more evaluations, of tables that are no candidates. errors: e_o, one dict
    per layer.
    """
    layers = sum(len(group.layers) for group in groups)
    uniform = [(pair,) * layers for pair in menu]
    archive = dict(zip(uniform, evaluate(uniform), strict=True))
    steps = sorted(ladder(groups, errors), key=lambda g: abs(equivalent_bits(table_of(g, groups)) - max_bits))
    seeds = [uniform_genome(pair, groups) for pair in menu] + steps
    if isolated:
        losses, lowest = isolated_losses(groups, evaluate), min(map(pair_bits, menu))
        budgets = [max_bits, *(budget for budget in BUDGETS if budget >= lowest)]
        seeds = [knapsack_genome(groups, losses, budget) for budget in budgets] + seeds
    found = nsga2(
        [len(group.candidates) for group in groups],
        lambda genomes: evaluate([table_of(genome, groups) for genome in genomes]),
        seeds=seeds,
        budget=evals - len(uniform),
        population=population,
        limit=max_bits,
        reference=(max(loss for loss, _ in archive.values()), max_bits + 1),
        seed=seed,
        patience=PATIENCE,
    )
    return archive | {table_of(genome, groups): point for genome, point in found.items()}


def best(archive: Archive, limit: float) -> list[Table]:
    """The `SHIPPED` tables of least loss on the front within `limit` bits."""
    tables = [table for table, (_, bits) in archive.items() if bits <= limit]
    kept = pareto_front([archive[table] for table in tables])
    return sorted((tables[i] for i in kept), key=archive.__getitem__)[:SHIPPED]


def best_uniform(archive: Archive, limit: float) -> list[Table]:
    """The uniform table of least loss within `limit` bits; none if all have more."""
    tables = [table for table, (_, bits) in archive.items() if bits <= limit and len(set(table)) == 1]
    return sorted(tables, key=archive.__getitem__)[:1]


def front(archive: Archive) -> list[dict]:
    """The tables that no other beats in bits and loss, by rising bits."""
    tables = list(archive)
    rows = [tables[i] for i in pareto_front(list(archive.values()))]
    return [{"bits": archive[t][1], "loss": archive[t][0], "layers": [list(pair) for pair in t]} for t in rows]


def held_out_scores(
    model: nn.Module, form: CacheFormat, tables: set[Table], windows: Tensor, sequences: Tensor, prompt: int, path: Path
) -> dict[Table, tuple]:
    """What orders the picks, the smaller the better: KL on windows that were not searched on, to two digits; between
    equals how long greedy decoding stays with the 16-bit model's answers (`first_divergence`); then bits; last the whole
    KL. Kept at `path`.
    """

    def make() -> dict:
        reference, found = log_probabilities(model, windows), {}
        for table in sorted(tables):
            with quantised_cache(model, table, form):
                found[table] = {"kl": mean_kl(model, windows, reference), "steps": 0}
        shown = [f"{row['kl']:.1e}" for row in found.values()]
        for table, row in found.items():
            if shown.count(f"{row['kl']:.1e}") > 1:
                with quantised_cache(model, table, form):
                    row["steps"] = first_divergence(model, sequences, prompt)
        return {table_text(table): row for table, row in found.items()}

    found = cached_json(path, make)
    rows = {table: found[table_text(table)] for table in tables}
    return {
        table: (float(f"{row['kl']:.1e}"), -row["steps"], equivalent_bits(table), row["kl"])
        for table, row in rows.items()
    }
