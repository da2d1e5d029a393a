"""What is in the way of a run, and what a resumed one may find changed."""

import json

import pytest

from recipes.common.core.state import check_device, open_state, refuse_existing
from zoo.errors import UserError


@pytest.fixture
def places(tmp_path):
    return tmp_path / "out", tmp_path / "out.state"


def refuse(places, beside=(), resume=False, overwrite=False):
    refuse_existing(*places, list(beside), resume=resume, overwrite=overwrite)


def test_nothing_is_in_the_way_of_a_first_run(places):
    refuse(places)
    places[0].mkdir()  # an empty folder is none
    refuse(places)


def test_an_output_is_kept_unless_it_may_go(places):
    places[0].mkdir()
    (places[0] / "precious").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="it exists; pass --overwrite"):
            refuse(places, resume=resume)
    refuse(places, overwrite=True)


def test_a_neighbour_is_kept_unless_it_may_go(places, tmp_path):
    beside = tmp_path / "out-dense"
    refuse(places, [beside])
    beside.mkdir()
    with pytest.raises(UserError, match="out-dense: it exists, and the run writes there"):
        refuse(places, [beside])
    with pytest.raises(UserError, match="out-dense: it exists, and the run writes there"):
        refuse(places, [beside], resume=True)  # there is nothing to resume
    open_state(places[1], {}, {}, resume=True)
    with pytest.raises(UserError, match="out-dense: it exists, and the run writes there"):
        refuse(places, [beside], resume=True)  # the run has not put anything there
    (places[1] / "placing.json").write_text(json.dumps([beside.name, places[0].name]))
    refuse(places, [beside], resume=True)  # it was killed while it put things into place
    refuse(places, [beside], overwrite=True)


def test_a_run_begun_with_overwrite_is_continued_by_resume_alone(places, tmp_path):
    output, state = places
    output.mkdir()
    (output / "old").write_text("")
    refuse(places, overwrite=True)
    open_state(state, {}, {}, resume=False, overwrites=[output])
    refuse(places, resume=True)
    beside = tmp_path / "out-dense"
    beside.mkdir()
    with pytest.raises(UserError, match="out-dense: it exists, and the run writes there"):
        refuse(places, [beside], resume=True)  # an export that was asked for later
    open_state(state, {}, {}, resume=True, overwrites=[output, beside])
    open_state(state, {}, {}, resume=True)
    refuse(places, [beside], resume=True)
    open_state(state, {}, {}, resume=False)
    with pytest.raises(UserError, match="it exists; pass --overwrite"):
        refuse(places, resume=True)  # a new run has no leave of the old one


@pytest.mark.parametrize("lost", ["recipe.yaml", "inputs.json"])
def test_a_state_that_lacks_its_settings_is_never_adopted(places, lost):
    state = places[1]
    open_state(state, {"lr": 1.0}, {"base_model": "a"}, resume=False)
    (state / "work").write_text("of other settings")
    (state / lost).unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="it exists and is no unfinished run"):
            refuse(places, resume=resume)
    open_state(state, {"lr": 2.0}, {"base_model": "a"}, resume=True)  # with --overwrite
    assert not (state / "work").exists()


@pytest.mark.parametrize("file", ["recipe.yaml", "inputs.json"])
@pytest.mark.parametrize("text", ["", "[1", "a: ["])
def test_a_damaged_state_is_one_sentence(places, file, text):
    open_state(places[1], {"lr": 1.0}, {"base_model": "a"}, resume=False)
    (places[1] / file).write_text(text)
    with pytest.raises(UserError, match="is damaged; pass --overwrite"):
        open_state(places[1], {"lr": 1.0}, {"base_model": "a"}, resume=True)


def test_whatever_interrupts_the_making_or_removing_of_a_state_leaves_a_whole_one_or_none(places, monkeypatch):
    state = places[1]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.rename", killed)
        open_state(state, {}, {}, resume=False)
    assert not state.exists()
    open_state(state, {"lr": 1.0}, {}, resume=False)
    (state / "work").write_text("done")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        open_state(state, {"lr": 2.0}, {}, resume=False)
    assert not state.exists()
    refuse(places, resume=True)  # starts afresh
    open_state(state, {"lr": 2.0}, {}, resume=True)
    assert sorted(path.name for path in state.parent.iterdir()) == ["out.state"]
    assert sorted(path.name for path in state.iterdir()) == ["inputs.json", "overwrites.json", "recipe.yaml"]


def test_a_folder_that_only_looks_like_a_state_is_not_touched(places):
    places[1].mkdir()
    (places[1] / "holiday.jpg").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="it exists and is no unfinished run"):
            refuse(places, resume=resume)


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        refuse((tmp_path / "file" / "out", tmp_path / "file" / "out.state"))


def test_a_state_is_continued_with_the_same_settings_and_inputs_only(places):
    state, settings, pins = places[1], {"lr": 1.0, "seed": 0}, {"base_model": "a" * 64}
    open_state(state, settings, pins, resume=True)
    (state / "work").write_text("done")
    with pytest.raises(UserError, match="holds an unfinished run; pass --resume"):
        refuse(places)
    refuse(places, resume=True)
    open_state(state, settings, pins, resume=True)
    with pytest.raises(UserError, match="made with other values of lr"):
        open_state(state, settings | {"lr": 2.0}, pins, resume=True)
    with pytest.raises(UserError, match="the base_model changed since"):
        open_state(state, settings, {"base_model": "b" * 64}, resume=True)
    assert (state / "work").exists()
    open_state(state, settings | {"lr": 2.0}, pins, resume=False)
    assert not (state / "work").exists()


@pytest.mark.parametrize("device", ["banana", "mps", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=f"--device {device}"):
        check_device(device)
    check_device("cpu")
