"""verify: a folder as a recipe left it passes, and each kind of tampering or damage fails by name."""

import json
import math
import re
import shutil

import pytest
import torch
from example_report import EXAMPLE, runs_of, write_run
from safetensors.torch import load_file, save_file

from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.layers.packing import row_bytes
from zoo.record.card import render_card
from zoo.record.hub import check_folder
from zoo.record.measurements import FILE, paired_differences, read_measurements, write_measurements
from zoo.record.verify import hash_files, verify

PROJECTION = "model.layers.1.mlp.up_proj"


def claims(folder, report):
    """What the first seed measured: an honest second measurement."""
    return runs_of(EXAMPLE["compressed"])[0] | {"acc/riddles": {"value": 0.512, "n": 211}}


def failures(folder, measure=claims):
    return [finding for finding in verify(folder, measure) if not finding.ok]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "armor")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "armor")


@pytest.fixture
def stock(finished, tmp_path):
    """A run that packed nothing: its model is a stock folder, as of a fine-tuned model or one of fewer blocks."""
    folder = shutil.copytree(finished.parent / f"base-{finished.name}", tmp_path / "stock")
    for name in ("report.json", "recipe.yaml", FILE):
        shutil.copy(finished / name, folder)
    rewrite(folder, lambda report: report.update(layers=[], size=open_folder(folder).sizes()))
    return folder


def rewrite(folder, change):
    """A clever forger: changes the report and renders the card anew, with fresh hashes."""
    report = json.loads((folder / "report.json").read_text())
    change(report)
    report["files"] = hash_files(folder)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "README.md").write_text(render_card(report, repo_id=None))


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def in_report(*path, value):
    def change(folder):
        def change_report(report):
            for key in path[:-1]:
                report = report[key]
            report[path[-1]] = value

        rewrite(folder, change_report)

    return change


def in_weights(change_tensors):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        rewrite(folder, lambda report: None)

    return change


def in_config(change_compression):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        change_compression(config["compression_config"])
        (folder / "config.json").write_text(json.dumps(config))
        rewrite(folder, lambda report: None)

    return change


def cut_shard(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def remove_module(folder):
    next(folder.glob("slimzoo_*.py")).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["armor", "ragged"])
def test_an_honest_folder_passes_in_every_format(tmp_path, kind):
    folder = write_run(tmp_path / "armor", kind=kind)
    findings = verify(folder, claims)
    assert [finding for finding in findings if not finding.ok] == []
    assert {"card", "files", "config", "weights", "layers", "sizes", *EXAMPLE["compressed"]} <= {
        f.check for f in findings
    }


@pytest.mark.slow
def test_an_honest_stock_folder_passes_and_a_dishonest_one_does_not(stock):
    assert failures(stock) == []
    check_folder(stock)
    rewrite(stock, lambda report: report["size"].update(compressed_bytes=report["size"]["compressed_bytes"] // 2))
    assert {finding.check for finding in failures(stock)} == {"sizes"}
    rewrite(stock, lambda report: report.update(layers=[EXAMPLE["layers"][0]]))
    assert {finding.check for finding in failures(stock)} == {"config", "layers", "sizes"}
    (stock / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        check_folder(stock)


def test_a_published_card_names_its_repository_and_passes(folder):
    report = json.loads((folder / "report.json").read_text())
    (folder / "README.md").write_text(render_card(report, repo_id="org/name"))
    assert failures(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "tamper, check, said",
    [
        (edit("README.md", "12.51", "11.51"), "card", r"line \d+ says .*11\.51.* the report gives .*12\.51"),
        (edit("README.md", "No gain over it was measured.", ""), "card", "armor against sparsegpt"),
        (edit("README.md", "value: 12.51", "value: 9.99"), "card", "value: 9.99"),
        (edit("report.json", '"value": 12.51', '"value": 9.99'), "report", "perplexity/A: value 9.99"),
        (edit("report.json", '"seconds": 12.5', '"seconds": 12.5e4'), "card", "The run took"),
        (edit("report.json", '"schema_version": 3', '"schema_version": NaN'), "report", "NaN is not a number"),
        (edit("recipe.yaml", "iters: 654", "iters: 655"), "config", "recipe.yaml"),
        (
            edit("slimzoo_layers_armor.py", "import torch", "import torch, os"),
            "files",
            "slimzoo_layers_armor.py is not",
        ),
        (lambda folder: (folder / "stowaway.py").write_text(""), "files", "stowaway.py was added"),
        (remove_module, "files", r"slimzoo_\w+.py is missing"),
        (cut_shard, "weights", r"model.safetensors cannot be read .* the file is damaged"),
        (in_weights(lambda t: t[f"{PROJECTION}.wrap_in"][0, 1].fill_(torch.inf)), "weights", "up_proj.wrap_in"),
        (
            in_weights(lambda t: t[f"{PROJECTION}.core_mask"][2:3].fill_(7)),
            "layers",
            "core_mask keeps 3 .*row 2",
        ),
        (in_weights(lambda t: t.pop(f"{PROJECTION}.wrap_out")), "layers", "up_proj.*wrap_out"),
        (in_weights(lambda t: t.update({"extra": torch.zeros(4096)})), "sizes", "compressed_bytes is"),
        (in_config(lambda c: c["modules"].pop(PROJECTION)), "config", "up_proj is packed in the report only"),
        (in_config(lambda c: c["modules"][PROJECTION].update(block_in=32)), "config", "up_proj: block_in is 32"),
        (in_config(lambda c: c["proxy_loss"][PROJECTION].reverse()), "config", "up_proj: proxy loss"),
        (in_report("layers", 5, "loss_final", value=0.0), "config", "proxy loss"),
        (in_report("size", "compressed_bytes", value=9_999), "sizes", "compressed_bytes"),
        (in_report("size", "dense_bytes", value=10**9), "sizes", "the report claims 1,000,000,000"),
        (in_report("files", "ghost.json", value="00"), "files", "ghost.json"),
    ],
)
def test_tampering_is_found_and_named(folder, tamper, check, said):
    tamper(folder)
    if said == "ghost.json":  # `rewrite` made the hashes anew: forge this one by hand
        edit("report.json", '"files": {', '"files": {"ghost.json": "00", ')(folder)
    found = failures(folder, None)
    assert any(finding.check == check and re.search(said, finding.message) for finding in found), found


def test_settings_that_the_claims_rest_on_are_those_of_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    layers = [[8, 4]] * config["num_hidden_layers"]
    table = {"mode": "per_token", "group_size": -1, "residual_length": 0, "layers": layers}
    changed = config | {"kv_cache_quantization": {"method": "kvtuner", "version": 1, **table}}
    (folder / "config.json").write_text(json.dumps(changed))
    rewrite(folder, lambda report: None)
    (finding,) = failures(folder, None)
    assert finding.message == "kv_cache_quantization is in config.json only"
    rewrite(folder, lambda report: report.update(settings={"kv_cache_quantization": table}))
    assert failures(folder, None) == []
    claimed = {"kv_cache_quantization": table | {"mode": "kivi"}, "drop": {"from_layer": 3}}
    rewrite(folder, lambda report: report.update(settings=claimed))
    assert [finding.message for finding in failures(folder, None)] == [
        "kv_cache_quantization: mode is per_token in config.json and kivi in the report",
        "drop: from_layer is None in config.json and 3 in the report",
    ]


def forged(value):
    def change(report):
        metric = report["compressed"]["perplexity/A"]
        metric.update(values=[value, value], value=value, spread=0.0)

    return change


def test_a_forged_mean_is_not_that_of_its_windows(folder):
    rewrite(folder, forged(11.0))
    (finding,) = failures(folder, None)
    assert finding.check == "measurements" and "perplexity/A of armor is [11.0, 11.0] in the report" in finding.message


def shift(raw, by):
    """All windows of all seeds."""
    return [[[x + by for x in windows] for windows in models] for models in raw]


@pytest.mark.parametrize(
    "tamper, said",
    [
        (
            lambda kept, paired: kept["wanda"].update({"perplexity/A": shift(kept["wanda"]["perplexity/A"], 0.1)}),
            "of wanda",
        ),
        (lambda kept, paired: kept["armor"]["perplexity/A"][0][0].reverse(), "against dense"),  # the mean is the same
        (lambda kept, paired: kept["armor"]["perplexity/A"].pop(), "of armor is"),
        (lambda kept, paired: kept["dense"]["perplexity/B"][0][0].pop(), "perplexity/B of dense is"),
        (lambda kept, paired: kept.pop("sparsegpt"), "is about dense, armor, wanda, the report about"),
        (lambda kept, paired: kept["armor"].pop("perplexity/B"), "perplexity/B against dense"),
        (lambda kept, paired: kept["armor"].update(extra=[[[1]]]), "extra of armor, which the report does not claim"),
        (lambda kept, paired: paired["wanda"]["perplexity/A"].update(error=1e-4), "perplexity/A against wanda"),
        (lambda kept, paired: paired["dense"]["perplexity/A"].update(difference=-0.3), "perplexity/A against dense"),
        (lambda kept, paired: paired["wanda"]["perplexity/A"].update(n=700), "perplexity/A against wanda"),
        (lambda kept, paired: paired.pop("dense"), "against dense: the report claims None"),
    ],
)
def test_values_of_windows_and_verdicts_have_to_agree(folder, tamper, said):
    """Even with hashes made anew."""
    kept = read_measurements(folder)

    def change(report):
        tamper(kept, report["paired"])
        write_measurements(kept, folder)

    rewrite(folder, change)
    found = failures(folder, None)
    assert found and {finding.check for finding in found} == {"measurements"}
    assert any(said in finding.message for finding in found), found


def test_the_file_of_values_has_its_hash_and_may_not_be_missing(folder):
    path = folder / FILE
    path.write_text(path.read_text().replace("]]]}}}", "]]]}}} "))
    (finding,) = failures(folder, None)
    assert finding.check == "files" and f"{FILE} is not the file that was measured" in finding.message
    path.unlink()
    assert {finding.check for finding in failures(folder, None)} == {"files", "measurements"}


def test_a_folder_without_values_of_windows_is_not_paired_and_verifies(folder):
    """As those of earlier versions."""
    (folder / FILE).unlink()
    rewrite(folder, lambda report: report.pop("paired"))
    assert failures(folder) == []
    (finding,) = [finding for finding in verify(folder, claims) if finding.check == "measurements"]
    assert "not paired" in finding.message


@pytest.mark.parametrize("measured, ok", [(0.0210, True), (0.0214, True), (0.0229, False), (None, True)])
def test_fidelity_is_measured_again_or_said_to_be_skipped(folder, measured, ok):
    own = {"value": 0.021, "spread": 0.002, "n": 7, "n_of": "windows", "unit": "kl", "higher_is_better": False}

    def change(report):
        report["compressed"]["kl"] = own
        for rows in (report["dense"], *report["baselines"].values()):
            rows["kl"] = own

    rewrite(folder, change)
    again = {} if measured is None else {"kl": {"value": measured, "n": 7}}
    found = {f.check: f for f in verify(folder, lambda *arguments: claims(*arguments) | again)}
    assert found["kl"].ok == ok and ("dense model is not at hand" in found["kl"].message) == (measured is None)


def test_a_forgery_that_is_consistent_is_found_by_measuring(folder):
    kept = read_measurements(folder)
    kept["armor"]["perplexity/A"] = [
        shift(kept["armor"]["perplexity/A"], math.log(11 / value))[seed] for seed, value in enumerate((12.41, 12.61))
    ]

    def change(report):
        forged(11.0)(report)
        report["paired"] = paired_differences(kept, "armor")
        write_measurements(kept, folder)

    rewrite(folder, change)
    assert failures(folder, None) == []
    (finding,) = failures(folder)
    assert (finding.check, finding.message) == ("perplexity/A", "claimed 11, measured 12.41")


@pytest.mark.parametrize(
    "key, measured, ok",
    [
        ("perplexity/A", {"value": 12.41 * 1.009, "n": 7}, True),
        ("perplexity/A", {"value": 12.41 * 1.011, "n": 7}, False),
        ("perplexity/A", {"value": 12.41 * 0.989, "n": 7}, False),  # too good is as wrong
        ("perplexity/A", {"value": 12.41, "n": 6}, False),
        ("acc/riddles", {"value": 0.512 + 0.029, "n": 211}, True),
        ("acc/riddles", {"value": 0.512 - 0.031, "n": 211}, False),
    ],
)
def test_measured_values_have_to_agree(folder, key, measured, ok):
    found = failures(folder, lambda *arguments: claims(*arguments) | {key: measured})
    assert [finding.check for finding in found] == ([] if ok else [key])


def test_every_window_is_measured_again(folder):
    """Two that are swapped, their mean and all that follows from it the same for this model alone."""
    kept = read_measurements(folder)
    windows = kept["armor"]["perplexity/A"][0][0]
    windows[1], windows[4] = windows[4], windows[1]

    def change(report):
        report["paired"] = paired_differences(kept, "armor")
        write_measurements(kept, folder)

    rewrite(folder, change)
    assert failures(folder, None) == []
    found = failures(folder)
    assert len(found) == 2 and all("of number" in finding.message for finding in found)


def test_what_cannot_be_measured_again_fails(folder):
    found = failures(folder, lambda *arguments: {k: m for k, m in claims(*arguments).items() if k != "acc/riddles"})
    assert [finding.check for finding in found] == ["acc/riddles"]

    def broken(folder, report):
        raise UserError("the text A is missing")

    assert "the text A is missing" in failures(folder, broken)[0].message


def test_damage_of_any_kind_is_a_finding_not_a_crash(folder):
    for name in ("README.md", "config.json", "recipe.yaml", "model.safetensors"):
        (folder / name).write_bytes(b"\x00{")
    found = {finding.check for finding in failures(folder, None)}
    assert {"card", "files", "config", "weights", "layers", "sizes"} <= found
    (folder / "report.json").unlink()
    assert [finding.check for finding in failures(folder)] == ["report"]
    with pytest.raises(UserError, match="no such folder"):
        verify(folder / "nowhere")


@pytest.mark.parametrize(
    "hidden, ffn, kv, overhead",
    [(3584, 18944, 512, 0.0495), (5120, 13824, 1024, 0.0417), (5120, 27648, 1024, 0.0344), (8192, 29568, 1024, 0.024)],
)
def test_bytes_of_a_layer_follow_the_paper(hidden, ffn, kv, overhead):
    """The overhead that the paper states for Qwen2.5 at block 128, from the bytes; without, 1 + 1/8 byte a weight."""
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    plain = [{"format": "bitmask", "d_out": d_out, "d_in": d_in, "pattern": [2, 4]} for d_out, d_in in shapes]
    wrapped = [row | {"format": "armor", "block_out": 128, "block_in": 128} for row in plain]
    dense = sum(d_out * d_in for d_out, d_in in shapes)
    assert sum(row_bytes(row, 2) for row in plain) == 1.125 * dense
    extra = sum(row_bytes(row, 2) for row in wrapped) - 1.125 * dense
    assert extra / (2 * dense) == pytest.approx(overhead, abs=1e-4)
