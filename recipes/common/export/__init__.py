"""Checkpoints for other engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from recipes.common.export.compressed_tensors import check_compressed_tensors, export_compressed_tensors
from recipes.common.export.dense import export_dense, export_dense_classifier
from recipes.common.export.gguf import check_gguf, export_gguf
from zoo.errors import UserError
from zoo.folder import ModelFolder, open_folder

EXPORTS = {
    "dense": export_dense,
    "gguf-f16": partial(export_gguf, kind="F16"),
    "gguf-q8_0": partial(export_gguf, kind="Q8_0"),
    "gguf-packed": partial(export_gguf, kind="packed"),
    "compressed-tensors": export_compressed_tensors,
}  # {name: (checkpoint, output) -> what it writes}


def export_as(folder: Path, output: Path, kind: str) -> None:
    """One export of `folder`; `kind` is one of EXPORTS. Raises: UserError for another, and for what it cannot hold."""
    if kind not in EXPORTS:
        raise UserError(f"--export {kind}: one of {', '.join(EXPORTS)} is needed.")
    images = open_folder(folder).auto_class == "AutoModelForImageClassification"
    if images and kind != "dense":
        raise UserError(f"--export {kind}: image models export as dense only.")
    (export_dense_classifier if images else EXPORTS[kind])(Path(folder), Path(output))


def check_export(kind: str, base: ModelFolder, modules: dict[str, dict]) -> None:
    """Raises UserError for an export, of EXPORTS, that cannot be made of `base` once `modules`, {name: spec}, are packed."""
    if kind.startswith("gguf"):
        check_gguf(base)
    elif kind == "compressed-tensors":
        check_compressed_tensors(modules)
