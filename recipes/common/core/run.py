"""The one run: begin, produce for each seed, write, measure, speed, report, exports, swap, publish."""

from __future__ import annotations

import json
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
    OVERWRITES,
    PLACING,
    World,
    cached_json,
    check_device,
    check_resources,
    discard,
    is_there,
    names_in,
    open_state,
    refuse_existing,
    world,
    write_text,
)
from recipes.common.metrics.fidelity import Reference
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

    def measure(
        self, key: str, opened: Callable[[], AbstractContextManager[nn.Module]], *, seed: int | None = None, **options
    ) -> dict[str, dict]:
        """The metrics of a model, measured once; `key` names it. seed: the dense model that it is compared with is that
        seed's (default: the first's). options: of the domain's `metrics`.
        """

        def make() -> dict:
            reference = self.reference(seed)  # before the model is opened, which may change the dense one for a while
            print(f"measuring {key}", flush=True)
            with opened() as model:
                return self.domain.metrics(model, reference, **options)

        return self.once(f"measured/{key}", make)

    def measure_dense(self, seed: int) -> dict[str, dict]:
        """The metrics of a seed's dense model, measured once; what it predicts stays for others to be compared with."""

        def make() -> dict:
            print(f"measuring dense-{seed}", flush=True)
            with self.recipe.open(self, "dense", seed) as model:
                return self.domain.metrics(model, Reference(self.state / "predictions" / str(seed), writing=True))

        return self.once(f"measured/dense-{seed}", make)

    def reference(self, seed: int | None = None) -> Reference:
        """What the dense model of a seed predicts."""
        seed = seed if seed in self.recipe.dense_seeds(self) else self.seeds[0]
        self.measure_dense(seed)
        return Reference(self.state / "predictions" / str(seed))

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
    if recipe.dry_run:
        recipe.show_plan(run)
        return None
    made = is_made(recipe)  # killed, or refused by the Hub, after all the work
    run.processes.barrier()  # all have looked before the first one moves anything
    if not made:
        for seed in run.seeds:
            recipe.produce(run, seed)
    if run.processes.rank == 0:
        if not made:
            finish(run)
        put_into_place(recipe)
    return recipe.output_path


def begin(recipe: Recipe) -> Run:
    """Every refusal, then the state folder."""
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
        *beside, output = places(recipe).values()
        modes = {"resume": recipe.resume, "overwrite": recipe.overwrite}
        refuse_existing(output, recipe.state_path, beside, **modes)
    torch.manual_seed(recipe.seed)
    processes = world(recipe.device)
    run = recipe.run_type(recipe, recipe.domain(), processes)
    run.domain.check()
    recipe.check_base(run)
    if processes.rank == 0 and not recipe.dry_run:
        ram, disk, minutes = recipe.needs(run)
        check_resources(ram, disk + run.domain.prediction_bytes, minutes, recipe.output_path.absolute())
        run.domain.check_weights()
        overwrites = list(places(recipe).values()) if recipe.overwrite else []
        open_state(run.state, recipe.settings(), run.domain.pins(), resume=recipe.resume, overwrites=overwrites)
    processes.barrier()
    return run


def finish(run: Run) -> None:
    """From what was produced to all that the run leaves, finished in the state folder; the last file there says so."""
    recipe, folder = run.recipe, run.checkpoint(run.seeds[0])
    measured = {variant: recipe.measure(run, variant) for variant in recipe.variants(run)}
    raw = reports.raw_values(measured)
    dense, own = measured.pop("dense"), measured.pop(recipe.method)
    speed = run.once("measured/speed", lambda: recipe.speed(run, folder))
    report = reports.build(
        recipe=recipe,
        base_model=recipe.base_row(run),
        data=run.domain.data_rows(dense[0]),
        dense=dense,
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
    reports.write(report, folder, raw)
    print(reports.render_table(report))
    for ending, write in recipe.beside().items():
        made = made_beside(recipe, ending)
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            write(run, made)
    for leftover in folder.rglob(".*.part"):  # of a run that was killed while it wrote
        leftover.unlink()
    write_text(run.state / PLACING, json.dumps([place.name for place in places(recipe).values()]))


def places(recipe: Recipe) -> dict[Path, Path]:
    """{what a run makes in its state folder: its place}, the output last."""
    found = {made_beside(recipe, ending): named(recipe, ending) for ending in recipe.beside()}
    return found | {recipe.state_path / f"checkpoint-{recipe.seed}": recipe.output_path}


def named(recipe: Recipe, ending: str) -> Path:
    """The place of what a run leaves beside its output."""
    return recipe.output_path.with_name(recipe.output_path.name + ending)


def made_beside(recipe: Recipe, ending: str) -> Path:
    return recipe.state_path / "beside" / f"output{ending}"


def is_made(recipe: Recipe) -> bool:
    """Whether a resumed run had all of this finished already, and some of it perhaps in its place."""
    wanted = places(recipe)
    finished = names_in(recipe.state_path / PLACING) == [place.name for place in wanted.values()]
    return finished and all(made.exists() or place.exists() for made, place in wanted.items())


def put_into_place(recipe: Recipe) -> None:
    """Moves what is finished to its place, publishes it, and only then forgets how it was made: a kill or a failed
    upload is finished by --resume.
    """
    for made, place in places(recipe).items():
        if made.exists():
            if is_there(place) and place.name not in names_in(recipe.state_path / OVERWRITES):
                raise UserError(f"{place}: it appeared while the run worked; move it away and pass --resume.")
            discard(place)
            made.replace(place)
    if recipe.push_to_hub:
        print(publish(recipe.output_path, recipe.push_to_hub))
    discard(recipe.state_path)
