"""Compressed Gemma, Gemma 2 and Gemma 3 (text only): stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
)

from .packed import PackedConfigMixin, PackedModelMixin


@strict
class SlimGemmaConfig(PackedConfigMixin, GemmaConfig):
    model_type = "slim_gemma"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemmaModel(PackedModelMixin, GemmaModel):
    config_class = SlimGemmaConfig


class SlimGemmaForCausalLM(PackedModelMixin, GemmaForCausalLM):
    config_class = SlimGemmaConfig


@strict
class SlimGemma2Config(PackedConfigMixin, Gemma2Config):
    model_type = "slim_gemma2"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemma2Model(PackedModelMixin, Gemma2Model):
    config_class = SlimGemma2Config


class SlimGemma2ForCausalLM(PackedModelMixin, Gemma2ForCausalLM):
    config_class = SlimGemma2Config


@strict
class SlimGemma3Config(PackedConfigMixin, Gemma3TextConfig):
    model_type = "slim_gemma3_text"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemma3Model(PackedModelMixin, Gemma3TextModel):
    config_class = SlimGemma3Config


class SlimGemma3ForCausalLM(PackedModelMixin, Gemma3ForCausalLM):
    config_class = SlimGemma3Config
