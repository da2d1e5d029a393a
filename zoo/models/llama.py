"""Compressed LLaMA: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .packed import PackedConfigMixin, PackedModelMixin


@strict
class SlimLlamaConfig(PackedConfigMixin, LlamaConfig):
    model_type = "slim_llama"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimLlamaModel(PackedModelMixin, LlamaModel):
    config_class = SlimLlamaConfig


class SlimLlamaForCausalLM(PackedModelMixin, LlamaForCausalLM):
    config_class = SlimLlamaConfig
