"""Image classifiers with fresh weights, by the names that papers use, or shaped like a model of the Hub."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig, PreTrainedModel

from zoo.errors import UserError
from zoo.models import slim_class_for
from zoo.models.mobilenet_v2 import SlimMobileNetV2Config
from zoo.models.resnet import SlimResNetConfig, cifar_resnet_config
from zoo.models.vgg import DEPTHS, cifar_vgg_config

IMAGENET_RESNETS = {  # depth: (kind of block, blocks of each stage, width of the first stage)
    18: ("basic", [2, 2, 2, 2], 64),
    34: ("basic", [3, 4, 6, 3], 64),
    50: ("bottleneck", [3, 4, 6, 3], 256),
    101: ("bottleneck", [3, 4, 23, 3], 256),
}
SMALL_IMAGE = 64  # pixels up to which MobileNetV2 does not halve the image twice at its start
LARGEST_DEPTH, LARGEST_WIDTH, LARGEST_MULTIPLIER = 1202, 1024, 16  # beyond them a name is a slip of the pen
KNOWN = (
    "resnet-N (N = 6n + 2, for small images) and resnet-N-W of another width, resnet-18, -34, -50, -101, wrn-50-2,"
    " vgg-11, -13, -16, -19 (for small images), mobilenet-v2 and mobilenet-v2-W of W times the width, a folder or a Hub id"
)


def fresh_model(name: str, classes: list[str], image_size: int, seed: int) -> PreTrainedModel:
    """A classifier of our own class with weights drawn from `seed`, dense, for square images of `image_size`.

    Args:
        name: resnet-20 is He's CIFAR ResNet of 16, 32 and 64 channels, resnet-20-8 the same from 8 on; resnet-18 to -101
            and wrn-50-2 are those for ImageNet; of a folder or Hub id only the config is taken.
    Raises: UserError for any other name.
    """
    config = architecture(name, len(classes), image_size)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: index for index, label in enumerate(classes)}
    torch.manual_seed(seed)
    return slim_class_for(config.model_type.removeprefix("slim_"), "AutoModelForImageClassification")(config)


def architecture(name: str, num_labels: int, image_size: int):
    """The config of `fresh_model`."""
    if name == "wrn-50-2":
        return _imagenet_resnet(50, num_labels, image_size, reduction=2)
    unknown = UserError(f"--model {name}: there is no such depth or width; known are {KNOWN}.")
    found = re.fullmatch(r"vgg-(\d+)", name)
    if found:
        if int(found[1]) not in DEPTHS:
            raise unknown
        return cifar_vgg_config(int(found[1]), num_labels, image_size)
    found = re.fullmatch(r"mobilenet-v2(?:-(\d*\.?\d+))?", name)
    if found:
        if not 0 < float(found[1] or 1) <= LARGEST_MULTIPLIER:
            raise unknown
        return _mobilenet_v2(float(found[1] or 1), num_labels, image_size)
    found = re.fullmatch(r"resnet-(\d+)(?:-(\d+))?", name)
    if found:
        depth, width = int(found[1]), int(found[2] or 16)
        if depth in IMAGENET_RESNETS and not found[2]:
            return _imagenet_resnet(depth, num_labels, image_size)
        if depth % 6 == 2 and 8 <= depth <= LARGEST_DEPTH and 1 <= width <= LARGEST_WIDTH:
            return cifar_resnet_config(depth, width, num_labels, image_size)
        raise unknown
    try:
        stock = AutoConfig.from_pretrained(name)
    except Exception:  # a file of nonsense fails in many ways
        raise UserError(f"--model {name}: no such architecture; known are {KNOWN}.") from None
    model_class = slim_class_for(stock.model_type.removeprefix("slim_"), "AutoModelForImageClassification")
    settings = {key: value for key, value in stock.to_dict().items() if key not in ("model_type", "architectures")}
    return model_class.config_class.from_dict(settings | {"num_labels": num_labels, "image_size": image_size})


def _imagenet_resnet(depth: int, num_labels: int, image_size: int, **more) -> SlimResNetConfig:
    kind, depths, width = IMAGENET_RESNETS[depth]
    return SlimResNetConfig(
        layer_type=kind,
        depths=depths,
        hidden_sizes=[width << stage for stage in range(4)],
        num_labels=num_labels,
        image_size=image_size,
        **more,
    )


def _mobilenet_v2(width: float, num_labels: int, image_size: int) -> SlimMobileNetV2Config:
    return SlimMobileNetV2Config(
        depth_multiplier=width,
        stem="cifar" if image_size <= SMALL_IMAGE else "imagenet",
        classifier_dropout_prob=0.2,  # stock's 0.8 is the share that TensorFlow keeps
        num_labels=num_labels,
        image_size=image_size,
    )
