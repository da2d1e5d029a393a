"""Compressed LLaMA: stock transformers classes with packed linear layers."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .causal import CausalConfigMixin, CausalModelMixin


@strict
class SlimLlamaConfig(CausalConfigMixin, LlamaConfig):
    model_type = "slim_llama"
    compression_config: dict | None = None
    kv_cache_quantization: dict | None = None


class SlimLlamaModel(CausalModelMixin, LlamaModel):
    config_class = SlimLlamaConfig


class SlimLlamaForCausalLM(CausalModelMixin, LlamaForCausalLM):
    config_class = SlimLlamaConfig
