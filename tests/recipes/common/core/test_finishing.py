"""The end of a run: everything made in the state folder, moved, published, and only then forgotten."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.common.core import run as runs
from recipes.common.core.recipe import Recipe
from recipes.common.core.run import is_made, places, put_into_place
from recipes.common.core.state import discard, open_state
from zoo.errors import UserError


@dataclass(frozen=True)
class Toy(Recipe):
    def beside(self):
        return {"-dense": None}


@pytest.fixture
def toy(tmp_path):
    """A recipe all of whose results are made, over an older output."""
    recipe = Toy(output=str(tmp_path / "out"), seed=3, overwrite=True)
    open_state(recipe.state_path, {}, {}, resume=False, overwrites=list(places(recipe).values()))
    for made, place in places(recipe).items():
        for folder, text in ((made, "new"), (place, "old")):
            folder.mkdir(parents=True)
            (folder / "weights").write_text(text)
    assert not is_made(recipe)
    (recipe.state_path / "placing.json").write_text(json.dumps(["out-dense", "out"]))
    assert is_made(recipe)
    return recipe


def left(tmp_path):
    return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.glob("*/weights")}


def test_what_is_made_replaces_what_was_there_and_the_state_goes(toy, tmp_path):
    put_into_place(toy)
    assert left(tmp_path) == {"out/weights": "new", "out-dense/weights": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-dense"]


@pytest.mark.parametrize("moves", range(5))
def test_whichever_move_is_the_last_before_a_kill_the_next_run_makes_the_others(toy, tmp_path, monkeypatch, moves):
    left_over, replace = iter(range(moves)), Path.replace

    def killed(path, target):
        if next(left_over, None) is None:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.replace", killed)
        put_into_place(toy)
    assert is_made(toy)
    put_into_place(toy)
    assert left(tmp_path) == {"out/weights": "new", "out-dense/weights": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-dense"]


def test_what_appeared_while_the_run_worked_is_not_replaced(toy, tmp_path):
    (toy.state_path / "overwrites.json").write_text(json.dumps(["out-dense"]))
    for _ in range(2):
        with pytest.raises(UserError, match="out: it appeared while the run worked"):
            put_into_place(toy)
        assert left(tmp_path) == {"out/weights": "old", "out-dense/weights": "new"} and is_made(toy)
    discard(tmp_path / "out")
    put_into_place(toy)
    assert left(tmp_path) == {"out/weights": "new", "out-dense/weights": "new"}


def test_what_is_neither_made_nor_in_place_is_made_again(toy):
    *_, (made, place) = places(toy).items()
    discard(made)
    assert is_made(toy)  # what is in its place is taken for it
    discard(place)
    assert not is_made(toy)


def test_a_failed_upload_is_finished_by_a_second_run(toy, tmp_path, monkeypatch):
    uploads = []

    def publish(folder, repo):
        uploads.append((folder.name, repo))
        if len(uploads) == 1:
            raise UserError("publishing to org/name failed; run it again.")
        return "https://hub/commit"

    monkeypatch.setattr(runs, "publish", publish)
    object.__setattr__(toy, "push_to_hub", "org/name")
    with pytest.raises(UserError, match="run it again"):
        put_into_place(toy)
    assert left(tmp_path) == {"out/weights": "new", "out-dense/weights": "new"} and is_made(toy)
    put_into_place(toy)
    assert uploads == [("out", "org/name")] * 2 and not toy.state_path.exists()
