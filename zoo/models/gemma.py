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

from .causal import CausalConfigMixin, CausalModelMixin


@strict
class SlimGemmaConfig(CausalConfigMixin, GemmaConfig):
    model_type = "slim_gemma"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemmaModel(CausalModelMixin, GemmaModel):
    config_class = SlimGemmaConfig


class SlimGemmaForCausalLM(CausalModelMixin, GemmaForCausalLM):
    config_class = SlimGemmaConfig


@strict
class SlimGemma2Config(CausalConfigMixin, Gemma2Config):
    model_type = "slim_gemma2"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemma2Model(CausalModelMixin, Gemma2Model):
    config_class = SlimGemma2Config


class SlimGemma2ForCausalLM(CausalModelMixin, Gemma2ForCausalLM):
    config_class = SlimGemma2Config


@strict
class SlimGemma3Config(CausalConfigMixin, Gemma3TextConfig):
    model_type = "slim_gemma3_text"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimGemma3Model(CausalModelMixin, Gemma3TextModel):
    config_class = SlimGemma3Config


class SlimGemma3ForCausalLM(CausalModelMixin, Gemma3ForCausalLM):
    config_class = SlimGemma3Config
