"""The command line on a tiny model: end to end, on two processes, and with bad input."""

import hashlib
import json

import pytest
import torch
from launching import RECIPES, TWO_PROCESSES, run
from safetensors.torch import load_file, save_file
from tiny_models import make_base
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401

pytestmark = pytest.mark.slow

WORDS = "a quick test of how the recipe runs from start to end with some plain words "
SMALL = {
    "--nsamples": 8,
    "--seqlen": 48,
    "--block": 16,
    "--iters": 4,
    "--eval_windows": 2,
    "--eval_seqlen": 64,
    "--tasks": "none",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "calibration.txt").write_text(WORDS * 40)
    return make_base(folder / "model", "qwen2", num_hidden_layers=4)


def command(base, output, *more, **changes):
    flags = SMALL | {"--model": base, "--calibration": base.parent / "calibration.txt", "--output": output}
    flags |= {f"--{key}": value for key, value in changes.items()}
    return [*RECIPES, "armor", *(str(part) for pair in flags.items() for part in pair), *more]


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "armor"
    process = run(command(base, output))
    assert process.returncode == 0, process.stderr
    return output, process


def test_end_to_end(finished):
    output, process = finished
    lines = process.stdout.splitlines()
    assert lines[-1] == str(output) and lines[0].startswith("needs about")
    assert sum(line.startswith("block ") for line in lines) == 4
    report = json.loads((output / "report.json").read_text())
    assert set(report["baselines"]) == {
        "armor-no-refit",
        "wanda",
        "nowag",
        "sparsegpt",
        "sparsegpt+rank",
        "gptq-4",
    }
    for row in report["layers"]:
        assert row["loss_final"] <= row["loss_init"] and 0 < row["output_error"] < 1
    for metrics in (report["compressed"], *report["baselines"].values()):
        assert 0 < metrics["kl_median"]["value"] < metrics["kl_p99"]["value"] and metrics["kl"]["n"] == 6
    assert report["dense"]["kl"]["value"] == 0 and report["paired"]["dense"]["kl"]["difference"] > 0
    assert report["paired"].keys() == {"dense", *report["baselines"]}
    assert len(report["layers"]) == 28
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "SlimQwen2ForCausalLM"
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert not output.with_name("armor.state").exists()


def test_its_own_claims_verify_and_forged_ones_do_not(finished):
    output, _ = finished
    honest = run([*RECIPES, "verify", str(output)])
    assert honest.returncode == 0, honest.stdout + honest.stderr
    assert "kl_p99: claimed" in honest.stdout and "measurements: measurements.json gives" in honest.stdout
    card = (output / "README.md").read_text()
    try:
        (output / "README.md").write_text(card.replace("perplexity", "perfection", 1))
        forged = run([*RECIPES, "verify", str(output), "--static"])
    finally:
        (output / "README.md").write_text(card)
    assert forged.returncode == 1 and "FAIL" in forged.stdout


def test_two_processes_give_the_same_weights(base, finished, tmp_path):
    output = tmp_path / "armor"
    process = run([*TWO_PROCESSES, *command(base, output, "--baselines", "none")[1:]])
    assert process.returncode == 0, process.stderr
    assert "2 processes share the work" in process.stdout
    assert weights(output) == weights(finished[0])


def broken(base, tmp_path, change):
    """A copy of the base whose tensors were changed."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "no-such-model"}, "no-such-model"),
        ({"block": "64"}, "block 64 does not divide its"),
        ({"calibration": "nothing.txt"}, "nothing.txt"),
        ({"nsamples": "5000"}, "5000"),
        ({"output": f"{__file__}/below-a-file"}, "cannot be written"),
        ({"include": "no_such_layer"}, "no linear layer"),
        ({"baselines": "oracle"}, "--baselines oracle"),
        ({"tasks": "no_such_task"}, "no_such_task"),
        ({"pattern": "4:2"}, "N:M with 0 < N < M"),
        ({"export": "compressed-tensors"}, "holds packed bits with integer zero points only"),
        ({"export": "onnx"}, "--export onnx: armor cannot write that, one of dense"),
        ({"push_to_hub": "notarepo"}, "a Hub id of the form org/name is needed"),
        ({"seeds": "0"}, "--seeds 0: a whole number from 1 to 100 is needed"),
        ({"seed": str(2**64)}, "a whole number from 0 to"),
        ({"device": "banana"}, "--device banana: cpu, cuda or cuda:N is needed"),
        ({"workers": "-3"}, "--workers -3: a whole number from 0 to 1,024 is needed"),
        ({"eval_windows": "0"}, "--eval_windows 0"),
        ({"eval_seqlen": "100000000"}, "a whole number from 2 to 16,777,216 is needed"),
        ({"include": "("}, "no regular expression"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(base, tmp_path, changes, said):
    flags = {"output": tmp_path / "out"} | changes
    process = run(command(base, flags.pop("output"), **flags))
    assert process.returncode == 2, process.stderr
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error and "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


def test_broken_weights_are_refused(base, tmp_path):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    folder = broken(base, tmp_path, poison)
    process = run(command(base, tmp_path / "out", model=folder))
    assert process.returncode == 2 and "model.layers.1.mlp.up_proj.weight holds NaN" in process.stderr
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    process = run(command(base, tmp_path / "out", model=folder))
    assert process.returncode == 2 and "safetensors" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_export_that_cannot_be_made_is_refused_before_any_work(base, tmp_path):
    gemma = make_base(tmp_path / "base" / "model", "gemma")
    process = run(command(base, tmp_path / "out", model=gemma, export="gguf-f16"))
    assert process.returncode == 2 and "gemma cannot be written as GGUF" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("lost", ["model.layers.3.mlp.down_proj.weight", "lm_head.weight"])
def test_a_base_that_lacks_a_tensor_is_refused_before_any_work(base, tmp_path, lost):
    folder = broken(base, tmp_path, lambda tensors: tensors.pop(lost))
    process = run(command(base, tmp_path / "out", model=folder))
    assert process.returncode == 2 and f"the weight {lost} is missing" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_existing_output_is_kept(base, finished):
    output, _ = finished
    before = weights(output)
    process = run(command(base, output))
    assert process.returncode == 2 and "--overwrite" in process.stderr
    assert weights(output) == before
