"""Reports: aggregation over seeds, sizes from the folder, the printed table, the plots, and writing whole."""

import json
import math
import re
import statistics

import pytest
from example_report import EXAMPLE, VERSION_1, example_report, metric, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.common.core import plots, report
from recipes.common.data.base_models import BaseModel
from recipes.common.domains.language import task_row
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.record.card import render_card
from zoo.record.measurements import FILE, read_measurements
from zoo.record.schema import check_report, read_report


@settings(deadline=None)
@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=6))
def test_seeds_give_mean_and_sample_deviation_that_the_schema_accepts(values):
    merged = report.over_seeds([{"perplexity/A": metric(v, 0.5)} for v in values])["perplexity/A"]
    assert merged["value"] == pytest.approx(sum(values) / len(values))
    squares = sum((v - merged["value"]) ** 2 for v in values)
    assert merged["spread"] ** 2 * (len(values) - 1) == pytest.approx(squares, rel=1e-9, abs=1e-9)
    assert (merged["n"], merged["n_of"], merged["values"]) == (len(values), "seeds", values)
    seeds = list(range(len(values)))
    checked = example_report(dense={"perplexity/A": metric(2.0)}, baselines={}, sweeps={}, seeds=seeds, paired={})
    check_report(checked | {"compressed": {"perplexity/A": merged}})


def test_one_seed_stays_what_was_measured():
    run = {"perplexity/A": metric(12.5, 0.5, 7)}
    assert (
        report.over_seeds([run]) == report.over_seeds([{"perplexity/A": run["perplexity/A"] | {"raw": [[1.0]]}}]) == run
    )


@pytest.mark.slow
def test_values_of_windows_leave_the_report_for_their_file(tmp_path):
    folder = write_run(tmp_path / "armor")
    built, kept = read_report(folder / "report.json"), read_measurements(folder)
    assert "raw" not in json.dumps(built) and FILE in built["files"]
    assert kept.keys() == {"dense", "armor", "wanda", "sparsegpt"}
    assert [len(kept[name]["perplexity/A"]) for name in ("dense", "armor")] == [1, 2]  # seeds
    assert "acc/riddles" not in kept["armor"], "none was given for each item"
    for name, pairs in built["paired"].items():
        assert pairs.keys() == {"perplexity/A", "perplexity/B"}
        rows = built["dense"] if name == "dense" else built["baselines"][name]
        ours, theirs = built["compressed"]["perplexity/A"], rows["perplexity/A"]
        by_seed = [
            math.log(a / b) for a, b in zip(ours["values"], theirs.get("values", [theirs["value"]] * 2), strict=True)
        ]
        assert pairs["perplexity/A"]["difference"] == pytest.approx(sum(by_seed) / 2, abs=1e-9)
        assert pairs["perplexity/A"]["error"] >= abs(by_seed[0] - by_seed[1]) / 2 - 1e-9


@pytest.mark.slow
def test_a_built_report_describes_the_folder(tmp_path):
    folder = write_run(tmp_path / "armor")
    built = read_report(folder / "report.json")
    data_bytes = sum(  # what follows each header
        file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in open_folder(folder).files
    )
    size = built["size"]
    assert size["compressed_bytes"] == data_bytes
    assert size["dense_bytes"] == 2 * size["parameters"]  # the dense model in the checkpoint's dtype, bfloat16
    wrappers = sum(row["block_out"] * row["d_out"] + row["block_in"] * row["d_in"] for row in built["layers"])
    assert size["baselines"] == {"wanda": data_bytes - 2 * wrappers}  # plain 2:4 needs all but the wrappers
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert built["files"].keys() == on_disk - {"report.json", "README.md"}
    assert {"plots/proxy_loss.png", "plots/quality_size.png", "config.json", "recipe.yaml"} <= built["files"].keys()
    evaluation = built["data"]["evaluation"]
    assert (evaluation["A"]["windows"], evaluation["A"]["seqlen"]) == (7, 19)
    assert evaluation["tasks"]["riddles"]["items"] == 211
    assert built["notes"] == ["made up"]
    assert re.fullmatch(r".+, \d+ threads?", built["environment"]["cpu"])
    assert 10**8 < built["cost"]["peak_rss_bytes"] < 10**11
    assert built["environment"]["versions"]["torch"].startswith("2.")


def test_tasks_of_the_packages_are_pinned_in_the_report():
    row = task_row("step_inference", 50)
    assert row["name"] == "bigbench" and row["version"] == "1.0.0" and len(row["sha256"]) == 64
    assert task_row("hellaswag", 50)["version"].startswith("lm-eval ")


def test_language_comes_from_the_base_models_card(tmp_path):
    base = BaseModel("made-up/base", tmp_path, None, "ef" * 32, 4321, None, "llama")
    assert base.languages() == []
    for stated, wanted in (("fr", ["fr"]), ("[fr, oc]", ["fr", "oc"])):
        (tmp_path / "README.md").write_text(f"---\nlanguage: {stated}\n---\n")
        assert base.languages() == wanted


def test_table_holds_every_model_and_marks_how_the_own_one_is_to_it():
    lines = report.render_table(example_report()).splitlines()
    header, rows = lines[0], {line.split()[0]: line for line in lines[2:6]}
    assert list(rows) == ["dense", "armor", "wanda", "sparsegpt"]
    assert [header.index(key) for key in EXAMPLE["compressed"]] == sorted(
        header.index(k) for k in EXAMPLE["compressed"]
    )
    assert re.findall(r"[-+~](?=\s|$)", rows["dense"]) == ["-", "-", "~"]
    assert re.findall(r"[-+~](?=\s|$)", rows["wanda"]) == ["+", "~", "+"]
    assert re.findall(r"[-+~](?=\s|$)", rows["sparsegpt"]) == ["-", "-", "~"]
    assert not re.findall(r"[-+~](?=\s|$)", rows["armor"])
    text = "\n".join(lines)
    for shown in ("12.51 ± 0.14", "0.513 ± 0.001", "143.2 kB of 197.5 kB dense (72.5 %)", "0.91 ± 0.02×", "21 min"):
        assert shown in text
    assert "armor against sparsegpt: worse on perplexity A (+4.1 ± 1.8 %)" in text
    assert max(len(line) for line in lines[:6]) <= 120


def test_a_better_metric_is_marked_better():
    better = example_report()
    better["compressed"]["perplexity/A"].update(value=9.0, values=[8.9, 9.1], spread=statistics.stdev([8.9, 9.1]))
    better["paired"]["dense"]["perplexity/A"] = {"difference": -0.2284, "error": 0.1, "n": 7}
    check_report(better)
    assert "11.31 +" in report.render_table(better)


@pytest.mark.slow
def test_what_is_lowered_besides_the_weights_is_a_line_and_the_axis_of_the_plot(tmp_path, figures):
    models = {"armor": 1_234, "wanda": 2_345}
    lowered = {"what": "KV cache", "unit": "bytes a token", "dense": 5_678, "models": models}
    lines = report.render_table(example_report(footprint=lowered)).splitlines()
    assert "KV cache: 1,234 of 5,678 bytes a token (21.7 %)" in lines
    for unit, scale in (("bytes a token", 1000), ("tokens an image", 1)):
        plots.draw(example_report(footprint=lowered | {"unit": unit}), tmp_path)
        figure = figures["quality_size.png"]
        places = {bars.get_label(): bars.lines[0].get_xdata()[0] for bars in figure.axes[0].containers}
        assert places == {"dense": 5_678 / scale, "armor": 1_234 / scale, "wanda": 2_345 / scale}
        assert figure.get_supxlabel() == f"KV cache, {unit.replace('bytes', 'kB')}"


@pytest.mark.slow
def test_failing_to_render_writes_neither_report_nor_card(tmp_path):
    with pytest.raises(UserError, match="no-such-method"):
        report.write(example_report(config={"method": "no-such-method"}), tmp_path, {})
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_written_report_reads_back_unrounded(tmp_path):
    written = report.write(example_report(), tmp_path, {})
    assert read_report(tmp_path / "report.json") == written
    assert json.loads((tmp_path / "report.json").read_text())["compressed"] == EXAMPLE["compressed"]
    assert not list(tmp_path.rglob(".*"))  # no temporary file stays


# ------------------------------------------------------------------------------------------------------------ plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by file name."""
    drawn, save = {}, plots.save

    def keep(figure, path, metadata=None):
        drawn[path.name] = figure
        return save(figure, path, metadata)

    monkeypatch.setattr(plots, "save", keep)
    return drawn


def test_plots_show_the_numbers_of_the_report(tmp_path, figures):
    example = example_report()
    files = plots.draw(example, tmp_path)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    panels = {axis.get_title(): axis for axis in figures["proxy_loss.png"].axes if axis.get_title()}
    assert list(panels) == ["up_proj", "gate_proj"]
    lines = {line.get_label(): line for line in panels["gate_proj"].lines}
    rows = [row for row in example["layers"] if row["name"].endswith("gate_proj")]
    assert list(lines["start"].get_xdata()) == list(lines["end"].get_xdata()) == [0, 1, 2]
    assert list(lines["start"].get_ydata()) == [row["loss_init"] for row in rows]
    assert list(lines["end"].get_ydata()) == [row["loss_final"] for row in rows]
    first = figures["quality_size.png"].axes[0]
    points = {
        bars.get_label(): (bars.lines[0].get_xdata()[0], bars.lines[0].get_ydata()[0]) for bars in first.containers
    }
    assert points == {
        "dense": (0.19753, 11.31),
        "armor": (0.14321, 12.51),
        "wanda": (0.131072, pytest.approx(20.32)),
    }
    (across,) = [line for line in first.lines if line.get_label() == "sparsegpt"]  # a size that nobody stated
    assert list(across.get_ydata()) == [EXAMPLE["baselines"]["sparsegpt"]["perplexity/A"]["value"]] * 2


@pytest.mark.slow
def test_sweeps_are_drawn_with_their_spread(tmp_path, figures):
    (axis,) = draw_all(example_report(), tmp_path, figures)["sweep-riddles-by-length"].axes
    (bars,) = axis.containers
    assert (list(bars.lines[0].get_xdata()), axis.get_xscale(), axis.get_title()) == (
        [12, 48],
        "log",
        "Riddles by length",
    )
    assert list(bars.lines[0].get_ydata()) == pytest.approx([0.623, 0.437])
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    assert [high - low for low, high in ends] == pytest.approx([2 * 0.02 / 2**0.5] * 2)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("words of a riddle", "acc riddles")


def draw_all(drawn_report, folder, figures):
    """{stem: figure} of all plots that the card links."""
    plots.draw(drawn_report, folder)
    linked = set(re.findall(r"\(plots/([^)]*)\)", render_card(drawn_report, repo_id=None)))
    assert linked == figures.keys() == {path.name for path in (folder / "plots").iterdir()}
    return {name.removesuffix(".png"): figure for name, figure in figures.items()}


@pytest.mark.slow
def test_described_figures_show_their_numbers(tmp_path, figures):
    """Every style, on the figures of an old report: two panels of curves, two of scores, a heat map, a front."""
    built = read_report(VERSION_1 / "report.json")
    drawn = draw_all(built, tmp_path, figures)

    curves = drawn["curves"]
    shown = built["figures"]["curves"]["panels"]
    assert [axis.get_title() for axis in curves.axes] == [panel["title"] for panel in shown]
    assert [axis.get_yscale() for axis in curves.axes] == ["log", "linear"]
    (legend,) = curves.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lim", "random"]
    for axis, panel in zip(curves.axes, shown, strict=True):
        points = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axis.lines}
        assert points >= {(tuple(series["x"]), tuple(series["y"])) for series in panel["series"]}
        (bars,) = [bars for bars in axis.containers if bars.get_label() == "random"]
        ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
        assert [high - low for low, high in ends] == pytest.approx([2 * e for e in panel["series"][1]["error"]])

    for axis, panel in zip(drawn["importance"].axes, built["figures"]["importance"]["panels"], strict=True):
        (series,) = panel["series"]
        cover = {
            line.get_xdata()[0]: line.get_ydata()[0] for line in axis.lines if line.get_markerfacecolor() == "white"
        }
        assert cover == {x: y for x, y, is_open in zip(*map(series.get, ("x", "y", "open")), strict=True) if is_open}
        assert sorted(cover) == [2, 3]
    assert drawn["importance"].get_supxlabel() == "block; filled: 4 bits, open: fewer"

    (axis,) = drawn["cache_bits"].axes
    assert axis.images[0].get_array().tolist() == [[8, 4, 4, 4], [8, 2, 2, 4]]
    written = {(int(text.get_position()[0]), int(text.get_position()[1])): text.get_text() for text in axis.texts}
    assert len(written) == 8 and (written[0, 0], written[1, 1], written[3, 1]) == ("8", "2", "4")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["keys", "values"]
    assert {axis.texts[place].get_color() for place in (0, 4)} == {"white"} and axis.texts[1].get_color() == "black"

    (axis,) = drawn["cache_front"].axes
    lines = {line.get_label(): line for line in axis.lines}
    series = {line["name"]: line for line in built["figures"]["cache_front"]["panels"][0]["series"]}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(series)
    assert (
        list(lines["evaluated"].get_ydata()) == series["evaluated"]["y"]
        and lines["evaluated"].get_linestyle() == "None"
    )
    steps = next(bars for bars in axis.containers if bars.get_label() == "front").lines[0]
    assert steps.get_drawstyle() == "steps-post" and list(steps.get_xdata()) == series["front"]["x"]
    assert list(lines["chosen"].get_xdata()) == [4.5, 4.5]
    notes = {note.get_text(): note.xy for note in axis.texts}
    assert notes == {"KV8": (8.0, 0.0012), "KV4": (4.0, 0.0931), "K4V2": (3.0, 0.4237)}
    assert axis.get_yscale() == "log" and axis.get_ylabel() == "KL to the 16-bit model, nats a token"


def test_layers_of_any_model_have_a_place():
    assert [plots.layer_index(name, 9) for name in ("model.layers.12.mlp.up", "h.3.attn", "lm_head")] == [12, 3, 9]


def test_leaderboard_keeps_its_fingerprint(tmp_path, figures):
    path = tmp_path / "leaderboard.png"
    assert plots.read_fingerprint(path) is None
    plots.leaderboard([{"name": "a", "size": 0.25, "quality": 0.75}], path, "abc")
    assert plots.read_fingerprint(path) == "abc"
    (point,) = [line for line in figures["leaderboard.png"].axes[0].lines if line.get_label() == "a"]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (0.25, 0.75)
