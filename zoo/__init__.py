"""Compressed models that load with plain from_pretrained: importing zoo registers our model classes, nothing else."""

import transformers

from .models import FAMILIES
from .registry import list_models, load

__all__ = ["list_models", "load"]


def _register() -> None:
    for base_class, head_class in FAMILIES.values():
        config_class = head_class.config_class
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto, suffix in config_class.auto_classes.items():
            model_class = base_class if suffix == "Model" else head_class
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)


_register()
