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
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from ..checkpoint import load_compression, read_checkpoint_sizes
from ..errors import UserError
from ..layers.packing import pack_layers
from .card import metric_source, render_card
from .schema import read_report

SIZE_TOLERANCE = 0.01  # relative; headers and padding
PERPLEXITY_TOLERANCE = 0.01  # relative; same windows and dtype, so only the order of sums differs between machines
FRACTION_TOLERANCE = 0.03  # absolute, or one item: the items are the same too, so only near ties flip
NOT_HASHED = {"report.json", "README.md"}  # the report holds the hashes; the card is rendered from the report
TENSOR_NAMES = {
    "armor": {"core_values", "core_mask", "wrap_out", "wrap_in"},
    "bitmask": {"values", "mask", "row_offsets"},
    "block_sparse": {"blocks", "crow_indices", "col_indices"},
    "packed": {"qweight", "scales", "zeros"},
    "seeded_bitmask": {"values"},
}


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
        except (UserError, OSError, SafetensorError) as error:
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
    for number in range(max(len(card), len(rendered))):
        found, wanted = (lines[number] if number < len(lines) else "" for lines in (card, rendered))
        if found != wanted:
            yield f"README.md, line {number + 1} says {found!r}, the report gives {wanted!r}"
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
    """config.json and recipe.yaml say what the report says: modules, formats, proxy losses, cache, settings."""
    compression = load_compression(folder)
    modules, losses = compression["modules"], compression.get("proxy_loss", {})
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
    table = getattr(AutoConfig.from_pretrained(folder), "kv_cache_quantization", None) or {}
    claimed = report.get("cache", {})
    for key in ("mode", "group_size", "residual_length", "layers"):
        if table.get(key) != claimed.get(key):
            yield f"kv_cache_quantization: {key} is {table.get(key)} in config.json and {claimed.get(key)} in the report"
    if yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) != report["config"]:
        yield "recipe.yaml differs from the settings in the report"


def check_weights(folder: Path, report: dict) -> Iterator[str]:
    """All weights files are complete, the index names each tensor's file, and every number is finite."""
    placed: dict[str, str] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    placed[name] = file.name
                    tensor = opened.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        yield f"{name} in {file.name} holds NaN or Inf"
        except SafetensorError as error:
            yield f"{file.name} is damaged ({error})"
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text(encoding="utf-8"))["weight_map"] != placed:
        yield f"{index.name} does not match what the weights files hold"


def check_layers(folder: Path, report: dict) -> Iterator[str]:
    """Every packed layer has its tensors, in the right shapes, valid masks, and the bytes that its format needs."""
    modules = load_compression(folder)["modules"]
    tensors = open_weights(folder)
    for row in report["layers"]:
        name = row["name"]
        names = {"bias", *TENSOR_NAMES.get(row["format"], ())}
        parts = {key: tensors[f"{name}.{key}"]() for key in sorted(names) if f"{name}.{key}" in tensors}
        floats = {tensor.dtype for tensor in parts.values() if tensor.is_floating_point()}
        if len(floats) != 1:
            yield f"{name}: one dtype of floating-point tensors is needed, there are {sorted(map(str, floats))}"
            continue
        dtype = floats.pop()
        with torch.device("meta"):
            holder = nn.ModuleDict({"layer": dense_layer(row, "bias" in parts, dtype)})
        try:
            pack_layers(holder, {"layer": modules[name]})
            holder["layer"].load_state_dict(parts, assign=True)
            holder["layer"].validate(name)
        except RuntimeError as error:  # load_state_dict: missing tensors, wrong shapes
            yield f"{name}: {' '.join(str(error).split())}"
            continue
        except UserError as error:
            yield str(error)
            continue
        stored = sum(tensor.nbytes for key, tensor in parts.items() if key != "bias")
        wanted = layer_bytes(row, dtype.itemsize)
        if not math.isclose(stored, wanted, rel_tol=SIZE_TOLERANCE):
            yield f"{name} takes {stored:,} bytes, its format needs {wanted:,}"


def check_sizes(folder: Path, report: dict) -> Iterator[str]:
    """Bytes on disk, dense bytes and the numbers stored are those of the report."""
    measured = read_checkpoint_sizes(folder)
    for key, value in measured.items():
        if not math.isclose(value, report["size"][key], rel_tol=SIZE_TOLERANCE):
            yield f"{key} is {value:,}, the report claims {report['size'][key]:,}"
    on_disk, claimed = sum(file.stat().st_size for file in weight_files(folder)), report["size"]["compressed_bytes"]
    headers = sum(header_bytes(file) for file in weight_files(folder))
    if not math.isclose(on_disk - headers, claimed, rel_tol=SIZE_TOLERANCE):
        yield f"the weights files hold {on_disk - headers:,} bytes, the report claims {claimed:,}"


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


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def header_bytes(file: Path) -> int:
    """A safetensors file is 8 bytes of length, that many bytes of JSON, and the tensors."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def open_weights(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """{tensor name: function that reads it}."""
    readers = {}
    for file in weight_files(folder):
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            readers[name] = lambda opened=opened, name=name: opened.get_tensor(name)
    return readers


def dense_layer(row: dict, bias: bool, dtype: torch.dtype) -> nn.Module:
    """A layer of the shape that a report's row gives: a convolution if it names a kernel."""
    if "kernel" not in row:
        return nn.Linear(row["d_in"], row["d_out"], bias, dtype=dtype)
    channels = row["d_in"] // math.prod(row["kernel"]) * row["groups"]
    return nn.Conv2d(channels, row["d_out"], tuple(row["kernel"]), groups=row["groups"], bias=bias, dtype=dtype)


def layer_bytes(row: dict, itemsize: int) -> int:
    """Bytes of one packed matrix without its bias, from its row in the report alone.

    N:M core: d_out·d_in·N/M values and one bit a position; unstructured: nnz values, the bits, d_out+1 offsets of
    8 bytes, or the values alone where a seed stands for the positions; ARMOR adds b_out·d_out + b_in·d_in wrapper
    values. Packed bits: the codes, a scale a group, and a zero a group of 1 byte (integer) or like the scale (float).
    Blocks: their numbers, and 4 bytes for each block-column and for where each block-row begins and ends.
    """
    d_out, d_in = row["d_out"], row["d_in"]
    if "blocks" in row:
        b_r, b_c = row["block"]
        return row["blocks"] * (b_r * b_c * itemsize + 4) + 4 * (-(-d_out // b_r) + 1)
    if "bits" in row:
        groups = d_out * (1 if row["group_size"] == -1 else d_in // row["group_size"])
        zero = {"none": 0, "integer": 1, "float": itemsize}[row["zeros"]]
        return d_out * d_in * row["bits"] // 8 + groups * (itemsize + zero)
    if "seed" in row:
        return row["nnz"] * itemsize
    mask = d_out * -(-d_in // 8)
    if "nnz" in row:
        return row["nnz"] * itemsize + mask + 8 * (d_out + 1)
    n, m = row["pattern"]
    numbers = d_out * d_in * n // m + d_out * row.get("block_out", 0) + d_in * row.get("block_in", 0)
    return numbers * itemsize + mask
