"""--head_bits packs the head that the model has."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_base

from recipes.common.core.state import World
from recipes.common.loops.streaming import MatrixStore
from recipes.layerwise_quant import LayerwiseQuant
from recipes.layerwise_quant.mixtures import QuantRun


@pytest.mark.parametrize("family, own", [("llama", False), ("llama", True), ("qwen2", True)])
def test_the_packed_head_is_near_the_head_that_the_model_loads_with(tmp_path, family, own):
    base = make_base(tmp_path / "base", family)
    tensors = load_file(base / "model.safetensors")
    if own:  # of a config that says tied, too
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    head = tensors["lm_head.weight" if own else "model.embed_tokens.weight"]
    recipe = LayerwiseQuant(model=str(base), head_bits=8, group_size=32)
    run, store = QuantRun(recipe, recipe.domain(), World()), MatrixStore(tmp_path / "store")
    recipe.pack_head(run, store)
    packed = store.weight(recipe.method, "lm_head", recipe.method)
    torch.testing.assert_close(packed, head, rtol=0, atol=0.02 * head.abs().max().item())
