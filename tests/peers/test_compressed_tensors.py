"""Our compressed-tensors exports load in stock transformers and give the packed model's logits. `make test-peers`."""

import sys
from pathlib import Path

import compressed_tensors  # noqa: F401  (transformers uses it; without it the export would not load)
import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
from tiny_models import Packing, make_base

from recipes.common.export import export_compressed_tensors

IDS = torch.tensor([[5, 60, 7, 200, 31, 9, 101, 77]])


@pytest.mark.parametrize("bits", [(4, 8), (2, 4), (3, 4)])
def test_stock_transformers_gives_our_logits(tmp_path, bits):
    Packing(make_base(tmp_path / "base", "qwen2"), bits).write(tmp_path / "packed")
    export_compressed_tensors(tmp_path / "packed", tmp_path / "export")
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(IDS).logits
        for name in ("packed", "export")
    )
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
