"""Whole vision transformers: half of the blocks of every encoder matrix against the dense model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from recipes.bench.rounds import rounds
from zoo.kernels.block_sparse_linear.reference import pack_blocks
from zoo.layers.packing import pack_layers

MATRICES = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
MODELS = (("DeiT-S", 384, 6), ("DeiT-B", 768, 12))  # name, width, heads
IMAGES = 8


def bench_vit(quick: bool) -> Iterator[dict]:
    """Rows for whole DeiTs of random weights, 8 images of 224 pixels, half of the blocks of 32 of each encoder matrix,
    against the dense model, fp32 and bf16. The bound is that of its products: half of the dense time."""
    for name, hidden_size, heads in MODELS:
        dense, packed = build_pair(hidden_size, heads)
        for dtype in (torch.float32, torch.bfloat16):
            pixels = torch.randn(IMAGES, 3, 224, 224, dtype=dtype)
            models = {"dense": dense.to(dtype), "block_sparse": packed.to(dtype)}
            with torch.inference_mode():
                seconds, bandwidth = rounds(
                    {key: partial(run_images, model, pixels) for key, model in models.items()}, 3 if quick else 7
                )
            ratio, dtype_name = seconds["dense"] / seconds["block_sparse"], str(dtype).removeprefix("torch.")
            yield {
                "op": f"{name} block_sparse 32",
                "shape": [hidden_size, dense.config.num_hidden_layers],
                "dtype": dtype_name,
                "batch": IMAGES,
                "seconds": seconds["block_sparse"],
                "bytes": sum(t.nbytes for t in packed.state_dict().values()),
                "fraction_of_bound": ratio / 2,
                "ratio_to": {f"dense {dtype_name}": ratio},
                "read_bandwidth": bandwidth,
            }


def build_pair(hidden_size: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """(dense, packed): the same random ViT but for the weights of its encoder matrices."""
    config = ViTConfig(hidden_size=hidden_size, num_attention_heads=heads, intermediate_size=4 * hidden_size)
    dense = ViTForImageClassification(config).eval()
    packed = copy.deepcopy(dense)
    modules = {}
    for layer in range(config.num_hidden_layers):
        for part in MATRICES:
            blocks = dense.get_submodule(path := f"vit.layers.{layer}.{part}").weight.numel() // 32**2
            modules[path] = {"format": "block_sparse", "block": [32, 32], "blocks": blocks // 2}
    pack_layers(packed, modules)
    for path in modules:
        layer = packed.get_submodule(path)
        layer.load_state_dict(half_of_blocks(layer.out_features, layer.in_features), strict=False)
    return dense, packed


def half_of_blocks(d_out: int, d_in: int) -> dict[str, Tensor]:
    """A random weight, equally many of its blocks of 32 kept in each block-row."""
    keep = torch.rand(d_out // 32, d_in // 32).argsort(-1) < d_in // 64
    return pack_blocks(0.02 * torch.randn(d_out, d_in), keep, (32, 32))


def run_images(model: nn.Module, pixels: Tensor, _: int) -> Tensor:
    return model(pixel_values=pixels).logits
