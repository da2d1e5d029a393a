"""The wheel holds all that is read at run time: unpacked, with no source tree in sight, it makes a checkpoint."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny_models import make_base

ROOT = Path(__file__).parents[2]
ROOMS = ("zoo", "recipes", "model_cards")
FLAGS = ["--nsamples", "2", "--seqlen", "32", "--tasks", "none", "--eval_windows", "1", "--eval_seqlen", "64"]
FLAGS += ["--dtype", "float32", "--iters", "2", "--baselines", "none", "--block", "16"]
RUN = """
import sys
wheel, packages, *arguments = sys.argv[1:]
sys.path[:0] = [wheel]
sys.path.append(packages)  # without `site`, so that nothing there points at the source tree
import model_cards, recipes, zoo
for package in (model_cards, recipes, zoo):
    assert [*package.__path__] == [f"{wheel}/{package.__name__}"], package.__path__
assert len(zoo.list_models()) == len(zoo.registry.ENTRIES)
from recipes.common.core.cli import main
main(arguments)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree (building leaves files in it), unpacked."""
    root = tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / "source" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "source")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(root),
    ]
    subprocess.run([*pip, str(root / "source")], check=True)
    (built,) = root.glob("slimzoo-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(root / "unpacked")
    return root / "unpacked"


def files(folder, room):
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_sources_settings_and_texts_and_nothing_measured(wheel):
    found, wanted = ({room: files(folder, room) for room in ROOMS} for folder in (wheel, ROOT))
    needed = (".py", ".cpp", ".hpp", ".yaml")
    for room in ("zoo", "recipes"):
        assert found[room] == {name for name in wanted[room] if name.endswith(needed)}
        assert any(name.endswith(".yaml" if room == "recipes" else ".cpp") for name in found[room])
    assert found["model_cards"] == {name for name in wanted["model_cards"] if name.count("/") == 1} - {
        "model_cards/leaderboard.png"
    }
    (about,) = wheel.glob("slimzoo-*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {*ROOMS, about.name}


@pytest.mark.slow
def test_a_recipe_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    base = make_base(tmp_path / "base", "llama")
    (tmp_path / "text.txt").write_text("some plain words to calibrate on " * 60)
    (tmp_path / "empty").mkdir()
    flags = ["--model", str(base), "--calibration", str(tmp_path / "text.txt"), *FLAGS]
    command = [sys.executable, "-I", "-S", "-c", RUN, str(wheel), sysconfig.get_path("purelib"), "armor", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    made = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "runs/armor"
    output = tmp_path / "empty" / "runs" / "armor"
    assert {"config.json", "model.safetensors", "report.json", "README.md", "recipe.yaml"} <= {
        path.name for path in output.iterdir()
    }
    assert "ARMOR" in (output / "README.md").read_text()
