"""A recipe: a dataclass whose fields are the command line, and the few verbs by which `run.execute` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from recipes.common.core.flags import check_flags
from recipes.common.core.run import Run
from recipes.common.export import export_as
from zoo.errors import UserError
from zoo.folder import open_folder

if TYPE_CHECKING:
    from recipes.common.domains import Domain

RUN_ONLY = ("output", "resume", "overwrite", "push_to_hub", "export", "workers")  # flags that do not change the weights

LONGEST_OUTPUT = 120  # bytes of a name: a run puts longer ones beside it
LARGEST_SEED = 2**62  # with those of --seeds it stays within 63 bits


@dataclass(frozen=True)
class Recipe:
    """What every recipe has. A recipe subclasses a domain's flags, and a loop's where it uses one, adds its own, and fills
    in the verbs below. Fields never change after parsing; what a run finds out lives in its `Run`.
    """

    model: str = field(
        default="smollm2-135m-instruct", metadata={"help": "base model: a Hub id, a folder, or an offline alias"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub model"})
    output: str | None = field(
        default=None,
        metadata={
            "help": "checkpoint folder; it appears whole or not at all (default: runs/<recipe>)",
            "longest": LONGEST_OUTPUT,
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "seed of calibration sampling and of the method", "at_least": 0, "at_most": LARGEST_SEED},
    )
    seeds: int = field(
        default=1,
        metadata={
            "help": "measure with this many seeds (seed, seed+1, …); the checkpoint is the first one's",
            "at_least": 1,
            "at_most": 100,
        },
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or cuda:N"})
    resume: bool = field(default=False, metadata={"help": "continue an interrupted run of the same settings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output or unfinished run"})
    push_to_hub: str | None = field(default=None, metadata={"help": "org/name to publish the checkpoint to"})
    export: list[str] = field(
        default_factory=list,
        metadata={"help": "also write for other engines: dense, gguf-f16, gguf-q8_0, gguf-packed, compressed-tensors"},
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "baselines to run beside it; 'none' for none (default: all)"}
    )

    paper_title: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    run_type: ClassVar[type[Run]] = Run
    dry_run: ClassVar[bool] = False  # where it is a flag, `show_plan` is all that is done

    # ----------------------------------------------------------------------------------------------- names and places

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def method(self) -> str:
        """Name of the recipe's own variant."""
        return self.name

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

    # ------------------------------------------------------------------------------------------ before any work: refusals

    def domain(self) -> Domain:
        """What the model is made of and measured on."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Raises UserError for a flag that is out of the range of its field: such a recipe does not exist."""
        check_flags(self)

    def check(self) -> None:
        """Raises UserError for flags that are impossible together."""

    def check_base(self, run: Run) -> None:
        """Raises UserError where flags, base model and data do not go together."""

    def baseline_names(self) -> list[str]:
        """Every name that --baselines takes, in the order of the report."""
        return []

    def default_baselines(self) -> list[str]:
        """Those that run without --baselines."""
        return self.baseline_names()

    def chosen_baselines(self) -> list[str]:
        known = [name for name in self.baseline_names() if name != self.method]
        unknown = [name for name in self.baselines if name not in known and name != "none"]
        if unknown:
            raise UserError(f"--baselines {unknown[0]}: one of {', '.join(known)} or none is needed.")
        chosen = self.baselines or self.default_baselines()
        return [name for name in known if name in chosen]

    def exports(self) -> tuple[str, ...]:
        """What --export takes."""
        return self.domain().exports

    def beside(self) -> dict[str, Callable[[Run, Path], None]]:
        """What the run leaves next to its output: {ending of its name: what writes it}."""

        def writer(kind: str) -> Callable[[Run, Path], None]:
            return lambda run, path: export_as(run.checkpoint(run.seeds[0]), path, kind)

        return {f"-{kind}.gguf" if "gguf" in kind else f"-{kind}": writer(kind) for kind in self.export}

    def needs(self, run: Run) -> tuple[float, float, float]:
        """(bytes of memory, bytes of disk, minutes) of the run."""
        raise NotImplementedError

    def show_plan(self, run: Run) -> None:
        """What --dry_run prints."""

    # ---------------------------------------------------------------------------------------------------------- the work

    def produce(self, run: Run, seed: int) -> None:
        """The method, for one seed; on every process."""
        raise NotImplementedError

    def write(self, run: Run, seed: int, folder: Path) -> None:
        """Writes the checkpoint of a seed, whole or not at all."""
        raise NotImplementedError

    def variants(self, run: Run) -> list[str]:
        """The models that are measured: dense, the recipe's own, the baselines."""
        return ["dense", self.method, *self.chosen_baselines()]

    @contextmanager
    def open(self, run: Run, variant: str, seed: int) -> Iterator[nn.Module]:
        """The model of a variant, to be measured."""
        raise NotImplementedError
        yield

    def dense_seeds(self, run: Run) -> list[int]:
        """The seeds that have a dense model of their own: where it is given, the first stands for all."""
        return run.seeds[:1]

    def measure(self, run: Run, variant: str) -> list[dict[str, dict]]:
        """The metrics of a variant, one dict a seed; of the dense model one where it is the same for all."""
        if variant == "dense":
            return [run.measure_dense(seed) for seed in self.dense_seeds(run)]
        opened = {seed: partial(self.open, run, variant, seed) for seed in run.seeds}
        return [run.measure(f"{variant}-{seed}", opened[seed], seed=seed) for seed in run.seeds]

    @contextmanager
    def reopen(self, folder: Path) -> Iterator[nn.Module]:
        """The model of a finished checkpoint as it was measured: what `verify` measures again."""
        yield self.domain().load(folder)

    def dense_at_hand(self, folder: Path, sha256: str) -> Path | None:
        """The dense model that a finished checkpoint was compared with; None where it is not here, or is not that one."""
        try:
            base = self.domain().base
        except (UserError, OSError):
            return None
        return base.path if base.sha256 == sha256 else None

    # -------------------------------------------------------------------------------------------------------- the report

    def dense_folder(self, run: Run) -> Path:
        """The dense model that the checkpoint's speed is compared with."""
        return run.domain.base.path

    def speed(self, run: Run, folder: Path) -> dict[str, dict[str, dict]]:
        return run.domain.speed(self.dense_folder(run), folder)

    def base_row(self, run: Run) -> dict:
        """`base_model` of the report."""
        return run.domain.base_row()

    def sizes(self, run: Run, folder: Path) -> dict:
        """`size` of the report."""
        return open_folder(folder).sizes()

    def layers(self, run: Run, folder: Path) -> list[dict]:
        """`layers` of the report: what was packed, and how its loss fell."""
        return []

    def findings(self, run: Run) -> dict:
        """What else the report holds, once all else is measured: "tables", "figures", "sweeps", "notes", …"""
        return {}
