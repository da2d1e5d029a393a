"""Training: schedules, the best epoch, resume to the last bit, losses, groups, hooks, distillation, two processes."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from launching import TWO_PROCESSES
from PIL import Image
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from recipes.common.data.image_batches import ImageTensors
from recipes.common.domains.classification import Classification
from recipes.common.loops import training
from recipes.common.loops.training import Schedule
from zoo.errors import UserError

SIDE = 16
SCHEDULE = Schedule(epochs=3, batch_size=16, lr=1e-2, optimizer="adamw", weight_decay=0.01, warmup_epochs=1)


train = partial(training.train, loss=Classification.training_loss, score=Classification.score)


def images(count: int, seed: int, augment: bool = False) -> ImageTensors:
    """Squares whose brighter half, left or right, is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator).tolist()
    pictures = []
    for label in labels:
        pixels = torch.randint(0, 120, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        pixels[:, SIDE // 2 * label : SIDE // 2 * (label + 1)] += 80
        pictures.append(Image.fromarray(pixels.numpy()))
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels})
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return ImageTensors(rows.cast_column("label", datasets.ClassLabel(2)), processor, augment=augment)


def tiny_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=SIDE, patch_size=8, num_labels=2, **sizes)
    return ViTForImageClassification(config)


def some_masks(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    linears = {n: p for n, p in model.named_parameters() if "mlp" in n and p.ndim == 2}
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in linears.items()}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_schedules_warm_up_and_fall():
    cosine = Schedule(epochs=10, batch_size=1, lr=1.0, warmup_epochs=2)
    assert [cosine.factor(e) for e in (1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    step = Schedule(epochs=10, batch_size=1, lr=1.0, schedule="step", lr_drops=(4, 8))
    assert [step.factor(e) for e in (0, 3.9, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"warmup_epochs": 99.0}, "--warmup_epochs 99.0: fewer than --epochs 10"),
        ({"warmup_epochs": 10.0}, "--warmup_epochs 10.0: fewer than --epochs 10"),
        ({"schedule": "step"}, "--lr_drops none"),
        ({"schedule": "step", "lr_drops": (2, 30)}, r"--lr_drops \[30\]"),
    ],
)
def test_impossible_schedules_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Schedule(**{"epochs": 10, "batch_size": 1, "lr": 1.0, **changes}).check()


def test_decay_spares_biases_and_normalisation():
    model = tiny_vit()
    decayed, spared = training.make_optimizer(model, SCHEDULE).param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] == 0.01
    assert all(p.ndim == 1 for p in spared["params"]) and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_it_learns_and_keeps_the_best_epoch(tmp_path):
    model, held_out = tiny_vit(), images(64, seed=2)
    log = train(model, images(128, seed=1), held_out, SCHEDULE, tmp_path / "a", seed=0)
    accuracies = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    with torch.no_grad():
        batch = torch.stack([held_out[i]["pixel_values"] for i in range(64)])
        found = (model.eval()(batch).logits.argmax(-1) == held_out.labels).double().mean().item()
    assert len(accuracies) == 3 and found == pytest.approx(max(accuracies)) and found > 0.8


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(an undisturbed training's weights, its data, the folder of one that was killed in its third epoch)."""
    folder, data, held_out = tmp_path_factory.mktemp("killed"), images(64, seed=1, augment=True), images(32, seed=2)
    whole = tiny_vit()
    masks = some_masks(whole)
    train(whole, data, held_out, SCHEDULE, folder / "whole", seed=3, masks=masks)

    def kill(self, args, state, control, model=None, **kwargs):
        training.apply_masks(model, self.masks)
        if state.global_step >= 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.KeepMasks, "on_optimizer_step", kill)
        train(tiny_vit(), data, held_out, SCHEDULE, folder / "killed", seed=3, masks=masks)
    return whole, (data, held_out), (folder / "killed").rename(folder / "moved")


def resumes_to_the_same_bits(killed, folder):
    whole, data, _ = killed
    resumed = tiny_vit()
    masks = some_masks(resumed)
    train(resumed, *data, SCHEDULE, folder, seed=3, masks=masks)
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, mask in masks.items():
        assert not resumed.get_parameter(name)[~mask].any() and resumed.get_parameter(name)[mask].all()


def test_a_killed_training_resumes_to_the_same_bits(killed, tmp_path):
    resumes_to_the_same_bits(killed, shutil.copytree(killed[2], tmp_path / "killed"))


@pytest.mark.parametrize(
    "lost",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "half of the state"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(killed, tmp_path, lost):
    folder = shutil.copytree(killed[2], tmp_path / "killed")
    newest = folder / "checkpoint-8"
    assert training.last_checkpoint(folder) == str(newest)
    if lost == "half of the state":
        text = (newest / "trainer_state.json").read_text()
        (newest / "trainer_state.json").write_text(text[: len(text) // 2])
    else:
        (newest / lost).unlink()
    assert training.last_checkpoint(folder) == str(folder / "checkpoint-4")
    if lost == "optimizer.pt":  # without which Trainer goes on, to other weights
        resumes_to_the_same_bits(killed, folder)
        return
    shutil.rmtree(folder / "checkpoint-4")
    assert training.last_checkpoint(folder) is None


def test_a_teacher_draws_predictions_towards_its_own(tmp_path):
    data, held_out = images(64, seed=1), images(32, seed=2)
    teacher = tiny_vit()
    with torch.no_grad():
        teacher.classifier.weight.zero_()
        teacher.classifier.bias.copy_(torch.tensor([2.0, 0.0]))  # always the first class
    means = {}
    for name, chosen in (("alone", None), ("taught", teacher)):
        model = tiny_vit()
        loss = partial(Classification.training_loss, teacher=chosen and chosen.eval())
        train(model, data, held_out, SCHEDULE, tmp_path / name, seed=0, loss=loss)
        batch = torch.stack([held_out[i]["pixel_values"] for i in range(32)])
        means[name] = model.eval()(batch).logits.softmax(-1)[:, 0].mean().item()
    assert means["taught"] > means["alone"] + 0.05


def test_labels_are_smoothed_while_the_model_trains_and_not_in_validation(tmp_path):
    seen = []

    def loss(model, batch, smoothing):
        seen.append((model.training, smoothing))
        return Classification.training_loss(model, batch, smoothing)

    schedule = Schedule(epochs=1, batch_size=16, lr=1e-2, label_smoothing=0.25)
    train(tiny_vit(), images(32, seed=1), images(8, seed=2), schedule, tmp_path, seed=0, loss=loss)
    assert seen == [(True, 0.25)] * 2 + [(False, 0.0)]


def test_half_of_the_loss_is_the_teachers():
    model, teacher = tiny_vit().train(), tiny_vit().eval()
    with torch.no_grad():
        teacher.classifier.bias.add_(torch.tensor([1.0, 0.0]))
    batch = images(8, seed=1).batch(list(range(8)))
    loss, outputs = Classification.training_loss(model, batch, 0.1, teacher)
    p, q = (m(batch["pixel_values"]).logits.log_softmax(-1) for m in (model, teacher))
    target = torch.nn.functional.one_hot(batch["labels"], 2) * 0.9 + 0.05
    wanted = -(target * p).sum(-1).mean() / 2 + (q.exp() * (q - p)).sum(-1).mean() / 2
    torch.testing.assert_close(loss, wanted)
    assert outputs["logits"].shape == (8, 2)
    plain = -(target * p).sum(-1).mean()
    torch.testing.assert_close(Classification.training_loss(model.eval(), batch, 0.1, teacher)[0], plain)


def test_the_score_chooses_the_epoch_and_less_is_better_of_a_loss(tmp_path):
    scores = {}
    for name in ("worth", "some_loss"):
        values, model = iter([1.0, 3.0, 2.0]), tiny_vit()
        log = train(
            *(model, images(32, seed=1), images(8, seed=2), SCHEDULE, tmp_path / name),
            seed=0,
            score=(name, lambda predicted, values=values: next(values)),
        )
        assert [entry[f"eval_{name}"] for entry in log if f"eval_{name}" in entry] == [1.0, 3.0, 2.0]
        scores[name] = state(model)
    after_one = tiny_vit()  # the schedule of three epochs, stopped after one

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    train(after_one, images(32, seed=1), images(8, seed=2), SCHEDULE, tmp_path / "one", seed=0, callbacks=[Stop()])
    assert all(torch.equal(tensor, after_one.state_dict()[name]) for name, tensor in scores["some_loss"].items())
    assert any(not torch.equal(tensor, scores["worth"][name]) for name, tensor in scores["some_loss"].items())


def test_groups_choose_what_is_trained_and_hooks_see_every_step(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.steps += 1

    count, model, begin = Count(), tiny_vit(), state(tiny_vit())
    train(
        *(model, images(32, seed=1), images(8, seed=2), SCHEDULE, tmp_path),
        seed=0,
        groups=lambda model: [{"params": [model.classifier.weight], "weight_decay": 0.0}],
        callbacks=[count],
    )
    moved = {name for name, tensor in begin.items() if not torch.equal(tensor, model.state_dict()[name])}
    assert moved == {"classifier.weight"} and count.steps == 3 * 2


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_training as t
from safetensors.torch import save_file
from accelerate import PartialState
model = t.tiny_vit()
t.train(model, t.images(64, seed=1), t.images(32, seed=2), t.SCHEDULE, Path(sys.argv[1]), seed=0, masks=t.some_masks(model))
save_file(model.state_dict(), f"{sys.argv[1]}-{PartialState().process_index}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path):
    """Without batch statistics and augmentation, gradients of half batches average to those of whole ones."""
    from safetensors.torch import load_file

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [*TWO_PROCESSES, str(script), str(tmp_path / "two"), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (load_file(tmp_path / f"two-{rank}.safetensors") for rank in range(2))
    one = tiny_vit()
    masks = some_masks(one)
    train(one, images(64, seed=1), images(32, seed=2), SCHEDULE, tmp_path / "one", seed=0, masks=masks)
    for name, tensor in one.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
    for name, mask in masks.items():
        assert not first[name][~mask].any()
