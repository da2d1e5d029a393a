"""The one run: begin, produce for each seed, write, measure, speed, report, exports, swap, publish."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from recipes.common.core import report as reports
from recipes.common.core.state import (
    World,
    cached_json,
    check_device,
    check_resources,
    open_state,
    placed_by,
    refuse_existing,
    world,
    write_text,
)
from recipes.common.metrics.metric import over_seeds
from zoo.errors import UserError
from zoo.record.card import method_file
from zoo.record.hub import check_target, publish

if TYPE_CHECKING:
    from recipes.common.core.recipe import Recipe
    from recipes.common.domains import Domain


@dataclass
class Run:
    """What the steps of one run share. What they make is kept in the state folder and found there again."""

    recipe: Recipe
    domain: Domain
    processes: World

    @property
    def state(self) -> Path:
        return self.recipe.state_path

    @property
    def seeds(self) -> list[int]:
        return list(range(self.recipe.seed, self.recipe.seed + self.recipe.seeds))

    @property
    def recipe_yaml(self) -> dict[str, str]:
        """The file that reproduces the checkpoint, as `extra_files` of whoever writes one."""
        return {"recipe.yaml": yaml.safe_dump(self.recipe.settings(), sort_keys=False)}

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """The JSON `name` of the state folder, made once, resumed or not."""
        return cached_json(self.state / f"{name}.json", make)

    def measure(self, key: str, opened: Callable[[], AbstractContextManager[nn.Module]], **options) -> dict[str, dict]:
        """The metrics of a model, measured once; `key` names it. options: of the domain's `metrics`."""

        def make() -> dict:
            print(f"measuring {key}", flush=True)
            with opened() as model:
                return self.domain.metrics(model, **options)

        return self.once(f"measured/{key}", make)

    def checkpoint(self, seed: int) -> Path:
        """The finished checkpoint of a seed, written on first use."""
        folder = self.state / f"checkpoint-{seed}"
        if not folder.exists():
            self.recipe.write(self, seed, folder)
        return folder


def execute(recipe: Recipe) -> Path | None:
    """Carries a recipe out. Returns the finished folder, None after a dry run.

    Raises: UserError, before any work, for whatever can be known to be wrong then.
    """
    run = begin(recipe)
    if was_placed(recipe):  # killed between its last move and the end
        clean_up(recipe)
        return recipe.output_path
    if recipe.dry_run:
        recipe.show_plan(run)
        return None
    for seed in run.seeds:
        recipe.produce(run, seed)
    if run.processes.rank == 0:
        finish(run)
    return recipe.output_path


def begin(recipe: Recipe) -> Run:
    """Every refusal, then the state folder."""
    recipe.at_least(seeds=1)
    if not -(2**63) <= recipe.seed < 2**63 - recipe.seeds:
        raise UserError(f"--seed {recipe.seed}: a whole number of 63 bits is needed.")
    check_device(recipe.device)
    recipe.check()
    recipe.chosen_baselines()
    method_file({"recipe": recipe.name, "config": recipe.settings()})  # what the card will say of the method
    for kind in recipe.export:
        if kind not in recipe.exports():
            allowed = f"one of {', '.join(recipe.exports())} is needed" if recipe.exports() else "it has none"
            raise UserError(f"--export {kind}: {recipe.name} cannot write that, {allowed}.")
    if recipe.push_to_hub:
        check_target(recipe.push_to_hub)
    if not recipe.dry_run:
        modes = {"resume": recipe.resume, "overwrite": recipe.overwrite}
        refuse_existing(recipe.output_path, recipe.state_path, [named(recipe, end) for end in recipe.beside()], **modes)
    torch.manual_seed(recipe.seed)
    processes = world(recipe.device)
    run = recipe.run_type(recipe, recipe.domain(), processes)
    run.domain.check()
    recipe.check_base(run)
    if processes.rank == 0 and not recipe.dry_run:
        check_resources(*recipe.needs(run), recipe.output_path.absolute())
        run.domain.check_weights()
        open_state(run.state, recipe.settings(), run.domain.pins(), resume=recipe.resume)
    processes.barrier()
    return run


def finish(run: Run) -> None:
    """From what was produced to the output: it appears whole, and what belongs beside it just before."""
    recipe, folder = run.recipe, run.checkpoint(run.seeds[0])
    measured = {variant: recipe.measure(run, variant) for variant in recipe.variants(run)}
    dense, own = measured.pop("dense"), measured.pop(recipe.method)
    speed = run.once("measured/speed", lambda: recipe.speed(run, folder))
    report = reports.build(
        recipe=recipe,
        base_model=recipe.base_row(run),
        data=run.domain.data_rows(dense[0]),
        dense=over_seeds(dense),
        compressed=own,
        baselines=measured,
        size=recipe.sizes(run, folder),
        speed=speed,
        layers=recipe.layers(run, folder),
        seconds=time.time() - (run.state / "recipe.yaml").stat().st_mtime,  # from the very start, resumed or not
        seeds=run.seeds,
        notes=run.domain.notes,
        findings=recipe.findings(run),
    )
    reports.write(report, folder)
    print(reports.render_table(report))
    beside = recipe.beside()
    for ending, write in beside.items():
        made = run.state / "beside" / f"output{ending}"
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            write(run, made)
    for leftover in folder.glob(".*.part"):  # of a run that was killed while it wrote
        leftover.unlink()
    places = {run.state / "beside" / f"output{ending}": named(recipe, ending) for ending in beside}
    places[folder] = recipe.output_path
    write_text(run.state / "placed.json", json.dumps([str(path) for path in places.values()]))
    for made, place in places.items():
        replace(made, place)
    clean_up(recipe)


def was_placed(recipe: Recipe) -> bool:
    """Whether a resumed run had put everything into place already."""
    placed = str(recipe.output_path) in placed_by(recipe.state_path)
    return placed and recipe.resume and not (recipe.state_path / f"checkpoint-{recipe.seed}").exists()


def clean_up(recipe: Recipe) -> None:
    shutil.rmtree(recipe.state_path)
    if recipe.push_to_hub:
        print(publish(recipe.output_path, recipe.push_to_hub))


def named(recipe: Recipe, ending: str) -> Path:
    """The place of what a run leaves beside its output."""
    return recipe.output_path.with_name(recipe.output_path.name + ending)


def replace(source: Path, target: Path) -> None:
    """Moves a finished file or folder to its place, over what is there."""
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
