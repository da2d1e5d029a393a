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
from .mobilenet_v2 import SlimMobileNetV2ForImageClassification, SlimMobileNetV2Model
from .qwen2 import SlimQwen2ForCausalLM, SlimQwen2Model
from .qwen3 import SlimQwen3ForCausalLM, SlimQwen3Model
from .resnet import SlimResNetForImageClassification, SlimResNetModel
from .swin import SlimSwinForImageClassification, SlimSwinModel
from .vgg import SlimVGGForImageClassification, SlimVGGModel
from .vit import (
    SlimDeiTForImageClassification,
    SlimDeiTModel,
    SlimDistilledDeiTForImageClassification,
    SlimDistilledDeiTModel,
    SlimViTForImageClassification,
    SlimViTModel,
)

FAMILIES = {
    "deit": (SlimDeiTModel, SlimDeiTForImageClassification),
    "deit_distilled": (SlimDistilledDeiTModel, SlimDistilledDeiTForImageClassification),
    "gemma": (SlimGemmaModel, SlimGemmaForCausalLM),
    "gemma2": (SlimGemma2Model, SlimGemma2ForCausalLM),
    "gemma3_text": (SlimGemma3Model, SlimGemma3ForCausalLM),
    "llama": (SlimLlamaModel, SlimLlamaForCausalLM),
    "mistral": (SlimMistralModel, SlimMistralForCausalLM),
    "mobilenet_v2": (SlimMobileNetV2Model, SlimMobileNetV2ForImageClassification),
    "qwen2": (SlimQwen2Model, SlimQwen2ForCausalLM),
    "qwen3": (SlimQwen3Model, SlimQwen3ForCausalLM),
    "resnet": (SlimResNetModel, SlimResNetForImageClassification),
    "vgg": (SlimVGGModel, SlimVGGForImageClassification),
    "swin": (SlimSwinModel, SlimSwinForImageClassification),
    "vit": (SlimViTModel, SlimViTForImageClassification),
}  # stock model_type -> our base model and our model with its head; their `config_class` has the new model_type. Of two
# stock heads under one type, deit, the second has a name of ours.


def slim_class_of(config) -> type:
    """The model class with its head that a config of ours belongs to."""
    return FAMILIES[config.model_type.removeprefix("slim_")][1]


def slim_class_for(model_type: str, auto: str = "AutoModelForCausalLM") -> type:
    """Our class for a stock `model_type` that this Auto class loads; UserError naming the supported ones if none fits."""
    fit = {name: pair[1] for name, pair in FAMILIES.items() if auto in pair[1].config_class.auto_classes}
    if model_type not in fit:
        raise UserError(f"model_type {model_type!r} is not supported: one of {', '.join(fit)} is needed.")
    return fit[model_type]
