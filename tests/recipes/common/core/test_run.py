"""The command line on a tiny model: end to end, killed and resumed, on two processes, and with bad input."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from launching import TWO_PROCESSES
from safetensors.torch import load_file, save_file
from tiny_models import make_base
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401

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
    return ["-m", "recipes", "armor", *(str(part) for pair in flags.items() for part in pair), *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run(arguments, launcher=(sys.executable,), **environment):
    return subprocess.run([*launcher, *arguments], env=ENVIRONMENT | environment, capture_output=True, text=True)


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
        "magnitude",
        "wanda",
        "nowag",
        "sparsegpt",
        "sparsegpt+rank",
    }
    for row in report["layers"]:
        assert row["loss_final"] <= row["loss_init"] and 0 < row["output_error"] < 1
    assert len(report["layers"]) == 28
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "SlimQwen2ForCausalLM"
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert not output.with_name("armor.state").exists()


def test_its_own_claims_verify_and_forged_ones_do_not(finished):
    output, _ = finished
    honest = run(["-m", "recipes", "verify", str(output)])
    assert honest.returncode == 0, honest.stdout + honest.stderr
    card = (output / "README.md").read_text()
    try:
        (output / "README.md").write_text(card.replace("perplexity", "perfection", 1))
        forged = run(["-m", "recipes", "verify", str(output), "--static"])
    finally:
        (output / "README.md").write_text(card)
    assert forged.returncode == 1 and "FAIL" in forged.stdout


def test_killed_and_resumed_gives_the_same_weights(base, finished, tmp_path):
    output = tmp_path / "armor"
    for progress in (3, 60):  # matrices stored when the run is killed
        more = ["--resume"] if output.with_name("armor.state").exists() else []
        process = subprocess.Popen(
            [sys.executable, *command(base, output, *more)], env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        state = tmp_path / "armor.state"
        while process.poll() is None and len(list(state.rglob("*.safetensors"))) < progress:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    refused = run(command(base, output))
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run(command(base, output, "--resume", iters=5))
    assert changed.returncode == 2 and "other values of iters" in changed.stderr
    resumed = run(command(base, output, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert weights(output) == weights(finished[0])


def test_a_run_killed_after_its_last_move_is_finished_by_resume(base, finished, tmp_path):
    output, state = tmp_path / "armor", tmp_path / "armor.state"
    shutil.copytree(finished[0], output)
    state.mkdir()
    shutil.copy(output / "recipe.yaml", state)
    refused = run(command(base, output, "--resume"))
    assert refused.returncode == 2 and "it exists; pass --overwrite" in refused.stderr  # not known to be this run's
    (state / "placed.json").write_text(json.dumps([str(output)]))
    process = run(command(base, output, "--resume"))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == str(output) and not state.exists()
    assert weights(output) == weights(finished[0])


def test_two_processes_give_the_same_weights(base, finished, tmp_path):
    output = tmp_path / "armor"
    process = run(command(base, output, "--baselines", "none"), launcher=TWO_PROCESSES)
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
        ({"seeds": "0"}, "--seeds 0: 1 or more is needed"),
        ({"seed": str(2**64)}, "a whole number of 63 bits is needed"),
        ({"device": "banana"}, "--device banana: cpu, cuda or cuda:N is needed"),
        ({"workers": "-3"}, "--workers -3: 0 or more is needed"),
        ({"eval_windows": "0"}, "--eval-windows 0"),
        ({"eval_seqlen": "100000000"}, "takes 128 tokens at most"),
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


def test_a_base_that_lacks_a_tensor_is_refused_before_any_work(base, tmp_path):
    folder = broken(base, tmp_path, lambda tensors: tensors.pop("model.layers.3.mlp.down_proj.weight"))
    process = run(command(base, tmp_path / "out", model=folder))
    assert process.returncode == 2 and "the weight model.layers.3.mlp.down_proj.weight is missing" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_existing_output_is_kept(base, finished):
    output, _ = finished
    before = weights(output)
    process = run(command(base, output))
    assert process.returncode == 2 and "--overwrite" in process.stderr
    assert weights(output) == before
