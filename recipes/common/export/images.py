"""Dense exports of image classifiers: what is packed multiplied out, under the stock class where the shapes are its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

import zoo  # noqa: F401 (registers our classes)
from zoo.checkpoint import atomic_folder
from zoo.layers.base import PackedLayer


def dense_state(packed: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the same model with nothing packed, zeros where weights are gone."""
    state = packed.state_dict()
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLayer):
            for key, _ in layer.named_parameters(recurse=False):
                if key != "bias":
                    del state[f"{name}.{key}"]
            state[f"{name}.weight"] = layer.dense_weight()
    return state


def unpack(packed: PreTrainedModel) -> PreTrainedModel:
    """The stock transformers model of a packed one; of our class still, if no stock model has its shapes."""
    stock = next(base for base in type(packed).__mro__ if base.__module__.startswith("transformers.models."))
    dropped = ("model_type", "architectures", "auto_map", "compression_config")
    settings = {key: value for key, value in packed.config.to_dict().items() if key not in dropped}
    for model_class in (stock, type(packed)):
        model = model_class(model_class.config_class.from_dict(settings)).to(packed.dtype)
        try:
            model.load_state_dict(dense_state(packed))
        except RuntimeError:  # widths or a stem of our own
            continue
        return model.eval()
    raise AssertionError("a model fits its own class")


def export_dense_classifier(checkpoint: Path, output: Path) -> Path:
    """Writes an image classifier as an ordinary folder of dense weights in the checkpoint's dtype, with its processor."""
    model = unpack(AutoModelForImageClassification.from_pretrained(checkpoint))
    own = type(model).__module__.startswith("zoo.")
    with atomic_folder(output, sum(tensor.nbytes for tensor in model.state_dict().values())) as folder, torch.no_grad():
        model.save_pretrained(folder)
        AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(folder)
        engine = "transformers with `trust_remote_code=True`" if own else "any engine that knows its base model"
        (folder / "README.md").write_text(
            f"# Dense export\n\nThe weights of the compressed checkpoint `{checkpoint.name}`, multiplied out.\nIt loads in"
            f" {engine}, and is neither smaller nor faster than the base model.\n",
            encoding="utf-8",
        )
    return output
