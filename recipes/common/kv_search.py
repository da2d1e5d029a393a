"""The search for a table of KV-cache widths: evaluations kept on file, NSGA-II over groups of layers, and the pick."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.kv_allocation import Group, knapsack, ladder, table_of, uniform_genome
from recipes.common.kv_simulation import first_divergence, log_probabilities, mean_kl, quantised_cache
from recipes.common.kv_tables import CacheFormat, Pair, Table, equivalent_bits, parse_table, table_text
from recipes.common.nsga2 import Point, nsga2, pareto_front
from recipes.common.runner import World, cached_json

PATIENCE = 60  # evaluations without gain of hypervolume before the search stops (section 3.5)
SHIPPED = 2  # tables per budget (section 3.5)
Archive = dict[Table, Point]  # every table evaluated, in order, with its (loss, bits)


class Evaluations:
    """Losses of tables under one objective, kept in `folder` by table, so that a killed search continues where it was.

    The tables of one call are split over the processes; afterwards each of them knows all results.
    """

    def __init__(
        self, model: nn.Module, form: CacheFormat, objective: Callable[[], float], folder: Path, processes: World
    ):
        self.model, self.form, self.objective = model, form, objective
        self.folder, self.processes = folder, processes
        self.known = self.read()

    def read(self) -> dict[Table, float]:
        """All results on file; a last line that a kill cut off is left out."""
        known = {}
        for path in sorted(self.folder.glob("evaluations-*.jsonl")):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    row = json.loads(line)
                    known[parse_table(row["table"])] = row["loss"]
        return known

    def __call__(self, tables: Sequence[Table]) -> list[Point]:
        """[(loss, bits)] of the tables, in order."""
        todo = [table for table in dict.fromkeys(tables) if table not in self.known]
        mine = todo[self.processes.rank :: self.processes.size]
        path = self.folder / f"evaluations-{self.processes.rank}.jsonl"
        begin = time.perf_counter()
        drop_torn_line(path)
        with path.open("a") as stream:
            for table in tqdm(mine, desc="tables", unit="table", leave=False):
                with quantised_cache(self.model, table, self.form):
                    self.known[table] = self.objective()
                stream.write(json.dumps({"table": table_text(table), "loss": self.known[table]}) + "\n")
                stream.flush()
        self.processes.barrier()
        if self.processes.size > 1:
            self.known |= self.read()
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
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])


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
) -> Archive:
    """Section 3.5: the uniform tables of the menu, then NSGA-II over one choice per group, `evals` tables in all.

    The first population: what comes nearest to the uniform tables, and the steps of the greedy ladder nearest to
    `max_bits`. errors: e_o, one dict per layer.
    """
    layers = sum(len(group.layers) for group in groups)
    uniform = [(pair,) * layers for pair in menu]
    archive = dict(zip(uniform, evaluate(uniform), strict=True))
    steps = sorted(ladder(groups, errors), key=lambda g: abs(equivalent_bits(table_of(g, groups)) - max_bits))
    found = nsga2(
        [len(group.candidates) for group in groups],
        lambda genomes: evaluate([table_of(genome, groups) for genome in genomes]),
        seeds=[uniform_genome(pair, groups) for pair in menu] + steps,
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


def front(archive: Archive) -> list[dict]:
    """The tables that no other beats in bits and loss, by rising bits."""
    tables = list(archive)
    rows = [tables[i] for i in pareto_front(list(archive.values()))]
    return [{"bits": archive[t][1], "loss": archive[t][0], "layers": [list(pair) for pair in t]} for t in rows]


def held_out_scores(
    model: nn.Module, form: CacheFormat, tables: set[Table], windows: Tensor, sequences: Tensor, prompt: int, path: Path
) -> dict[Table, tuple]:
    """What orders the picks, the smaller the better: KL on windows that were not searched on, to two digits; then how
    long greedy decoding stays with the 16-bit model's answers (`first_divergence`); then bits. Kept at `path`.
    """

    def make() -> dict:
        reference, found = log_probabilities(model, windows), {}
        for table in sorted(tables):
            with quantised_cache(model, table, form):
                steps = first_divergence(model, sequences, prompt)
                found[table_text(table)] = {"kl": mean_kl(model, windows, reference), "steps": steps}
        return found

    found = cached_json(path, make)
    rows = {table: found[table_text(table)] for table in tables}
    return {table: (float(f"{row['kl']:.1e}"), -row["steps"], equivalent_bits(table)) for table, row in rows.items()}


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
    return table_of(knapsack(costs, weights, int(2 * bits * layers)), groups)
