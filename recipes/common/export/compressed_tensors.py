"""Packed bits as compressed-tensors, which vLLM and transformers read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.errors import UserError
from zoo.folder import atomic_folder, open_folder
from zoo.kernels.packed_linear.reference import unpack_codes
from zoo.layers.siblings import SIBLINGS


@dataclass
class Codes:
    """A packed linear taken apart: w = scales (codes - zeros); codes uint8 (d_out, d_in), the others (d_out, d_in / g)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    def rows(self, permute: Callable[[Tensor], Tensor]) -> Codes:
        return Codes(permute(self.codes), permute(self.scales), permute(self.zeros), self.bits, self.group)


def read_codes(spec: dict, parts: dict[str, Tensor]) -> Codes:
    """The codes, scales and zero points of one module of format "packed"."""
    bits, scales = spec["bits"], parts["scales"]
    d_in = parts["qweight"].shape[1] * 8 // bits
    codes = unpack_codes(parts["qweight"], bits, spec["group_size"], d_in)
    zeros = parts.get("zeros", torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8))
    return Codes(codes, scales, zeros, bits, d_in // scales.shape[1])


def check_compressed_tensors(modules: dict[str, dict]) -> None:
    """Raises UserError for packed modules, {name: spec}, that the format cannot hold."""
    if not modules or any(spec["format"] != "packed" or spec["zeros"] == "float" for spec in modules.values()):
        raise UserError("compressed-tensors holds packed bits with integer zero points only; export dense.")
    for siblings in SIBLINGS:  # one matrix in vLLM, so of one scheme
        for name in (name for name in modules if name.endswith(siblings[0])):
            prefix = name.removesuffix(siblings[0])
            if len({json.dumps(modules.get(prefix + s), sort_keys=True) for s in siblings}) > 1:
                raise UserError(
                    f"{prefix}{{{','.join(siblings)}}} differ in bits or groups; engines merge them, so they must agree."
                )


def export_compressed_tensors(checkpoint: Path, output: Path) -> Path:
    """Writes packed bits in the format `pack-quantized` of compressed-tensors, one config group per scheme.

    A module's codes run densely along its inputs, b words of 32 bits for 32 codes, low bits first; integer zero points
    run likewise along its outputs. q, k, v (and gate, up), which vLLM merges, must be of one scheme.
    transformers 5.23 with compressed-tensors 0.20 loads symmetric groups, and refuses asymmetric ones of any origin.
    """
    source = open_folder(checkpoint)
    modules = source.modules
    check_compressed_tensors(modules)
    out: dict[str, Tensor] = {}
    for key, value in source.stored_tensors():
        if not isinstance(value, dict):
            out[key] = value
            continue
        name = key.removesuffix(".weight")
        c = read_codes(modules[name], value)
        out[f"{name}.weight_packed"] = pack_words(c.codes, c.bits)
        out[f"{name}.weight_scale"] = c.scales.contiguous()
        out[f"{name}.weight_shape"] = torch.tensor(c.codes.shape)
        if "zeros" in value:
            out[f"{name}.weight_zero_point"] = pack_words(c.zeros.T, c.bits).T.contiguous()
    with atomic_folder(output) as folder:
        save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
        stock = source.stock_config() | {"quantization_config": quantization_config(modules)}
        (folder / "config.json").write_text(json.dumps(stock, indent=2), encoding="utf-8")
        source.carry_files(folder)
    return output


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 (rows, n), n padded to 32s -> int32 (rows, ceil(n bits / 32)), code i at bit i * bits of its row."""
    rows, n = codes.shape
    planes = codes.to(torch.uint8).contiguous().unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)
    stream = (planes & 1).reshape(rows, n * bits)
    stream = torch.nn.functional.pad(stream, (0, -(n * bits) % 32)).view(rows, -1, 8)
    packed = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)


def quantization_config(modules: dict[str, dict]) -> dict:
    """The `quantization_config` that compressed-tensors, and through it transformers and vLLM, read."""
    schemes: dict[tuple, list[str]] = {}
    for name, spec in modules.items():
        schemes.setdefault((spec["bits"], spec["group_size"], spec["zeros"]), []).append(name)
    groups = {}
    for index, ((bits, group, zeros), names) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": zeros == "none",
            "strategy": "channel" if group == -1 else "group",
            "group_size": None if group == -1 else group,
        }
        groups[f"group_{index}"] = {"targets": names, "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if "lm_head" in modules else ["lm_head"],
    }
