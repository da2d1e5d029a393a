"""Labelled images: two packaged sets, a folder, or a data set of the Hub, split into train, validation and test."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from filelock import FileLock
from tqdm.auto import tqdm

from recipes.common.core.flags import first_line
from recipes.common.data.assets import ASSETS, asset_path, cache_folder
from zoo.errors import UserError

HELD_OUT = 0.1  # of the training images, to validate on, where a data set has no such split
LARGEST_SIDE = 224  # larger images are served at this side, and so are images of several sizes
SAMPLED = 64  # images looked at to learn their size
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SHAPES = ("circle", "rectangle", "triangle")  # of easy-VQA; its other answers but yes and no are colours
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class ImageData:
    """Labelled images and what a report says of them.

    `train`, `validation` and `test` have the columns `image` (PIL images) and `label` (numbers of `classes`) and share
    no row. `sha256` and `size` (bytes) are of the files they were read from; `image_size` is the side, in pixels, of
    the square images that models are given.
    """

    name: str
    version: str
    sha256: str | None
    license: str | None
    size: int | None
    classes: list[str]
    train: Dataset
    validation: Dataset
    test: Dataset
    image_size: int

    def row(self, split: str, items: int | None = None) -> dict:
        """A row of a report's `data`: where the images come from, and how many of `split` were used (default: all)."""
        facts = {key: getattr(self, key) for key in ("name", "version", "sha256", "size", "license")}
        return facts | {"items": len(getattr(self, split)) if items is None else items}


def load_images(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Labelled images by name, in three splits that share no row; the same ones in every process.

    Args:
        name: `cifar10` or `easy-vqa`, which need no hub; a folder of images, one subfolder a class, or of Parquet
            files; or the id of a Hub data set for image classification.
        config: of a Hub data set.
        train_split, validation_split, test_split: of a folder or a Hub data set. Without a validation split, a tenth of
            the training images is held out for it. The default test split is `test`, or, if there is none with labels,
            the validation split; without either, a tenth of the training images.
        label_column: of a folder or a Hub data set; needed where several columns are classes.

    Raises:
        UserError: there is no such data set or split, it has no images, no labels, or fewer than two classes.
    """
    if name in PACKAGED:
        return _load_packaged(name)
    asked = {"train": train_split, "validation": validation_split, "test": test_split}
    return _load_foreign(name, config, asked, label_column)


def calibration_images(data: ImageData, n: int, seed: int) -> Dataset:
    """`n` training images without their labels, evenly strided through the list sorted by class.

    The stride starts at a place that `seed` sets; images of a class keep their order.

    Raises:
        UserError: there are fewer training images.
    """
    total = len(data.train)
    if not 1 <= n <= total:
        raise UserError(f"--nsamples {n}: {data.name} has {total:,} training images; 1 to that many are needed.")
    order = sorted(range(total), key=data.train["label"][:].__getitem__)
    start = int.from_bytes(hashlib.sha256(f"calibration/{seed}".encode()).digest()[:6], "big") % total
    places = [(start + k * total) // n for k in range(n)]  # start / n < total / n: the last place is below total
    return data.train.select([order[place] for place in places]).select_columns(["image"])


def training_subset(data: ImageData, items: int | None) -> Dataset:
    """The first `items` training images of a fixed shuffle, all of them by default. UserError if there are fewer."""
    if items is None:
        return data.train
    if items > len(data.train):
        raise UserError(f"--train_items {items}: there are {len(data.train)} training images.")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    return data.train.select(order[:items].tolist())


# ------------------------------------------------------------------------------------------------------------ splitting


def hold_out(labels: list[int], fraction: float, salt: str) -> tuple[list[int], list[int]]:
    """(kept, held out) row numbers, ascending: `fraction` of each class, at least one row of any class with two.

    The rows of a class are ranked by the sha256 of the salt and their number, so the choice is the same everywhere.
    """
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    held_out: set[int] = set()
    for members in rows.values():
        count = max(round(fraction * len(members)), 1) if len(members) > 1 else 0
        held_out.update(sorted(members, key=lambda row: hashlib.sha256(f"{salt}/{row}".encode()).digest())[:count])
    return [row for row in range(len(labels)) if row not in held_out], sorted(held_out)


def _carve(dataset: Dataset, fraction: float, salt: str) -> tuple[Dataset, Dataset]:
    kept, held_out = hold_out(dataset["label"][:], fraction, salt)
    return dataset.select(kept), dataset.select(held_out)


# ------------------------------------------------------------------------------------------------------------- packaged


def _load_packaged(name: str) -> ImageData:
    """Read once from the pinned file, then from Arrow files in the cache, which appear whole or not at all."""
    title, side, read = PACKAGED[name]
    asset, path = ASSETS[name], asset_path(name)
    folder = cache_folder("images") / f"{name}-{asset.sha256[:12]}-{SPLIT_VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            part = folder.with_name(f".{folder.name}.part")  # left over only from a killed run: we hold the lock
            shutil.rmtree(part, ignore_errors=True)
            read(path).save_to_disk(part)
            part.rename(folder)
    splits = datasets.load_from_disk(folder)
    return ImageData(
        name=title,
        version=asset.package,
        sha256=asset.sha256,
        license=asset.license,
        size=path.stat().st_size,
        classes=splits["train"].features["label"].names,
        image_size=side,
        **splits,
    )


def _read_cifar10(path: Path) -> DatasetDict:
    """The 10,000 images of CIFAR-10's test set as PNG files, in our own split: 700, 100 and 200 of each class."""
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    images = [base64.b64decode(example["input"]) for example in examples]
    scores = [list(example["target_scores"].values()) for example in examples]
    everything = _dataset(images, [row.index(max(row)) for row in scores], list(examples[0]["target_scores"]))
    rest, test = _carve(everything, 0.2, "cifar10/test")
    train, validation = _carve(rest, 0.125, "cifar10/validation")
    return DatasetDict(train=train, validation=validation, test=test)


def _read_easy_vqa(path: Path) -> DatasetDict:
    """Images of one shape in one colour. Labels are the answers to "what" questions, so images that lack one are out.

    A "yes" says nothing: some questions are negated.
    """
    with zipfile.ZipFile(path) as archive:
        train, validation = _carve(_read_easy_vqa_split(archive, "train"), HELD_OUT, "easy-vqa/validation")
        return DatasetDict(train=train, validation=validation, test=_read_easy_vqa_split(archive, "test"))


def _read_easy_vqa_split(archive: zipfile.ZipFile, split: str) -> Dataset:
    folder = f"easy_vqa/data/{split}"
    shape: dict[int, str] = {}
    color: dict[int, str] = {}
    for question, answer, image in json.loads(archive.read(f"{folder}/questions.json")):
        if question.startswith("what"):
            (shape if answer in SHAPES else color)[image] = answer
    labelled = sorted(shape.keys() & color.keys())
    classes = [f"{c} {s}" for s in SHAPES for c in COLORS]
    labels = [classes.index(f"{color[image]} {shape[image]}") for image in labelled]
    return _dataset([archive.read(f"{folder}/images/{image}.png") for image in labelled], labels, classes)


def _dataset(images: list[bytes], labels: list[int], classes: list[str]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in images], "label": labels}, features)


SPLIT_VERSION = 1  # part of the cache's name: raise it when a reader or a split changes
PACKAGED: dict[str, tuple[str, int, Callable[[Path], DatasetDict]]] = {
    "cifar10": ("CIFAR-10 test images (BIG-bench), own 7000/1000/2000 split", 32, _read_cifar10),
    "easy-vqa": ("easy-VQA images, shape and colour", 64, _read_easy_vqa),
}


# ------------------------------------------------------------------------------------------------------ folders and Hub


def _load_foreign(name: str, config: str | None, asked: dict[str, str | None], label_column: str | None) -> ImageData:
    facts, revision, there = _describe(name, config)
    for use, split in asked.items():
        if split is not None and split not in there:
            raise UserError(f"--{use}-split {split}: {name} has {', '.join(there)}.")
    named = [split for split in asked.values() if split is not None]
    if len(set(named)) < len(named):
        raise UserError(
            f"--dataset {name}: {', '.join(named)} are named for different uses; different splits are needed."
        )

    train = _labelled(_load_split(name, config, asked["train"], revision), name, label_column)
    classes = train.features["label"].names
    _refuse_unlabelled(train, name, asked["train"])
    if len(set(train["label"][:])) < 2:
        raise UserError(f"--dataset {name}: its training images are of one class; at least two are needed.")

    splits, sources = {"train": train}, {"train": asked["train"]}
    for use, usual in (("test", ("test", *VALIDATION_NAMES)), ("validation", VALIDATION_NAMES)):
        taken = [*named, *sources.values()]
        for split in [asked[use]] if asked[use] else [s for s in usual if s in there and s not in taken]:
            found = _labelled(_load_split(name, config, split, revision), name, label_column, train)
            if asked[use]:
                _refuse_unlabelled(found, name, split)
            if _is_labelled(found):  # those of a benchmark's test split may be secret
                splits[use], sources[use] = found, split
                break
        else:
            splits["train"], splits[use] = _carve(splits["train"], HELD_OUT, use)
            sources[use] = f"a tenth of {asked['train']}"
            if not len(splits[use]):
                raise UserError(f"--dataset {name}: too few training images to hold some out; name a --{use}-split.")
    version = ", ".join([facts.pop("version"), *(f"{use}: {source}" for use, source in sources.items())])
    size = facts.pop("size") or train.info.dataset_size
    return ImageData(name, version, size=size, classes=classes, image_size=_side(train), **facts, **splits)


def _describe(name: str, config: str | None) -> tuple[dict, str | None, list[str]]:
    """({version, sha256, license, size}, commit, names of the splits) of a folder or a Hub data set."""
    folder = Path(name)
    try:
        if folder.is_dir():
            there = datasets.get_dataset_split_names(str(folder), config)
            facts = {"version": config or "folder", "license": None} | _hash_folder(folder)
            return facts, None, there
        from huggingface_hub import dataset_info

        info = dataset_info(name)
        there = datasets.get_dataset_split_names(name, config, revision=info.sha)
    except Exception as error:  # datasets and the Hub raise many kinds; all mean that the data cannot be had
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UserError(
            f"--dataset {name}: not one of {', '.join(PACKAGED)}, no folder of images or Parquet files, and no Hub data set"
            f" that can be read ({reason[:300]})."
        ) from None
    license = info.card_data.get("license") if info.card_data else None
    license = license if isinstance(license, str) else None
    facts = {"version": f"{info.sha} {config or 'default'}", "sha256": None, "license": license, "size": None}
    return facts, info.sha, there


def _hash_folder(folder: Path) -> dict:
    """sha256 of the sorted names and contents of all files below, and their bytes."""
    digest, size = hashlib.sha256(), 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in tqdm(files, desc=f"hashing {folder.name}", unit="file", leave=False):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
        size += path.stat().st_size
    return {"sha256": digest.hexdigest(), "size": size}


def _load_split(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # as in _describe
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UserError(f"--dataset {name}: its split {split} cannot be read ({reason[:300]}).") from None


def _labelled(dataset: Dataset, name: str, label_column: str | None, train: Dataset | None = None) -> Dataset:
    """The columns `image` and `label`, found by their types; `train` gives the classes where it was read before."""
    features = dataset.features
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    if not images:
        raise UserError(f"--dataset {name}: no column holds images; there are {', '.join(features)}.")
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [column for column in ("label", "labels") if column in features]
    if label_column is None and len(labels) != 1:
        found = f"the columns {', '.join(labels)} are" if labels else f"none of {', '.join(features)} is"
        raise UserError(f"--dataset {name}: {found} of class labels; name one with --label-column.")
    column = label_column or labels[0]
    if column not in features or column in images:
        raise UserError(f"--label-column {column}: {name} has {', '.join(c for c in features if c not in images)}.")
    dataset = dataset.select_columns([images[0], column]).rename_columns({images[0]: "image", column: "label"})
    if not isinstance(dataset.features["label"], ClassLabel):
        dataset = _number_classes(dataset, name, column, train)
    if train is not None and dataset.features["label"].names != train.features["label"].names:
        raise UserError(f"--dataset {name}: its splits have different classes; the same ones are needed.")
    return dataset


def _number_classes(dataset: Dataset, name: str, column: str, train: Dataset | None) -> Dataset:
    """Labels that are words or whole numbers, as numbers of the sorted classes of the training images."""
    values = set(dataset["label"][:])
    if not all(isinstance(value, str | int) for value in values):
        raise UserError(f"--dataset {name}: the column {column} has to hold one word or whole number for every image.")
    names = [str(v) for v in sorted(values)] if train is None else train.features["label"].names
    if unknown := sorted({str(value) for value in values} - set(names)):
        raise UserError(
            f"--dataset {name}: no training image is of class {unknown[0]}; the splits need the same classes."
        )
    dataset = dataset.cast_column("label", datasets.Value("string"))
    return dataset.cast_column("label", ClassLabel(names=names))


def _is_labelled(dataset: Dataset) -> bool:
    labels = set(dataset["label"][:])
    return bool(labels) and None not in labels and min(labels) >= 0


def _refuse_unlabelled(dataset: Dataset, name: str, split: str) -> None:
    if not _is_labelled(dataset):
        raise UserError(f"--dataset {name}: images of its split {split} have no label; name another split.")


def _side(dataset: Dataset) -> int:
    """The side of the images if all are squares of one size, judging by some of them, else `LARGEST_SIDE`."""
    step = max(len(dataset) // SAMPLED, 1)
    try:
        sizes = {dataset[place]["image"].size for place in range(0, len(dataset), step)}
    except Exception as error:  # Pillow raises many kinds, SyntaxError for a broken PNG among them
        raise UserError(f"--dataset: one of its training images cannot be decoded ({first_line(error)}).") from None
    width, height = sizes.pop()
    return min(width, LARGEST_SIDE) if not sizes and width == height else LARGEST_SIDE
