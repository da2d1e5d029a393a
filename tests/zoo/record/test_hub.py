"""Publishing and loading through the real Hub clients, against a Hub of our own on loopback, over LFS and over Xet."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from example_report import write_run
from hub_double import TOKEN, Repository, hub_double
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401  (registers the classes)
from zoo.errors import UserError
from zoo.record.hub import assemble_space, publish

SPACES = Path(__file__).parents[3] / "spaces"
PUBLISH = """
import sys
from zoo.errors import UserError
from zoo.record.hub import publish
try:
    print(publish(sys.argv[1], sys.argv[2], tag=sys.argv[3] if len(sys.argv) > 3 else None))
except UserError as error:
    raise SystemExit(f"refused: {error}")
"""
LOAD = """
import json, sys, torch
if sys.argv[2] == "installed":
    import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer
remote = sys.argv[2] == "bundled"
model = AutoModelForCausalLM.from_pretrained("org/name", revision=sys.argv[1], trust_remote_code=remote)
assert ("zoo" in sys.modules) != remote
ids = torch.tensor([AutoTokenizer.from_pretrained("org/name", revision=sys.argv[1])("abc").input_ids])
with torch.no_grad():
    print("LOGITS", json.dumps(model.float()(ids).logits.flatten().tolist()))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    write_run(folder)
    return folder


@pytest.fixture(params=["lfs", "xet"])
def hub(request, tmp_path):
    with hub_double(tmp_path / "xet" if request.param == "xet" else None) as hub:
        yield hub


only_lfs = pytest.mark.parametrize("hub", ["lfs"], indirect=True)  # where the way of uploading plays no part


@pytest.fixture
def client(hub, tmp_path):
    """Runs a script in a fresh process whose Hub is the double, with an empty cache each time."""
    count = iter(range(100))

    def run(script, *arguments, token=TOKEN):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / f"home-{next(count)}"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if hub.xet else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        if token:
            environment["HF_TOKEN"] = token
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
        )

    return run


def succeed(process):
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_publish_then_load_by_tag_in_a_fresh_process(hub, client, checkpoint):
    url = succeed(client(PUBLISH, checkpoint, "org/name", "v1")).strip()
    assert url.startswith(hub.url) and hub.repositories["org/name"].tags["v1"] == url.rpartition("/")[2]
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)("abc").input_ids])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(ids).logits.flatten()
    for how in ("bundled", "installed"):
        logits = torch.tensor(json.loads(succeed(client(LOAD, "v1", how)).partition("LOGITS")[2]))
        torch.testing.assert_close(logits, expected)


@pytest.mark.slow
def test_an_interrupted_publish_is_finished_by_the_next_one(hub, client, checkpoint):
    hub.refuse_commits = True
    first = client(PUBLISH, checkpoint, "org/name")
    hub.refuse_commits = False
    assert first.returncode == 1 and "run it again" in first.stderr
    assert not hub.repositories["org/name"].head[1]
    stored = len([path for method, path in hub.requests if path.startswith("/store/")])
    succeed(client(PUBLISH, checkpoint, "org/name"))
    assert set(hub.repositories["org/name"].head[1]) == {
        path.name for path in checkpoint.iterdir() if path.is_file()
    } | {f"plots/{path.name}" for path in (checkpoint / "plots").glob("*")}
    assert len([path for method, path in hub.requests if path.startswith("/store/")]) == stored, "sent again"


@pytest.mark.slow
@only_lfs
def test_a_tag_is_never_moved(hub, client, checkpoint, tmp_path):
    succeed(client(PUBLISH, checkpoint, "org/name", "v1"))
    succeed(client(PUBLISH, checkpoint, "org/name", "v1"))  # the same content: nothing to do
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    (changed / "NOTICE").write_text("another commit")
    refused = client(PUBLISH, changed, "org/name", "v1")
    assert refused.returncode == 1 and "on another commit" in refused.stderr


@pytest.mark.slow
@only_lfs
def test_refusals_create_nothing(hub, client, checkpoint, tmp_path):
    incomplete = tmp_path / "incomplete"
    shutil.copytree(checkpoint, incomplete)
    (incomplete / "recipe.yaml").unlink()
    for folder, name, token, message in (
        (incomplete, "org/name", TOKEN, "lacks recipe.yaml"),
        (checkpoint, "a name", TOKEN, "of the form org/name"),
        (checkpoint, "org/name", None, "set HF_TOKEN"),
        (checkpoint, "org/name", "hf_wrong", "set HF_TOKEN"),
    ):
        process = client(PUBLISH, folder, name, token=token)
        assert process.returncode == 1 and "refused: " in process.stderr and message in process.stderr
    assert not hub.repositories


# ---------------------------------------------------------------------------------------------------------------- Spaces


def python_without_us(*arguments, place):
    """Python that sees installed packages but not our editable install, for which `site` would be needed."""
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@only_lfs
def test_a_published_space_starts_with_what_it_brings(hub, client, tmp_path):
    hub.repositories["spaces/org/space"] = Repository()
    hub.repositories["spaces/org/space"].commit({"zoo/gone.py": ("regular", b"", 0), "LICENSE": ("regular", b"", 0)})
    url = succeed(client(PUBLISH, SPACES / "armor", "org/space", "v1")).strip()
    assert hub.repositories["spaces/org/space"].tags["v1"] == url.rpartition("/")[2]
    space = hub.download("spaces/org/space", tmp_path / "space")
    assert (space / "LICENSE").is_file() and not (space / "zoo" / "gone.py").exists()
    assert "No module named 'zoo'" in python_without_us("-c", "import zoo", place=tmp_path).stderr
    process = python_without_us("app.py", "--help", place=space)
    assert process.returncode == 0 and "--checkpoint" in process.stdout, process.stderr


@pytest.mark.parametrize("name", [folder.name for folder in SPACES.iterdir()])
def test_a_space_needs_public_packages_only(name, tmp_path):
    space = assemble_space(SPACES / name, tmp_path / "space")
    needed = (space / "requirements.txt").read_text().splitlines()
    assert not [line for line in needed if "slimzoo" in line] and len(set(needed)) == len(needed)
    assert {"torch<3,>=2.8", "gradio<7,>=6.0"} <= {line.replace(">=6.0,<7", "<7,>=6.0") for line in needed}
    assert (space / "zoo" / "kernels" / "packed_linear" / "cpu.cpp").is_file()
    assert (space / "recipes").is_dir() == (name == "layerwise-quant") == any("lm-eval" in line for line in needed)
    assert not list(space.rglob("__pycache__"))


def test_a_folder_that_is_no_space_is_refused(tmp_path):
    folder = tmp_path / "space"
    shutil.copytree(SPACES / "armor", folder)
    (folder / "requirements.txt").unlink()
    with pytest.raises(UserError, match="lacks requirements.txt: a Space has"):
        publish(folder, "org/space")
    (folder / "requirements.txt").touch()
    (folder / "README.md").write_text("---\nsdk: docker\n---\n")
    with pytest.raises(UserError, match="sdk: gradio"):
        publish(folder, "org/space")
