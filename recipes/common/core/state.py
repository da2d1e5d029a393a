"""What lets a run be repeated and resumed: seeds by name, whole files, the state folder, processes, resources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import PartialState

from zoo.errors import UserError
from zoo.folder import atomic_folder


def module_seed(seed: int, name: str) -> int:
    """A seed for one module that depends on the run's seed and the module's name only, not on any order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


# --------------------------------------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


def discard(path: Path) -> None:
    """Removes a file or folder, if there is one: at `path` it is whole or gone, whenever this is interrupted."""
    leftover = path.with_name(f".{path.name}.discarded")
    _remove(leftover)  # of a removal that was interrupted
    if os.path.lexists(path):
        path.replace(leftover)
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cached_json(path: Path, make: Callable[[], dict]) -> dict:
    """The JSON at `path`, made once: what a resumed run has measured already is not measured again."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------------- state folder


RECORDED = ("recipe.yaml", "inputs.json")  # what makes a folder the state of a run: its settings, and what it reads
OVERWRITES, PLACING = "overwrites.json", "placing.json"  # names of what a run may replace, and of what it is placing


def is_unfinished(state: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return all((state / name).is_file() for name in RECORDED)


def names_in(file: Path) -> list[str]:
    return json.loads(file.read_text()) if file.exists() else []


def is_there(path: Path) -> bool:
    """Whether something is at `path`, other than an empty folder."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def refuse_existing(output: Path, state: Path, beside: list[Path], *, resume: bool, overwrite: bool) -> None:
    """Raises UserError, before any work, for an output, a neighbour of it or a state that is in the way, and for a place
    that cannot be written. What an interrupted run was allowed to replace, or had put into place already, is in nobody's
    way when it is resumed.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--output {output}: {folder} cannot be written; name a writable folder.")
    if overwrite:
        return
    unfinished = is_unfinished(state)
    if unfinished and not resume:
        raise UserError(f"{state} holds an unfinished run; pass --resume to continue it or --overwrite to restart.")
    if not unfinished and is_there(state):
        raise UserError(f"{state}: it exists and is no unfinished run; remove it or name another --output.")
    allowed = [name for file in (OVERWRITES, PLACING) for name in names_in(state / file)]
    if is_there(output) and output.name not in allowed:
        raise UserError(f"--output {output}: it exists; pass --overwrite to replace it or name another folder.")
    for path in beside:
        if os.path.lexists(path) and path.name not in allowed:
            raise UserError(
                f"{path}: it exists, and the run writes there; pass --overwrite to replace it or name another --output."
            )


def open_state(
    state: Path, settings: dict, pins: dict[str, str], *, resume: bool, overwrites: Sequence[Path] = ()
) -> None:
    """Creates or, with `resume`, reopens the state folder of a run; what is there otherwise may go (`refuse_existing`).

    It appears with all that it must hold, and goes at once, so that a kill leaves a whole one or none.

    pins: {what the run reads: its sha256}, recorded when it starts. overwrites: what --overwrite allows to replace; the run
    remembers it, so that --resume alone goes on. Raises: UserError for a state of other settings, or of inputs that have
    changed since.
    """
    if not (resume and is_unfinished(state)):
        try:
            discard(state)
        except OSError as error:
            raise UserError(
                f"--output: {state} cannot be written ({error.strerror}); name a writable folder."
            ) from None
        with atomic_folder(state) as folder:
            write_text(folder / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))
            write_text(folder / "inputs.json", json.dumps(pins))
            write_text(folder / OVERWRITES, json.dumps([path.name for path in overwrites]))
    try:
        old, pinned = (
            yaml.safe_load((state / "recipe.yaml").read_text()),
            json.loads((state / "inputs.json").read_text()),
        )
        changed = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
    except (ValueError, AttributeError, yaml.YAMLError):
        raise UserError(f"--resume: {state} is damaged; pass --overwrite to restart.") from None
    if changed:
        raise UserError(f"--resume: {state} was made with other values of {', '.join(changed)}; use those again.")
    if changed := sorted(key for key in pins if pinned.get(key) != pins[key]):
        raise UserError(
            f"--resume: the {', '.join(changed)} changed since {state} was begun; pass --overwrite to restart."
        )
    allowed = dict.fromkeys([*names_in(state / OVERWRITES), *(path.name for path in overwrites)])
    write_text(state / OVERWRITES, json.dumps(list(allowed)))


def check_device(device: str) -> None:
    """Raises UserError for a device that torch does not know or that is not there."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: cpu, cuda or cuda:N is needed.")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise UserError(f"--device {device}: torch sees {found} GPUs here; use cpu, or install a torch with CUDA.")


def check_resources(ram_bytes: float, disk_bytes: float, minutes: float, folder: Path) -> None:
    """Prints what the run needs, and refuses early what cannot fit."""
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    disk, unit = shutil.disk_usage(folder).free, "minute" if round(minutes) == 1 else "minutes"
    print(f"needs about {ram_bytes / 2**30:.1f} GiB RAM, {disk_bytes / 2**30:.1f} GiB disk, {minutes:.0f} {unit}")
    check_memory(ram_bytes)
    if disk_bytes > disk:
        raise UserError(
            f"about {disk_bytes / 2**30:.1f} GiB of disk are needed, {disk / 2**30:.1f} GiB are free; choose another"
            " --output."
        )


def check_memory(needed: float) -> None:
    """Raises UserError for more bytes than are free."""
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"about {needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} GiB are free; lower --nsamples,"
            " --batch_size or --image_size, whichever this recipe has."
        )


def matmul_flops() -> float:
    """Floating-point operations a second of this machine in a product of matrices, roughly."""
    a = torch.rand(1024, 1024)
    a @ a
    begin = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (time.perf_counter() - begin)


# ----------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
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
