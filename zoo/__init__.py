"""Compressed models that load with plain from_pretrained: importing zoo registers our model classes, nothing else."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .models import FAMILIES
from .registry import list_models, load

__all__ = ["list_models", "load"]


def _register() -> None:
    for base_class, causal_class in FAMILIES.values():
        config_class = causal_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, base_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)


_register()
