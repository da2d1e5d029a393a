"""Compressed Mistral: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .packed import PackedConfigMixin, PackedModelMixin


@strict
class SlimMistralConfig(PackedConfigMixin, MistralConfig):
    model_type = "slim_mistral"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimMistralModel(PackedModelMixin, MistralModel):
    config_class = SlimMistralConfig


class SlimMistralForCausalLM(PackedModelMixin, MistralForCausalLM):
    config_class = SlimMistralConfig
