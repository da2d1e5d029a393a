"""What every compressed model class adds to its stock transformers class: packed layers, a strict load, a full save."""

import copy
import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..bundle import bundle_stem, write_bundle
from ..errors import UserError
from ..layers.base import PackedLayer
from ..layers.packing import pack_layers
from .strict import base_of, check_blocks, check_contents, check_fit, check_settings, find_weights, reason

FORMAT_VERSION = 1
NOT_OF_CONFIG = ("config", "device_map", "dtype", "quantization_config", "state_dict", "torch_dtype")
_loading = threading.RLock()  # transformers changes its classes, and torch's default dtype, while it builds a model
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

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As PreTrainedConfig.from_dict. Raises: UserError, in one sentence, for values that no such model can have."""
        check_settings(cls, config_dict)
        check_compression(config_dict.get("compression_config"))
        try:
            return super().from_dict(config_dict, **kwargs)
        except (ImportError, OSError, UserError):
            raise
        except Exception as error:  # whatever transformers raises for values that it did not expect
            raise UserError(f"config.json does not describe a model of its type ({reason(error)}).") from None

    def dense_config(self):
        """The config of the dense model that the checkpoint was made from or stands for."""
        config = copy.deepcopy(self)
        config.compression_config = None
        if (self.compression_config or {}).get("untied_head"):
            config.tie_word_embeddings = True
        return config

    def packed_modules(self) -> dict[str, dict]:
        """{module name in the model with its head: weight format}. Raises: UserError as check_compression."""
        return check_compression(self.compression_config)


def check_compression(compression: Any) -> dict[str, dict]:
    """The modules of a `compression_config`: {name: weight format}, each still to be checked by who packs it.

    Raises: UserError for one of a newer slimzoo, and for one that is no such mapping.
    """
    if compression is None:
        return {}
    if not isinstance(compression, dict):
        raise UserError(f"compression_config is {compression!r}: a mapping is needed.")
    version, modules = compression.get("format_version", FORMAT_VERSION), compression.get("modules", {})
    if version != FORMAT_VERSION:
        raise UserError(
            f"compression_config.format_version {version!r} is unknown, {FORMAT_VERSION} is needed: update slimzoo."
        )
    if not isinstance(modules, dict):
        raise UserError(f"compression_config.modules is {modules!r}: a mapping of names to weight formats is needed.")
    if not isinstance(compression.get("untied_head", False), bool):
        raise UserError(f"compression_config.untied_head is {compression['untied_head']!r}: true or false is needed.")
    return modules


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
        """As PreTrainedModel.from_pretrained, but only from safetensors, one load at a time, and a checkpoint with
        missing, unknown, wrongly shaped or typed, contradictory or not finite tensors raises UserError, before memory is
        taken where the headers of its files tell. `ignore_mismatched_sizes=True` starts a dense head of another size
        anew. The packed tensors come back frozen: adapters train on top, they do not.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # nothing is ever unpickled
        try:
            with _loading:
                tensors = find_weights(source, kwargs)
                names = check_fit(cls._empty(source, tensors, kwargs), tensors, kwargs.get("ignore_mismatched_sizes"))
                model, info = super().from_pretrained(source, *model_args, **kwargs, output_loading_info=True)
                for layer in model.modules():
                    if isinstance(layer, PackedLayer):
                        layer.freeze()
                lost = sorted(names.keys() & set(info.get("missing_keys", ())))  # of an adapter, if one is on top
                if lost:
                    raise UserError(
                        f"tensor {lost[0]} is there, but this transformers did not load it: update slimzoo."
                    )
                check_contents(model, tensors, names)
        except UserError as error:
            raise error if str(source) in str(error) else UserError(f"{source}: {error}") from None
        return (model, info) if with_info else model

    @classmethod
    def _empty(cls, source, tensors, options: dict) -> nn.Module:
        """The model that config.json describes, on the meta device; UserError if it describes none."""
        config = options.get("config")
        if not isinstance(config, PreTrainedConfig):
            options = {key: value for key, value in options.items() if key not in NOT_OF_CONFIG}
            config, _ = cls.config_class.from_pretrained(
                config or base_of(source), return_unused_kwargs=True, **options
            )
        check_blocks(config, tensors)
        try:
            with torch.device("meta"):
                return cls(copy.deepcopy(config))
        except (ImportError, OSError, UserError):
            raise
        except Exception as error:  # whatever transformers and torch raise for values that they did not expect
            raise UserError(f"no model can be built from config.json ({reason(error)}).") from None

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As PreTrainedModel.resize_token_embeddings. Raises: UserError for another number of tokens if the head is packed:
        its rows are those of the vocabulary.
        """
        rows = self.get_input_embeddings().num_embeddings
        same = pad_to_multiple_of is None and new_num_tokens in (None, rows)
        if isinstance(self.get_output_embeddings(), PackedLayer) and not same:
            raise UserError(
                f"the output head is packed, so the vocabulary stays at {rows} tokens: resize the base model and compress"
                " it again, or compress it without its head."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

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
