"""The search for a table of KV-cache widths: evaluations kept on file, NSGA-II over groups of layers, and the pick."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.core.state import World, cached_json
from recipes.common.metrics.language import perplexity, run_tasks
from recipes.kvtuner.allocation import Group, ladder, table_of, uniform_genome
from recipes.kvtuner.genetic import Point, nsga2, pareto_front
from recipes.kvtuner.simulation import first_divergence, log_probabilities, mean_kl, quantised_cache
from recipes.kvtuner.tables import CacheFormat, Pair, Table, equivalent_bits, parse_table, table_text
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
        self, model: nn.Module, form: CacheFormat, objective: Callable[[], float], folder: Path, processes: World
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
                    loss = float(self.objective())
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
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])


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


def make_objective(name: str, model: nn.Module, tokenizer, windows: Tensor) -> Callable[[], float]:
    """What the search lowers, for the model as it is when called; windows (N, T) are searched on."""
    if name == "kl":
        return partial(mean_kl, model, windows, log_probabilities(model, windows))
    if name == "ppl":
        return lambda: perplexity(model, windows)["value"]
    if name == "gsm8k":
        score = "exact_match-flexible-extract/gsm8k_cot"
        return lambda: 1 - run_tasks(model, tokenizer, ["gsm8k_cot"], len(windows))[score]["value"]
    return partial(check_objective(name), model, tokenizer)


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
    """Step 5: the uniform tables of the menu, then NSGA-II over one choice per group, `evals` tables in all.

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
