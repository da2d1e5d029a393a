"""Publishing and loading through the real Hub clients, against a Hub of our own on loopback, over LFS and over Xet."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from example_report import write_run
from hub_double import TOKEN, hub_double
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401  (registers the classes)

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


def test_publish_then_load_by_tag_in_a_fresh_process(hub, client, checkpoint):
    url = succeed(client(PUBLISH, checkpoint, "org/name", "v1")).strip()
    assert url.startswith(hub.url) and hub.repositories["org/name"].tags["v1"] == url.rpartition("/")[2]
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)("abc").input_ids])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(ids).logits.flatten()
    for how in ("bundled", "installed"):
        logits = torch.tensor(json.loads(succeed(client(LOAD, "v1", how)).partition("LOGITS")[2]))
        torch.testing.assert_close(logits, expected)


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


@only_lfs
def test_a_tag_is_never_moved(hub, client, checkpoint, tmp_path):
    succeed(client(PUBLISH, checkpoint, "org/name", "v1"))
    succeed(client(PUBLISH, checkpoint, "org/name", "v1"))  # the same content: nothing to do
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    (changed / "NOTICE").write_text("another commit")
    refused = client(PUBLISH, changed, "org/name", "v1")
    assert refused.returncode == 1 and "on another commit" in refused.stderr


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
