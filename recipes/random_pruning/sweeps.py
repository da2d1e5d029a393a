"""Random pruning at other densities and in other networks, and where in a network the weights are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from recipes.common.loops.trained import TrainedRun
from recipes.common.metrics.metric import over_seeds
from recipes.common.parts.densities import RATIOS, mac_ratio
from recipes.random_pruning.networks import live_weights

if TYPE_CHECKING:
    from recipes.random_pruning import RandomPruning


@dataclass(frozen=True)
class Point:
    """A network of a sweep; ratio None is dense."""

    model: str
    ratio: str | None
    density: float

    @property
    def key(self) -> str:
        return f"{self.model.replace('/', '-')}-{self.ratio or 'dense'}-{self.density:g}"


def swept_ratios(recipe: RandomPruning) -> list[str]:
    return list(dict.fromkeys((recipe.ratio, "uniform")))


def other_models(recipe: RandomPruning) -> list[str]:
    return [name for name in recipe.more_models if name not in ("none", recipe.model)]


def sweep_points(recipe: RandomPruning) -> list[Point]:
    """The networks that are trained for the sweeps alone."""
    densities = [density for density in recipe.more_densities if density not in (0, 1, recipe.density)]
    points = [Point(recipe.model, ratio, d) for ratio in swept_ratios(recipe) for d in densities]
    for name in other_models(recipe):
        points += [Point(name, None, 1.0), Point(name, recipe.ratio, recipe.density)]
    return points


def train_point(recipe: RandomPruning, run: TrainedRun, point: Point, seed: int) -> PreTrainedModel:
    """The trained network of a point, on every process; made once."""
    model = recipe.fresh(run, seed, point.model)
    if point.ratio is None:
        return run.train(model, point.key, seed)
    counts = recipe.kept(run, model, point.ratio, point.density, seed, point.key)["counts"]
    return recipe.train_masked(run, model, recipe.masks(recipe.prunable(model), counts, seed), point.key, seed)


def accuracy(recipe: RandomPruning, run: TrainedRun, what: str | Point) -> dict[str, dict]:
    """{"accuracy": M over the seeds} of a variant or of a point of a sweep."""
    point = isinstance(what, Point)
    key, make = (what.key, partial(train_point, recipe, run, what)) if point else (what, partial(run.trained, what))
    found = [
        run.measure(f"accuracy-{key}-{seed}", lambda seed=seed: nullcontext(make(seed)), seed=seed, which=["accuracy"])
        for seed in run.seeds
    ]
    return {"accuracy": over_seeds(found)["accuracy"]}


def sweeps(recipe: RandomPruning, run: TrainedRun) -> dict:
    """`sweeps` of the report: the rules by density, and dense and pruned networks by their size."""
    found, series = {}, by_density(recipe, run)
    if len(series[recipe.ratio]) > 2:
        found["Accuracy by density"] = {"x": "fraction of the weights kept", "log": True, "series": series}
    if other_models(recipe):
        series = by_network(recipe, run)
        found["Accuracy by size of the network"] = {"x": "weights of the dense network", "log": True, "series": series}
    return found


def by_density(recipe: RandomPruning, run: TrainedRun) -> dict[str, list[dict]]:
    """{ratio: points by density} on --model, from the sparsest to dense."""
    dense = {"x": 1.0, "metrics": accuracy(recipe, run, "dense")}
    series: dict[str, list[dict]] = {ratio: [dense] for ratio in swept_ratios(recipe)}
    for point in sweep_points(recipe):
        if point.model == recipe.model:
            series[point.ratio].append({"x": point.density, "metrics": accuracy(recipe, run, point)})
    for ratio, points in series.items():
        variant = recipe.method if ratio == recipe.ratio else ratio
        if variant in recipe.variants(run) and recipe.density < 1:
            points.append({"x": recipe.density, "metrics": accuracy(recipe, run, variant)})
        points.sort(key=lambda point: point["x"])
    return series


def by_network(recipe: RandomPruning, run: TrainedRun) -> dict[str, list[dict]]:
    """Dense and pruned networks, by the number of weights of the dense one."""
    series: dict[str, list[dict]] = {"dense": [], f"{recipe.ratio}, {recipe.density:g} of the weights": []}
    for name in (recipe.model, *other_models(recipe)):
        layers = recipe.prunable(recipe.fresh(run, recipe.seed, name))
        x = float(sum(layer.size for layer in layers.values()))
        pair = (Point(name, None, 1.0), Point(name, recipe.ratio, recipe.density))
        if name == recipe.model:
            pair = ("dense", recipe.method)
        for points, what in zip(series.values(), pair, strict=True):
            points.append({"x": x, "metrics": accuracy(recipe, run, what)})
    for points in series.values():
        points.sort(key=lambda point: point["x"])
    return series


def path_table(recipe: RandomPruning, run: TrainedRun) -> dict:
    """Weights, multiplications, and how many of the weights are on a path from the pixels to the labels."""
    seed, rows = run.seeds[0], []
    for variant in recipe.variants(run):
        model, masks = recipe.untrained(run, variant, seed), recipe.chosen_masks(run, variant, seed)
        layers = recipe.prunable(model)
        kept = {name: masks[name].double().mean().item() if masks else 1.0 for name in layers}
        macs = mac_ratio(kept, layers) * sum(layer.macs for layer in layers.values())
        count = sum(round(kept[name] * layer.size) for name, layer in layers.items())
        rows.append([variant, f"{count:,}", f"{macs:,.0f}", live_weights(model, masks) / count])
    return {"header": ["network", "weights", "multiplications an image", "of the weights, on a path"], "rows": rows}


def density_table(recipe: RandomPruning, run: TrainedRun) -> dict:
    """d_l of the first seed under every ratio of this run."""
    seed, model = run.seeds[0], recipe.fresh(run, run.seeds[0])
    layers, columns = recipe.prunable(model), {}
    for variant in recipe.variants(run):
        if variant in RATIOS or variant == recipe.method:
            ratio = recipe.ratio if variant == recipe.method else variant
            title = f"{ratio} (this model)" if variant == recipe.method else variant
            columns[title] = recipe.kept(run, model, ratio, recipe.density, seed, variant)["densities"]
    rows = [[n, f"{layer.size:,}", *(column[n] for column in columns.values())] for n, layer in layers.items()]
    return {"header": ["weight", "size", *columns], "rows": rows}
