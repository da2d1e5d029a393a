"""What every compressed model class adds to its stock transformers class: packed layers, a strict load, a full save."""

import copy
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from torch import nn

from ..bundle import bundle_stem, write_bundle
from ..errors import UserError
from ..layers.base import REBUILD, PackedLayer
from ..layers.packing import pack_layers

FORMAT_VERSION = 1
IMAGE_CLASSES = {"AutoModel": "Model", "AutoModelForImageClassification": "ForImageClassification"}


class PackedConfigMixin:
    """Mixed in before a stock config class, beside the field `compression_config: dict | None` (what is packed).

    Wherever the config is saved, alone or with its model, the code that reads it goes along. `auto_classes` says which
    Auto class of transformers loads which class of the family: {"AutoModel": suffix of its name, ...}.
    """

    auto_classes: ClassVar[dict[str, str]]
    base_model_tp_plan = None  # the stock plans slice dense weights

    def save_pretrained(self, save_directory, *args, **kwargs):
        stem, prefix = bundle_stem(type(self).__module__), type(self).__name__.removesuffix("Config")
        self.auto_map = {"AutoConfig": f"{stem}.{prefix}Config"}
        self.auto_map |= {auto: f"{stem}.{prefix}{suffix}" for auto, suffix in self.auto_classes.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        write_bundle(Path(save_directory), type(self).__module__)

    def dense_config(self):
        """The config of the dense model that the checkpoint was made from or stands for."""
        config = copy.deepcopy(self)
        config.compression_config = None
        if (self.compression_config or {}).get("untied_head"):
            config.tie_word_embeddings = True
        return config

    def packed_modules(self) -> dict[str, dict]:
        """{module name in the model with its head: weight format}; UserError if a newer slimzoo wrote it."""
        compression = self.compression_config or {}
        version = compression.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise UserError(
                f"compression_config.format_version {version} is unknown, {FORMAT_VERSION} is needed: update slimzoo."
            )
        return compression.get("modules", {})


class PackedModelMixin:
    """Mixed in before a stock model class whose config is a PackedConfigMixin.

    Loading refuses whatever does not fit: stock transformers fills missing tensors with random numbers and only
    prints a table, which for packed weights is never what anybody wants.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        modules = config.packed_modules()
        if self.base_model is self:  # the names are those in the model with its head
            prefix = f"{self.base_model_prefix}."
            modules = {name.removeprefix(prefix): spec for name, spec in modules.items() if name.startswith(prefix)}
        pack_layers(self, modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As PreTrainedModel.from_pretrained, but a checkpoint with missing, unknown, wrongly shaped or contradictory
        tensors raises UserError. The packed tensors come back frozen: adapters train on top, they do not.
        """
        kwargs["ignore_mismatched_sizes"] = True  # reaches our own check, which is stricter and speaks one sentence
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise UserError(
                f"{pretrained_model_name_or_path}: a weights file cannot be read ({error}); {REBUILD}."
            ) from None
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info=True
        if not model.__dict__.pop("_all_tensors_fit", False):
            raise RuntimeError(
                "this transformers does not say which tensors are missing: install one from 5.20 to 5.24."
            )
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLayer):
                layer.requires_grad_(False)
                if layer.device.type != "meta":  # offloaded to disk: read later, layer by layer
                    layer.validate(name)
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        # Not in the report of output_loading_info, because that describes the adapter when there is one on top.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        unexpected = loading_info.unexpected_keys
        if self.base_model is self:  # loaded without its head
            unexpected = {name for name in unexpected if name.startswith(f"{self.base_model_prefix}.")}
        problems = [f"{name} is missing" for name in sorted(loading_info.missing_keys)]
        problems += [
            f"{name} has shape {tuple(found)} instead of {tuple(wanted)}"
            for name, found, wanted in sorted(loading_info.mismatched_keys)
        ]
        problems += [f"{name} is unknown" for name in sorted(unexpected)]
        if problems:
            more = f" and {len(problems) - 1} more tensors are wrong" if problems[1:] else ""
            raise UserError(f"{self.name_or_path}: tensor {problems[0]}{more}; {REBUILD}.")
        self._all_tensors_fit = True

    def dense_model(self) -> nn.Module:
        """The dense model that this one stands for, on the meta device: what its size is compared with."""
        with torch.device("meta"):
            return type(self)(self.config.dense_config())

    def save_pretrained(self, save_directory, *args, max_shard_size="5GB", save_original_format=False, **kwargs):
        """As PreTrainedModel.save_pretrained, with smaller shards, and the names of the modules for the tensors: stock
        transformers gives those of some families, such as ViT, their names of earlier versions.
        """
        kwargs |= {"max_shard_size": max_shard_size, "save_original_format": save_original_format}
        super().save_pretrained(save_directory, *args, **kwargs)
