"""Reports and folders of earlier versions: they still read, render and verify, and a forged number is still found."""

import json
import shutil

import pytest
from example_report import VERSION_1

from zoo.errors import UserError
from zoo.record.card import render_card
from zoo.record.schema import SCHEMA_VERSION, check_report, read_report
from zoo.record.verify import verify


@pytest.fixture
def folder(tmp_path):
    """As a recipe left it then: the report, and the card that was rendered then."""
    return shutil.copytree(VERSION_1, tmp_path / "kvtuner")


@pytest.fixture(scope="module")
def old():
    return json.loads((VERSION_1 / "report.json").read_text())


@pytest.fixture(scope="module")
def new():
    return read_report(VERSION_1 / "report.json")


def test_only_what_belonged_to_single_papers_is_changed(old, new):
    assert new["schema_version"] == SCHEMA_VERSION == 3
    same = old.keys() - {"schema_version", "tables", "cache", "importance", "curves"}
    assert {key: new[key] for key in same} == {key: old[key] for key in same}
    assert new.keys() - same == {"schema_version", "tables", "figures", "footprint", "settings"}
    assert new["tables"]["The paper's claims"] == old["tables"]["The paper's claims"]
    with pytest.raises(UserError, match="schema_version 1"):
        check_report(old)


def test_the_numbers_of_the_cache_are_the_same(old, new):
    cache, figures = old["cache"], new["figures"]
    taken = {name: row["bytes_per_token"] for name, row in cache["models"].items()}
    assert (new["footprint"]["dense"], new["footprint"]["models"]) == (cache["dense_bytes_per_token"], taken)
    settings = {key: cache[key] for key in ("mode", "group_size", "residual_length", "layers")}
    assert new["settings"] == {"kv_cache_quantization": settings}
    (panel,) = figures["cache_bits"]["panels"]
    assert list(map(list, zip(*panel["cells"].values(), strict=True))) == cache["layers"]
    (panel,) = figures["cache_front"]["panels"]
    series = {line["name"]: line for line in panel["series"]}
    for name, points in {"evaluated": cache["searched"], "front": cache["front"]}.items():
        assert series[name]["x"] == [point["bits"] for point in points]
        assert series[name]["y"] == [point["loss"] for point in points]
    uniform = zip(series["uniform"]["notes"], series["uniform"]["x"], series["uniform"]["y"], strict=True)
    assert {name: {"bits": x, "loss": y} for name, x, y in uniform} == cache["uniform"]
    assert series["chosen"]["x"] == [cache["models"]["kvtuner"]["equivalent_bits"]]


def test_the_numbers_of_the_blocks_are_the_same(old, new):
    panels = {panel["title"]: panel["series"] for panel in new["figures"]["importance"]["panels"]}
    for block in old["importance"]["blocks"]:
        for name, score in block["scores"].items():
            (points,) = panels[name]
            place = points["x"].index(block["index"])
            assert (points["y"][place], points["open"][place]) == (score, block["bits"] < 4)
    panels = new["figures"]["curves"]["panels"]
    assert [panel["title"] for panel in panels] == ["perplexity A", "acc riddles"]
    assert [panel.get("log") for panel in panels] == ["y", None]
    for key, panel in zip(("perplexity/A", "acc/riddles"), panels, strict=True):
        *lines, guide = panel["series"]
        assert [line["name"] for line in lines] == list(old["curves"])
        for line in lines:
            points = old["curves"][line["name"]]
            assert line["x"] == [point["bits"] for point in points]
            assert line["y"] == [point["metrics"][key]["value"] for point in points]
        assert "error" not in lines[0] and lines[1]["error"][1] == old["curves"]["random"][1]["metrics"][key]["spread"]
        assert lines[1]["error"][::2] == [0.0, 0.0]  # windows scatter together
        assert (guide["x"], guide["y"]) == (lines[0]["x"][::2], lines[0]["y"][::2])


def test_no_row_of_the_old_card_is_lost(new):
    card, now = (VERSION_1 / "README.md").read_text().splitlines(), render_card(new, repo_id=None).splitlines()
    front = card.index("---", 1)
    assert card[: front + 1] == now[: front + 1]
    for lines, others in ((card, now), (now, card)):
        assert [line for line in lines if line.startswith("|") and line not in others] == []
    assert {"KV cache:", "Sensitivity of the layers:"} <= set(now) - set(card)


def test_verdicts_of_one_seed_are_taken_back(new):
    (now,) = [line for line in render_card(new, repo_id=None).splitlines() if line.startswith("- kvtuner against KV4")]
    assert "- kvtuner against KV4: better on perplexity A (-3.0 %); undecided" in (VERSION_1 / "README.md").read_text()
    assert "undecided on perplexity A (-3.0 %), acc riddles" in now and "paired" not in new


def problems(folder, check="card"):
    return [finding.message for finding in verify(folder) if finding.check == check and not finding.ok]


@pytest.mark.parametrize(
    "line, forged",
    [
        ("      value: 12.57", "      value: 12.51"),
        ("| **kvtuner** | **12.57** | **0.498** |", "| **kvtuner** | **12.51** | **0.498** |"),
        ("| KV4 | 4.00 | 5.00 | 960 | 31.2 % | 0.1045 |", "| KV4 | 4.00 | 5.00 | 960 | 31.2 % | 0.1046 |"),
        ("| random | 20.74 | 27.38 ± 0.79 | 135.01 |", "| random | 20.74 | 27.38 ± 0.97 | 135.01 |"),
        (
            "- kvtuner against KV4: better on perplexity A (-3.0 %); undecided on acc riddles (+2.7 points).",
            "- kvtuner against KV4: better on perplexity A (-9.0 %); undecided on acc riddles (+2.7 points).",
        ),
    ],
)
def test_an_old_folder_verifies_and_a_changed_digit_is_found(folder, line, forged):
    assert problems(folder, "report") == problems(folder) == []
    path = folder / "README.md"
    assert path.read_text().count(f"{line}\n") == 1
    path.write_text(path.read_text().replace(line, forged))
    (found,) = problems(folder)
    assert repr(forged) in found


@pytest.mark.parametrize("part", ["cache", "importance", "curves"])
@pytest.mark.parametrize("damage", [{"blocks": [{}], "lim": [{}]}, [1], 7])
def test_a_broken_old_report_is_a_finding(folder, old, part, damage):
    (folder / "report.json").write_text(json.dumps(old | {part: damage}))
    (found,) = problems(folder, "report")
    assert "a broken report of schema_version 1" in found


def test_of_an_old_card_forged_prose_and_missing_rows_are_found(folder):
    path = folder / "README.md"
    text = path.read_text()
    path.write_text(text + "\nPerplexity is 1.00, better than dense.\n")
    assert "which the report does not give" in problems(folder)[0]
    row = next(line for line in text.splitlines() if line.startswith("| KV4 "))
    path.write_text(text.replace(f"{row}\n", ""))
    assert "lacks the row" in problems(folder)[0]
