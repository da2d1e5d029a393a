"""Compressed ViT and DeiT: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from .packed import IMAGE_CLASSES, PackedConfigMixin, PackedModelMixin


@strict
class SlimViTConfig(PackedConfigMixin, ViTConfig):
    model_type = "slim_vit"
    auto_classes = IMAGE_CLASSES
    compression_config: dict | None = None


class SlimViTModel(PackedModelMixin, ViTModel):
    config_class = SlimViTConfig


class SlimViTForImageClassification(PackedModelMixin, ViTForImageClassification):
    config_class = SlimViTConfig


@strict
class SlimDeiTConfig(PackedConfigMixin, DeiTConfig):
    model_type = "slim_deit"
    auto_classes = IMAGE_CLASSES
    compression_config: dict | None = None


class SlimDeiTModel(PackedModelMixin, DeiTModel):
    config_class = SlimDeiTConfig


class SlimDeiTForImageClassification(PackedModelMixin, DeiTForImageClassification):
    config_class = SlimDeiTConfig


@strict
class SlimDistilledDeiTConfig(SlimDeiTConfig):
    """Of a DeiT that was trained with a teacher: a type of its own, because it has two heads and averages them."""

    model_type = "slim_deit_distilled"


class SlimDistilledDeiTModel(PackedModelMixin, DeiTModel):
    config_class = SlimDistilledDeiTConfig


class SlimDistilledDeiTForImageClassification(PackedModelMixin, DeiTForImageClassificationWithTeacher):
    config_class = SlimDistilledDeiTConfig
