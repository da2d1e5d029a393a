"""Compressed Qwen2 and Qwen2.5: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .causal import CausalConfigMixin, CausalModelMixin


@strict
class SlimQwen2Config(CausalConfigMixin, Qwen2Config):
    model_type = "slim_qwen2"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimQwen2Model(CausalModelMixin, Qwen2Model):
    config_class = SlimQwen2Config


class SlimQwen2ForCausalLM(CausalModelMixin, Qwen2ForCausalLM):
    config_class = SlimQwen2Config
