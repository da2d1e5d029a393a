"""Check a checkpoint folder against its own report: files, weights, sizes, card, and the metrics."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import metadata_load
from torch import nn

from ..errors import UserError
from ..folder import INDEX, open_folder
from ..layers.packing import filled_layer, row_bytes
from .card import metric_source, render_card
from .migrate import RENAMED
from .schema import read_report

SIZE_TOLERANCE = 0.01  # relative; headers and padding
PERPLEXITY_TOLERANCE = 0.01  # relative; same windows and dtype, so only the order of sums differs between machines
FRACTION_TOLERANCE = 0.03  # absolute, or one item: the items are the same too, so only near ties flip
NOT_HASHED = {"report.json", "README.md"}  # the report holds the hashes; the card is rendered from the report


@dataclass(frozen=True)
class Finding:
    """One check of one claim; prints as a line."""

    ok: bool
    check: str
    message: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.check}: {self.message}"


def verify(folder: Path, measure: Callable[[Path, dict], dict[str, dict]] | None = None) -> list[Finding]:
    """Checks every claim that `folder` makes about itself.

    Args:
        folder: a checkpoint with report.json and README.md.
        measure: (folder, report) -> {metric: M}, measured anew on the texts, windows and items that `report["config"]`
            names; None leaves the metrics out, and the findings say so.
    Returns: findings, the failed ones with what is wrong and where.
    Raises: UserError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a checkpoint folder that a recipe printed.")
    try:
        report = read_report(folder / "report.json")
    except UserError as error:
        return [Finding(False, "report", str(error))]
    findings = [Finding(True, "report", "report.json follows the schema")]
    for check in (check_card, check_files, check_config, check_weights, check_layers, check_sizes):
        try:
            problems = list(check(folder, report))
        except (UserError, OSError) as error:
            problems = [str(error)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # files of any content get here
            problems = [f"cannot be checked ({type(error).__name__}: {error})"]
        name = check.__name__.removeprefix("check_")
        findings += [Finding(False, name, problem) for problem in problems]
        if not problems:
            findings.append(Finding(True, name, check.__doc__.splitlines()[0].rstrip(".")))
    return findings + list(check_metrics(folder, report, measure))


# Each check yields one sentence per problem; its docstring says what holds when it yields none.


def check_card(folder: Path, report: dict) -> Iterator[str]:
    """README.md is what the report renders to."""
    metadata = metadata_load(folder / "README.md") or {}
    name = metadata.get("model-index", [{}])[0].get("name", "")
    card = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    rendered = render_card(report, repo_id=name if "/" in name else None).splitlines()
    if json.loads((folder / "report.json").read_text(encoding="utf-8"))["schema_version"] != report["schema_version"]:
        yield from check_old_card(card, rendered)
        return
    for number in range(max(len(card), len(rendered))):
        found, wanted = (lines[number] if number < len(lines) else "" for lines in (card, rendered))
        if found != wanted:
            yield f"README.md, line {number + 1} says {found!r}, the report gives {wanted!r}"
            return


def check_old_card(card: list[str], rendered: list[str]) -> Iterator[str]:
    """Of a card that an earlier version rendered, every line that holds a number is one that the report gives, and no row of
    a table is missing; the order of its parts may be another one.
    """
    front = card.index("---", 1)
    for number, line in enumerate(card):
        told = number < front or line.startswith("|") or any(character.isdigit() for character in line)
        for old, new in RENAMED.items():
            line = line.replace(old, new)
        if told and line not in rendered:
            yield f"README.md, line {number + 1} says {line!r}, which the report does not give"
            return
    for line in rendered:
        if line.startswith("|") and line not in card:
            yield f"README.md lacks the row {line!r}, which the report gives"
            return


def check_files(folder: Path, report: dict) -> Iterator[str]:
    """Every file has the sha256 that the report records, and no code or weights were added."""
    if "files" not in report:
        yield "the report records no sha256 of the files"
        return
    found = hash_files(folder)
    for name, digest in report["files"].items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != digest:
            yield f"{name} is not the file that was measured: its sha256 is {found[name][:12]}…, not {digest[:12]}…"
    for name in found.keys() - report["files"].keys():
        if Path(name).suffix in (".py", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".so"):
            yield f"{name} was added: the report does not know it"


def check_config(folder: Path, report: dict) -> Iterator[str]:
    """config.json and recipe.yaml say what the report says: modules, formats, proxy losses, settings."""
    model = open_folder(folder)
    modules, losses = model.modules, model.compression.get("proxy_loss", {})
    rows = {row["name"]: row for row in report["layers"]}
    for name in sorted(modules.keys() ^ rows.keys()):
        yield f"{name} is packed in {'config.json' if name in modules else 'the report'} only"
    for name in modules.keys() & rows.keys():
        row, spec = rows[name], modules[name]
        for key in spec:
            if row.get(key) != spec[key]:
                yield f"{name}: {key} is {spec[key]} in config.json and {row.get(key)} in the report"
        claimed = None if row["loss_init"] is None else [row["loss_init"], row["loss_final"]]
        if losses.get(name) != claimed:
            yield f"{name}: proxy loss is {losses.get(name)} in config.json and {claimed} in the report"
    for key, claimed in ({"kv_cache_quantization": {}} | report.get("settings", {})).items():
        found = model.config.get(key) or {}
        if found and not claimed:
            yield f"{key} is in config.json only"
        for part, value in claimed.items():
            if found.get(part) != value:
                yield f"{key}: {part} is {found.get(part)} in config.json and {value} in the report"
    if yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) != report["config"]:
        yield "recipe.yaml differs from the settings in the report"


def check_weights(folder: Path, report: dict) -> Iterator[str]:
    """All weights files are complete, the index names each tensor's file, and every number is finite."""
    tensors = open_folder(folder).tensors
    for name in tensors:
        tensor = tensors[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{name} in {tensors.file_of[name].name} holds NaN or Inf"
    index, placed = folder / INDEX, {name: file.name for name, file in tensors.file_of.items()}
    if index.exists() and json.loads(index.read_text(encoding="utf-8"))["weight_map"] != placed:
        yield f"{index.name} does not match what the weights files hold"


def check_layers(folder: Path, report: dict) -> Iterator[str]:
    """Every packed layer has its tensors, in the right shapes, valid masks, and the bytes that its format needs."""
    model = open_folder(folder)
    for row in report["layers"]:
        name = row["name"]
        parts = model.parts(name)
        with torch.device("meta"):
            like = dense_layer(row, "bias" in parts)
        try:
            layer = filled_layer(name, like, model.modules[name], parts)
        except UserError as error:
            yield str(error)
            continue
        stored = sum(tensor.nbytes for key, tensor in parts.items() if key != "bias")
        wanted = row_bytes(row, layer.dtype.itemsize)
        if not math.isclose(stored, wanted, rel_tol=SIZE_TOLERANCE):
            yield f"{name} takes {stored:,} bytes, its format needs {wanted:,}"


def check_sizes(folder: Path, report: dict) -> Iterator[str]:
    """Bytes on disk, dense bytes and the numbers stored are those of the report."""
    model = open_folder(folder)
    unknown = () if model.compression else ("parameters", "dense_bytes")  # a stock folder does not know its dense model
    for key, value in model.sizes().items():
        if key not in unknown and not math.isclose(value, report["size"][key], rel_tol=SIZE_TOLERANCE):
            yield f"{key} is {value:,}, the report claims {report['size'][key]:,}"
    on_disk, claimed = sum(map(tensor_bytes, model.files)), report["size"]["compressed_bytes"]
    if not math.isclose(on_disk, claimed, rel_tol=SIZE_TOLERANCE):
        yield f"the weights files hold {on_disk:,} bytes, the report claims {claimed:,}"


def check_metrics(folder: Path, report: dict, measure: Callable | None) -> Iterator[Finding]:
    """Measures the first seed's claims again: that seed's checkpoint is the one in the folder."""
    if measure is None:
        yield Finding(True, "metrics", "not measured again")
        return
    try:
        measured = measure(folder, report)
    except (OSError, ValueError, RuntimeError) as error:  # what a damaged checkpoint or a missing text gives
        yield Finding(False, "metrics", f"cannot be measured ({error})")
        return
    for key, metric in report["compressed"].items():
        claim = metric.get("values", [metric["value"]])[0]
        if key not in measured:
            yield Finding(False, key, f"claimed as {claim:.6g}, but was not measured again")
            continue
        value, n = measured[key]["value"], measured[key]["n"]
        dense = report["dense"][key]
        items, of = dense["n"], dense["n_of"]
        if of == "seeds":  # a dense model was trained for each seed
            items, of = metric_source(report, key)[1]["items"], "items"
        if n != items:
            yield Finding(False, key, f"measured on {n} {of}, the report says {items}")
        elif metric["unit"] == "fraction":
            tolerance = max(FRACTION_TOLERANCE, 1.5 / n)
            yield Finding(abs(value - claim) <= tolerance, key, f"claimed {claim:.4g}, measured {value:.4g}")
        else:
            ok = math.isclose(value, claim, rel_tol=PERPLEXITY_TOLERANCE)
            yield Finding(ok, key, f"claimed {claim:.6g}, measured {value:.6g}")


# --------------------------------------------------------------------------------------------------------- reading


def hash_files(folder: Path) -> dict[str, str]:
    """{path in the folder: sha256} of all but the report, the card, and hidden files."""
    digests = {}
    for file in sorted(Path(folder).rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if file.is_file() and not hidden and name.as_posix() not in NOT_HASHED:
            with file.open("rb") as stream:
                digests[name.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def tensor_bytes(file: Path) -> int:
    """Of a safetensors file: 8 bytes of length, that many bytes of JSON, and the tensors."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def dense_layer(row: dict, bias: bool) -> nn.Module:
    """A layer of the shape that a report's row gives: a convolution if it names a kernel."""
    if "kernel" not in row:
        return nn.Linear(row["d_in"], row["d_out"], bias)
    channels = row["d_in"] // math.prod(row["kernel"]) * row["groups"]
    return nn.Conv2d(channels, row["d_out"], tuple(row["kernel"]), groups=row["groups"], bias=bias)
