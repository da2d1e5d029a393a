"""VGG with batch normalisation, for small images: a class of our own, because transformers has none."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutputWithNoAttention
from transformers.utils import can_return_tuple

from ..errors import UserError
from .packed import IMAGE_CLASSES, PackedConfigMixin, PackedModelMixin
from .widths import Groups, WidthsConfigMixin, resize_channels

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions a stage


@strict
class SlimVGGConfig(WidthsConfigMixin, PackedConfigMixin, PreTrainedConfig):
    """depths and hidden_sizes: the convolutions of every stage and their channels; between stages the image is halved.

    image_size: height and width that the model was made for; 2^(number of stages) at least.
    widths: channels of every convolution that differs from its stage, by the name in channel_groups.
    """

    model_type = "slim_vgg"
    auto_classes = IMAGE_CLASSES
    num_channels: int = 3
    image_size: int = 32
    depths: list[int] | tuple[int, ...] = DEPTHS[16]
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512, 512)
    widths: dict[str, int] | None = None
    compression_config: dict | None = None


class VGGLayer(nn.Module):
    """3x3 convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(channels_out)
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        return self.activation(self.normalization(self.convolution(hidden_state)))


class SlimVGGPreTrainedModel(PreTrainedModel):
    config_class = SlimVGGConfig
    base_model_prefix = "vgg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VGGLayer"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=0.01)


class _VGGModel(SlimVGGPreTrainedModel):
    """pixel_values (B, C, H, W) -> features (B, hidden_sizes[-1], h, w) and their mean over places (B, ·, 1, 1)."""

    def __init__(self, config):
        super().__init__(config)
        if len(config.depths) != len(config.hidden_sizes) or config.image_size < 2 ** len(config.depths):
            raise UserError(
                f"config.depths {config.depths}, hidden_sizes {config.hidden_sizes}, image_size {config.image_size}: one"
                " width a stage, and an image that can be halved after each, are needed."
            )
        self.stages = nn.ModuleList()
        channels = config.num_channels
        for depth, width in zip(config.depths, config.hidden_sizes, strict=True):
            self.stages.append(nn.Sequential(*(VGGLayer(width if i else channels, width) for i in range(depth))))
            channels = width
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        resize_channels(self, channel_groups(self), config.widths or {})
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values, output_hidden_states=None, **kwargs):
        hidden, states = pixel_values, []
        for stage in self.stages:
            hidden = stage(nn.functional.max_pool2d(hidden, 2) if states else hidden)
            states.append(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class _VGGForImageClassification(SlimVGGPreTrainedModel):
    """A linear classifier on the pooled features."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vgg = _VGGModel(config)
        width = self.vgg.stages[-1][-1].convolution.out_channels
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, **kwargs):
        outputs = self.vgg(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.classifier(outputs.pooler_output.flatten(1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class SlimVGGModel(PackedModelMixin, _VGGModel):
    pass


class SlimVGGForImageClassification(PackedModelMixin, _VGGForImageClassification):
    pass


def channel_groups(model: _VGGModel | _VGGForImageClassification) -> Groups:
    """{convolution or linear of a VGG: (group that it reads, group that it writes)}; the groups are `stages.S.I`."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    groups, source = {}, None
    for s, stage in enumerate(model.base_model.stages):
        for i in range(len(stage)):
            groups[f"{prefix}stages.{s}.{i}.convolution"] = (source, f"stages.{s}.{i}")
            source = f"stages.{s}.{i}"
    if prefix and isinstance(model.classifier, nn.Linear):
        groups["classifier"] = (source, None)
    return groups


def cifar_vgg_config(depth: int, num_labels: int, image_size: int = 32) -> SlimVGGConfig:
    """VGG-`depth` with 512 features and one linear layer on their mean. Raises: UserError for another depth."""
    if depth not in DEPTHS:
        raise UserError(f"depth {depth}: one of {', '.join(map(str, DEPTHS))} is needed.")
    return SlimVGGConfig(depths=DEPTHS[depth], num_labels=num_labels, image_size=image_size)
