"""One tiny random checkpoint of a family, whose layers are packed in every format in turn."""

from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from zoo.checkpoint import save_checkpoint
from zoo.layers.seeded_bitmask import seeded_bitmask
from zoo.models import FAMILIES
from zoo.random_mask import GENERATOR, digest

SIZE = 16  # of pictures
DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
SETTINGS = {
    "llama": {**DECODER, "tie_word_embeddings": True},
    "qwen2": {**DECODER, "tie_word_embeddings": False},
    "gemma2": {**DECODER, "sliding_window": 8},
    "gemma3_text": {**DECODER, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "vit": VIT,
    "deit_distilled": VIT,
    "swin": {
        "image_size": SIZE,
        "patch_size": 4,
        "embed_dim": 32,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
    },
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "stem": "cifar",
        "image_size": SIZE,
    },
    "vgg": {"image_size": SIZE, "depths": [1, 1], "hidden_sizes": [8, 16]},
    "mobilenet_v2": {
        "depth_multiplier": 0.25,
        "stem": "cifar",
        "image_size": SIZE,
        "widths": {"layer.0.expand_1x1": 20},
    },
}


def write_tiny(folder: Path, family: str) -> Path:
    """Write the checkpoint of a family of SETTINGS into a new folder."""
    torch.manual_seed(0)
    model_class = FAMILIES[family][1]
    config_class = model_class.config_class
    with torch.device("meta"):
        dense = model_class(config_class(**SETTINGS[family]))
    modules, linears, convolutions = {}, cycle(range(8)), cycle(range(2))
    for name, layer in dense.named_modules():
        if not name.startswith(f"{model_class.base_model_prefix}."):
            continue  # the head stays dense
        if isinstance(layer, nn.Linear):
            modules[name] = linear_spec(next(linears), layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            rows, columns = layer.weight.flatten(1).shape
            modules[name] = (unstructured, seeded)[next(convolutions)](rows, columns)
    model = model_class(config_class(**SETTINGS[family], compression_config={"format_version": 1, "modules": modules}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("scales"):
                tensor.uniform_(0.001, 0.01)
            elif tensor.is_floating_point() and not name.endswith(("running_mean", "running_var")):
                tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.ndim else 1.0)
            elif name.endswith("qweight"):
                tensor.random_(0, 256)
    return save_checkpoint(folder, model.eval(), extra_files={})


def linear_spec(kind: int, rows: int, columns: int) -> dict:
    group = 32 if columns % 32 == 0 else -1
    return (
        {"format": "armor", "block_in": 8, "block_out": 8, "pattern": [2, 4]},
        {"format": "bitmask", "pattern": [2, 4]},
        unstructured(rows, columns),
        {"format": "block_sparse", "block": [4, 8], "blocks": (rows // 4) * (columns // 8) // 2},
        {"format": "packed", "bits": 4, "group_size": group, "zeros": "integer"},
        {"format": "packed", "bits": 3, "group_size": group, "zeros": "none"},
        {"format": "packed", "bits": 8, "group_size": group, "zeros": "float"},
        seeded(rows, columns),
    )[kind]


def unstructured(rows: int, columns: int) -> dict:
    return {"format": "bitmask", "nnz": rows * columns // 3}


def seeded(rows: int, columns: int) -> dict:
    name = {"seed": 3, "layer": 5, "nnz": rows * columns // 4}
    mask, _ = seeded_bitmask(rows, columns, **name)
    return {"format": "seeded_bitmask", **name, "generator": GENERATOR, "sha256": digest(mask)}
