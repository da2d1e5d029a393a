"""Compressed Qwen3: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .causal import CausalConfigMixin, CausalModelMixin


@strict
class SlimQwen3Config(CausalConfigMixin, Qwen3Config):
    model_type = "slim_qwen3"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimQwen3Model(CausalModelMixin, Qwen3Model):
    config_class = SlimQwen3Config


class SlimQwen3ForCausalLM(CausalModelMixin, Qwen3ForCausalLM):
    config_class = SlimQwen3Config
