"""ResNets for ImageNet and CIFAR: the stock class with a choice of stem, a width per group and packed layers."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from ..errors import UserError
from .packed import IMAGE_CLASSES, PackedConfigMixin, PackedModelMixin
from .widths import STEMS, Groups, WidthsConfigMixin, resize_channels

STOCK_REDUCTION = 4  # transformers' own ratio of a bottleneck's outer to its inner width


@strict
class SlimResNetConfig(WidthsConfigMixin, PackedConfigMixin, ResNetConfig):
    """Beyond the stock fields:

    stem: "imagenet" (7x7, stride 2, and a pool) or "cifar" (3x3, stride 1).
    reduction: outer over inner width of a bottleneck; 2 makes a Wide ResNet-50-2 of a ResNet-50.
    image_size: height and width that the model was made for.
    widths: width of every group of channels that differs from the base, see channel_groups.
    """

    model_type = "slim_resnet"
    auto_classes = IMAGE_CLASSES
    stem: str = "imagenet"
    reduction: int = STOCK_REDUCTION
    image_size: int = 224
    widths: dict[str, int] | None = None
    compression_config: dict | None = None


class _ResNetMixin:
    """Mixed in between PackedModelMixin and the stock class: stem and widths, before anything is packed."""

    def __init__(self, config):
        super().__init__(config)
        if config.stem not in STEMS:
            raise UserError(f"config.stem is {config.stem!r}: one of {', '.join(STEMS)} is needed.")
        if config.stem == "cifar":
            stem = self.base_model.embedder
            old = stem.embedder.convolution
            stem.embedder.convolution = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
            stem.pooler = nn.Identity()
        groups = channel_groups(self)
        if config.layer_type == "bottleneck" and config.reduction != STOCK_REDUCTION:
            widths = {group: config.hidden_sizes[_stage(group)] // config.reduction for group in _inner(groups)}
            resize_channels(self, groups, widths)
        resize_channels(self, groups, config.widths or {})
        self.post_init()  # the new layers


class SlimResNetModel(PackedModelMixin, _ResNetMixin, ResNetModel):
    config_class = SlimResNetConfig


class SlimResNetForImageClassification(PackedModelMixin, _ResNetMixin, ResNetForImageClassification):
    config_class = SlimResNetConfig


def channel_groups(model: ResNetModel | ResNetForImageClassification) -> Groups:
    """{convolution or linear of a ResNet, stock or ours: (group that it reads, group that it writes)}.

    The groups: `stages.S`, the trunk that the residual sums of a stage share; `stages.S.layers.L.layer.I`, inside a
    block; `embedder`, the stem, unless the first block adds its input unchanged, which ties the stem to `stages.0`.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    stages = model.base_model.encoder.stages
    trunk = "stages.0" if isinstance(stages[0].layers[0].shortcut, nn.Identity) else "embedder"
    groups = {f"{prefix}embedder.embedder.convolution": (None, trunk)}
    for s, stage in enumerate(stages):
        for i, block in enumerate(stage.layers):
            place = f"stages.{s}.layers.{i}"
            inner = [f"{place}.layer.{k}" for k in range(len(block.layer) - 1)]
            for k, sides in enumerate(zip([trunk, *inner], [*inner, f"stages.{s}"], strict=True)):
                groups[f"{prefix}encoder.{place}.layer.{k}.convolution"] = sides
            if not isinstance(block.shortcut, nn.Identity):
                groups[f"{prefix}encoder.{place}.shortcut.convolution"] = (trunk, f"stages.{s}")
            trunk = f"stages.{s}"
    if prefix and isinstance(model.classifier[1], nn.Linear):
        groups["classifier.1"] = (trunk, None)
    return groups


def cifar_resnet_config(depth: int, width: int, num_labels: int, image_size: int = 32) -> SlimResNetConfig:
    """ResNet-`depth`-`width` for small images: a 3x3 stem, three stages of (depth - 2) / 6 basic blocks, widths
    W, 2W, 4W, strides 1, 2, 2, projections only where the shape changes (He et al. 2016, option B).

    Raises: UserError for a depth that is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"depth {depth}: 6 n + 2 layers are needed, such as 8, 14, 20, 32, 44, 56 or 110.")
    return SlimResNetConfig(
        stem="cifar",
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[(depth - 2) // 6] * 3,
        layer_type="basic",
        num_labels=num_labels,
        image_size=image_size,
    )


def _inner(groups: Groups) -> list[str]:
    return [group for _, group in groups.values() if group is not None and ".layer." in group]


def _stage(group: str) -> int:
    return int(group.split(".")[1])
