"""What a flag may be: said in the metadata of its field, and checked here for command lines, YAML files and code alike.

Metadata of a field, besides `help`: `choices`; of a number, or of each in a list, `at_least`, `at_most`, `above` and
`below`; `regex` of a regular expression; `longest`, bytes of the last part of a path; `empty` where a list may be empty
although its default is not. What holds for all is not said: numbers are finite; text is printable, is empty only where
its default is, and no part of it between slashes is longer than a file's name may be.
"""

from __future__ import annotations

import math
import re
import reprlib
import types
import unicodedata
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from zoo.errors import UserError

if TYPE_CHECKING:
    from recipes.common.core.recipe import Recipe

LIMITS = ("at_least", "at_most", "above", "below", "regex", "longest", "empty")  # metadata that argparse does not know
LONGEST_NAME = 255  # bytes, of a file
LONGEST_TEXT = 4095  # bytes, of a path
LARGEST_YAML = 1 << 20  # bytes
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_flags(recipe: Recipe) -> None:
    """Raises UserError for the first field whose value is not of its type, or not one that its metadata allow."""
    hints = types_of(type(recipe))
    for f in fields(recipe):
        value, hint = getattr(recipe, f.name), hints[f.name]
        if not fits(value, hint):
            raise UserError(f"--{f.name} {shown(value)}: {wanted(hint, value)} is needed.")
        if isinstance(value, list) and not value and default(f) and "empty" not in f.metadata:
            raise UserError(f"--{f.name}: an empty list will not do; name one or more.")
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (needed := refusal(each, f)):
                raise UserError(f"--{f.name} {shown(each)}: {needed}.")


def refusal(value: Any, f: Field) -> str | None:
    """What is needed where one value, of the field's type, will not do."""
    limits = f.metadata
    if "choices" in limits:
        known = list(limits["choices"])
        return None if value in known else f"one of {', '.join(map(str, known))} is needed"
    if isinstance(value, str):
        return text_refusal(value, f)
    if isinstance(value, bool):
        return None
    fine = (
        -math.inf < value < math.inf
        and limits.get("at_least", -math.inf) <= value <= limits.get("at_most", math.inf)
        and limits.get("above", -math.inf) < value < limits.get("below", math.inf)
    )
    noun = KINDS[int if isinstance(value, int) else float]
    return None if fine else " ".join([noun, *filter(None, [range_of(limits)]), "is needed"])


def text_refusal(value: str, f: Field) -> str | None:
    if not value and default(f) != "":
        return "it is empty; leave the flag out for its default"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        return "it holds a character that is none of a text"
    raw = value.encode()
    if "regex" in f.metadata:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"no regular expression ({error})"
    elif max(map(len, raw.split(b"/"))) > LONGEST_NAME or len(raw) > LONGEST_TEXT:
        return f"it is {len(raw)} bytes long, a name takes {LONGEST_NAME} at most"
    elif len(Path(value).name.encode()) > f.metadata.get("longest", LONGEST_NAME):
        return f"a name of {f.metadata['longest']} bytes at most is needed"
    return None


def range_of(limits: Mapping[str, Any]) -> str:
    """'from 0 to 1', 'above 0 and at most 1'; empty where nothing is said."""
    if "at_least" in limits and "at_most" in limits:
        return f"from {limits['at_least']:,} to {limits['at_most']:,}"
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return " and ".join(f"{word} {limits[name]:,}" for name, word in words.items() if name in limits)


def default(f: Field) -> Any:
    return f.default_factory() if f.default is MISSING else f.default


# --------------------------------------------------------------------------------------------------------------- types


types_of = cache(get_type_hints)  # {field: its type} of a class


def kind(hint: Any) -> type:
    """`int` of int, of int | None and of list[int]."""
    inner = [kind(part) for part in get_args(hint) if part is not types.NoneType]
    return inner[0] if inner else hint


def fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(each, kind(hint)) for each in value)
    if get_args(hint):
        return value is None or fits(value, kind(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def wanted(hint: Any, value: Any) -> str:
    """The type in words, with how YAML writes it where a value is of another one."""
    if get_origin(hint) is list:
        how = "" if isinstance(value, list | dict) else f", [{shown(value)}] in YAML,"
        return f"a list, each of it {KINDS[kind(hint)]},{how.removeprefix(',')}"
    return KINDS[kind(hint)] + (
        " (in YAML, in quotes)" if kind(hint) is str and not isinstance(value, list | dict) else ""
    )


def converted(value: Any, hint: Any) -> Any:
    """Numbers that were given as text, and whole ones where any will do; anything else as it is, for `check_flags`."""
    if isinstance(value, list) and get_origin(hint) is list:
        return [converted(each, kind(hint)) for each in value]
    if kind(hint) in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return kind(hint)(value)
        except (ValueError, OverflowError):
            return value
    return value


def shown(value: Any) -> str:
    """A value in a sentence, however long or deep it is."""
    text = value if isinstance(value, str) and value.isprintable() and value else reprlib.Repr().repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's code says, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------- YAML


class UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that says the same thing twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = [key.value for key, _ in node.value]
        if twice := [key for key in seen if seen.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"it says {shown(twice[0])} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, flag: str = "--config") -> dict:
    """The mapping in a YAML file. Raises: UserError, naming `flag`, for anything else."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_YAML + 1)
        values = yaml.load(raw.decode("utf-8-sig"), UniqueKeys) if len(raw) <= LARGEST_YAML else None
    except OSError as error:
        raise UserError(f"{flag} {shown(str(path))}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not a YAML file (it is not UTF-8 text).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{flag} {path}: not a YAML file ({reason}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{flag} {path}: a YAML mapping from names to values is needed.")
    return values
