"""Every model of a run is measured once, the dense one first, and compared with the dense model of its seed."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from recipes.common.core.report import raw_values
from recipes.common.core.run import Run
from recipes.common.core.state import World
from recipes.common.metrics.metric import mean_of, metric, over_runs, over_seeds

LOGITS = {"dense-0": 0.0, "dense-1": 1.0, "ours-0": 0.5, "ours-1": 1.5}


def made_run(folder, dense_seeds):
    """Of two seeds, whose models are single numbers; `seen` lists what was measured and opened, in order."""
    seen = []

    @contextmanager
    def opened(run, variant, seed):
        seen.append(f"open {variant}-{seed}")
        yield LOGITS[f"{variant}-{seed}"]
        seen.append(f"close {variant}-{seed}")

    def metrics(model, reference, **options):
        seen.append("measure")
        kl, _ = reference.compare("test", torch.tensor([[model, -1.0]] * 5))
        return {"kl": mean_of(kl, "items", "kl", False)}

    recipe = SimpleNamespace(
        state_path=folder, seed=0, seeds=2, open=opened, dense_seeds=lambda run: list(range(dense_seeds))
    )
    return Run(recipe, SimpleNamespace(metrics=metrics), World()), seen


@pytest.mark.parametrize("dense_seeds", [1, 2])
def test_models_are_compared_with_the_dense_one_of_their_seed(tmp_path, dense_seeds):
    run, seen = made_run(tmp_path, dense_seeds)
    found = [
        run.measure(f"ours-{seed}", lambda seed=seed: run.recipe.open(run, "ours", seed), seed=seed)["kl"]["value"]
        for seed in run.seeds
    ]
    dense = [LOGITS[f"dense-{min(seed, dense_seeds - 1)}"] for seed in run.seeds]
    p, q = (torch.tensor([[x, -1.0] for x in values]).log_softmax(1) for values in (dense, [0.5, 1.5]))
    wanted = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert found == pytest.approx(wanted.tolist(), rel=1e-2)
    assert seen[:6] == ["open dense-0", "measure", "close dense-0", "open ours-0", "measure", "close ours-0"]
    again, seen = made_run(tmp_path, dense_seeds)
    assert again.measure("ours-0", None, seed=0)["kl"]["value"] == found[0] and seen == []  # resumed


def test_a_dense_model_whose_measurement_was_killed_is_measured_anew(tmp_path):
    run, _ = made_run(tmp_path, 1)
    run.measure_dense(0)
    (tmp_path / "measured" / "dense-0.json").unlink()  # the kill came between its predictions and its metrics
    (tmp_path / "predictions" / "0" / "test.safetensors").write_bytes(b"half")
    run, seen = made_run(tmp_path, 1)
    assert run.measure("other", lambda: nullcontext(0.0))["kl"]["value"] < 1e-6 and "open dense-0" in seen


def test_raw_values_by_seed_and_draw():
    draws = [[{"kl": metric(x, None, 2, "items", raw=[x, x])} for x in (1.0, 2.5)] for _ in range(2)]
    seeds = [over_runs(runs) for runs in draws]
    variants = {"dense": [{"kl": metric(0.0, None, 2, "items", raw=[0, 0])}], "random": seeds}
    assert raw_values(variants) == {"dense": {"kl": [[[0, 0]]]}, "random": {"kl": [[[1, 1], [2.5, 2.5]]] * 2}}
    assert "raw" not in over_seeds(seeds)["kl"] and over_seeds(seeds)["kl"]["values"] == [1.75, 1.75]
    without = {"own": [{"auroc": metric(0.5, 0.1, 2, "items")}]}
    assert raw_values(without) == {"own": {}}


@pytest.mark.parametrize("x, kept", [(1.0, "1"), (0.0, "0"), (1 / 3, "0.3333333"), (1.23456789e-9, "1.234568e-09")])
def test_raw_values_are_short(x, kept):
    assert str(metric(x, None, 1, "items", raw=[x])["raw"][0][0]) == kept
