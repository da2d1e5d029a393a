"""Metrics of classifiers: against their definitions, against scikit-learn, and the bounds that attacks must keep."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, nn
from torch.nn import functional as F

from recipes.common.data.image_batches import ImageTensors, make_processor
from recipes.common.data.images import load_images
from recipes.common.metrics import images as image_metrics
from recipes.common.metrics.fidelity import Reference
from recipes.common.metrics.images import (
    DETECTION,
    METRICS,
    auroc,
    brier,
    check_metrics,
    confidence,
    correct,
    ece,
    ece_parts,
    energy,
    evaluation_rows,
    fgsm,
    fit_temperature,
    foreign_batches,
    foreign_sets,
    measure_images,
    nll,
    passes_at_95,
    pgd,
    predict,
    survives,
)
from zoo.errors import UserError
from zoo.record.card import metric_source
from zoo.record.compare import compare
from zoo.record.format import FIDELITY, metric_title
from zoo.record.schema import _check_metric


class Small(nn.Module):
    """A classifier with batch normalisation that calls and answers as transformers' do."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        )

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.body(pixel_values))


@pytest.fixture(scope="module")
def data():
    """easy-VQA with fewer images."""
    data = load_images("easy-vqa")
    few = {split: getattr(data, split).select(range(n)) for split, n in (("train", 800), ("test", 200))}
    return replace(data, **few)


@pytest.fixture(scope="module")
def processor(data):
    return make_processor(data, side=24)


@pytest.fixture(scope="module")
def model(data, processor):
    torch.manual_seed(0)
    model, images = Small(24), ImageTensors(data.train, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(64):
            inputs = images.normalize(images.pixels(rows.tolist()))
            loss = F.cross_entropy(model(inputs).logits, images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def test_images(data, processor):
    return ImageTensors(data.test, processor)


def random_logits(n: int, classes: int, scale: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels drawn from the very softmax of the logits: a perfectly calibrated predictor."""
    generator = Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------- calibration


def test_ece_of_a_perfectly_calibrated_predictor_is_nearly_zero():
    logits, labels = random_logits(50_000, 10)
    assert ece(logits, labels) < 0.01
    assert ece(3 * logits, labels) > 0.1 and ece(logits / 3, labels) > 0.1


def test_ece_is_its_definition():
    confidences = torch.tensor([0.55, 0.58, 0.95, 0.99, 0.61])
    logits = torch.stack([confidences.log(), (1 - confidences).log()], 1)
    labels = torch.tensor([0, 1, 0, 0, 1])  # right, wrong, right, right, wrong
    # bins of 1/15: .55 and .58 in (.533, .6], .61 in (.6, .667], .95 and .99 in (.933, 1]
    expected = (abs(1 - 1.13) + abs(0 - 0.61) + abs(2 - 1.94)) / 5
    assert math.isclose(ece(logits, labels), expected, rel_tol=1e-6)
    one_bin = abs(3 - 3.68) / 5
    assert math.isclose(ece(logits, labels, bins=1), one_bin, rel_tol=1e-6)
    certain = torch.tensor([[100.0, 0.0]])
    assert ece(certain, torch.tensor([0])) < 1e-9 and ece(certain, torch.tensor([1])) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_spoilt_the_logits_is_found(temperature):
    logits, labels = random_logits(20_000, 10)
    fitted = fit_temperature(temperature * logits, labels)
    assert math.isclose(fitted, temperature, rel_tol=0.03)
    losses = [nll(temperature * logits / t, labels).mean() for t in (0.97 * fitted, fitted, 1.03 * fitted)]
    assert losses[1] == min(losses)
    assert ece(temperature * logits / fitted, labels) < 0.01


def test_a_temperature_without_a_minimum_stays_finite():
    logits = torch.eye(4) * 5
    assert math.isclose(fit_temperature(logits, torch.arange(4)), 0.01, rel_tol=1e-6)
    assert math.isclose(fit_temperature(logits, torch.arange(4).roll(1)), 100, rel_tol=1e-6)


def test_likelihood_and_brier_score_agree_with_scikit_learn():
    logits, labels = random_logits(500, 7)
    probabilities = logits.double().softmax(1).numpy()
    assert math.isclose(nll(logits, labels).mean(), sklearn.metrics.log_loss(labels, probabilities), rel_tol=1e-5)
    one_hot = np.eye(7)[labels]
    expected = 7 * np.mean(
        [sklearn.metrics.mean_squared_error(t, p) for t, p in zip(one_hot, probabilities, strict=True)]
    )
    assert math.isclose(brier(logits, labels).mean(), expected, rel_tol=1e-5)
    for k in (1, 3):
        expected = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=k, labels=range(7))
        assert math.isclose(correct(logits, labels, k).double().mean(), expected)


# ------------------------------------------------------------------------------------------------------ foreign images

scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_auroc_is_the_chance_that_the_own_image_scores_higher(inside, outside):
    wins = inside[:, None] > outside
    ties = inside[:, None] == outside
    area, error = auroc(inside, outside)
    assert math.isclose(area, (wins.double() + ties.double() / 2).mean(), abs_tol=1e-12)
    assert 0 <= error < 1
    assert math.isclose(auroc(outside, inside)[0], 1 - area, abs_tol=1e-12)


def test_auroc_of_identical_sets_is_a_half_and_of_separable_ones_one():
    a, b = torch.randn(2, 5000, generator=Generator().manual_seed(0))
    assert abs(auroc(a, a)[0] - 0.5) < 1e-12 and abs(auroc(a, b)[0] - 0.5) < 0.01
    assert auroc(a.abs() + 1e-3, -b.abs()) == (1.0, 0.0) and auroc(-b.abs(), a.abs() + 1e-3)[0] == 0.0
    assert auroc(torch.ones(9), torch.ones(5))[0] == 0.5
    labels = [1] * 5000 + [0] * 5000
    assert math.isclose(auroc(a + 0.7, b)[0], sklearn.metrics.roc_auc_score(labels, torch.cat([a + 0.7, b])))


def test_the_standard_error_of_auroc_is_how_far_other_draws_scatter():
    generator = Generator().manual_seed(0)
    drawn = [
        auroc(torch.randn(300, generator=generator) + 1, torch.randn(120, generator=generator)) for _ in range(400)
    ]
    areas, errors = np.array(drawn).T
    assert abs(errors.mean() / areas.std(ddof=1) - 1) < 0.12


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_95_percent_of_the_own_images_pass_the_threshold_and_no_higher_one_would_do(inside, outside):
    passed = passes_at_95(inside, outside)
    feasible = [t for t in inside.tolist() if (inside >= t).sum() >= 0.95 * len(inside)]
    assert passed.tolist() == (outside >= max(feasible)).tolist()


def test_scores_are_the_largest_softmax_output_and_the_energy():
    logits, _ = random_logits(50, 6)
    torch.testing.assert_close(confidence(logits).exp(), logits.double().softmax(1).amax(1))
    torch.testing.assert_close(energy(logits), logits.double().exp().sum(1).log())
    nearly_certain = torch.tensor([[90.0, 0.0], [95.0, 0.0], [20.0, 0.0], [25.0, 0.0]])
    assert (confidence(nearly_certain)[2:].diff() > 0).all()  # a float32 softmax would give 1 for both


def test_foreign_images_are_what_they_are_called(data, processor, test_images):
    assert foreign_sets(data) == ["inverted", "uniform", "gaussian", "cifar10"]
    assert foreign_sets(load_images("cifar10"))[-1] == "easy-vqa"
    pixels = {}
    for name in foreign_sets(data):
        batches, total = foreign_batches(name, test_images, 64, seed=0)
        pixels[name] = torch.cat(list(batches))
        assert pixels[name].shape == (total, 3, 24, 24)
        assert pixels[name].min() >= 0 and pixels[name].max() <= 1
    own = test_images.pixels(list(range(200)))
    torch.testing.assert_close(pixels["inverted"] + own, torch.ones_like(own))
    assert len(pixels["uniform"]) == len(pixels["gaussian"]) == 200 and len(pixels["cifar10"]) == 2000
    bins = pixels["uniform"].histc(10, 0, 1) / pixels["uniform"].numel()
    assert (bins - 0.1).abs().max() < 0.005
    expected = (test_images.mean + test_images.std * torch.randn(3, 100_000)[..., None]).clamp(0, 1)
    for statistic in (torch.mean, torch.std):
        found = torch.stack([statistic(pixels["gaussian"][:, c]) for c in range(3)])
        torch.testing.assert_close(found, torch.stack([statistic(e) for e in expected]), atol=0.01, rtol=0)
    again = torch.cat(list(foreign_batches("uniform", test_images, 64, seed=0)[0]))
    other = torch.cat(list(foreign_batches("uniform", test_images, 64, seed=1)[0]))
    assert torch.equal(again, pixels["uniform"]) and not torch.equal(other, again)


# -------------------------------------------------------------------------------------------------------------- attacks


def accuracy(model, images, attack, epsilon):
    return survives(model, images, attack, epsilon=epsilon).double().mean().item()


@pytest.mark.slow
def test_an_attack_of_no_strength_gives_clean_accuracy(model, test_images):
    clean = correct(predict(model, test_images), test_images.labels)
    assert 0.6 < clean.double().mean() < 1
    for attack in ("fgsm", "pgd"):
        assert torch.equal(survives(model, test_images, attack, epsilon=0.0), clean)


def test_pgd_does_not_get_weaker_with_epsilon_and_is_no_weaker_than_fgsm(model, test_images):
    strengths = [epsilon / 255 for epsilon in (1, 2, 4, 8)]
    robust = [accuracy(model, test_images, "pgd", epsilon) for epsilon in strengths]
    assert all(later <= earlier + 0.005 for earlier, later in zip(robust, robust[1:], strict=False))
    for found, epsilon in zip(robust, strengths, strict=True):
        assert found <= accuracy(model, test_images, "fgsm", epsilon) + 0.0051  # one image of 200, as between strengths
    assert robust[-1] < accuracy(model, test_images, "fgsm", 0.0) - 0.2


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.3])
def test_attacked_pixels_stay_in_range_and_in_the_ball(model, test_images, epsilon):
    rows = list(range(40))
    pixels, labels = test_images.pixels(rows), test_images.labels[rows]
    for attack in (fgsm, pgd):
        moved = attack(model, test_images.normalize, pixels, labels, epsilon)
        assert moved.min() >= 0 and moved.max() <= 1
        assert (moved - pixels).abs().max() <= epsilon + 1e-6
        assert (moved - pixels).abs().max() > 0.9 * epsilon  # measured in pixels, not in normalised units
        assert pixels.grad is None and not moved.requires_grad


class Linear(nn.Module):
    """Two classes, logits (0, w.x + b) in pixel space."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, generator=Generator().manual_seed(1)) / 10)

    def forward(self, pixel_values):
        margin = (pixel_values - 0.5).flatten(1) @ self.weight
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(margin), margin], 1))


def test_on_a_linear_model_both_attacks_shrink_the_margin_by_epsilon_times_its_l1_norm():
    model, epsilon = Linear().eval(), 8 / 255
    pixels = 0.2 + 0.6 * torch.rand(300, 3, 4, 4, generator=Generator().manual_seed(0))  # never near 0 or 1
    labels = torch.arange(300) % 2
    sign = 2.0 * labels - 1
    margin = sign * model(pixels).logits[:, 1]
    expected = margin - epsilon * model.weight.abs().sum()
    for attack in (fgsm, pgd):
        moved = attack(model, lambda x: x, pixels, labels, epsilon)
        torch.testing.assert_close(sign * model(moved).logits[:, 1], expected, atol=1e-5, rtol=1e-4)


def test_an_overconfident_model_is_attacked_all_the_same():
    """Where its softmax rounds to 1, a gradient in single precision would lack the label's own logit."""
    model, pixels, labels = Linear().eval(), torch.full((1, 3, 4, 4), 0.5), torch.tensor([1])
    three = nn.Parameter(torch.randn(3, 48, generator=Generator().manual_seed(2)))

    def forward(pixel_values):
        return SimpleNamespace(logits=pixel_values.flatten(1) @ three.T + torch.tensor([0.0, 20.0, 0.0]))

    model.forward = forward
    moved = fgsm(model, lambda x: x, pixels, labels, 0.01)
    weights = forward(pixels).logits.double().softmax(1) - F.one_hot(labels, 3)
    expected = (weights @ three.double()).sign().view_as(pixels)
    torch.testing.assert_close((moved - pixels) / 0.01, expected.float(), atol=1e-4, rtol=0)


def test_pgd_starts_at_random_and_repeats_with_its_seed(model, test_images):
    pixels, labels = test_images.pixels([0, 1]), test_images.labels[:2]

    def start(seed):
        generator = Generator().manual_seed(seed)
        return pgd(model, test_images.normalize, pixels, labels, 0.1, steps=0, generator=generator)

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))
    inner = (pixels > 0.1) & (pixels < 0.9)
    spread = (start(0) - pixels)[inner]
    assert spread.min() < -0.09 and spread.max() > 0.09 and spread.mean().abs() < 0.02


def test_measuring_changes_no_statistics_and_no_mode(model, data, processor):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        measure_images(model, data, ["accuracy", "fgsm"], processor, attacked=20)
        assert model.training is training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def measured(model, data, processor):
    return measure_images(model, data, list(METRICS), processor, attacked=50)


def test_every_metric_is_measured_under_its_key(measured, data):
    single = ["accuracy", "top5", "nll", "brier", "ece", "ece_scaled"]
    detection = [f"{kind}/{name}" for kind in DETECTION for name in foreign_sets(data)]
    assert list(measured) == [*single, *detection, "fgsm", "pgd"]
    for key, m in measured.items():
        _check_metric(m, key, seeds=1)
        assert m["n_of"] == "items" and m["n"] == {"fgsm": 50, "pgd": 50}.get(key, 2000 if "cifar10" in key else 200)
        assert m["higher_is_better"] is (key in ("accuracy", "top5", "fgsm", "pgd") or key.startswith("auroc"))
        assert m["spread"] is not None


def test_the_numbers_are_those_of_the_logits(measured, model, data, processor, test_images):
    logits, labels = predict(model, test_images, batch_size=7), test_images.labels
    right = (logits.argmax(1) == labels).double()
    n, p = 200, right.mean().item()
    assert measured["accuracy"]["value"] == p
    assert math.isclose(measured["accuracy"]["spread"], math.sqrt(p * (1 - p) / (n - 1)), rel_tol=1e-9)
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    assert math.isclose(measured["nll"]["value"], losses.mean(), rel_tol=1e-5)
    assert math.isclose(measured["nll"]["spread"], losses.std() / math.sqrt(n), rel_tol=1e-4)
    assert math.isclose(measured["ece"]["value"], ece(logits, labels), rel_tol=1e-4)
    validation = ImageTensors(data.validation, processor)
    temperature = fit_temperature(predict(model, validation), validation.labels)
    assert math.isclose(measured["ece_scaled"]["value"], ece(logits / temperature, labels), rel_tol=1e-3)
    noise = torch.cat(list(foreign_batches("uniform", test_images, 256, seed=0)[0]))
    with torch.inference_mode():
        foreign = model(test_images.normalize(noise)).logits
    for ending, score in (("", confidence), ("_energy", energy)):
        area = sklearn.metrics.roc_auc_score([1] * 200 + [0] * 200, torch.cat([score(logits), score(foreign)]))
        assert math.isclose(measured[f"auroc{ending}/uniform"]["value"], area, abs_tol=1e-4)
    assert measured["pgd"]["value"] <= measured["fgsm"]["value"] <= measured["accuracy"]["value"]


def test_the_same_call_gives_the_same_numbers(measured, model, data, processor):
    some = ["accuracy", "auroc", "pgd"]
    again = measure_images(model, data, some, processor, attacked=50)
    assert again == {key: measured[key] for key in again}
    other = measure_images(model, data, ["auroc"], processor, seed=1)
    assert other["auroc/uniform"] != measured["auroc/uniform"]
    assert other["auroc/inverted"] == measured["auroc/inverted"]


def test_only_what_was_asked_for_is_measured(model, data, processor, monkeypatch):
    monkeypatch.setattr(image_metrics, "survives", None)
    monkeypatch.setattr(image_metrics, "foreign_batches", None)
    assert list(measure_images(model, data, ["brier", "nll"], processor)) == ["nll", "brier"]


def test_no_top_5_of_ten_classes(data, processor):
    ten = replace(data, classes=data.classes[:10])
    torch.manual_seed(0)
    assert list(measure_images(Small(24), ten, ["accuracy"], processor)) == ["accuracy"]


def test_a_report_describes_every_set_and_titles_every_metric(measured, data):
    rows = evaluation_rows(data, measured)
    assert list(rows) == ["test", *foreign_sets(data), "fgsm", "pgd"]
    report = {"data": {"evaluation": rows}}
    for key in measured:
        kind, row = metric_source(report, key)
        assert row["items"] == measured[key]["n"]
        assert row is rows[key.partition("/")[2] or (key if key in ("fgsm", "pgd") else "test")]
    assert rows["inverted"]["name"] == f"{data.name}, inverted" and rows["uniform"]["sha256"] is None
    titles = [metric_title(key) for key in measured]
    assert len(set(titles)) == len(titles)
    assert {"accuracy", "ECE", "AUROC against cifar10", "accuracy under PGD"} <= set(titles)
    assert not any("_" in title for title in titles)


def test_a_likelihood_gain_within_the_scatter_of_its_items_is_undecided(measured):
    better = {key: m | {"value": m["value"] - 0.5 * (m["spread"] or 0)} for key, m in measured.items()}
    much_better = {key: m | {"value": m["value"] - 4 * (m["spread"] or 0)} for key, m in measured.items()}
    for key in ("nll", "brier"):
        for ours, verdict in ((better, "undecided"), (much_better, "better")):
            report = {"dense": measured, "compressed": ours, "baselines": {"same": measured}}
            assert compare(report, key, "same") == verdict


def test_means_come_with_a_value_for_every_image(measured):
    for key, m in measured.items():
        if not key.startswith("auroc"):
            (raw,) = m["raw"]
            assert len(raw) == m["n"] and sum(raw) / len(raw) == pytest.approx(m["value"], abs=1e-6), key
    assert set(measured["accuracy"]["raw"][0]) <= {0, 1} and "raw" not in measured["auroc/uniform"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 1)), min_size=1, max_size=40))
def test_the_parts_of_ece_have_it_as_their_mean(rows):
    logits, labels = torch.tensor([row[:2] for row in rows]), torch.tensor([row[2] for row in rows])
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * 15).ceil()
    gaps = [(confidence[place == b] - (predicted == labels)[place == b].double()).sum().abs().item() for b in range(16)]
    assert ece_parts(logits, labels).mean().item() == pytest.approx(sum(gaps) / len(rows), abs=1e-9)


def test_classifiers_are_compared_with_the_dense_one(model, data, processor, tmp_path):
    dense = measure_images(model, data, ["accuracy"], processor, reference=Reference(tmp_path, writing=True))
    assert {key: dense[key]["value"] for key in FIDELITY} == {"kl": 0, "kl_median": 0, "kl_p99": 0, "agreement": 1}
    torch.manual_seed(5)
    other = Small(24)
    found = measure_images(other, data, ["accuracy"], processor, reference=Reference(tmp_path))
    test = ImageTensors(data.test, processor)
    p, q = (predict(one, test).double().log_softmax(1) for one in (model, other))
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert found["kl"]["value"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["kl_median"]["value"] == pytest.approx(kl.median().item(), rel=1e-2)
    assert found["kl_p99"]["value"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-2)
    same = (p.argmax(1) == q.argmax(1)).double()
    assert found["agreement"]["value"] == pytest.approx(same.mean().item()) and found["agreement"]["n"] == len(test)
    assert metric_source({"data": {"evaluation": {"test": data.row("test")}}}, "kl")[1]["items"] == len(test)


def test_mistakes_are_told(model, data, processor):
    with pytest.raises(UserError, match="--metrics f1: no such metric; there are accuracy, nll"):
        measure_images(model, data, ["accuracy", "f1"], processor)
    check_metrics(list(METRICS))

    class Broken(Small):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=torch.full((len(pixel_values), 24), math.nan))

    with pytest.raises(UserError, match="outputs are NaN"):
        measure_images(Broken(24), data, ["accuracy"], processor)
