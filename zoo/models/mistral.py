"""Compressed Mistral: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .causal import CausalConfigMixin, CausalModelMixin


@strict
class SlimMistralConfig(CausalConfigMixin, MistralConfig):
    model_type = "slim_mistral"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimMistralModel(CausalModelMixin, MistralModel):
    config_class = SlimMistralConfig


class SlimMistralForCausalLM(CausalModelMixin, MistralForCausalLM):
    config_class = SlimMistralConfig
