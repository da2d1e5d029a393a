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
    (places[1] / "placed.json").write_text(json.dumps([str(beside), str(places[0])]))
    refuse(places, [beside], resume=True)  # it was killed while it put things into place
    refuse(places, [beside], overwrite=True)


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
