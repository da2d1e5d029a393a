"""Dense exports: what is packed multiplied out, in folders that stock transformers and other engines load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from zoo.folder import atomic_folder, open_folder
from zoo.layers.base import PackedLayer
from zoo.tensors import INDEX

SHARD_BYTES = 5 * 10**9


def export_dense(checkpoint: Path, output: Path, dtype: str = "bfloat16") -> Path:
    """Writes a language model as an ordinary Hugging Face folder with dense weights in `dtype`; one shard in memory."""
    source = open_folder(checkpoint)
    target = getattr(torch, dtype)
    with atomic_folder(output) as folder:
        shards: list[dict[str, Tensor]] = [{}]
        files: dict[str, str] = {}
        size = total = 0

        def flush() -> None:
            name = f"model-{len(shards):05}.safetensors"
            save_file(shards[-1], folder / name, metadata={"format": "pt"})
            files.update(dict.fromkeys(shards[-1], name))
            shards[-1] = {}

        for key, tensor in source.dense_tensors():
            tensor = tensor.to(target).contiguous() if tensor.is_floating_point() else tensor
            if size and size + tensor.nbytes > SHARD_BYTES:
                flush()
                shards.append({})
                size = 0
            shards[-1][key] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
        flush()
        if len(shards) == 1:
            (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        else:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        stock = source.stock_config() | {"dtype": dtype}
        (folder / "config.json").write_text(json.dumps(stock, indent=2), encoding="utf-8")
        source.carry_files(folder)
        (folder / "README.md").write_text(
            f"# Dense export\n\nThe weights of the compressed checkpoint `{checkpoint.name}`, multiplied out to {dtype}."
            "\nIt loads in any engine and is neither smaller nor faster than the base model.\n",
            encoding="utf-8",
        )
    return output


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
