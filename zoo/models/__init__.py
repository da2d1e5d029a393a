"""transformers classes of compressed checkpoints, one file a family."""

from ..errors import UserError
from .gemma import (
    SlimGemma2ForCausalLM,
    SlimGemma2Model,
    SlimGemma3ForCausalLM,
    SlimGemma3Model,
    SlimGemmaForCausalLM,
    SlimGemmaModel,
)
from .llama import SlimLlamaForCausalLM, SlimLlamaModel
from .mistral import SlimMistralForCausalLM, SlimMistralModel
from .qwen2 import SlimQwen2ForCausalLM, SlimQwen2Model
from .qwen3 import SlimQwen3ForCausalLM, SlimQwen3Model

FAMILIES = {
    "gemma": (SlimGemmaModel, SlimGemmaForCausalLM),
    "gemma2": (SlimGemma2Model, SlimGemma2ForCausalLM),
    "gemma3_text": (SlimGemma3Model, SlimGemma3ForCausalLM),
    "llama": (SlimLlamaModel, SlimLlamaForCausalLM),
    "mistral": (SlimMistralModel, SlimMistralForCausalLM),
    "qwen2": (SlimQwen2Model, SlimQwen2ForCausalLM),
    "qwen3": (SlimQwen3Model, SlimQwen3ForCausalLM),
}  # stock model_type -> our base model and our causal language model; their `config_class` has the new model_type


def slim_class_for(model_type: str) -> type:
    """Our causal language model class for a stock `model_type`; UserError naming the supported ones if none fits."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported: one of {', '.join(FAMILIES)} is needed.")
    return FAMILIES[model_type][1]
