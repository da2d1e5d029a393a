"""The zoo's index: one row per published checkpoint, with its recipe, base, Hub repository and measured report."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from .errors import UserError
from .record.format import CARDS, baseline_name
from .record.schema import read_report


@dataclass(frozen=True)
class Entry:
    """A checkpoint of the zoo. Its numbers are those of its committed report, nothing else."""

    name: str
    recipe: str
    base: str  # Hub id of the dense model, or what its report calls it
    hub_repo: str
    auto_class: str = "AutoModelForCausalLM"

    @property
    def folder(self) -> Path:
        """Where the card and report.json are kept."""
        return CARDS / self.hub_repo.rpartition("/")[2]

    @property
    def is_measured(self) -> bool:
        return (self.folder / "report.json").exists()

    @property
    def command(self) -> str:
        """What builds it."""
        return f"make recipe-{self.recipe}"

    def report(self) -> dict:
        """The committed report. Raises: UserError if there is none yet, or a broken one."""
        if not self.is_measured:
            raise UserError(f"{self.name} has no committed report yet: `{self.command}` builds and measures it.")
        return read_report(self.folder / "report.json")

    def headline(self) -> dict:
        """{"metric", "dense", "compressed": M, "size_ratio", "quality_ratio": fractions of dense, "speed": M or
        None, "speed_of": what it is, such as "decode / dense bf16"}.

        The metric and the speed are the report's first; a quality ratio below 1 is a loss.
        """
        report = self.report()
        metric, compressed = next(iter(report["compressed"].items()))
        dense = report["dense"][metric]
        ratio = compressed["value"] / dense["value"]
        phase, ratios = next(iter(report["speed"].items()), ("", {}))
        baseline, speed = next(iter(ratios.items()), ("", None))
        return {
            "metric": metric,
            "dense": dense,
            "compressed": compressed,
            "size_ratio": report["size"]["compressed_bytes"] / report["size"]["dense_bytes"],
            "quality_ratio": ratio if compressed["higher_is_better"] else 1 / ratio,
            "speed": speed,
            "speed_of": f"{phase} / {baseline_name(baseline)}" if speed else "",
        }


ENTRIES = (
    Entry(
        name="smollm2-135m-instruct-armor-2:4",
        recipe="armor",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_repo="slimzoo/smollm2-135m-instruct-armor",
    ),
    Entry(
        name="smollm2-135m-instruct-layerwise-quant-3.5",
        recipe="layerwise-quant",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_repo="slimzoo/smollm2-135m-instruct-layerwise-quant",
    ),
    Entry(
        name="smollm2-135m-instruct-kvtuner-4",
        recipe="kvtuner",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_repo="slimzoo/smollm2-135m-instruct-kvtuner",
    ),
    Entry(
        name="resnet-8-cifar10-precropping",
        recipe="precropping",
        base="resnet-8 on cifar10",
        hub_repo="slimzoo/resnet-8-cifar10-precropping",
        auto_class="AutoModelForImageClassification",
    ),
    Entry(
        name="resnet-14-8-cifar10-random-pruning-5",
        recipe="random-pruning",
        base="resnet-14-8 on cifar10",
        hub_repo="slimzoo/resnet-14-8-cifar10-random-pruning",
        auto_class="AutoModelForImageClassification",
    ),
    Entry(
        name="vit-tiny-easy-vqa-lpvit-50",
        recipe="lpvit",
        base="vit-tiny on easy-vqa",
        hub_repo="slimzoo/vit-tiny-easy-vqa-lpvit",
        auto_class="AutoModelForImageClassification",
    ),
)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's checkpoints that match a shell wildcard, such as "*2:4*"; upper and lower case are alike."""
    return sorted(entry.name for entry in ENTRIES if fnmatch(entry.name.lower(), pattern.lower()))


def find_entry(name: str) -> Entry:
    """The row called `name`. Raises: UserError suggesting the nearest names."""
    for entry in ENTRIES:
        if entry.name == name.lower():
            return entry
    names = list_models()
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or names
    raise UserError(f"{name}: no such model in the zoo; did you mean {' or '.join(near)}?")


def find_checkpoint(entry: Entry, runs: Path = Path("runs")) -> str:
    """runs/<recipe> if that is this checkpoint (same recipe and base), else the Hub repository."""
    folder = runs / entry.recipe
    if (folder / "report.json").exists():
        report = read_report(folder / "report.json")
        if (report["recipe"], report["base_model"]["id"]) == (entry.recipe, entry.base):
            return str(folder)
    return entry.hub_repo


def load(name: str, **kwargs) -> PreTrainedModel:
    """The model called `name`; no remote code runs. Its tokenizer or image processor is at `model.name_or_path`.

    Args:
        kwargs: what `from_pretrained` accepts, such as dtype, device_map or revision.
    Raises: UserError for an unknown name, and when neither a local run nor the Hub has the checkpoint.
    """
    entry = find_entry(name)
    source = find_checkpoint(entry)
    try:
        return getattr(transformers, entry.auto_class).from_pretrained(source, **kwargs)
    except OSError as error:
        if source != entry.hub_repo:
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{name}: there is no runs/{entry.recipe} of it here, and {entry.hub_repo} cannot be loaded from the Hub"
            f" ({reason}). `{entry.command}` builds it."
        ) from error
