"""Images as tensors: what the processor gives, augmented within bounds, the same in a resumed run."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil

from recipes.common.data import image_batches
from recipes.common.data.image_batches import ImageTensors, crop_and_mirror, make_processor, shift_and_mirror
from recipes.common.data.images import calibration_images, load_images
from zoo.errors import UserError


@pytest.fixture(scope="module")
def data():
    return load_images("easy-vqa")


@pytest.fixture(scope="module")
def few(data):
    """The same with fewer training images, where their statistics do not matter."""
    return replace(data, train=data.train.select(range(20)))


@pytest.fixture(scope="module")
def processor(data):
    return make_processor(data)


def dataset(pictures: list[Image.Image]) -> Dataset:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(len(pictures))]}, features)


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# ----------------------------------------------------------------------------------------------------------- processor


def test_statistics_are_those_of_the_training_pixels(data):
    data = replace(data, train=data.train.select(range(300)))
    processor = make_processor(data)
    pixels = np.stack([np.asarray(image) for image in data.train["image"]]) / 255
    np.testing.assert_allclose(processor.image_mean, pixels.mean((0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(processor.image_std, pixels.std((0, 1, 2)), atol=6e-5)
    batch = ImageTensors(data.train, processor)
    inputs = torch.stack([item["pixel_values"] for item in batch.__getitems__(list(range(len(batch))))])
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-3 and (inputs.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("side", [32, 64, 224])
def test_a_reloaded_processor_gives_the_inputs_that_were_measured(tmp_path, few, side):
    make_processor(few, side).save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    images = ImageTensors(few.test.select(range(3)), make_processor(few, side))
    assert images.size == (side, side)
    expected = reloaded([row["image"] for row in few.test.select(range(3))], return_tensors="pt").pixel_values
    measured = torch.stack([images[row]["pixel_values"] for row in range(3)])
    torch.testing.assert_close(measured, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(images.normalize(images.pixels([0, 1, 2])), measured)


def test_large_images_are_resized_by_their_shorter_side_and_cropped_in_the_centre(few):
    picture = random_picture(500, 300)
    images = ImageTensors(dataset([picture] * 2), make_processor(few, 224))
    width = int(256 * 500 / 300)
    left, top = (width - 224) // 2, 16
    resized = picture.resize((width, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    assert np.array_equal((images.pixels([1])[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


@pytest.mark.slow
def test_small_images_are_their_own_pixels(data, processor):
    images = ImageTensors(data.test, processor)
    expected = np.stack([np.asarray(image) for image in data.test.select(range(5))["image"]]) / 255
    pixels = images.pixels([0, 1, 2, 3, 4])
    assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1).numpy(), expected, atol=1e-7)


def test_a_processor_of_the_hub_with_other_habits_is_followed_or_refused(data):
    plain = ViTImageProcessorPil(size={"height": 48, "width": 48}, do_normalize=False)
    images = ImageTensors(data.test.select(range(2)), plain)
    assert images.size == (48, 48) and torch.equal(images[0]["pixel_values"], images.pixels([0])[0])
    for odd in ({"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        with pytest.raises(UserError, match=r"ViTImageProcessor\w* scales pixels by .* \[0, 1\]"):
            ImageTensors(data.test, ViTImageProcessorPil(**odd))


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_cover_the_split_in_order_with_its_labels(data, processor):
    images = ImageTensors(data.test, processor)
    pixels, labels = zip(*images.batches(100), strict=True)
    assert [len(p) for p in pixels] == [100] * 6 + [3]
    assert torch.cat(labels).tolist() == data.test["label"][:] == images.labels.tolist()
    assert torch.equal(torch.cat(pixels)[[7, 602]], images.pixels([7, 602]))
    loader = torch.utils.data.DataLoader(images, batch_size=200, shuffle=True)
    assert sorted(y for batch in loader for y in batch["labels"].tolist()) == sorted(data.test["label"][:])


def test_images_without_labels_have_none(data, processor):
    images = ImageTensors(calibration_images(data, 5, seed=0), processor)
    assert images.labels is None and images[0].keys() == {"pixel_values"}
    assert [labels for _, labels in images.batches(2)] == [None] * 3


@pytest.mark.parametrize("augment", [False, True])
def test_images_that_do_not_fit_in_memory_are_the_same(data, processor, monkeypatch, augment):
    rows = [5, 3, 600]
    held = ImageTensors(data.test, processor, augment=augment).pixels(rows)
    monkeypatch.setattr(image_batches, "IN_MEMORY", 1000)
    decoded = ImageTensors(data.test, processor, augment=augment)
    assert torch.equal(decoded.pixels(rows), held) and decoded._decoded is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_become_three_channels(processor, mode):
    images = ImageTensors(dataset([random_picture(64, 64).convert(mode)] * 2), processor)
    assert images.pixels([0, 1]).shape == (2, 3, 64, 64)


def test_a_picture_that_cannot_be_decoded_is_told(processor):
    file = io.BytesIO()
    random_picture(64, 64).save(file, "PNG")
    for broken in (file.getvalue()[:500], b"no picture"):
        table = dataset([random_picture(64, 64)]).cast_column("image", ImageFeature(decode=False))
        table = Dataset.from_dict({"image": [{"bytes": broken, "path": None}], "label": [0]}, table.features)
        with pytest.raises(UserError, match="image 0 of a split cannot be decoded"):
            ImageTensors(table.cast_column("image", ImageFeature()), processor).pixels([0])


# -------------------------------------------------------------------------------------------------------- augmentation


def test_shifting_is_cropping_a_reflected_border_and_every_shift_occurs():
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(1, 3, 8, 8)
    padded = F.pad(image.float(), (2, 2, 2, 2), mode="reflect").byte()[0]
    crops = {}
    for dy in range(5):
        for dx in range(5):
            for mirrored in (False, True):
                crop = padded[:, dy : dy + 8, dx : dx + 8]
                crops[(crop.flip(2) if mirrored else crop).numpy().tobytes()] = dy, dx, mirrored
    assert len(crops) == 50
    drawn = shift_and_mirror(image.expand(4000, -1, -1, -1), 2, Generator().manual_seed(0))
    seen = [crops[one.numpy().tobytes()] for one in drawn]  # KeyError if it is none of them
    assert len(set(seen)) == 50
    assert 1850 < sum(mirrored for _, _, mirrored in seen) < 2150
    for place in (0, 1):
        counts = np.bincount([one[place] for one in seen], minlength=5)
        assert counts.min() > 680 and counts.max() < 920  # 800 each, standard deviation 25


def test_small_images_are_shifted_by_an_eighth_of_their_side_at_most(few):
    for side in (32, 64):
        pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8).numpy()
        pixels[:, side // 2, side // 2] = 255
        images = ImageTensors(
            dataset([Image.fromarray(p) for p in pixels] * 200), make_processor(few, side), augment=True
        )
        places = images.pixels(list(range(400)))[:, 0].flatten(1).argmax(1)
        for axis in (places // side, places % side):  # mirrored, the middle is at side / 2 - 1
            assert side // 2 - side // 8 - 1 <= axis.min() and axis.max() <= side // 2 + side // 8
        assert (places // side).max() == side // 2 + side // 8 and (places // side).min() == side // 2 - side // 8


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row, both from 0 to 255."""
    red = np.linspace(0, 255, width)[None].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


def test_random_crops_have_the_stated_areas_ratios_and_places():
    picture, generator = coordinates(400, 300), Generator().manual_seed(0)
    areas, ratios, mirrored, centres = [], [], 0, []
    for _ in range(600):
        crop = crop_and_mirror(picture, (48, 48), generator).double()
        assert crop.shape == (3, 48, 48)
        red, green = crop[0].mean(0), crop[1].mean(1)
        mirrored += bool(red[0] > red[-1])
        width, height = ((x.max() - x.min()).item() / 255 * n * 48 / 47 for x, n in ((red, 400), (green, 300)))
        areas.append(width * height / (400 * 300))
        ratios.append(width / height)
        centres.append(red.mean().item())
    assert 0.07 < min(areas) < 0.11 and 0.9 < max(areas) < 1.03
    assert 0.70 < min(ratios) < 0.80 and 1.26 < max(ratios) < 1.42
    assert 250 < mirrored < 350 and 115 < np.mean(centres) < 140 and np.std(centres) > 20


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
def test_a_random_crop_exists_for_every_shape(width, height, seed):
    crop = crop_and_mirror(random_picture(width, height, seed), (24, 16), Generator().manual_seed(seed))
    assert crop.shape == (3, 24, 16) and crop.dtype == torch.uint8


def test_of_a_thin_image_the_centre_of_an_allowed_ratio_is_taken():
    crop = crop_and_mirror(coordinates(1000, 10), (32, 32), Generator().manual_seed(0))
    width = (crop[0].max() - crop[0].min()).item() / 255 * 1000
    assert abs(crop[0].double().mean() - 127.5) < 2 and 8 < width < 14


@pytest.mark.parametrize("side", [32, 96])
def test_what_is_drawn_depends_on_the_seed_and_the_batch_only(few, side):
    processor, rows = make_processor(few, side), [4, 1, 9]

    def drawn(seed=0, rows=rows, before=()):
        images = ImageTensors(few.train, processor, augment=True, seed=seed)
        for earlier in before:
            images.pixels(earlier)
        return images.pixels(rows)

    assert torch.equal(drawn(), drawn(before=[[0, 1], [2]]))
    for other in (drawn(seed=1), drawn(rows=[4, 1, 8]), drawn(rows=[4, 1, 9, 2])):
        assert not torch.equal(drawn()[:2], other[:2])  # two images that they share
    plain = (ImageTensors(few.train, processor, seed=seed).pixels(rows) for seed in (0, 1))
    assert torch.equal(*plain)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 24)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(F.adaptive_avg_pool2d(pixel_values, 8).flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_save = state.global_step == 6
        return control


def test_trainer_trains_on_augmented_images_and_resumes_to_the_same_weights(tmp_path, data, processor):
    train, validation = data.train.select(range(64)), data.validation.select(range(20))

    def trainer(folder, **more):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path / folder,
            per_device_train_batch_size=16,
            num_train_epochs=3,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=5,
        )
        return Trainer(
            Tiny(),
            arguments,
            train_dataset=ImageTensors(train, processor, augment=True),
            eval_dataset=ImageTensors(validation, processor),
            **more,
        )

    whole = trainer("whole")
    whole.train()
    trainer("cut", callbacks=[Stop()]).train()  # in the middle of the second epoch
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)
    images = ImageTensors(validation, processor)
    batch = torch.utils.data.default_collate(images.__getitems__(list(range(20))))
    expected = whole.model(**batch)["loss"].item()
    assert math.isclose(whole.evaluate()["eval_loss"], expected, rel_tol=1e-5)
