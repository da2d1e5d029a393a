"""Render the cards in model_cards/ and the leaderboard in README.md from the committed reports: `make cards`.

python -m recipes.common.core.readme            render all
python -m recipes.common.core.readme --check    only say whether something is out of date (exit code 1)
python -m recipes.common.core.readme --take DIR first take over the report and plots of a finished run
python -m recipes.common.core.readme --add DIR  first add the seeds of a finished run to the report that is there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from recipes.common.core import plots
from recipes.common.core.merge import merge
from recipes.common.core.report import as_text
from recipes.common.core.state import write_text
from zoo import registry
from zoo.errors import UserError
from zoo.record.card import render_card, returned
from zoo.record.format import CARDS, base_link, format_bytes, format_metric, metric_title, table
from zoo.record.measurements import FILE as MEASUREMENTS
from zoo.record.measurements import read_measurements, write_measurements
from zoo.record.schema import read_report
from zoo.record.verify import hash_files
from zoo.registry import Entry

README = CARDS.parent / "README.md"
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
PLOT = "leaderboard.png"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.common.core.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is out of date")
    parser.add_argument("--take", type=Path, metavar="DIR", help="a finished run whose report the zoo shall show")
    parser.add_argument(
        "--add", type=Path, metavar="DIR", help="a finished run at other seeds, for a report that is there"
    )
    flags = parser.parse_args(arguments)
    try:
        if flags.take:
            take(flags.take)
        if flags.add:
            add(flags.add)
        stale = outdated()
        if flags.check:
            if stale:
                print("out of date, run `make cards`: " + ", ".join(str(path) for path in stale), file=sys.stderr)
                raise SystemExit(1)
        else:
            render()
            print("\n".join(f"rendered {path}" for path in stale) or "all up to date")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def take(folder: Path) -> Path:
    """Copies report and plots of a run to the place of its entry in the zoo's table. Returns that folder."""
    report = read_report(folder / "report.json")
    entry = entry_of(report, f"--take {folder}")
    shutil.copytree(folder / "plots", entry.folder / "plots", dirs_exist_ok=True)
    if (folder / MEASUREMENTS).exists():  # older runs kept none
        shutil.copy(folder / MEASUREMENTS, entry.folder)
    write_text(entry.folder / "report.json", as_text(report))
    return entry.folder


def add(folder: Path) -> Path:
    """Adds the seeds of a run to the report of its entry in the zoo's table. Returns that entry's folder."""
    report = read_report(folder / "report.json")
    place = entry_of(report, f"--add {folder}").folder
    measured = [(read_report(where / "report.json"), read_measurements(where)) for where in (place, folder)]
    try:
        report, raw = merge(*measured)
    except UserError as error:
        raise UserError(f"--add {folder}: {error}") from None
    plots.draw(report, place)
    write_measurements(raw, place)
    made = {name: digest for name, digest in hash_files(place).items() if name in report["files"]}
    write_text(place / "report.json", as_text(report | {"files": report["files"] | made}))
    return place


def entry_of(report: dict, flag: str) -> Entry:
    made = (report["recipe"], report["base_model"]["id"])
    for entry in registry.ENTRIES:
        if (entry.recipe, entry.base) == made:
            return entry
    raise UserError(f"{flag}: zoo/registry.py has no entry of recipe {made[0]} and base {made[1]}; add one.")


def texts() -> dict[Path, str]:
    """{file: what it has to hold} of every card and the README."""
    wanted = {}
    for entry in measured():
        wanted[entry.folder / "README.md"] = render_card(entry.report(), repo_id=entry.hub_repo)
    readme = README.read_text(encoding="utf-8") if README.exists() else ""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"{README}: the lines {BEGIN} and {END} are needed once each; the table goes between them.")
    head, rest = readme.split(BEGIN)
    wanted[README] = f"{head}{BEGIN}\n{leaderboard()}\n{END}{rest.partition(END)[2]}"
    return wanted


def outdated() -> list[Path]:
    """The files that `render` would change."""
    stale = [path for path, text in texts().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if measured() and plots.read_fingerprint(CARDS / PLOT) != fingerprint():
        stale.append(CARDS / PLOT)
    return stale


def render() -> None:
    """Writes every card, the plots that are missing, the leaderboard and its plot."""
    for path, text in texts().items():
        write_text(path, text)
    for entry in measured():
        if not (entry.folder / "plots").exists():
            plots.draw(entry.report(), entry.folder)
    if measured() and plots.read_fingerprint(CARDS / PLOT) != fingerprint():
        plots.leaderboard(points(), CARDS / PLOT, fingerprint())


def measured() -> list[Entry]:
    return [entry for entry in registry.ENTRIES if entry.is_measured]


def leaderboard() -> str:
    """The table, one row a checkpoint, and the plot."""
    rows = []
    for entry in registry.ENTRIES:
        base = base_link(entry.base)
        if not entry.is_measured:
            rows.append([f"`{entry.name}`", base, "not measured yet", "", "", f"`{entry.command}`"])
            continue
        line, size = entry.headline(), entry.report()["size"]
        values = f"{format_metric(line['dense'])} → {format_metric(line['compressed'])}"
        bytes_ = f"{format_bytes(size['compressed_bytes'])} of {format_bytes(size['dense_bytes'])}"
        speed = f"{format_metric(line['speed'])} {line['speed_of']}" if line["speed"] else ""
        card = (
            f"[{entry.name}]({entry.folder.relative_to(README.parent).as_posix()}/README.md){returned(entry.report())}"
        )
        rows.append([card, base, f"{metric_title(line['metric'])}: {values}", bytes_, speed, f"`{entry.command}`"])
    header = ["checkpoint", "base", "quality, dense → compressed", "weights", "speed", "built by"]
    shown = table(header, rows)
    if measured():
        shown += f"\n\n![Quality kept against size kept]({(CARDS / PLOT).relative_to(README.parent).as_posix()})"
    return shown


def points() -> list[dict]:
    lines = {entry.name: entry.headline() for entry in measured()}
    return [{"name": name, "size": h["size_ratio"], "quality": h["quality_ratio"]} for name, h in lines.items()]


def fingerprint() -> str:
    """Changes when the plot's numbers do."""
    return hashlib.sha256(json.dumps(points()).encode()).hexdigest()


if __name__ == "__main__":
    main()
