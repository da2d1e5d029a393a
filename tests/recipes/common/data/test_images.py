"""Labelled images: splits that share none, the same everywhere, honestly named; a user's mistakes told in a sentence."""

import hashlib
import os
import subprocess
import sys
import textwrap
from collections import Counter
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recipes.common.data import images
from recipes.common.data.assets import ASSETS
from recipes.common.data.images import ImageData, calibration_images, hold_out, load_images
from zoo.errors import UserError
from zoo.record.schema import DATA

SPLITS = ("train", "validation", "test")
# sha256 of the pixels and labels of every image in order: another Python, or another machine, has to give these too.
PINNED = {
    "cifar10": {
        "train": "b2e033be431cf420831510d8840e12f3644d35f009bb52549fe695d702fcd86e",
        "validation": "c475f7057456efcea8627cc278a74bad975a7b727c291888c5b824796e2578b9",
        "test": "980883a3e2aeee9ab1ff8d1ac7573d15dd047d76eb496ea9b6f8be70d1bb944c",
    },
    "easy-vqa": {
        "train": "bc6cc45349178501cb40d37bd60afe1928caee3736b7d50ebab83e3952590996",
        "validation": "d7e3c90c7ff21002cbca169aa42e4a1f1f78aab077b54235ebb8bed6c857b816",
        "test": "ae4e7bf320bb40b1f4969d8c1bd2975180c5918f4a29e63431e176204b252e7c",
    },
}


def pixel_hashes(split: Dataset) -> list[bytes]:
    return [hashlib.sha256(image.convert("RGB").tobytes()).digest() for image in split["image"]]


def digest(split: Dataset, hashes: list[bytes] | None = None) -> str:
    rows = zip(hashes or pixel_hashes(split), split["label"][:], strict=True)
    return hashlib.sha256(b"".join(pixels + bytes([label]) for pixels, label in rows)).hexdigest()


def noise(rng: np.random.Generator, size=(16, 16)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=list(PINNED))
def packaged(request) -> tuple[str, ImageData, dict[str, list[bytes]]]:
    """A packaged set with the hash of every image."""
    data = load_images(request.param)
    return request.param, data, {split: pixel_hashes(getattr(data, split)) for split in SPLITS}


# ------------------------------------------------------------------------------------------------------------- packaged


@pytest.mark.slow
def test_packaged_splits_are_pinned_and_share_no_image(packaged):
    name, data, hashes = packaged
    assert {split: digest(getattr(data, split), hashes[split]) for split in SPLITS} == PINNED[name]
    assert len(set().union(*hashes.values())) == sum(map(len, hashes.values()))


@pytest.mark.slow
def test_processes_that_fill_an_empty_cache_at_once_get_the_same_images(tmp_path, monkeypatch):
    program = textwrap.dedent(f"""
        import hashlib, pathlib
        from recipes.common.data import images
        images.cache_folder = lambda kind: pathlib.Path({str(tmp_path)!r}, kind)
        data = images.load_images("easy-vqa")
        for split in (data.train, data.validation, data.test):
            rows = [(hashlib.sha256(row["image"].tobytes()).digest(), row["label"]) for row in split]
            print(hashlib.sha256(b"".join(pixels + bytes([label]) for pixels, label in rows)).hexdigest())
    """)
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    monkeypatch.setattr(images, "cache_folder", lambda kind: tmp_path / kind)
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as other:
        here = load_images("easy-vqa")
        output = other.communicate(timeout=120)[0]
    assert output.split() == [digest(getattr(here, split)) for split in SPLITS] == list(PINNED["easy-vqa"].values())
    assert [p.name for p in (tmp_path / "images").iterdir() if not p.name.startswith(".")] == [
        f"easy-vqa-{ASSETS['easy-vqa'].sha256[:12]}-{images.SPLIT_VERSION}"
    ]


@pytest.mark.slow
def test_cifar10_is_the_test_set_in_a_split_of_our_own():
    data = load_images("cifar10")
    assert "test images" in data.name and "own 7000/1000/2000 split" in data.name  # not to be taken for the real one
    assert data.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for split, per_class in (("train", 700), ("validation", 100), ("test", 200)):
        assert Counter(getattr(data, split)["label"][:]) == dict.fromkeys(range(10), per_class)
    everything = np.stack([np.asarray(image) for split in SPLITS for image in getattr(data, split)["image"]])
    assert everything.shape == (10_000, 32, 32, 3) and data.image_size == 32
    np.testing.assert_allclose(everything.mean((0, 1, 2)), [126.0, 123.7, 114.9], atol=0.06)  # of CIFAR-10's test set
    assert "none stated" in data.license


def test_easy_vqa_labels_are_what_the_images_show():
    """2,435 and 603 images have both answers; the hue of the pixels that are not background agrees with the label."""
    data = load_images("easy-vqa")
    assert (len(data.train) + len(data.validation), len(data.test), len(data.classes)) == (2435, 603, 24)
    assert set(data.classes) == {f"{color} {shape}" for color in images.COLORS for shape in images.SHAPES}
    assert min(Counter(data.validation["label"][:]).values()) >= 8 and len(set(data.validation["label"][:])) == 24
    strongest = {"red": 0, "green": 1, "blue": 2}
    checked = 0
    for row in data.test:
        color = data.classes[row["label"]].split()[0]
        pixels = np.asarray(row["image"], dtype=float).reshape(-1, 3)
        shape = pixels[np.abs(pixels - np.median(pixels, 0)).max(1) > 40].mean(0)
        if color in strongest:
            checked += 1
            assert shape.argmax() == strongest[color]
        elif color in ("gray", "black"):
            checked += 1
            assert shape.max() - shape.min() < 30
    assert checked > 250


def test_a_row_of_the_report_says_where_images_come_from(packaged):
    name, data, _ = packaged
    row = data.row("test")
    assert row.keys() <= {key.rstrip("?") for key in DATA}
    assert (row["items"], row["sha256"], row["version"]) == (len(data.test), ASSETS[name].sha256, ASSETS[name].package)
    assert data.row("train", items=7)["items"] == 7


# ------------------------------------------------------------------------------------------------ splits, calibration


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.05, 0.6), st.integers(0, 3))
def test_hold_out_takes_a_share_of_every_class(labels, fraction, salt):
    kept, held_out = hold_out(labels, fraction, str(salt))
    assert sorted(kept + held_out) == list(range(len(labels))) and kept == sorted(kept)
    for label, count in Counter(labels).items():
        share = sum(labels[row] == label for row in held_out)
        assert share == (max(round(fraction * count), 1) if count > 1 else 0)
        assert count - share >= 1
    assert (kept, held_out) == hold_out(labels, fraction, str(salt))


def test_hold_out_is_random_and_depends_on_the_salt():
    chosen = [hold_out([0] * 1000, 0.1, str(salt))[1] for salt in range(20)]
    assert len(set(map(tuple, chosen))) == 20
    assert 450 < np.mean(chosen) < 550 and max(Counter(row for rows in chosen for row in rows).values()) < 10
    assert hold_out([0] * 10, 0.3, "x")[1] == [0, 4, 5]  # the three smallest sha256 of "x/0" to "x/9"


def test_calibration_images_stride_through_the_classes(packaged):
    _, data, hashes = packaged
    chosen = calibration_images(data, 100, seed=0)
    assert chosen.column_names == ["image"]  # no labels to be tempted by
    label_of = dict(zip(hashes["train"], data.train["label"][:], strict=True))
    labels = [label_of[pixels] for pixels in pixel_hashes(chosen)]
    assert labels == sorted(labels) and len(set(pixel_hashes(chosen))) == 100
    wanted = {label: 100 * count / len(data.train) for label, count in Counter(data.train["label"][:]).items()}
    assert all(abs(Counter(labels)[label] - share) < 1 for label, share in wanted.items())
    assert pixel_hashes(chosen) == pixel_hashes(calibration_images(data, 100, seed=0))
    assert pixel_hashes(chosen) != pixel_hashes(calibration_images(data, 100, seed=1))


def test_calibration_can_take_all_images_and_no_more():
    data = load_images("easy-vqa")
    assert sorted(pixel_hashes(calibration_images(data, 2189, seed=3))) == sorted(pixel_hashes(data.train))
    for n in (0, 2190):
        with pytest.raises(UserError, match=f"--nsamples {n}: .* 2,189 training images"):
            calibration_images(data, n, seed=3)


# ------------------------------------------------------------------------------------------------------ folders and Hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What datasets prepares from a test's folder goes with the folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def image_folder(root, splits: dict[str, int], classes=("cat", "dog"), size=(16, 16)):
    """`root`/split/class/*.png, with `splits` images of each class; split "" has no folder of its own."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise(rng, size).save(folder / f"{number}.png")
    return root


def test_a_folder_without_validation_gives_a_tenth_of_its_training_images(tmp_path):
    root = image_folder(tmp_path / "pets", {"train": 20, "test": 6})
    data = load_images(str(root))
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 12)
    assert data.classes == ["cat", "dog"] and data.image_size == 16
    assert data.version == "folder, train: train, test: test, validation: a tenth of train"
    files = {hashlib.sha256(Image.open(p).tobytes()).digest() for p in (root / "test").rglob("*.png")}
    assert set(pixel_hashes(data.test)) == files  # nothing was taken of the test images
    assert len(set(pixel_hashes(data.train)) | set(pixel_hashes(data.validation))) == 40
    assert Counter(data.validation["label"][:]) == {0: 2, 1: 2}
    for split in SPLITS:
        for image, label in zip(getattr(data, split)["image"], getattr(data, split)["label"], strict=True):
            assert (root / ("test" if split == "test" else "train") / data.classes[label]).is_dir() and image.size


def test_a_folder_of_classes_alone_is_split_three_ways(tmp_path):
    data = load_images(str(image_folder(tmp_path / "pets", {"": 20}, size=(30, 20))))
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 4, 4)
    hashes = [set(pixel_hashes(getattr(data, split))) for split in SPLITS]
    assert len(set.union(*hashes)) == 40
    assert data.image_size == 224  # no squares
    assert data.version.endswith("test: a tenth of train, validation: a tenth of train")


def test_the_hash_of_a_folder_follows_its_contents(tmp_path):
    root = image_folder(tmp_path / "pets", {"train": 3, "test": 2})
    first = load_images(str(root))
    assert first.size == sum(p.stat().st_size for p in root.rglob("*.png"))
    assert load_images(str(root)).sha256 == first.sha256
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "9.png")
    assert load_images(str(root)).sha256 != first.sha256


def table(count: int, features: dict, **columns) -> Dataset:
    rng = np.random.default_rng(count)
    pictures = [noise(rng) for _ in range(count)]
    return Dataset.from_dict({"img": pictures, **columns}, Features({"img": ImageFeature(), **features}))


def write_parquet(root, **splits: Dataset) -> str:
    root.mkdir()
    for split, dataset in splits.items():
        dataset.to_parquet(root / f"{split}.parquet")
    return str(root)


FINE, COARSE = ClassLabel(names=list("abcd")), ClassLabel(names=["x", "y"])


def two_kinds(count: int) -> Dataset:
    columns = {"fine": [i % 4 for i in range(count)], "coarse": [i % 2 for i in range(count)]}
    return table(count, {"fine": FINE, "coarse": COARSE}, **columns)


def test_columns_and_splits_of_parquet_files_are_found_or_named(tmp_path):
    root = write_parquet(tmp_path / "p", train=two_kinds(21), validation=two_kinds(9), test=two_kinds(8))
    with pytest.raises(UserError, match="the columns fine, coarse are of class labels; name one with --label-column"):
        load_images(root)
    data = load_images(root, label_column="fine")
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (21, 9, 8, ["a", "b", "c", "d"])
    assert data.train["label"][:5] == [0, 1, 2, 3, 0] and data.train.column_names == ["image", "label"]
    data = load_images(root, label_column="coarse", test_split="validation")
    assert (len(data.test), data.classes) == (9, ["x", "y"])
    assert len(data.train) + len(data.validation) == 21 and data.version.endswith("validation: a tenth of train")
    for flags, says in (
        ({"label_column": "nope"}, r"--label-column nope: .* has fine, coarse\."),
        ({"label_column": "img"}, r"--label-column img: .* has fine, coarse\."),
        ({"train_split": "training"}, r"--train-split training: .* has train, validation, test\."),
        ({"test_split": "dev"}, r"--test-split dev: .* has train, validation, test\."),
        ({"test_split": "train"}, "train, train are named for different uses"),
    ):
        with pytest.raises(UserError, match=says):
            load_images(root, **{"label_column": "fine", **flags})


@pytest.mark.parametrize("kind", [Value("string"), Value("int64")])
def test_labels_may_be_words_or_numbers(tmp_path, kind):
    values = ["9", "10", "9", "100"] if kind.dtype == "string" else [9, 10, 9, 100]
    root = write_parquet(
        tmp_path / "p",
        train=table(40, {"label": kind}, label=values * 10),
        test=table(2, {"label": kind}, label=[values[3], values[0]]),
    )
    data = load_images(root)
    assert data.classes == (["10", "100", "9"] if kind.dtype == "string" else ["9", "10", "100"])
    assert [data.classes[label] for label in data.test["label"]] == ["100", "9"]


LABEL = {"label": FINE}


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": Dataset.from_dict({"text": ["a"], "label": [0]})}, "no column holds images; there are text, label"),
        ({"train": table(4, {"id": Value("int64")}, id=[0, 1, 2, 3])}, "none of img, id is of class labels"),
        ({"train": table(4, LABEL, label=[2] * 4)}, "of one class; at least two are needed"),
        ({"train": table(4, LABEL, label=[0, 1, -1, 2])}, "images of its split train have no label"),
        (
            {"train": table(4, LABEL, label=[0, 1, 2, 3])},
            "too few training images to hold some out; name a --test-split",
        ),
        (
            {
                "train": table(4, {"label": Value("string")}, label=list("aabb")),
                "test": table(1, {"label": Value("string")}, label=["c"]),
            },
            "no training image is of class c",
        ),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(tmp_path, splits, says):
    with pytest.raises(UserError, match=says) as caught:
        load_images(write_parquet(tmp_path / "p", **splits))
    assert str(caught.value).startswith("--dataset ") and "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one data set, made of the splits that a test puts into the fixture; load_dataset's calls beside it."""
    splits, calls = {}, []
    card = SimpleNamespace(get=lambda key: {"license": "mit"}[key])
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha="c0ffee", card_data=card))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: list(splits))

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits, calls


def labelled(count: int) -> Dataset:
    return table(count, LABEL, label=[i % 4 for i in range(count)])


def test_a_hub_data_set_is_read_at_its_commit_and_only_the_splits_needed(hub):
    splits, calls = hub
    splits |= {"train": labelled(40), "extra": labelled(400), "test": labelled(12)}
    data = load_images("org/set", config="small")
    assert calls == [("org/set", "small", split, "c0ffee") for split in ("train", "test")]
    assert (data.name, data.license, data.sha256) == ("org/set", "mit", None)
    assert data.version == "c0ffee small, train: train, test: test, validation: a tenth of train"
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 12)


def test_a_test_split_with_secret_labels_gives_way_to_the_validation_split(hub):
    splits, _ = hub
    secret = table(5, LABEL, label=[-1] * 5)
    splits |= {"train": labelled(40), "val": labelled(12), "test": secret}
    data = load_images("org/set")
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 12)
    assert data.version.endswith("test: val, validation: a tenth of train")
    with pytest.raises(UserError, match="images of its split test have no label"):
        load_images("org/set", test_split="test")


def test_splits_of_different_classes_are_refused(hub):
    splits, _ = hub
    splits |= {"train": labelled(8), "test": table(2, {"label": COARSE}, label=[0, 1])}
    with pytest.raises(UserError, match="its splits have different classes"):
        load_images("org/set")


def test_an_unknown_name_is_told_with_the_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("cifar-10", "./no-folder"):
        with pytest.raises(UserError, match=f"--dataset {name}: not one of cifar10, easy-vqa, no folder") as caught:
            load_images(name)
        assert "\n" not in str(caught.value)
