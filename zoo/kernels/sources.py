"""The C++ texts of the kernels. In a checkpoint's bundle this module is replaced by one that holds them."""

from pathlib import Path


def all_sources() -> list[str]:
    """Paths of all C++ files, relative to the kernels folder."""
    root = Path(__file__).parent
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.[ch]pp"))


def source(path: str) -> str:
    """The text of one C++ file."""
    return (Path(__file__).parent / path).read_text(encoding="utf-8")
