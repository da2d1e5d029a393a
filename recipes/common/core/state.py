"""What lets a run be repeated and resumed: seeds by name, whole files, the state folder, processes, resources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import PartialState

from zoo.errors import UserError


def module_seed(seed: int, name: str) -> int:
    """A seed for one module that depends on the run's seed and the module's name only, not on any order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


# --------------------------------------------------------------------------------------------------------------- files


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


# -------------------------------------------------------------------------------------------------------- state folder


def refuse_existing(output: Path, state: Path, beside: list[Path], *, resume: bool, overwrite: bool) -> None:
    """Raises UserError, before any work, for an output, a neighbour of it or a state that is in the way, and for a place
    that cannot be written. What an interrupted run had put into place already is in nobody's way when it is resumed.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--output {output}: {folder} cannot be written; name a writable folder.")
    unfinished = (state / "recipe.yaml").exists()
    placed = placed_by(state) if resume and unfinished else []
    if overwrite:
        return
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and str(output) not in placed:
        raise UserError(f"--output {output}: it exists; pass --overwrite to replace it or name another folder.")
    if unfinished and not resume:
        raise UserError(f"{state} holds an unfinished run; pass --resume to continue it or --overwrite to restart.")
    if not unfinished and state.exists() and any(state.iterdir() if state.is_dir() else [state]):
        raise UserError(f"{state}: it exists and is no unfinished run; remove it or name another --output.")
    for path in beside:
        if path.exists() and str(path) not in placed:
            raise UserError(
                f"{path}: it exists, and the run writes there; pass --overwrite to replace it or name another --output."
            )


def placed_by(state: Path) -> list[str]:
    """What a run had begun to put into place when it was interrupted: its neighbours, and last its output."""
    file = state / "placed.json"
    return json.loads(file.read_text()) if file.exists() else []


def open_state(state: Path, settings: dict, pins: dict[str, str], *, resume: bool) -> None:
    """Creates or, with `resume`, reopens the state folder of a run; what is there otherwise may go (`refuse_existing`).

    pins: {what the run reads: its sha256}, recorded when it starts. Raises: UserError for a state of other settings, or of
    inputs that have changed since.
    """
    recorded = state / "recipe.yaml"
    if resume and recorded.exists():
        old = yaml.safe_load(recorded.read_text())
        changed = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
        if changed:
            raise UserError(f"--resume: {state} was made with other values of {', '.join(changed)}; use those again.")
    else:
        try:
            if state.exists():
                shutil.rmtree(state)  # asked for by --overwrite, or empty
            state.mkdir(parents=True)
            write_text(recorded, yaml.safe_dump(settings, sort_keys=False))
        except OSError as error:
            raise UserError(
                f"--output: {state} cannot be written ({error.strerror}); name a writable folder."
            ) from None
    pinned = cached_json(state / "inputs.json", lambda: pins)
    if changed := sorted(key for key in pins if pinned.get(key) != pins[key]):
        raise UserError(
            f"--resume: the {', '.join(changed)} changed since {state} was begun; pass --overwrite to restart."
        )


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
    import psutil

    folder = next(place for place in (folder, *folder.parents) if place.exists())
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
