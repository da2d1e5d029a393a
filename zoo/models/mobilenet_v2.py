"""MobileNetV2 for ImageNet and CIFAR: the stock class with a choice of stem, a width per group and packed layers."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2Model

from ..errors import UserError
from .packed import IMAGE_CLASSES, PackedConfigMixin, PackedModelMixin
from .widths import STEMS, Groups, WidthsConfigMixin, resize_channels

MOMENTUM = 0.1  # of running statistics in training; stock's 0.997, TensorFlow's decay, would keep the last batch only


@strict
class SlimMobileNetV2Config(WidthsConfigMixin, PackedConfigMixin, MobileNetV2Config):
    """Beyond the stock fields:

    stem: "imagenet" (strides of 2 in the first convolution and the first block) or "cifar" (strides of 1 there).
    widths: width of every group of channels that differs from the base, see channel_groups; of any number, while the
        stock fields allow multiples of `depth_divisible_by` only.
    """

    model_type = "slim_mobilenet_v2"
    auto_classes = IMAGE_CLASSES
    stem: str = "imagenet"
    widths: dict[str, int] | None = None
    compression_config: dict | None = None


class _MobileNetV2Mixin:
    """Mixed in between PackedModelMixin and the stock class: stem, widths and momentum, before anything is packed."""

    def __init__(self, config):
        super().__init__(config)
        if config.stem not in STEMS:
            raise UserError(f"config.stem is {config.stem!r}: one of {', '.join(STEMS)} is needed.")
        if config.stem == "cifar":
            self.base_model.conv_stem.first_conv.convolution.stride = (1, 1)
            self.base_model.layer[0].conv_3x3.convolution.stride = (1, 1)
        resize_channels(self, channel_groups(self), config.widths or {})
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = MOMENTUM
        self.post_init()  # the new layers


class SlimMobileNetV2Model(PackedModelMixin, _MobileNetV2Mixin, MobileNetV2Model):
    config_class = SlimMobileNetV2Config


class SlimMobileNetV2ForImageClassification(PackedModelMixin, _MobileNetV2Mixin, MobileNetV2ForImageClassification):
    config_class = SlimMobileNetV2Config


def channel_groups(model: MobileNetV2Model | MobileNetV2ForImageClassification) -> Groups:
    """{convolution or linear of a MobileNetV2, stock or ours: (group that it reads, group that it writes)}.

    A group has the name of the first module that writes it: `conv_stem.first_conv`, `layer.I.expand_1x1` (the hidden
    channels of a block, which its depth-wise convolution keeps), `layer.I.reduce_1x1` (the trunk, shared by the blocks
    that add their input) and `conv_1x1` (the head).
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    base, groups = model.base_model, {}

    def add(place: str, source: str | None, target: str | None) -> str | None:
        groups[f"{prefix}{place}.convolution"] = (source, target)
        return target

    hidden = add("conv_stem.first_conv", None, "conv_stem.first_conv")
    if base.conv_stem.expand_1x1 is not None:
        hidden = add("conv_stem.expand_1x1", hidden, "conv_stem.expand_1x1")
    add("conv_stem.conv_3x3", hidden, hidden)
    trunk = add("conv_stem.reduce_1x1", hidden, "conv_stem.reduce_1x1")
    for i, block in enumerate(base.layer):
        hidden = add(f"layer.{i}.expand_1x1", trunk, f"layer.{i}.expand_1x1")
        add(f"layer.{i}.conv_3x3", hidden, hidden)
        trunk = add(f"layer.{i}.reduce_1x1", hidden, trunk if block.use_residual else f"layer.{i}.reduce_1x1")
    head = add("conv_1x1", trunk, "conv_1x1")
    if prefix and isinstance(model.classifier, nn.Linear):
        groups["classifier"] = (head, None)
    return groups
