"""The way in, `python -m recipes`: finds a recipe, parses its flags and runs it; and verify, publish, export."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from transformers import HfArgumentParser

from recipes.common.core.flags import LIMITS, converted, range_of, read_yaml, types_of
from recipes.common.core.recipe import Recipe
from recipes.common.core.run import execute
from recipes.common.export import EXPORTS, export_as
from zoo.errors import UserError
from zoo.record.format import FIDELITY
from zoo.record.hub import publish as publish_folder
from zoo.record.verify import verify as verify_folder

RECIPES = Path(__file__).resolve().parents[2]
HELP = """usage: python -m recipes <name> [--config FILE] [flags]   make, measure and describe a compressed checkpoint
       python -m recipes <name> --help                    the recipe's flags
       python -m recipes --list                           the recipes
       python -m recipes verify FOLDER                    re-measure a checkpoint's own claims
       python -m recipes publish FOLDER ORG/NAME [--tag TAG] [--private]
       python -m recipes export FOLDER OUTPUT --format FORMAT
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Mistakes of the user end with one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"verify": verify, "publish": publish, "export": export}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
        elif arguments[0] == "--list":
            print("\n".join(recipe_names()))
        elif arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            if folder := execute(parse(arguments[0], arguments[1:])):
                print(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# ------------------------------------------------------------------------------------------------------------- recipes


def recipe_names() -> list[str]:
    """Names of the recipes, modules or folders with an `__init__.py`, in kebab case."""
    found = {path.stem for path in RECIPES.glob("*.py")} | {path.parent.name for path in RECIPES.glob("*/__init__.py")}
    return sorted(name.replace("_", "-") for name in found - {"common", "bench"} if not name.startswith("_"))


def recipe_class(name: str) -> type[Recipe]:
    if name not in recipe_names():
        raise UserError(f"{name}: no such recipe; there are {', '.join(recipe_names())}.")
    module = importlib.import_module(f"recipes.{name.replace('-', '_')}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module.__name__
    )


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as UserError: one sentence, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split()).rstrip('.')}; see --help.")


class RecipeParser(Parser, HfArgumentParser):
    """The command line of a recipe's fields. Values are checked by the recipe (flags.py), so numbers stay text here."""

    def add_argument(self, *names: str, **options) -> argparse.Action:
        limits = {key: options.pop(key) for key in LIMITS if key in options}
        if options.get("type") in (int, float):
            del options["type"]
        if "choices" in options:
            options["metavar"] = f"{{{','.join(map(str, options.pop('choices')))}}}"
        if names[0].startswith("--no_"):
            options |= {"help": f"turn --{options['dest']} off", "default": argparse.SUPPRESS}
        elif values := range_of(limits):
            options["help"] += f"; {values}"
        return super().add_argument(*names, **options)


def parse(name: str, arguments: list[str]) -> Recipe:
    """Flags over `--config file.yaml` over `--paper` (configs/<name>/paper.yaml) over the dataclass's defaults."""
    cls = recipe_class(name)
    parser = RecipeParser(cls, prog=f"python -m recipes {name}", description=cls.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags on the command line win")
    parser.add_argument("--paper", action="store_true", help=f"the paper's settings (configs/{name}/paper.yaml)")
    hints, unset = types_of(cls), argparse.SUPPRESS
    known = [f.name for f in fields(cls)]
    given = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(known, unset))))
    paper, config, values = given.pop("paper"), given.pop("config"), {}
    for path in (RECIPES / "configs" / name / "paper.yaml" if paper else None, config):
        if path is None:
            continue
        read = read_yaml(Path(path))
        unknown = [str(key) for key in read if key not in known]
        if unknown:
            raise UserError(f"--config {path}: {', '.join(unknown)} is not a flag of {name}; see --help.")
        values |= read
    values |= {key: value for key, value in given.items() if value is not unset}
    return cls(**{key: converted(value, hints[key]) for key, value in values.items()})


# ------------------------------------------------------------------------------------------------------------ commands


def verify(arguments: list[str]) -> None:
    """Re-measures a checkpoint's own claims; exit code 1 when one does not hold."""
    parser = Parser(prog="python -m recipes verify", description=verify.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("--static", action="store_true", help="check files, sizes and card only; measure nothing")
    flags = parser.parse_args(arguments)
    findings = verify_folder(flags.folder, None if flags.static else remeasure)
    for finding in findings:
        print(finding)
    if any(not finding.ok for finding in findings):
        raise SystemExit(1)


def remeasure(folder: Path, report: dict) -> dict[str, dict]:
    """The metrics of a finished checkpoint, measured again through its recipe's domain as its report says."""
    cls = recipe_class(report["recipe"])
    known = {f.name for f in fields(cls)}
    recipe = cls(**{key: value for key, value in report["config"].items() if key in known})
    domain, reference = replace(recipe.domain(), folder=folder), None
    with tempfile.TemporaryDirectory() as kept:
        if report["compressed"].keys() & set(FIDELITY):
            dense = recipe.dense_at_hand(folder, report["base_model"]["sha256"])
            reference = domain.predictions(domain.load(dense), Path(kept)) if dense else None
        with recipe.reopen(folder) as model:
            return domain.metrics(model, reference)


def publish(arguments: list[str]) -> None:
    """Uploads a checkpoint or a Space to the Hub; running it again finishes an interrupted upload."""
    parser = Parser(prog="python -m recipes publish", description=publish.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder, or one of spaces/")
    parser.add_argument("repo", help="org/name")
    parser.add_argument("--tag", help="also tag the commit, for from_pretrained(..., revision=TAG)")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    flags = parser.parse_args(arguments)
    print(publish_folder(flags.folder, flags.repo, tag=flags.tag, private=flags.private))


def export(arguments: list[str]) -> None:
    """Writes a compressed checkpoint for other engines: dense weights, compressed-tensors, or GGUF for llama.cpp."""
    parser = Parser(prog="python -m recipes export", description=export.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("output", type=Path, help="folder (dense) or .gguf file to write; must not exist")
    parser.add_argument("--format", choices=EXPORTS, default="dense")
    flags = parser.parse_args(arguments)
    export_as(flags.folder, flags.output, flags.format)
    print(flags.output)
