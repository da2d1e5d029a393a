"""Compressed Qwen2 and Qwen2.5: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .packed import PackedConfigMixin, PackedModelMixin


@strict
class SlimQwen2Config(PackedConfigMixin, Qwen2Config):
    model_type = "slim_qwen2"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimQwen2Model(PackedModelMixin, Qwen2Model):
    config_class = SlimQwen2Config


class SlimQwen2ForCausalLM(PackedModelMixin, Qwen2ForCausalLM):
    config_class = SlimQwen2Config
