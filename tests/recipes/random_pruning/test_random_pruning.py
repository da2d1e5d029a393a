"""random-pruning: its steps one by one, and the whole command line on two small seeds."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from recipes.common.core.cli import main
from recipes.common.core.state import World
from recipes.common.data.architectures import fresh_model
from recipes.common.data.image_batches import ImageTensors
from recipes.common.data.images import ImageData
from recipes.common.domains.classification import Classification
from recipes.common.loops import training
from recipes.common.loops.trained import TrainedRun
from recipes.common.loops.training import Schedule, apply_masks, make_optimizer, mask_gradients
from recipes.common.metrics import images as image_metrics
from recipes.common.parts.densities import mac_ratio, prunable_layers
from recipes.common.parts.scores import grasp_scores, keep_fractions, snip_scores, top_masks
from recipes.random_pruning import MAGNITUDE, POSITIONS, SMALL, RandomPruning, snip_batches
from recipes.random_pruning.networks import kaiming, live_weights, narrowed
from recipes.random_pruning.packing import pack_masked
from zoo.checkpoint import save_checkpoint
from zoo.errors import UserError
from zoo.models.resnet import SlimResNetForImageClassification, cifar_resnet_config
from zoo.models.vgg import SlimVGGForImageClassification, cifar_vgg_config

pytestmark = pytest.mark.slow

SIDE = 12
train = partial(training.train, loss=Classification.training_loss, score=Classification.score)


def tiny(depth: int = 8, width: int = 4, seed: int = 0, side: int = SIDE, channels: int = 3, **settings):
    config = cifar_resnet_config(depth, width, 10, side)
    config.num_channels = channels
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return kaiming(SlimResNetForImageClassification(config), seed)


def recipe(**flags) -> RandomPruning:
    return RandomPruning(model="resnet-8-4", image_size=SIDE, **flags)


def random_masks(model, density: float, seed: int = 0, ratio: str = "erk", **flags):
    made = recipe(density=density, ratio=ratio, **flags)
    layers = made.prunable(model)
    return made.masks(layers, made.counts(layers, made.formula(layers, ratio, density), seed), seed)


def pictures(rows: int, seed: int, classes: int = 10) -> datasets.Dataset:
    """Noise, with a bright patch at a place that the label sets."""
    generator = torch.Generator().manual_seed(seed)
    labels = [row % classes for row in range(rows)]
    images = []
    for label in labels:
        pixels = torch.randint(0, 90, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        pixels[label : label + 3, : 3 + label % 5] += 150
        images.append(Image.fromarray(pixels.numpy()))
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels})
    return dataset.cast_column("label", datasets.ClassLabel(names=[f"class {i}" for i in range(classes)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run gives to the steps of the method: images and a folder to keep things in."""
    splits = {split: pictures(rows, seed) for seed, (split, rows) in enumerate((("train", 300), ("validation", 40)))}
    classes = splits["train"].features["label"].names
    about = {"name": "patches", "version": "1", "sha256": None, "license": None, "size": None}
    made = recipe(output=str(tmp_path_factory.mktemp("run") / "out"))
    found = TrainedRun(made, made.domain(), World())
    found.domain.data = ImageData(**about, classes=classes, test=pictures(60, 9), image_size=SIDE, **splits)
    return found


# ------------------------------------------------------------------------------------------------------------ sampling


def test_masks_keep_exactly_the_budget_and_two_seeds_overlap_by_chance():
    model = tiny(14, 8)
    layers = recipe().prunable(model)
    total = sum(layer.size for layer in layers.values())
    first, second = (random_masks(model, 0.1, seed) for seed in (0, 1))
    assert sum(int(mask.sum()) for mask in first.values()) == round(0.1 * total)
    for name, layer in layers.items():
        assert first[name].shape == layer.shape
        density = first[name].double().mean().item()
        expected, overlap = density**2 * layer.size, int((first[name] & second[name]).sum())
        deviation = math.sqrt(max(expected * (1 - density) ** 2, 1e-9))
        assert abs(overlap - expected) <= 4 * deviation + 1, name
    assert len({mask.flatten()[:64].numpy().tobytes() for mask in first.values()}) > len(first) // 2
    again = random_masks(tiny(14, 8, seed=5), 0.1, 0)  # of shapes and seed only, not of the weights
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_coins_keep_about_the_budget():
    model = tiny(14, 8)
    layers = recipe().prunable(model)
    total = sum(layer.size for layer in layers.values())
    masks = random_masks(model, 0.1, 0, mask_sampling="bernoulli")
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept != round(0.1 * total)
    assert abs(kept - 0.1 * total) < 4 * math.sqrt(0.1 * total)


# --------------------------------------------------------------------------------------------------- masks in training


def steps(model, masks, optimizer: str, mask_gradient: bool, clip: float = 0.0, count: int = 50) -> list[float]:
    """Trains by hand, re-zeroing weights after each step and, if asked, masking gradients before; gradient norms."""
    torch.manual_seed(1)
    pixels, labels = torch.randn(count, 16, 3, SIDE, SIDE), torch.randint(10, (count, 16))
    schedule = Schedule(epochs=1, batch_size=16, lr=0.05 if optimizer == "sgd" else 3e-3, optimizer=optimizer)
    apply_masks(model, masks)
    handles = mask_gradients(model, masks) if mask_gradient else []
    made, norms = make_optimizer(model, schedule), []
    for x, y in zip(pixels, labels, strict=True):
        made.zero_grad()
        F.cross_entropy(model(pixel_values=x).logits, y).backward()
        if clip:
            norms.append(clip_grad_norm_(model.parameters(), clip).item())
        made.step()
        apply_masks(model, masks)
    for handle in handles:
        handle.remove()
    return norms


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_stay_masks_and_masking_gradients_changes_no_bit(optimizer):
    models = [tiny().train() for _ in range(2)]
    masks = random_masks(models[0], 0.2)
    for model, mask_gradient in zip(models, (True, False), strict=True):
        steps(model, masks, optimizer, mask_gradient)
    for name, mask in masks.items():
        assert torch.equal(models[0].get_parameter(name) != 0, mask), name
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    assert not torch.equal(models[0].state_dict()["classifier.1.weight"], tiny().state_dict()["classifier.1.weight"])


def test_clipping_sees_the_norm_of_live_weights_only():
    models = [tiny().train() for _ in range(2)]
    masks = random_masks(models[0], 0.2)
    masked, whole = (steps(m, masks, "sgd", flag, clip=0.1) for m, flag in zip(models, (True, False), strict=True))
    assert masked[0] < whole[0]
    name = "classifier.1.weight"
    assert not torch.equal(models[0].get_parameter(name), models[1].get_parameter(name))
    probe = tiny().train()
    apply_masks(probe, masks)
    torch.manual_seed(1)
    pixels, labels = torch.randn(50, 16, 3, SIDE, SIDE), torch.randint(10, (50, 16))
    F.cross_entropy(probe(pixel_values=pixels[0]).logits, labels[0]).backward()
    parts = [p.grad if n not in masks else p.grad[masks[n]] for n, p in probe.named_parameters()]
    assert masked[0] == pytest.approx(torch.cat([part.flatten() for part in parts]).norm().item(), rel=1e-5)


def test_in_trainer_masks_hold_and_full_ones_change_no_bit(run, tmp_path):
    schedule = Schedule(epochs=2, batch_size=50, lr=0.05)
    models = {"none": tiny(), "full": tiny(), "sparse": tiny()}
    masks = {"none": None, "full": random_masks(models["full"], 1.0), "sparse": random_masks(models["sparse"], 0.1)}
    assert all(mask.all() for mask in masks["full"].values())
    for key, model in models.items():
        data = run.domain.train_images, run.domain.validation
        train(model, *data, schedule, tmp_path / key, seed=0, masks=masks[key])
    for name, tensor in models["none"].state_dict().items():
        assert torch.equal(tensor, models["full"].state_dict()[name]), name
    for name, mask in masks["sparse"].items():
        assert torch.equal(models["sparse"].get_parameter(name) != 0, mask), name


# --------------------------------------------------------------------------------------------------------- round trips


def sparse_model(density: float = 0.1, seed: int = 3, side: int = SIDE):
    model = tiny(14, 8, side=side).eval()
    for name, tensor in model.named_buffers():  # running statistics that are not trivial
        if name.endswith(("mean", "var")):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    masks = random_masks(model, density, seed)
    apply_masks(model, masks)
    return model, masks


SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
assert "zoo" not in sys.modules
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    logits = model(pixel_values=load_file(sys.argv[2])["pixels"]).logits
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.mark.parametrize("storage", ["seed", "bitmask", "dense"])
def test_round_trip_size_and_logits(storage, tmp_path):
    from transformers import AutoModelForImageClassification

    model, masks = sparse_model()
    packed = pack_masked(model, masks, storage, 3, {"method": "random-pruning"})
    folder = save_checkpoint(tmp_path / "out", packed, extra_files={})
    pixels = torch.randn(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(pixel_values=pixels).logits
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        found = packed(pixel_values=pixels).logits
        assert torch.equal(loaded(pixel_values=pixels).logits, found)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # sums in another order
        other = pack_masked(model, masks, "bitmask", 3, {"method": "random-pruning"})
        assert storage == "dense" or torch.equal(other(pixel_values=pixels).logits, found)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    rows = {name: len(mask) for name, mask in masks.items()}
    formulas = {
        "dense": lambda name: 4 * sizes[name],
        "bitmask": lambda name: min(
            4 * sizes[name], 4 * kept[name] + rows[name] * -(-sizes[name] // rows[name] // 8) + 8 * (rows[name] + 1)
        ),
        "seed": lambda name: 4 * kept[name],
    }
    state = load_file(folder / "model.safetensors")
    modules = {name.removesuffix(".weight"): name for name in masks}
    for module, name in modules.items():
        stored = sum(t.nbytes for n, t in state.items() if n.rpartition(".")[0] == module and not n.endswith("bias"))
        assert stored == pytest.approx(formulas[storage](name), rel=0.02), name
    others = sum(t.nbytes for n, t in model.state_dict().items() if n not in masks)
    assert sum(t.nbytes for t in state.values()) == others + sum(map(formulas[storage], masks))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_a_fresh_process_without_slimzoo_draws_the_same_masks(tmp_path):
    from safetensors.torch import save_file

    model, masks = sparse_model()
    folder = save_checkpoint(tmp_path / "out", pack_masked(model, masks, "seed", 3, {"method": "x"}), extra_files={})
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    paths = [str(folder), str(tmp_path / "pixels.safetensors"), str(tmp_path / "logits.safetensors")]
    command = [sys.executable, "-P", "-c", SCRIPT, *paths]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        wanted = model(pixel_values=pixels).logits
    torch.testing.assert_close(load_file(paths[2])["logits"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"seed": 4}, {"layer": 7}, {"sha256": "0" * 64}])
def test_a_tampered_seed_is_refused_on_loading(change, tmp_path):
    from transformers import AutoModelForImageClassification

    model, masks = sparse_model()
    folder = save_checkpoint(tmp_path / "out", pack_masked(model, masks, "seed", 3, {"method": "x"}), extra_files={})
    config = json.loads((folder / "config.json").read_text())
    name = "resnet.encoder.stages.1.layers.0.layer.1.convolution"
    config["compression_config"]["modules"][name] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name}: the mask of seed"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_vgg_and_other_dtypes_make_the_trip_too(tmp_path):
    from transformers import AutoModel, AutoModelForImageClassification

    config = cifar_vgg_config(11, 10)
    config.hidden_sizes = (4, 6, 8, 8, 8)
    torch.manual_seed(0)
    model = SlimVGGForImageClassification(config).eval()
    masks = random_masks(model, 0.2, 3)
    assert list(masks)[0] == "vgg.stages.0.0.convolution.weight" and list(masks)[-1] == "classifier.weight"
    folder = save_checkpoint(tmp_path / "vgg", pack_masked(model, masks, "seed", 3, {"method": "x"}), extra_files={})
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixel_values=pixels)
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, wanted.logits, rtol=1e-5, atol=1e-6)
        features = AutoModel.from_pretrained(folder)(pixel_values=pixels, output_hidden_states=True)
        torch.testing.assert_close(features.hidden_states[-1], features.last_hidden_state)
        torch.testing.assert_close(model.classifier(features.pooler_output.flatten(1)), wanted.logits)
        half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
        assert half(pixel_values=pixels.bfloat16()).logits.dtype == torch.bfloat16
        torch.testing.assert_close(
            half(pixel_values=pixels.bfloat16()).logits.float(), wanted.logits, rtol=0.1, atol=0.1
        )


# ---------------------------------------------------------------------------------------- products and multiplications


def test_packed_products_and_the_counter_of_multiplications():
    """The layers themselves, strides, groups and an empty row: tests/zoo/layers/test_bitmask_conv.py."""
    model, masks = sparse_model(0.1, side=32)
    layers = prunable_layers(model, torch.zeros(1, 3, 32, 32))
    kept = {name: mask.double().mean().item() for name, mask in masks.items()}
    places = {name: layer.macs // layer.size for name, layer in layers.items()}
    counted = sum(int((model.get_parameter(name) != 0).sum()) * places[name] for name in layers)
    assert counted == pytest.approx(mac_ratio(kept, layers) * sum(layer.macs for layer in layers.values()), rel=1e-12)
    assert places["resnet.embedder.embedder.convolution.weight"] == 32 * 32
    assert places["resnet.encoder.stages.2.layers.0.shortcut.convolution.weight"] == 8 * 8
    packed = pack_masked(model, masks, "bitmask", 3, {"method": "x"})
    for name, spec in packed.config.compression_config["modules"].items():
        assert spec["nnz"] == int(masks[f"{name}.weight"].sum())
        assert torch.equal(packed.get_submodule(name).dense_weight(), model.get_parameter(f"{name}.weight"))


# ------------------------------------------------------------------------------------------- what is learnt, on digits


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's 8x8 digits: 900 to train on, the others to test."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = ((pixels - pixels.mean()) / pixels.std())[order], torch.tensor(found.target)[order]
    return (pixels[:900], labels[:900]), (pixels[900:], labels[900:])


def learn(digits, model, masks, epochs: int = 5, batch: int = 64) -> float:
    """Test accuracy in percent."""
    (pixels, labels), (test_pixels, test_labels) = digits
    schedule = Schedule(epochs=epochs, batch_size=batch, lr=0.1)
    apply_masks(model, masks)
    optimizer, handles = make_optimizer(model, schedule), mask_gradients(model, masks)
    generator, per_epoch = torch.Generator().manual_seed(0), len(pixels) // batch
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(pixels), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor((step + 0.5) / per_epoch)
        rows = order[(step % per_epoch) * batch :][:batch]
        loss = F.cross_entropy(model.train()(pixel_values=pixels[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apply_masks(model, masks)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        found = model.eval()(pixel_values=test_pixels).logits.argmax(1)
    return 100 * (found == test_labels).double().mean().item()


@pytest.fixture(scope="module")
def learnt(digits):
    """Accuracy of ResNet-14-16 with one channel, 173,840 weights, of which 2 % stay; and of one half as wide."""
    found = {}
    for width in (16, 8):
        model = tiny(14, width, channels=1, side=8)
        found["dense", width] = learn(digits, model, None)
        for ratio in ("erk", "balanced", "uniform") if width == 16 else ("erk",):
            model = tiny(14, width, channels=1, side=8)
            found[ratio, width] = learn(digits, model, random_masks(model, 0.02, ratio=ratio))
    made = RandomPruning(model="resnet-14-16", image_size=SIDE, density=0.02)
    wide = kaiming(fresh_model("resnet-14-16", list("0123456789"), SIDE, 0), 0)
    widths = narrowed(wide, made.budget(made.prunable(wide)), 0.02, 0).config.widths
    narrow = tiny(14, 16, channels=1, side=8, widths=widths)
    assert sum(layer.size for layer in made.prunable(narrow).values()) <= 0.02 * 173_840
    found[SMALL, 16] = learn(digits, narrow, None)
    return found


def test_ratios_matter_more_than_a_smaller_network(learnt):
    """One seed, five epochs, 8x8 pixels."""
    assert learnt["erk", 16] - learnt["uniform", 16] >= 8
    assert learnt["balanced", 16] - learnt["uniform", 16] >= 8
    assert learnt["erk", 16] - learnt[SMALL, 16] >= 2
    assert 0 <= learnt["dense", 16] - learnt["erk", 16] <= 6


def test_the_gap_to_dense_shrinks_with_width(learnt):
    gaps = {width: learnt["dense", width] - learnt["erk", width] for width in (8, 16)}
    assert gaps[8] > gaps[16] + 1


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("ratio", ["snip", "grasp"])
def test_only_the_numbers_are_taken_from_scores(run, ratio):
    made, model = recipe(ratio=ratio, density=0.1, grasp_samples_per_class=8), tiny()
    layers = made.prunable(model)
    scores = made.scores(run, model, ratio, seed=0)
    positions = top_masks(scores, made.budget(layers))
    kept = made.kept(run, model, ratio, 0.1, 0, f"check-9-{ratio}")
    drawn = made.masks(layers, kept["counts"], 0)
    assert sum(kept["counts"].values()) == pytest.approx(made.budget(layers), abs=1)
    chance = 0.0
    for name in layers:
        assert abs(int(drawn[name].sum()) - max(1, int(positions[name].sum()))) <= 1, name
        chance += int(drawn[name].sum()) * positions[name].double().mean().item()
    overlap = sum(int((drawn[name] & positions[name]).sum()) for name in layers)
    total = sum(kept["counts"].values())
    assert abs(overlap - chance) < 4 * math.sqrt(chance) and overlap < total / 2
    again = made.kept(run, model, ratio, 0.1, 0, f"check-9-{ratio}-again")
    assert again == kept


def test_snip_scores_are_gradients_of_multiplicative_masks(run):
    made, model = recipe(), tiny()
    batch = snip_batches(run.domain.train_images, 1, seed=0)[0]
    assert batch["pixel_values"].shape == (128, 3, SIDE, SIDE)
    assert torch.equal(batch["pixel_values"], snip_batches(run.domain.train_images, 1, seed=0)[0]["pixel_values"])
    scores = made.scores(run, model, "snip", seed=0)
    model.train()
    gates = {name: torch.ones_like(model.get_parameter(name), requires_grad=True) for name in scores}
    gated = {name: model.get_parameter(name).detach() * gate for name, gate in gates.items()}
    logits = torch.func.functional_call(model, gated, kwargs={"pixel_values": batch["pixel_values"]}).logits
    wanted = torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), list(gates.values()))
    for score, gradient in zip(scores.values(), wanted, strict=True):
        torch.testing.assert_close(score, gradient.abs(), rtol=1e-4, atol=1e-7)
    other = replace(made, snip_reinit="xavier").scores(run, tiny(), "snip", seed=0)
    assert any(not torch.equal(other[name], scores[name]) for name in scores)


def test_grasps_hessian_product_is_that_of_finite_differences():
    model = tiny(8, 2).double()
    generator = torch.Generator().manual_seed(0)
    halves = [
        {
            "pixel_values": torch.randn(6, 3, SIDE, SIDE, generator=generator, dtype=torch.float64),
            "labels": torch.randint(10, (6,), generator=generator),
        }
        for _ in range(2)
    ]
    names = list(snip_scores(model, halves))
    scores = grasp_scores(model, halves, temperature=2.0)

    def gradient(shift: float, direction=None):
        probe = tiny(8, 2).double().train()
        with torch.no_grad():
            for name, step in zip(names, direction or [], strict=False):
                probe.get_parameter(name).add_(shift * step)
        weights = [probe.get_parameter(name) for name in names]
        parts = []
        for half in halves:
            logits = probe(pixel_values=half["pixel_values"]).logits
            parts.append(torch.autograd.grad(F.cross_entropy(logits / 2.0, half["labels"]), weights))
        return [a + b for a, b in zip(*parts, strict=True)]

    g, step = gradient(0.0), 1e-5
    product = [(a - b) / (2 * step) for a, b in zip(gradient(step, g), gradient(-step, g), strict=True)]
    unscaled = {name: model.get_parameter(name).detach() * hg for name, hg in zip(names, product, strict=True)}
    scale = abs(sum(score.sum() for score in unscaled.values()))
    found, wanted = (torch.cat([s[name].flatten() for name in names]) for s in (scores, unscaled))
    assert ((found * scale - wanted).norm() / wanted.norm()).item() < 1e-3


def test_the_sample_of_grasp(run):
    made = recipe(grasp_samples_per_class=6)
    first, second = made.grasp_sample(run, 0)
    assert first["labels"].bincount().tolist() == second["labels"].bincount().tolist() == [3] * 10
    first, second = replace(made, grasp_halves="sorted").grasp_sample(run, 0)
    assert set(first["labels"].tolist()) == set(range(5)) and set(second["labels"].tolist()) == set(range(5, 10))
    with pytest.raises(UserError, match="--grasp_samples_per_class 31: a class has 30"):
        list(replace(made, grasp_samples_per_class=31).grasp_sample(run, 0))


def test_magnitude_is_trained_after_pruning_as_long_and_as_fast_as_all_others(run, monkeypatch):
    made, trained = recipe(density=0.1), {}

    def record(model, key, seed, *, masks=None, schedule=None, **_):
        trained[key] = (schedule or made.training, {name: mask.clone() for name, mask in masks.items()})
        return model

    monkeypatch.setattr(run, "train", record)
    monkeypatch.setattr(run, "trained", lambda variant, seed: tiny())
    for variant in (made.method, MAGNITUDE):
        made.make(run, variant, 0)
    (own, random), (schedule, masks) = trained[made.method], trained[MAGNITUDE]
    assert schedule == own == made.training
    assert sum(mask.sum() for mask in masks.values()) == sum(mask.sum() for mask in random.values())
    for name, mask in masks.items():
        weight = tiny().get_parameter(name).abs()
        assert not mask.any() or mask.all() or weight[mask].min() >= weight[~mask].max()


# ------------------------------------------------------------------------------------------ evaluation beyond accuracy


def test_detection_calibration_and_attacks(run):
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(4000, generator=generator)
    assert image_metrics.auroc(same[:2000], same[2000:])[0] == pytest.approx(0.5, abs=0.02)
    assert image_metrics.auroc(same, same)[0] == pytest.approx(0.5)
    assert image_metrics.auroc(same + 100, same)[0] == 1
    probabilities = torch.rand(200_000, generator=generator) * 0.5 + 0.5
    labels = (torch.rand(200_000, generator=generator) > probabilities).long()  # right as often as it says
    assert image_metrics.ece(torch.stack([probabilities, 1 - probabilities], 1).log(), labels) < 0.01

    model = tiny(14, 8).eval()
    train(
        model,
        run.domain.train_images,
        run.domain.validation,
        Schedule(2, 50, 0.05),
        run.state / "c",
        seed=0,
    )
    images = ImageTensors(run.domain.data.test, run.domain.processor)

    def accuracy(attack: str, epsilon: float) -> float:
        survived = image_metrics.survives(model, images, attack, epsilon=epsilon)
        return survived.double().mean().item()

    clean = image_metrics.correct(image_metrics.predict(model, images), images.labels).double().mean().item()
    assert clean > 0.3
    assert accuracy("fgsm", 0.0) == accuracy("pgd", 0.0) == clean
    falling = [accuracy("pgd", e / 255) for e in (1, 2, 4, 8)]
    assert all(b <= a + 0.005 for a, b in zip(falling, falling[1:], strict=False)) and falling[-1] <= clean
    assert all(accuracy("pgd", e / 255) <= accuracy("fgsm", e / 255) for e in (4, 8))
    pixels = images.pixels(list(range(8)))
    moved = image_metrics.pgd(model, images.normalize, pixels, images.labels[:8], 8 / 255)
    assert moved.min() >= 0 and moved.max() <= 1 and (moved - pixels).abs().max() <= 8 / 255 + 1e-6


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"density": 0.0}, "--density 0.0"),
        ({"density": 1.5}, "--density 1.5"),
        ({"fc_density": 0.5}, "--fc_density 0.5: it is for --ratio erk_plus"),
        ({"mask_seed": -1}, "--mask_seed -1"),
        ({"snip_batches": 0}, "--snip_batches 0"),
        ({"grasp_temp": 0.0}, "--grasp_temp 0.0"),
        ({"more_densities": [2.0]}, "--more_densities 2.0"),
        ({"baselines": ["magic"]}, "--baselines magic: one of uniform"),
        ({"baselines": ["erk"]}, "--baselines erk: one of uniform"),  # it is the recipe's own
        ({"schedule": "step", "lr_drops": [99]}, r"--lr_drops \[99\]"),
        ({"exclude": "("}, r"--exclude \(: no regular expression"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        made = recipe(**flags)
        made.check()
        made.chosen_baselines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"density": 0.02, "ratio": "uniform_plus"}, "--ratio uniform_plus spends .* more is needed"),
        ({"density": 0.001}, "weights for 10 layers are too few"),
        ({"ratio": "grasp", "grasp_samples_per_class": 99}, "a class has 30 training images"),
        ({"exclude": "."}, "no convolution or linear layer is left"),
        ({"more_densities": [0.001]}, "weights for 10 layers are too few"),
        ({"more_models": ["resnet-9"]}, "--more_models resnet-9: there is no such depth"),
        ({"more_models": ["vgg-11"], "density": 0.002, "ratio": "erk_plus"}, "--ratio erk_plus spends"),
        ({"ratio": "snip", "density": 0.001}, "weights for 10 layers are too few"),
        ({"baselines": [SMALL], "density": 0.004}, "even the smallest widths need"),
    ],
)
def test_impossible_budgets_are_refused_before_any_work(run, flags, message):
    alone = {"baselines": ["none"], "more_densities": [0.0], "more_models": ["none"]}
    with pytest.raises(UserError, match=message):
        recipe(**alone | flags).check_base(run)


def test_grasp_finds_its_images_among_those_that_are_trained_on(run):
    made = recipe(ratio="grasp", grasp_samples_per_class=8, train_items=60, more_models=["none"])
    fewer = TrainedRun(made, made.domain(), World())
    fewer.domain.data = run.domain.data
    with pytest.raises(UserError, match=r"a class has \d training images"):
        made.check_base(fewer)
    made.check_base(run)


def test_no_path_yields_an_empty_tensor(run):
    """Not even scores that leave a layer out."""
    made, model = recipe(ratio="snip", density=0.02, mask_sampling="bernoulli"), tiny()
    layers = made.prunable(model)
    starving = dict.fromkeys(layers, 0.0) | {"classifier.1.weight": 1.0}
    for sampling in ("exact", "bernoulli"):
        counts = replace(made, mask_sampling=sampling).counts(layers, starving, 0)
        assert min(counts.values()) == 1
        assert all(mask.any() for mask in made.masks(layers, counts, 0).values())
    scores = {name: torch.zeros(layer.shape) for name, layer in layers.items()}
    scores["classifier.1.weight"] += torch.rand(scores["classifier.1.weight"].shape)
    assert min(made.counts(layers, keep_fractions(scores, 0.02), 0).values()) >= 1


def test_live_weights_are_those_on_a_path():
    model = tiny()
    layers = recipe().prunable(model)
    total = sum(layer.size for layer in layers.values())
    masks = {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in layers.items()}
    assert live_weights(model, masks) == total
    inner = "resnet.encoder.stages.1.layers.0.layer.{}.convolution.weight"
    masks[inner.format(0)][2] = False  # a channel inside a block that nothing writes: 4 * 9 weights, and
    assert live_weights(model, masks) == total - 4 * 9 - 8 * 9  # those that read it


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run):
    """A data set as a folder of images, and a finished run on it with two seeds."""
    root = tmp_path_factory.mktemp("run")
    for split, images in (("train", run.domain.data.train), ("test", run.domain.data.test)):
        for row, item in enumerate(images):
            place = root / "data" / split / run.domain.data.classes[item["label"]].replace(" ", "-")
            place.mkdir(parents=True, exist_ok=True)
            item["image"].save(place / f"{row}.png")
    return root


def flags(root: Path, output: str) -> list[str]:
    return [
        *("random-pruning", "--dataset", str(root / "data"), "--model", "resnet-8-8", "--density", "0.1"),
        *("--image_size", str(SIDE), "--grasp_samples_per_class", "5"),
        *("--epochs", "2", "--batch_size", "50", "--lr", "0.05", "--seeds", "2", "--eval", "accuracy", "ece"),
        *("--baselines", "uniform", SMALL, "magnitude", POSITIONS, "--more_densities", "0.3"),
        *("--more_models", "resnet-8-4", "--output", str(root / output)),
    ]


def test_command_line_makes_measures_and_describes_a_checkpoint(folder, capsys, monkeypatch):
    from zoo.record.verify import verify

    main(flags(folder, "out"))
    out = folder / "out"
    assert capsys.readouterr().out.strip().endswith(str(out))
    report = json.loads((out / "report.json").read_text())
    assert list(report["baselines"]) == ["uniform", SMALL, "magnitude", POSITIONS]
    assert report["seeds"] == [0, 1] and report["compressed"]["accuracy"]["n_of"] == "seeds"
    assert report["compressed"]["accuracy"]["value"] > 0.15  # chance is 0.1
    config = json.loads((out / "config.json").read_text())["compression_config"]
    layers = {row["name"]: row for row in report["layers"]}
    assert config["modules"].keys() == layers.keys() and len(layers) >= 9
    sizes = {name: row["d_out"] * row["d_in"] for name, row in layers.items()}
    kept = sum(row["nnz"] for row in layers.values())
    dense = {n: d for n, d in config["densities"].items() if n.removesuffix(".weight") not in layers}
    assert all(density == 1 for density in dense.values())  # stored as they are
    assert kept < 0.1 * sum(sizes.values()) + 1
    tensors = load_file(out / "model.safetensors")
    assert not any(name.endswith(("mask", "row_offsets")) for name in tensors)
    assert report["size"]["compressed_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["size"]["compressed_bytes"] < 0.2 * report["size"]["dense_bytes"]
    sweep = report["sweeps"]["Accuracy by density"]["series"]
    assert {name: [point["x"] for point in points] for name, points in sweep.items()} == {
        "erk": [0.1, 0.3, 1.0],
        "uniform": [0.1, 0.3, 1.0],
    }
    networks = report["sweeps"]["Accuracy by size of the network"]["series"]
    assert len(networks) == 2 and all(len(points) == 2 for points in networks.values())
    where = {row[0]: row for row in report["tables"]["Where the weights are"]["rows"]}
    total = int(where["dense"][1].replace(",", ""))
    assert int(where["random-pruning"][1].replace(",", "")) == round(0.1 * total)
    assert int(where[SMALL][1].replace(",", "")) <= round(0.1 * total)
    storage = {row[0]: int(row[1].replace(",", "")) for row in report["tables"]["Bytes of the pruned weights"]["rows"]}
    assert storage["seed"] == 4 * round(0.1 * total) < min(size for name, size in storage.items() if name != "seed")
    card = (out / "README.md").read_text()
    assert "random-pruning" in card and "$" not in card.split("---")[2]
    findings = verify(out)
    assert all(finding.ok for finding in findings), [str(finding) for finding in findings]


def test_a_killed_run_resumes_to_the_same_checkpoint(folder, monkeypatch):
    main_flags = [*flags(folder, "whole"), "--overwrite"]
    main_flags[main_flags.index("--seeds") + 1] = "1"
    short = [*main_flags[: main_flags.index("--baselines")], "--baselines", "none", "--more_densities", "0"]
    short += ["--more_models", "none"]

    def to(output: str, *more: str) -> Path:
        main([*short, "--output", str(folder / output), *more])
        return folder / output

    whole = to("whole", "--overwrite")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RandomPruning, "pack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        to("killed")
    resumed = to("killed", "--resume")
    first, second = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    shutil.rmtree(whole)
    shutil.rmtree(resumed)
