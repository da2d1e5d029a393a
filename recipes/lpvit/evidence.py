"""What LPViT's report tells besides quality: what an image costs, dense and pruned, and accuracy at other targets."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from recipes.common.metrics.metric import over_seeds
from recipes.lpvit.blocks import block_sums, count_macs, matrix

if TYPE_CHECKING:
    from recipes.lpvit import LPViT, LPViTRun

BITS = 32  # of the numbers in the energy model: checkpoints of image models are fp32


def image_costs(recipe: LPViT, run: LPViTRun) -> tuple[dict[str, int], dict]:
    """Multiply-adds of the first seed's model (`count_macs`), and the table of what an image costs dense and pruned."""
    seed, table = run.seeds[0], recipe.table
    calibrated, own = run.calibrated(seed), run.trained(recipe.method, seed)
    masks = {name: matrix(layer).detach() != 0 for name, layer in recipe.layers_of(own).items()}
    macs = count_macs(own, calibrated.batches[0][:1], masks)
    fixed, energies = calibrated.fixed_energy(table, BITS), calibrated.energies(table, BITS)
    kept = sum(
        (energies[name] * (block_sums(mask.float(), recipe.blocks) > 0)).sum().item() for name, mask in masks.items()
    )
    dense = sum(energy.sum().item() for energy in energies.values())
    rows = [
        ["multiply-adds of the pruned layers, M", macs["pruned_dense"] / 1e6, macs["pruned"] / 1e6],
        ["of all linear and convolution layers, M", macs["linear_dense"] / 1e6, macs["linear"] / 1e6],
        ["of attention's products, M", macs["attention"] / 1e6, macs["attention"] / 1e6],
        ["energy of the pruned layers, modelled, uJ", (dense + fixed) / 1e6, (kept + fixed) / 1e6],
    ]
    return macs, {"header": ["", "dense", recipe.method], "rows": rows}


def notes(recipe: LPViT, run: LPViTRun, macs: dict[str, int]) -> list[str]:
    """What a reader must know of the costs, the baselines and the seeds."""
    seeds = "Every seed prunes the same base model: seeds choose calibration images and probes."
    if recipe.keeps_dense:
        data = run.domain.data.name
        seeds = f"{recipe.model} was trained on the training images of {data} first, anew for every seed."
    return [
        "Joules are modelled from operation counts and the energies of `--energy_table`, not measured.",
        f"Multiply-adds for an image, kept of dense: {macs['pruned'] / macs['pruned_dense']:.4f} in the pruned layers,"
        f" {macs['linear'] / macs['linear_dense']:.4f} in all linear and convolution layers (the paper's count),"
        f" {(macs['linear'] + macs['attention']) / (macs['linear_dense'] + macs['attention']):.4f} with the products"
        " of attention.",
        "magnitude and wanda remove single weights: a ceiling for accuracy at these multiply-adds, but no faster.",
        "lpvit sees no label and takes no gradient step; rows called finetuned saw the training labels.",
        seeds,
    ]


def target_sweep(recipe: LPViT, run: LPViTRun, targets: list[float]) -> dict:
    """The own variant, and those of the main baselines that ran, at all targets."""
    series = {name: [{"x": target, "metrics": []} for target in targets] for name in recipe.swept()}
    for seed in run.seeds:  # outermost: the statistics of one seed are kept at a time
        for name, points in series.items():
            for point in points:
                key = f"{name}-{seed}" if point["x"] == recipe.target else f"{name}-{seed}-at-{point['x']:g}"

                def opened(name=name, seed=seed, target=point["x"]):
                    return nullcontext(recipe.prune(run, name, seed, target)[0])

                point["metrics"].append(run.measure(key, opened, seed=seed))
    for points in series.values():
        for point in points:
            point["metrics"] = {"accuracy": over_seeds(point["metrics"])["accuracy"]}
    return {"x": f"fraction of {recipe.budget} kept", "log": False, "series": series}
