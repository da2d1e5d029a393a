"""Kills runs at chosen moments, resumes them, and compares what they leave with what an undisturbed run leaves.

    python tests/helpers/killing.py FOLDER [--long] [--chains N] [--seed N] [--jobs NAME …]

A moment is an event of the file system: a file about to be opened for writing, moved or removed, a folder made. Whoever is
killed when a file is opened leaves it empty, and half of it where safetensors or torch write it. Or it is a time. Each run
is killed again and again, resumed by `--resume` alone, until it ends; what it leaves must then equal the undisturbed run's,
and nothing else may be left. Prints a line for each chain of kills; exit code 1 if one went wrong.

Without --long the moments are named, and few; with it they are drawn, and there are many, over all recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from compare_with import (  # noqa: E402
    ARMOR,
    KVTUNER,
    LAYERWISE,
    LPVIT,
    PRECROPPING,
    RANDOM,
    differences,
    kind_of,
    left_in,
    make_inputs,
)

SHOWN = 10  # differences of one run that are spelled out
TIMELESS = ("config", "base_model", "data", "dense", "compressed", "baselines", "size", "layers")  # of a report
NO_SWEEP = "--more_densities 0 --more_models none"
IN_THE_WAY = {"out/config.json": "old", "out-dense/config.json": "old", "out-gguf-f16.gguf": "old"}


@dataclass(frozen=True)
class Job:
    """A run and the moments of `SHORT`: regular expressions of events, each of the run that the one before left over."""

    line: str
    moments: tuple[str, ...] = ()


PLACING = (r"rename .*/placing\.json$", r"rename .*/\.out-dense\.discarded$", r"rename .*/out$")
JOBS = {
    "armor": Job(
        f"{ARMOR} --seeds 1 --baselines none --export dense gguf-f16",
        (
            r"rename .*/out\.state$",
            r"safetensors .*/seed-0/",
            r"rename .*/checkpoint-0$",
            r"rename .*/beside/output-gguf",
            *PLACING,
        ),
    ),
    "precropping": Job(
        f"{PRECROPPING} --seeds 1 --baselines none --epochs 2",
        (
            r"mkdir .*\.out\.state\.partial",
            r"torch .*/training/dense-0/.*/optimizer\.pt",
            r"open .*/training/dense-0/.*/trainer_state\.json",
            r"rename .*/training/.*safetensors",
            r"rename .*/models/",
            r"rename .*/checkpoint-0/report\.json$",
            r"rename .*/\.out\.state\.discarded$",
        ),
    ),
    "layerwise-quant": Job(f"{LAYERWISE} --seeds 1 --baselines random rtn --head_bits 8 --export dense gguf-packed"),
    "gptq": Job(f"{LAYERWISE} --seeds 2 --backend gptq --baselines none --curve_points 0"),
    "kvtuner": Job(f"{KVTUNER} --seeds 1 --baselines KV4 random"),
    "lpvit": Job(f"{LPVIT} --seeds 1 --densities 0.7 --baselines lpvit-finetuned lpvit-no-ls wanda"),
    "lpvit-own-base": Job(f"{LPVIT} --model vit-tiny --seeds 1 --densities 1 --baselines none --finetune"),
    "random-pruning": Job(f"{RANDOM} --seeds 1 --epochs 2 --baselines uniform magnitude small-dense {NO_SWEEP}"),
    "random-sweep": Job(f"{RANDOM} --seeds 2 --ratio snip --baselines none --more_densities 0.3 --more_models none"),
}
SHORT = ("armor", "precropping")


# ------------------------------------------------------------------------------------------------------------- killing


class Watch:
    """Counts the events of this process below its working folder, and kills it at one of them.

    moment: a regular expression that "kind path" matches, a number of events, or seconds; None for never.
    """

    def __init__(self, moment: str | int | float | None):
        self.moment, self.events, self.inside = moment, [], str(Path.cwd()) + os.sep
        self.busy = False

    def hook(self, name: str, args: tuple) -> None:
        if self.busy or name not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            return
        if name == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = args[1] if name == "os.rename" else args[0]
        if isinstance(path, str | bytes | os.PathLike):
            self.saw(name.removeprefix("os."), os.path.abspath(os.fsdecode(path)), args[2] if name == "open" else 0)

    def saw(self, kind: str, path: str, flags: int = 0) -> None:
        removed = kind in ("remove", "rmdir")  # below a folder that has no name in the event
        if not removed and not path.startswith(self.inside):
            return
        self.events.append(f"{kind} {path}")
        named = isinstance(self.moment, str) and re.search(self.moment, self.events[-1])
        if named or self.moment == len(self.events):
            self.busy = True
            if kind == "open":
                os.close(os.open(path, flags))
            if kind in ("safetensors", "torch"):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def written_by(self, kind: str, write, place: int):
        """`write`, whose argument `place` is a file that it writes without telling Python."""

        def watched(*args, **kwargs):
            result = write(*args, **kwargs)
            if len(args) > place and isinstance(args[place], str | os.PathLike):
                self.saw(kind, os.path.abspath(args[place]))
            return result

        return watched


def start(line: str, folder: Path, moment: str | int | float | None) -> tuple[int, float]:
    """Runs a command in `folder` in a process of its own: (exit code, below 0 if it was killed, and seconds)."""
    begin = time.perf_counter()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_REAL, moment if isinstance(moment, float) else 0)
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(run(line, moment, folder))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - begin


def run(line: str, moment: str | int | float | None, folder: Path) -> int:
    import matplotlib.figure
    import safetensors.torch
    import torch

    watch = Watch(moment)
    matplotlib.figure.Figure.savefig = lambda self, path, *_, **__: open(path, "w").close()  # drawing takes seconds
    safetensors.torch.serialize_file = watch.written_by("safetensors", safetensors.torch.serialize_file, 1)
    torch.save = watch.written_by("torch", torch.save, 1)
    sys.addaudithook(watch.hook)
    sys.argv = ["recipes", *shlex.split(line)]
    try:
        runpy.run_module("recipes", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    watch.busy = True
    folder.with_suffix(".events").write_text("\n".join(watch.events))
    return code


# ----------------------------------------------------------------------------------------------------------- comparing


def wrong_in(whole: Path, folder: Path) -> list[str]:
    """How what is left in `folder` differs from what the undisturbed run left."""
    names = [sorted(path.name for path in place.iterdir()) for place in (whole, folder)]
    files = [left_in(place) for place in (whole, folder)]
    if names[0] != names[1] or files[0] != files[1]:
        return [f"left: {sorted({*names[0], *files[0]} ^ {*names[1], *files[1]})}"]
    found = []
    for name in files[0]:
        if Path(name).name == "report.json":
            old, new = (
                {key: json.loads((place / name).read_text()).get(key) for key in TIMELESS} for place in (whole, folder)
            )
            found += [f"{name} {wrong}" for wrong in differences(old, new)]
        elif kind_of(name):
            found += [f"{name} {wrong}" for wrong in kind_of(name)[1](whole / name, folder / name)]
    return found[:SHOWN]


def read_once() -> None:
    """What all runs read is read by the first one, before it is forked, and of long texts the beginning only."""
    from recipes.common.domains import classification, language
    from recipes.common.loops import streamed

    read_text = cache(language.load_text)

    def beginning(*args, **kwargs):
        text = read_text(*args, **kwargs)
        return replace(text, text=text.text[:60_000])

    language.load_text, classification.load_images = beginning, cache(classification.load_images)
    streamed.matmul_flops = lambda: 1e10
    language.Language.speed = classification.Classification.speed = (
        lambda *_: {}
    )  # takes seconds, and is never the same


def chain(job: Job, place: Path, moments: list, whole: Path) -> tuple[int, list[str]]:
    """Kills a run with --overwrite, over an older output, at one moment after the other: (kills, what went wrong)."""
    for name, text in IN_THE_WAY.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    kills, wrong = 0, []
    for moment in [*moments, None]:
        begun = (place / "out.state").exists()
        code, _ = start(f"{job.line} --output out {'--resume' if begun else '--overwrite'}", place, moment)
        if code == 0:
            if isinstance(moment, str):
                wrong.append(f"{moment} was not reached")
            break
        if code > 0:
            return kills, [*wrong, f"exit {code}: {place.with_suffix('.log').read_text()[-2000:]}"]
        kills += 1
        if not (place / "out.state").exists() and (place / "out" / "recipe.yaml").exists():
            break  # nothing was left to do
    for leftover in place.glob(".*.discarded"):
        shutil.rmtree(leftover)  # the last thing that a finished run does; the next one would
    for name in IN_THE_WAY:  # what this run does not write stays
        if (place / name).exists() and (place / name).read_bytes() == b"old":
            part = place / name.split("/")[0]
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    return kills, wrong + wrong_in(whole, place)


def drawn(rng: random.Random, events: int, seconds: float) -> list[int | float]:
    """Moments of a chain: anywhere in the first run, early in those that go on with it."""
    found = []
    for number in range(rng.randint(1, 4)):
        share = rng.random() if number == 0 else rng.random() ** 2 / 2
        found.append(1 + int(share * events) if rng.random() < 0.75 else 0.3 + share * seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for inputs and runs; what went wrong stays there")
    parser.add_argument("--long", action="store_true", help="many moments, drawn, over all recipes")
    parser.add_argument("--chains", type=int, default=4, help="with --long, of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS)
    flags = parser.parse_args()
    from recipes.common.core import cli

    read_once()
    root, failed, kills = flags.folder.resolve(), 0, 0
    if not (root / "inputs").exists():
        make_inputs(root / "inputs")
    for name in flags.jobs or (JOBS if flags.long else SHORT):
        job = JOBS[name]
        job = Job(job.line.format(inputs=root / "inputs"), job.moments)
        recipe, *flags_of_run = shlex.split(job.line)
        cli.parse(recipe, flags_of_run).domain().check()
        whole = root / name / "whole"
        shutil.rmtree(root / name, ignore_errors=True)
        whole.mkdir(parents=True)
        code, seconds = start(f"{job.line} --output out", whole, None)
        if code:
            print(f"{name}: exit {code}, undisturbed\n{whole.with_suffix('.log').read_text()}")
            failed += 1
            continue
        events = len(whole.with_suffix(".events").read_text().splitlines())
        rng = random.Random(f"{name}/{flags.seed}")
        chains = [drawn(rng, events, seconds) for _ in range(flags.chains)] if flags.long else [list(job.moments)]
        for number, moments in enumerate(chains):
            place = root / name / f"chain-{number}"
            place.mkdir()
            made, wrong = chain(job, place, moments, whole)
            kills += made
            failed += bool(wrong)
            print(f"{name}: {made} kills at {moments}", *wrong, sep="\n    ", flush=True)
            if not wrong:
                shutil.rmtree(place)
    print(f"{kills} kills, {failed} chains went wrong")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
