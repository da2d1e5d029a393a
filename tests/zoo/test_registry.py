"""The zoo's table, loading by name, and what `make cards` renders from the committed reports."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from example_report import write_run
from huggingface_hub import ModelCard

import zoo
from recipes.common.core import plots, readme
from recipes.common.core.cli import recipe_names
from zoo import registry
from zoo.errors import UserError
from zoo.record.card import render_card
from zoo.registry import ENTRIES, find_entry, list_models, load

ARMOR = "smollm2-135m-instruct-armor-2:4"


def test_table_is_sound():
    assert len({entry.name for entry in ENTRIES}) == len({entry.folder for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.name == entry.name.lower() and entry.recipe in recipe_names()
        if entry.is_measured:
            report = entry.report()
            assert (report["recipe"], report["base_model"]["id"]) == (entry.recipe, entry.base)
            assert f"{entry.auto_class}.from_pretrained" in render_card(report, repo_id=None)


def test_cards_and_readme_are_up_to_date():
    assert readme.outdated() == [], "run `make cards`"


@pytest.mark.parametrize("pattern", ["*", "*2:4*", "SMOLLM2*", "*-armor-*", ARMOR])
def test_wildcards_find_a_model(pattern):
    assert ARMOR in zoo.list_models(pattern)


def test_wildcards_that_match_nothing():
    assert list_models("*3:4*") == list_models("armor") == []


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=f"smollm2-armor: no such model in the zoo; did you mean {ARMOR}"):
        zoo.load("smollm2-armor")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished local run of the ARMOR entry, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return write_run(tmp_path / "runs" / "armor", find_entry(ARMOR).base)


@pytest.mark.slow
def test_load_takes_the_local_run_of_the_same_base(run):
    model = load(ARMOR.upper(), dtype=torch.float32)
    assert type(model).__name__ == "SlimLlamaForCausalLM" and model.dtype == torch.float32
    assert model.name_or_path == os.path.join("runs", "armor")
    report = json.loads((run / "report.json").read_text())
    report["base_model"]["id"] = "another/base"
    (run / "report.json").write_text(json.dumps(report))
    assert registry.find_checkpoint(find_entry(ARMOR)) == find_entry(ARMOR).hub_repo


@pytest.mark.slow
def test_without_a_run_or_a_hub_the_recipe_is_named(tmp_path):
    code = f"""
import zoo
from zoo.errors import UserError
try:
    zoo.load("{ARMOR}")
except UserError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert f"{ARMOR}: there is no runs/armor" in done.stdout
    assert "`make recipe-armor` builds it" in done.stdout


# ---------------------------------------------------------------------------------------------------- rendering


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the project's cards with no report yet, and a README that has room for the table."""
    cards = tmp_path / "model_cards"
    cards.mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n{readme.BEGIN}\nold\n{readme.END}\nEnd.\n")
    for module in (readme, registry):
        monkeypatch.setattr(module, "CARDS", cards)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    return tmp_path


def test_unmeasured_models_are_listed_without_numbers(clone):
    readme.main([])
    text = (clone / "README.md").read_text()
    assert text.startswith(f"# Title\n{readme.BEGIN}\n") and text.endswith(f"{readme.END}\nEnd.\n")
    (row,) = (line for line in text.splitlines() if ARMOR in line)
    assert "not measured yet" in row and "`make recipe-armor`" in row
    assert not (clone / "model_cards" / readme.PLOT).exists()


@pytest.mark.slow
def test_a_run_is_taken_over_and_everything_rendered_from_it(clone, run, capsys):
    readme.main(["--take", str(run)])
    entry = find_entry(ARMOR)
    folder = clone / "model_cards" / "smollm2-135m-instruct-armor"
    assert (folder / "README.md").read_text() == render_card(entry.report(), repo_id=entry.hub_repo)
    assert ModelCard.load(folder / "README.md").data.model_name == entry.hub_repo
    for link in ("plots/quality_size.png", "plots/proxy_loss.png"):
        assert (folder / link).exists() and link in (folder / "README.md").read_text()
    (row,) = (line for line in (clone / "README.md").read_text().splitlines() if ARMOR in line)
    assert "11.31 → 12.51 ± 0.14" in row and "1.47 ± 0.03×" in row
    assert "model_cards/smollm2-135m-instruct-armor/README.md" in row
    assert plots.read_fingerprint(clone / "model_cards" / readme.PLOT) == readme.fingerprint()
    readme.main(["--check"])


def change_report(folder):
    report = json.loads((folder / "report.json").read_text())
    report["speed"]["decode"]["ratio_to_dense_bf16"]["value"] = 1.5
    (folder / "report.json").write_text(json.dumps(report))


def change_card(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("12.51", "12.15"))


def change_leaderboard(folder):
    path = folder.parent.parent / "README.md"
    path.write_text(path.read_text().replace("12.51", "12.15"))


def change_plot(folder):
    (folder.parent / readme.PLOT).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_report, change_card, change_leaderboard, change_plot])
def test_check_fails_when_something_is_out_of_date_and_changes_nothing(clone, run, change, capsys):
    readme.main(["--take", str(run)])
    change(clone / "model_cards" / "smollm2-135m-instruct-armor")
    before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        readme.main(["--check"])
    assert stop.value.code == 1 and "make cards" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    readme.main([])
    readme.main(["--check"])


@pytest.mark.slow
def test_bad_input_is_told_in_a_sentence(clone, run, capsys):
    (clone / "README.md").write_text("no markers")
    report = json.loads((run / "report.json").read_text())
    report["base_model"]["id"] = "another/base"
    other = shutil.copytree(run, clone / "other")
    (other / "report.json").write_text(json.dumps(report))
    for arguments, said in (
        ([], readme.BEGIN),
        (["--take", str(clone / "nowhere")], "nowhere/report.json cannot be read"),
        (["--take", str(other)], "no entry of recipe armor and base another/base"),
    ):
        with pytest.raises(SystemExit) as stop:
            readme.main(arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert not list((clone / "model_cards").iterdir())
