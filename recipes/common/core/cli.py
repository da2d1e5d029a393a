"""The commands beside the recipes: verify, publish, export."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from recipes.common.core.recipe import recipe_class
from recipes.common.export.engines import export_compressed_tensors, export_dense, export_gguf, read_config
from recipes.common.export.images import export_dense_classifier
from zoo.errors import UserError
from zoo.record.hub import publish as publish_folder
from zoo.record.verify import verify as verify_folder

EXPORTS = ("dense", "gguf-f16", "gguf-q8_0", "gguf-packed", "compressed-tensors")


def verify(arguments: list[str]) -> None:
    """Re-measures a checkpoint's own claims; exit code 1 when one does not hold."""
    parser = argparse.ArgumentParser(prog="python -m recipes verify", description=verify.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("--static", action="store_true", help="check files, sizes and card only; measure nothing")
    flags = parser.parse_args(arguments)
    findings = verify_folder(flags.folder, None if flags.static else remeasure)
    for finding in findings:
        print(finding)
    if any(not finding.ok for finding in findings):
        raise SystemExit(1)


def remeasure(folder: Path, report: dict) -> dict[str, dict]:
    """The metrics of a checkpoint measured again, as its recipe does it: `remeasure` of the recipe's module, or the
    one of its kind of recipe."""
    from recipes.common import layerwise, vision  # of which one exports through this module

    recipe = recipe_class(report["recipe"])
    kind = vision if issubclass(recipe, vision.VisionRecipe) else layerwise
    module = importlib.import_module(recipe.__module__)
    return getattr(module, "remeasure", kind.remeasure)(folder, report)


def publish(arguments: list[str]) -> None:
    """Uploads a checkpoint folder to the Hub; running it again finishes an interrupted upload."""
    parser = argparse.ArgumentParser(prog="python -m recipes publish", description=publish.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("repo", help="org/name")
    parser.add_argument("--tag", help="also tag the commit, for from_pretrained(..., revision=TAG)")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    flags = parser.parse_args(arguments)
    print(publish_folder(flags.folder, flags.repo, tag=flags.tag, private=flags.private))


def export(arguments: list[str]) -> None:
    """Writes a compressed checkpoint for other engines: dense weights, compressed-tensors, or GGUF for llama.cpp."""
    parser = argparse.ArgumentParser(prog="python -m recipes export", description=export.__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("output", type=Path, help="folder (dense) or .gguf file to write; must not exist")
    parser.add_argument("--format", choices=EXPORTS, default="dense")
    flags = parser.parse_args(arguments)
    export_as(flags.folder, flags.output, flags.format)
    print(flags.output)


def export_as(folder: Path, output: Path, kind: str) -> None:
    """One export of `folder`; `kind` is one of EXPORTS."""
    if kind not in EXPORTS:
        raise UserError(f"--export {kind}: one of {', '.join(EXPORTS)} is needed.")
    images = "AutoModelForImageClassification" in read_config(folder).get("auto_map", {})
    if images and kind != "dense":
        raise UserError(f"--export {kind}: image models export as dense only.")
    if images:
        export_dense_classifier(folder, output)
    elif kind == "dense":
        export_dense(folder, output)
    elif kind == "compressed-tensors":
        export_compressed_tensors(folder, output)
    else:
        kind = kind.removeprefix("gguf-")
        export_gguf(folder, output, kind if kind == "packed" else kind.upper())
