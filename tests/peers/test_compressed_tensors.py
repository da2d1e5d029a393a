"""Our compressed-tensors exports in stock transformers and in the package's own unpacker. `make test-peers`."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM

from recipes.common.export.compressed_tensors import export_compressed_tensors
from zoo.kernels.packed_linear.reference import unpack_codes

IDS = torch.tensor([[5, 60, 7, 200, 31, 9, 101, 77]])


@pytest.mark.parametrize("bits", [(4, 8), (2, 4), (3, 4)])
def test_stock_transformers_gives_our_logits(tmp_path, bits):
    """Symmetric groups: with asymmetric ones transformers 5.23 expects zero points of another shape than it then reads."""
    packing = Packing(make_base(tmp_path / "base", "qwen2"), bits)
    for name, spec in packing.compression["modules"].items():
        spec["zeros"] = "none"
        del packing.tensors[f"{name}.zeros"]
    packing.write(tmp_path / "packed")
    export_compressed_tensors(tmp_path / "packed", tmp_path / "export")
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(IDS).logits
        for name in ("packed", "export")
    )
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_package_unpacks_our_codes_and_zeros(tmp_path, bits):
    packing = Packing(make_base(tmp_path / "base", "qwen2"), (bits,))
    packing.write(tmp_path / "packed")
    export_compressed_tensors(tmp_path / "packed", tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    for name in packing.compression["modules"]:
        shape = weights[f"{name}.weight_shape"]
        codes = unpack_codes(packing.tensors[f"{name}.qweight"], bits, 32, int(shape[1]))
        zeros = packing.tensors[f"{name}.zeros"]
        middle = 2 ** (bits - 1)
        theirs = unpack_from_int32(weights[f"{name}.weight_packed"], bits, shape)
        assert torch.equal(theirs.int() + middle, codes.int())
        theirs = unpack_from_int32(weights[f"{name}.weight_zero_point"], bits, zeros.shape, packed_dim=0)
        assert torch.equal(theirs.int() + middle, zeros.int())
