"""Check a checkpoint folder against its own report: files, weights, sizes, card, and the metrics."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import metadata_load
from torch import nn

from ..errors import UserError
from ..folder import open_folder
from ..layers.packing import filled_layer, row_bytes
from ..tensors import INDEX
from .card import metric_source, render_card
from .format import FIDELITY, method_name
from .measurements import FILE, Raw, paired_differences, read_measurements, seed_values
from .migrate import RENAMED
from .schema import read_report

SIZE_TOLERANCE = 0.01  # relative; headers and padding
PERPLEXITY_TOLERANCE = 0.01  # relative; same windows and dtype, so only the order of sums differs between machines
WINDOW_TOLERANCE = 0.03  # absolute, in nats: of a single window's, or item's, log-likelihood
KL_TOLERANCE = 0.03, 1e-4  # relative and absolute: a KL is the small rest of two large sums
RAW_TOLERANCE = 1e-5  # relative: measurements.json has 7 digits
FRACTION_TOLERANCE = 0.03  # absolute, or one item: the items are the same too, so only near ties flip
QUANTILES = {"kl_median", "kl_p99"}  # their raw values are of windows, or of groups of items
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
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
    return [*findings, *check_measurements(folder, report), *check_metrics(folder, report, measure)]


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
    """Of a card that an earlier version rendered, the front matter, the rows of tables and the changes in verdicts are what
    the report gives, no row is missing, and no sentence holds a number that the report does not give; the words of the
    sentences, and the order of the parts, are those of then.
    """
    front = card.index("---", 1)
    known, numbers = {comparable(line) for line in rendered}, set(NUMBER.findall("\n".join(rendered)))
    for number, line in enumerate(card):
        for old, new in RENAMED.items():
            line = line.replace(old, new)
        exact = number < front or line.startswith("|") or len(comparable(line)) > 1
        if not (comparable(line) in known if exact else numbers.issuperset(NUMBER.findall(line))):
            yield f"README.md, line {number + 1} says {line!r}, which the report does not give"
            return
    for line in rendered:
        if line.startswith("|") and line not in card:
            yield f"README.md lacks the row {line!r}, which the report gives"
            return


def comparable(line: str) -> tuple[str, ...]:
    """A line of a card; a verdict as its parts, without the words better, worse and undecided, which earlier versions chose
    by other rules.
    """
    head, against, told = line.partition(" against ")
    if not (against and line.startswith("- ")):
        return (line,)
    told = re.sub(r"\b(better|worse|undecided) on |\.( No gain over it was measured\.)?$", "", told)
    name, _, changes = told.partition(": ")
    return head, name, *sorted(re.split(r"(?<=\))[,;] ", changes))


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


def check_measurements(folder: Path, report: dict) -> Iterator[Finding]:
    """measurements.json gives the means, the values of the seeds and the paired differences that the report claims."""
    if "paired" not in report and not (folder / FILE).exists():
        yield Finding(True, "measurements", "none were kept: the report's differences are not paired")
        return
    try:
        problems = list(measurement_problems(read_measurements(folder), report))
    except UserError as error:
        problems = [str(error)]
    yield from (Finding(False, "measurements", problem) for problem in problems)
    if not problems:
        yield Finding(True, "measurements", check_measurements.__doc__.rstrip("."))


def measurement_problems(variants: dict[str, dict[str, Raw]], report: dict) -> Iterator[str]:
    own = method_name(report)
    rows = {"dense": report["dense"], own: report["compressed"], **report["baselines"]}
    if variants.keys() != rows.keys():
        yield f"{FILE} is about {', '.join(variants)}, the report about {', '.join(rows)}"
        return
    for name, metrics in variants.items():
        for key, raw in metrics.items():
            if key not in rows[name]:
                yield f"{FILE} has {key} of {name}, which the report does not claim"
                continue
            claimed = rows[name][key]
            found, wanted = seed_values(raw, claimed["unit"]), claimed.get("values", [claimed["value"]])
            if len(found) != len(wanted) or not all(map(near, found, wanted)):
                yield f"{key} of {name} is {wanted} in the report, {FILE} gives {found}"
            if claimed["n_of"] in ("windows", "items") and key not in QUANTILES and len(raw[0][0]) != claimed["n"]:
                yield f"{key} of {name} is claimed of {claimed['n']} {claimed['n_of']}, {FILE} has {len(raw[0][0])}"
    pairs, claims = paired_differences(variants, own), report.get("paired", {})
    places = {(other, key) for side in (pairs, claims) for other in side for key in side[other]}
    for other, key in sorted(places):
        found, claimed = (side.get(other, {}).get(key) for side in (pairs, claims))
        same = found is not None and claimed is not None and found["n"] == claimed["n"]
        if not same or not all(near_or_none(found[part], claimed[part]) for part in ("difference", "error")):
            yield f"{key} against {other}: the report claims {claimed}, {FILE} gives {found}"


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RAW_TOLERANCE, abs_tol=RAW_TOLERANCE * 1e-4)


def near_or_none(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else near(a, b)


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
    try:
        kept = read_measurements(folder).get(method_name(report), {})
    except UserError:  # none, or a finding already
        kept = {}
    for key, metric in report["compressed"].items():
        claim = metric.get("values", [metric["value"]])[0]
        if key not in measured and key in FIDELITY:
            yield Finding(True, key, "not measured again: the dense model is not at hand")
            continue
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
        elif metric["unit"] == "kl":
            relative, absolute = KL_TOLERANCE
            ok = math.isclose(value, claim, rel_tol=relative, abs_tol=absolute)
            yield Finding(ok, key, f"claimed {claim:.4g}, measured {value:.4g}")
        else:
            ok = math.isclose(value, claim, rel_tol=PERPLEXITY_TOLERANCE)
            yield Finding(ok, key, f"claimed {claim:.6g}, measured {value:.6g}")
            if ok and metric["unit"] == "ppl" and key in kept and "raw" in measured[key]:  # the first seed's again
                yield from check_windows(key, kept[key][0][0], measured[key]["raw"][0])


def check_windows(key: str, claimed: list[float], found: list[float]) -> Iterator[Finding]:
    """The mean log-likelihood of every window or item, which may be further off than their mean."""
    for place, (a, b) in enumerate(zip(claimed, found, strict=False)):  # other numbers of them are findings already
        if abs(a - b) > WINDOW_TOLERANCE:
            yield Finding(False, key, f"of number {place}, {FILE} has {a:.6g} nats a token, measured {b:.6g}")


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
