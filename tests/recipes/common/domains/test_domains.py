"""Domains: built from settings alone, and what they say of a model."""

import json
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


@pytest.mark.slow
def test_the_loss_of_a_batch_is_what_perplexity_is_made_of(language):
    model = language.load(language.base.path)
    for name, metric in language.metrics(model).items():
        batch = {"input_ids": language.windows[name.partition("/")[2]]}
        assert math.exp(language.loss(model, batch).item()) == pytest.approx(metric["value"], rel=1e-5)
    language.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
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


def test_a_model_is_compared_with_the_dense_one(language, tmp_path):
    dense, other = (language.load(language.base.path) for _ in range(2))
    reference = language.predictions(dense, tmp_path / "kept")
    assert not reference.writing and len(list(reference.folder.iterdir())) == 6
    size = sum(file.stat().st_size for file in reference.folder.iterdir())
    assert 0.9 * language.prediction_bytes < size < 1.1 * language.prediction_bytes
    same = language.metrics(dense, reference)
    assert same["kl"]["value"] < 1e-5 and same["agreement"]["value"] == 1
    other.lm_head.weight.data += 0.1 * torch.randn(
        other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
    )
    found = language.metrics(other, reference)
    p, q = (
        torch.cat([one(rows).logits[:, :-1].double().log_softmax(-1) for rows in language.windows.values()])
        for one in (dense, other)
    )
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found["kl"]["value"] == pytest.approx(kl.mean().item(), rel=5e-3) and found["kl"]["n"] == 6
    assert language.data_rows(found) == language.data_rows(language.metrics(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": "nul.txt"}, "full of NUL characters"),
        ({"seqlen": 129}, "--seqlen 129: .* takes 128 tokens at most"),
        ({"eval_seqlen": 200}, "--eval_seqlen 200: .* takes 128 tokens at most"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"calibration": "nothing.txt"}, "nothing.txt"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_at_once(language, changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nul.txt").write_bytes(b"\0" * 5000)
    with pytest.raises(UserError, match=said):
        Language(language.settings | changes).check()


@pytest.mark.slow
def test_it_calibrates_on_chats_as_the_model_speaks_them(language, tmp_path):
    chats = [[{"role": "user", "content": f"number {i}?"}, {"role": "assistant", "content": str(i)}] for i in range(99)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    made = Language(
        language.settings | {"calibration": str(tmp_path / "chats.jsonl"), "calibration_column": "messages"}
    )
    with pytest.raises(UserError, match="chat template"):
        made.check()
    again = Language(made.settings)
    again.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    again.check()
    assert again.text.text.startswith("<user>number 0?<assistant>0\n\n<user>number 1?")


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
