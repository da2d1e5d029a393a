"""The way in: a recipe is a dataclass whose fields are its flags; this module finds it, parses, checks and runs it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser

from zoo.errors import UserError

RECIPES = Path(__file__).resolve().parents[2]
RUN_ONLY = ("output", "resume", "overwrite", "push_to_hub", "export", "workers")  # flags that do not change the weights


@dataclass
class Recipe:
    """What every recipe has. A recipe module subclasses it (or a kind of recipe), adds its knobs, and fills in `run`."""

    model: str = field(
        default="smollm2-135m-instruct", metadata={"help": "base model: a Hub id, a folder, or an offline alias"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub model"})
    output: str | None = field(
        default=None, metadata={"help": "checkpoint folder; it appears whole or not at all (default: runs/<recipe>)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of calibration sampling and of the method"})
    seeds: int = field(
        default=1,
        metadata={"help": "measure with this many seeds (seed, seed+1, …); the checkpoint is the first one's"},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or cuda:N"})
    resume: bool = field(default=False, metadata={"help": "continue an interrupted run of the same settings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output or unfinished run"})
    push_to_hub: str | None = field(default=None, metadata={"help": "org/name to publish the checkpoint to"})
    export: list[str] = field(
        default_factory=list,
        metadata={"help": "also write for other engines: dense, gguf-f16, gguf-q8_0, gguf-packed, compressed-tensors"},
    )

    kind = "abstract"
    paper_title = ""
    arxiv = ""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def output_path(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    @property
    def state_path(self) -> Path:
        """Where an unfinished run keeps what it has: beside the output, removed when the output is whole."""
        return self.output_path.with_name(self.output_path.name + ".state")

    def settings(self) -> dict:
        """The fields that determine the weights: `recipe.yaml`."""
        return {key: value for key, value in asdict(self).items() if key not in RUN_ONLY}

    def check(self) -> None:
        """Raises UserError for impossible flags, before any work."""

    def run(self) -> Path:
        """Makes the checkpoint and returns its folder."""
        raise UserError(f"{self.name} cannot be run.")


def module_seed(seed: int, name: str) -> int:
    """A seed for one module that depends on the run's seed and the module's name only, not on any order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


# ------------------------------------------------------------------------------------------------------ run folders


def open_state(recipe: Recipe) -> Path:
    """Creates or reopens the state folder. Refuses an existing output and a state of other settings."""
    output, state = recipe.output_path, recipe.state_path
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not recipe.overwrite:
        raise UserError(f"--output {output}: it exists; pass --overwrite to replace it or name another folder.")
    settings = state / "recipe.yaml"
    if settings.exists() and not recipe.overwrite:
        if not recipe.resume:
            raise UserError(f"{state} holds an unfinished run; pass --resume to continue it or --overwrite to restart.")
        old, new = yaml.safe_load(settings.read_text()), recipe.settings()
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            raise UserError(f"--resume: {state} was made with other values of {', '.join(changed)}; use those again.")
        return state
    try:
        if recipe.overwrite and state.exists():
            shutil.rmtree(state)
        state.mkdir(parents=True, exist_ok=True)
        write_text(settings, yaml.safe_dump(recipe.settings(), sort_keys=False))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name a writable folder.") from None
    return state


def pin_inputs(state: Path, **sha256: str) -> None:
    """Records what a run reads when it starts, and refuses to resume it on anything else."""
    path = state / "inputs.json"
    pinned = cached_json(path, lambda: sha256)
    changed = sorted(key for key in sha256 if pinned.get(key) != sha256[key])
    if changed:
        raise UserError(
            f"--resume: the {', '.join(changed)} changed since {state} was begun; pass --overwrite to restart."
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


def cached_json(path: Path, make: Callable[[], dict]) -> dict:
    """The JSON at `path`, made once: what a resumed run has measured already is not measured again."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def check_resources(ram_bytes: float, disk_bytes: float, minutes: float, folder: Path) -> None:
    """Prints what the run needs, and refuses early what cannot fit."""
    import psutil

    while not folder.exists():
        folder = folder.parent
    ram, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    print(f"needs about {ram_bytes / 2**30:.1f} GiB RAM, {disk_bytes / 2**30:.1f} GiB disk, {minutes:.0f} minutes")
    if ram_bytes > ram:
        raise UserError(
            f"about {ram_bytes / 2**30:.1f} GiB of memory are needed, {ram / 2**30:.1f} GiB are free; lower --nsamples."
        )
    if disk_bytes > disk:
        raise UserError(
            f"about {disk_bytes / 2**30:.1f} GiB of disk are needed, {disk / 2**30:.1f} GiB are free; choose another"
            " --output."
        )


# ---------------------------------------------------------------------------------------------- processes and parsing


@dataclass
class World:
    """This process among those that torchrun or `accelerate launch` started; one process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None


def world(device: str) -> World:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    if state.is_main_process:
        print(f"{state.num_processes} processes share the work", flush=True)
    return World(state.process_index, state.num_processes, state.wait_for_everyone)


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


def parse(name: str, arguments: list[str]) -> Recipe:
    """Flags over `--config file.yaml` over `--paper` (configs/<name>/paper.yaml) over the dataclass's defaults."""
    cls = recipe_class(name)
    parser = HfArgumentParser(cls, prog=f"python -m recipes {name}", description=cls.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags on the command line win")
    parser.add_argument("--paper", action="store_true", help=f"the paper's settings (configs/{name}/paper.yaml)")
    files, _ = parser.parse_known_args(arguments)
    known = {f.name for f in fields(cls)}
    for path in (RECIPES / "configs" / name / "paper.yaml" if files.paper else None, files.config):
        if path is None:
            continue
        values = read_yaml(Path(path))
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UserError(f"{path}: {', '.join(unknown)} is not a flag of {name}; see --help.")
        parser.set_defaults(**values)
    values = vars(parser.parse_args(arguments))
    for f in fields(cls):
        if "choices" in f.metadata and values[f.name] not in f.metadata["choices"]:
            raise UserError(f"--{f.name} {values[f.name]}: one of {', '.join(f.metadata['choices'])} is needed.")
    return cls(**{key: value for key, value in values.items() if key in known})


def read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not a YAML file ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: a YAML mapping of flags is needed.")
    return values


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
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
        elif arguments[0] == "--list":
            print("\n".join(recipe_names()))
        elif arguments[0] in ("verify", "publish", "export"):
            tools = importlib.import_module("recipes.common.core.cli")
            getattr(tools, arguments[0])(arguments[1:])
        else:
            recipe = parse(arguments[0], arguments[1:])
            torch.manual_seed(recipe.seed)
            recipe.check()
            print(recipe.run())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
