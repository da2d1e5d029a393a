"""Tiny random base models of every supported family, and random packings of them beside their dense equals."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from zoo.checkpoint import write_checkpoint
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.packed_linear.reference import dequantize, pack_codes

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILY_SETTINGS = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},  # q, k, v with biases
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 8},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def make_base(folder: Path, family: str = "llama", **settings) -> Path:
    """Save a random model of a family, fp32, with biases and norms that are not trivial, and a byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILY_SETTINGS[family], **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert len(tokenizer) == SHAPE["vocab_size"]
    tokenizer.save_pretrained(folder)
    return folder


class Packing:
    """Random packed weights for every linear of a base folder's decoder layers, and the dense model they amount to.

    Kinds: armor, 2:4, ragged, or a tuple of bits, one per layer in turn; head_bits packs the output head too.

    Attributes: compression (the config), tensors {name: packed tensor, fp32}, dense (the stock model with W = A' S B').
    """

    def __init__(
        self, base: Path, kind: str = "armor", block_in: int = 16, block_out: int = 8, head_bits: int | None = None
    ):
        self.base = base
        self.dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.tensors, modules = {}, {}
        generator = torch.Generator().manual_seed(1)
        for name, linear in self.dense.named_modules():
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            pack = {"armor": self.pack_armor, "2:4": self.pack_pattern, "ragged": self.pack_ragged}
            if isinstance(kind, tuple):  # bits of the layers in turn
                bits = kind[int(name.split(".")[2]) % len(kind)]
                modules[name], weight, tensors = self.pack_bits(linear, bits, generator)
            else:
                modules[name], weight, tensors = pack[kind](linear, block_in, block_out, generator)
            self.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
            linear.weight.data.copy_(weight)
        if head_bits:
            modules["lm_head"], weight, tensors = self.pack_bits(self.dense.lm_head, head_bits, generator)
            self.tensors |= {f"lm_head.{key}": tensor for key, tensor in tensors.items()}
            self.dense.lm_head.weight = nn.Parameter(weight)  # no longer the table of tied embeddings
        self.compression = {"method": str(kind), "format_version": 1, "modules": modules}

    @staticmethod
    def two_of_four(linear, generator):
        scores = torch.rand(linear.out_features, linear.in_features // 4, 4, generator=generator)
        mask = torch.zeros_like(scores).scatter_(-1, scores.topk(2).indices, 1).flatten(1).bool()
        return torch.randn(mask.shape, generator=generator) * (2 / linear.in_features) ** 0.5 * mask, mask

    def pack_armor(self, linear, block_in, block_out, generator):
        core, mask = self.two_of_four(linear, generator)
        values, packed_mask, _ = pack_bitmask(core, mask, per_row=linear.in_features // 2)
        wrap = {}
        for key, block, size in (("in", block_in, linear.in_features), ("out", block_out, linear.out_features)):
            wrap[key] = torch.randn(size // block, block, block, generator=generator) / block**0.5
        weight = torch.block_diag(*wrap["out"]) @ core @ torch.block_diag(*wrap["in"])
        spec = {"format": "armor", "block_in": block_in, "block_out": block_out, "pattern": [2, 4]}
        tensors = {"core_values": values, "core_mask": packed_mask, "wrap_out": wrap["out"], "wrap_in": wrap["in"]}
        return spec, weight, tensors

    def pack_pattern(self, linear, block_in, block_out, generator):
        weight, mask = self.two_of_four(linear, generator)
        values, packed_mask, _ = pack_bitmask(weight, mask, per_row=linear.in_features // 2)
        return {"format": "bitmask", "pattern": [2, 4]}, weight, {"values": values, "mask": packed_mask}

    def pack_ragged(self, linear, block_in, block_out, generator):
        mask = torch.rand(linear.weight.shape, generator=generator) < 0.4
        mask[1] = False  # an empty row
        weight = torch.randn(mask.shape, generator=generator) * linear.in_features**-0.5 * mask
        values, packed_mask, row_offsets = pack_bitmask(weight, mask)
        spec = {"format": "bitmask", "nnz": int(mask.sum())}
        return spec, weight, {"values": values, "mask": packed_mask, "row_offsets": row_offsets}

    def pack_bits(self, linear, bits, generator):
        codes = torch.randint(0, 2**bits, linear.weight.shape, dtype=torch.uint8, generator=generator)
        shape = (linear.out_features, linear.in_features // 32)
        scales = (torch.rand(shape, generator=generator) + 0.5) * 2**-bits * 2 / linear.in_features**0.5
        scales = scales.bfloat16().float()
        zeros = torch.randint(2**bits // 4, 2**bits - 2**bits // 4, shape, dtype=torch.uint8, generator=generator)
        qweight = pack_codes(codes, bits, 32)
        weight = dequantize(qweight, scales, zeros, bits, 32, linear.in_features)
        spec = {"format": "packed", "bits": bits, "group_size": 32, "zeros": "integer"}
        return spec, weight, {"qweight": qweight, "scales": scales, "zeros": zeros}

    def write(self, output: Path, **changes) -> Path:
        arguments = {
            "base": self.base,
            "compression": self.compression,
            "tensors": self.tensors.items(),
            "dtype": torch.float32,
            "extra_files": {"report.json": "{}"},
        }
        return write_checkpoint(output, **{**arguments, **changes})
