"""Compressed Swin: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from .packed import IMAGE_CLASSES, PackedConfigMixin, PackedModelMixin


@strict
class SlimSwinConfig(PackedConfigMixin, SwinConfig):
    model_type = "slim_swin"
    auto_classes = IMAGE_CLASSES
    compression_config: dict | None = None


class SlimSwinModel(PackedModelMixin, SwinModel):
    config_class = SlimSwinConfig


class SlimSwinForImageClassification(PackedModelMixin, SwinForImageClassification):
    config_class = SlimSwinConfig
