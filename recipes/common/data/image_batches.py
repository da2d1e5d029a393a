"""Labelled images as tensors: decoded by the model's own processor, augmented and normalised batch by batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import datasets
import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm.auto import tqdm
from transformers import ConvNextImageProcessorPil

from recipes.common.core.flags import first_line
from recipes.common.core.state import module_seed
from recipes.common.data.images import SAMPLED, ImageData
from zoo.errors import UserError

IN_MEMORY = 512 << 20  # bytes of decoded images that one split may hold; larger splits are decoded again and again
DECODED_AT_ONCE = 256
LARGEST_SMALL = 64  # side up to which images are used whole, and augmented by shifting; larger ones are cropped
CROPPED = 224 / 256  # of the shorter side of a large image, in evaluation
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random crop of a large image, in training
STATISTICS_IMAGES = 10_000  # that channel means and deviations are taken of, at most


def make_processor(data: ImageData, side: int | None = None) -> ConvNextImageProcessorPil:
    """The image processor of a model trained from scratch on `data`, with the channel statistics of its train split.

    It resizes the shorter side, to 256/224 of `side` above 64 pixels, and crops a square of `side` from the centre.

    Args:
        side: of the model's square input in pixels; `data.image_size` by default.
    """
    side = side or data.image_size
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_pct=1.0 if side <= LARGEST_SMALL else CROPPED,
        resample=Image.Resampling.BILINEAR,
        do_normalize=False,
    )
    step = math.ceil(len(data.train) / STATISTICS_IMAGES)
    mean, std = _channel_statistics(ImageTensors(data.train.select(range(0, len(data.train), step)), processor))
    processor.do_normalize, processor.image_mean, processor.image_std = True, mean, std
    return processor


def _channel_statistics(images: ImageTensors) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel in [0, 1], to four digits."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for pixels, _ in images.batches(DECODED_AT_ONCE):
        pixels = pixels.double()
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
        count += pixels[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in std.tolist()]


class ImageTensors(torch.utils.data.Dataset):
    """One split as tensors: a data set for Trainer, and batches in pixel space for whoever works there.

    Pixel space is what the processor gives before it normalises, as floats in [0, 1]; `normalize` takes pixels to the
    model's input. Items are {"pixel_values": (3, H, W) float32 normalised, "labels": () int64}; the labels are absent
    where `dataset` has none.

    With `augment`, images up to 64 pixels are shifted by up to an eighth of their side over reflected borders and
    mirrored (pad 4 at 32 pixels, as usual for CIFAR), larger ones are cropped at random, resized and mirrored. What is
    drawn for a batch depends on the seed and on which rows are in the batch, in which order, and on nothing else: so a
    resumed run, on any number of processes, sees the images that the uninterrupted one would have seen. Shuffling makes
    the batches of every epoch different; batches of a single image would repeat.

    Args:
        dataset: with a column `image`, and `label` where labels are known.
        processor: of transformers; it has to scale by 1/255.

    Raises:
        UserError: the processor scales otherwise, or an image cannot be decoded.
    """

    def __init__(self, dataset: datasets.Dataset, processor, *, augment: bool = False, seed: int = 0) -> None:
        if not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255, rel_tol=1e-3):
            raise UserError(
                f"{type(processor).__name__} scales pixels by {processor.rescale_factor}; only processors that scale to"
                " [0, 1] are supported."
            )
        self.dataset, self.processor, self.augment, self.seed = dataset, processor, augment, seed
        self.labels = torch.tensor(dataset["label"][:]) if "label" in dataset.features else None  # (N,) int64
        self.size = tuple(self._process([Image.new("RGB", (256, 256))]).shape[-2:])  # (H, W)
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self._decoded: Tensor | None = None

    def augmented(self, seed: int) -> ImageTensors:
        """The same images, decoded once for both, augmented."""
        views = copy.copy(self)
        views.augment, views.seed, views.epoch = True, seed, 0
        return views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Tensor]]:
        """The items of a batch, made together; torch's DataLoader prefers this to `__getitem__`."""
        inputs = self.normalize(self.pixels(rows))
        if self.labels is None:
            return [{"pixel_values": x} for x in inputs]
        return [{"pixel_values": x, "labels": y} for x, y in zip(inputs, self.labels[rows], strict=True)]

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """{"pixel_values": (B, 3, H, W) normalised, "labels": (B,)} of these rows."""
        return {"pixel_values": self.normalize(self.pixels(rows)), "labels": self.labels[rows]}

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """((B, 3, H, W) pixels in [0, 1], (B,) labels or None), in order."""
        for rows in torch.arange(len(self)).split(batch_size):
            yield self.pixels(rows.tolist()), None if self.labels is None else self.labels[rows]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, H, W) in [0, 1] as the model's input; differentiable."""
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)

    def pixels(self, rows: list[int]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1] of these rows, augmented if the data set is."""
        if not self.augment:
            return self._views(rows).float() / 255
        generator = Generator().manual_seed(module_seed(self.seed, f"images/{rows}"))
        if max(self.size) <= LARGEST_SMALL:
            views = shift_and_mirror(self._views(rows), max(self.size) // 8, generator)
        else:
            views = torch.stack([crop_and_mirror(image, self.size, generator) for image in self._images(rows)])
        return views.float() / 255

    def check(self) -> None:
        """Decodes what stays in memory then, or else some. Raises: UserError for an image that cannot be decoded."""
        self._views(list(range(0, len(self), max(1, len(self) // SAMPLED))))

    def _views(self, rows: list[int]) -> Tensor:
        """(B, 3, H, W) uint8 as evaluated, from memory if all of them fit there."""
        if len(self) * 3 * math.prod(self.size) > IN_MEMORY:
            return self._process(self._images(rows))
        if self._decoded is None:
            decoded = torch.empty(len(self), 3, *self.size, dtype=torch.uint8)
            chunks = torch.arange(len(self)).split(DECODED_AT_ONCE)
            for chunk in tqdm(chunks, desc="decoding images", unit="batch", leave=False, disable=len(chunks) < 20):
                decoded[chunk] = self._process(self._images(chunk.tolist()))
            self._decoded = decoded
        return self._decoded[rows]

    def _images(self, rows: list[int]) -> list[Image.Image]:
        try:
            return [image.convert("RGB") for image in self.dataset[rows]["image"]]
        except Exception as error:  # Pillow raises many kinds, SyntaxError for a broken PNG among them
            if len(rows) > 1:
                return [image for row in rows for image in self._images([row])]  # which one is it?
            raise UserError(f"--dataset: image {rows[0]} of a split cannot be decoded ({first_line(error)}).") from None

    def _process(self, images: list[Image.Image]) -> Tensor:
        return self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values


def shift_and_mirror(views: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image (B, 3, H, W) moved by up to `padding` pixels either way, borders reflected; every other one mirrored.

    The same as padding by reflection and cropping at random, without making the padded images.
    """
    count, _, height, width = views.shape
    dy, dx = torch.randint(-padding, padding + 1, (2, count, 1), generator=generator)
    rows, columns = (_reflect(torch.arange(n) + d, n) for n, d in ((height, dy), (width, dx)))  # (B, H), (B, W)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch, channel = torch.arange(count).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    return views[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _reflect(place: Tensor, length: int) -> Tensor:
    """Places outside 0 .. length - 1 mirrored at the first and the last one, which are not repeated."""
    return length - 1 - (length - 1 - place.abs()).abs()


def crop_and_mirror(image: Image.Image, size: tuple[int, int], generator: Generator) -> Tensor:
    """(3, H, W) uint8: a random part of the image, of 8 to 100 % of its area, resized; mirrored half of the time.

    Of ten draws of area and aspect ratio (3/4 to 4/3, log-uniform) the first that fits is taken; if none does, the
    largest centred part whose ratio is allowed. Always draws as many numbers, so that images do not depend on others.
    """
    area = torch.empty(CROP_TRIES).uniform_(*CROP_AREA, generator=generator) * image.width * image.height
    ratio = torch.empty(CROP_TRIES).uniform_(*map(math.log, CROP_RATIO), generator=generator).exp()
    left, top, mirror = torch.rand(3, generator=generator).tolist()
    widths, heights = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)
    fits = ((widths <= image.width) & (heights <= image.height)).nonzero()
    if len(fits):
        width, height = int(widths[fits[0]]), int(heights[fits[0]])
        left, top = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    else:
        width = min(image.width, round(image.height * CROP_RATIO[1]))
        height = min(image.height, round(image.width / CROP_RATIO[0]))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if mirror < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
