"""Domains: built from settings alone, and what they say of a model."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_base

import zoo  # noqa: F401
from recipes.common.core.cli import parse
from recipes.common.domains.classification import Classification
from recipes.common.domains.language import Language
from zoo.errors import UserError


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    (folder / "calibration.txt").write_text("some plain words to calibrate on " * 40)
    base = make_base(folder / "model", "llama")
    flags = [
        "--model",
        str(base),
        "--calibration",
        str(folder / "calibration.txt"),
        "--seqlen",
        "32",
        "--tasks",
        "none",
    ]
    return parse("armor", [*flags, "--eval_seqlen", "64", "--eval_windows", "2"]).domain()


def test_the_loss_of_a_batch_is_what_perplexity_is_made_of(language):
    model = language.load(language.base.path)
    for name, metric in language.metrics(model).items():
        batch = {"input_ids": language.windows[name.partition("/")[2]]}
        assert math.exp(language.loss(model, batch).item()) == pytest.approx(metric["value"], rel=1e-5)
    language.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_domain_needs_settings_alone(language):
    """`verify` has those of a report, and the tokenizer of the folder, but no base model that it could reach."""
    gone = Language(language.settings | {"model": "org/gone"})
    with pytest.raises(UserError, match="org/gone"):
        gone.base  # noqa: B018
    again = replace(gone, folder=language.base.path)
    assert {name: rows.tolist() for name, rows in again.windows.items()} == {
        name: rows.tolist() for name, rows in language.windows.items()
    }
    assert again.metrics(language.load(language.base.path)) == language.metrics(language.load(language.base.path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seqlen": 129}, "--seqlen 129: .* takes 128 tokens at most"),
        ({"eval_seqlen": 200}, "--eval_seqlen 200: .* takes 128 tokens at most"),
        ({"eval_windows": 0}, "--eval-windows 0"),
        ({"task_limit": 0}, "--task_limit 0"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"calibration": "nothing.txt"}, "nothing.txt"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_at_once(language, changes, said):
    with pytest.raises(UserError, match=said):
        Language(language.settings | changes).check()


def test_rows_say_what_was_used(language):
    model = language.load(language.base.path)
    rows = language.data_rows(language.metrics(model))
    assert rows["calibration"]["windows"] == language.settings["nsamples"] and rows["calibration"]["seqlen"] == 32
    assert {name: row["windows"] for name, row in rows["evaluation"].items()} == dict.fromkeys("ABC", 2)
    assert language.pins() == {"base_model": language.base.sha256, "calibration_text": language.text.sha256}


def test_a_classifiers_loss_smooths_its_labels_and_listens_to_its_teacher():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([0, 2])}

    def speaker(values, training):
        model = torch.nn.Module()
        model.forward = lambda pixel_values: type("Output", (), {"logits": values})()
        return model.train(training)

    p = logits.double().log_softmax(-1)
    plain = -(p[0, 0] + p[1, 2]).item() / 2
    smooth = sum(-(0.9 * p[i, y] + 0.1 * p[i].mean()).item() for i, y in enumerate((0, 2))) / 2
    assert Classification.training_loss(speaker(logits, True), batch)[0].item() == pytest.approx(plain, rel=1e-6)
    assert Classification.training_loss(speaker(logits, True), batch, 0.1)[0].item() == pytest.approx(smooth, rel=1e-6)
    taught = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    q = taught.double().log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum().item() / 2
    teacher = speaker(taught, False)
    found = Classification.training_loss(speaker(logits, True), batch, 0.0, teacher)[0].item()
    assert found == pytest.approx(0.5 * plain + 0.5 * divergence, rel=1e-6)
    measured = Classification.training_loss(speaker(logits, False), batch, 0.0, teacher)[0].item()
    assert measured == pytest.approx(plain, rel=1e-6), "a teacher speaks only while its pupil trains"
