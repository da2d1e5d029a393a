"""GGUF files for llama.cpp."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import gguf
import torch
from torch import Tensor

from recipes.common.export.compressed_tensors import Codes, read_codes
from zoo.errors import UserError
from zoo.folder import ModelFolder, open_folder

KINDS = {  # how matrices are written; "packed" gives packed bits the type that holds their codes
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "packed": gguf.GGMLQuantizationType.F16,
}
FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "packed": gguf.LlamaFileType.MOSTLY_Q4_1,
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SPLITS = {  # the number part of a byte-level tokenizer's regular expression tells llama.cpp's pre-tokenizers apart
    r"\p{N}{1,3}": "llama-bpe",
    r"\p{N}|": "qwen2",
}


def gguf_blocks(c: Codes) -> tuple[Tensor, gguf.GGMLQuantizationType]:
    """Bytes (d_out, blocks) of a GGUF type that holds the codes as they are: Q4_1 up to 4 bits, Q5_1 for 5.

    Both keep w = d q + m for 32 weights, d and m fp16; our group of g has g / 32 blocks with equal d and m = -zero d.
    """
    rows, d_in = c.codes.shape
    repeat = c.group // 32
    d = c.scales.float().repeat_interleave(repeat, 1)
    m = -(c.zeros.float() * c.scales.float()).repeat_interleave(repeat, 1)
    head = torch.stack([d, m], -1).half().view(torch.uint8)  # (rows, blocks, 4)
    q = c.codes.view(rows, d_in // 32, 32)
    low = (q[..., :16] & 15) | (q[..., 16:] & 15) << 4
    if c.bits <= 4:
        return torch.cat([head, low], -1).flatten(1), gguf.GGMLQuantizationType.Q4_1
    high = (q >> 4).view(rows, d_in // 32, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat([head, high.sum(-1, dtype=torch.uint8), low], -1).flatten(1), gguf.GGMLQuantizationType.Q5_1


def export_gguf(checkpoint: Path, output: Path, kind: str = "F16") -> Path:
    """Writes a GGUF file for llama.cpp from a checkpoint folder, compressed or dense; matrices as `kind`, norms F32.

    Kind "packed" keeps the codes of packed bits: 1 to 4 bits as Q4_1, 5 as Q5_1, 6 and 8 requantised to Q8_0, the rest F16.
    """
    if kind not in KINDS:
        raise UserError(f"GGUF type {kind}: one of {', '.join(KINDS)} is needed.")
    if output.exists():
        raise UserError(f"output {output} exists already: name another file, or remove this one first.")
    source = open_folder(checkpoint)
    check_gguf(source)
    stock = source.stock_config()
    architecture = ARCHITECTURES[stock["model_type"]]
    unfinished = output.with_name(f".{output.name}.part")
    writer = gguf.GGUFWriter(unfinished, architecture, use_temp_file=True)
    try:
        write_metadata(writer, stock, checkpoint.name, kind)
        write_tokenizer(writer, checkpoint, stock)
        for key, value in source.stored_tensors():
            name = tensor_name(key, architecture, stock["num_hidden_layers"])
            reorder = lambda rows: rows  # noqa: E731
            if architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
                heads = stock["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
                reorder = partial(interleave_rope, heads=heads)
            module = key.removesuffix(".weight")
            spec = source.modules.get(module, {})
            if kind == "packed" and spec.get("format") == "packed" and spec["bits"] <= 5:
                blocks, quantised = gguf_blocks(read_codes(spec, value).rows(reorder))
                writer.add_tensor(name, blocks.numpy(), raw_dtype=quantised)
                continue
            dense = source.dense_weight(module, value) if isinstance(value, dict) else value
            data = reorder(dense).float().numpy()
            quantised = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else KINDS[kind]
            if kind == "packed" and isinstance(value, dict):
                quantised = gguf.GGMLQuantizationType.Q8_0  # 6 and 8 bits
            if quantised == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % 32:
                quantised = gguf.GGMLQuantizationType.F16
            writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
        unfinished.rename(output)
    except BaseException:
        writer.close()
        unfinished.unlink(missing_ok=True)
        raise
    return output


def check_gguf(source: ModelFolder) -> None:
    """Raises UserError, naming it, for what of a model, compressed or the dense one it will be made of, GGUF cannot hold."""
    stock = source.stock_config()
    if stock["model_type"] not in ARCHITECTURES:
        raise UserError(f"{stock['model_type']} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can.")
    architecture = ARCHITECTURES[stock["model_type"]]
    nowhere = gguf.GGUFWriter(None, architecture)
    write_metadata(nowhere, stock, source.path.name, "F16")
    write_tokenizer(nowhere, source.path, stock)
    for key in source.tensors:
        module = key.rpartition(".")[0]
        tensor_name(f"{module}.weight" if module in source.modules else key, architecture, stock["num_hidden_layers"])


def tensor_name(key: str, architecture: str, blocks: int) -> str:
    """What GGUF calls a tensor; UserError if it has no place there."""
    name = name_map(architecture, blocks).get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UserError(f"{key} has no place in a GGUF file of architecture {architecture}.")
    return name


@cache
def name_map(architecture: str, blocks: int) -> gguf.TensorNameMap:
    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def interleave_rope(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from two halves per head, as transformers rotates them, to pairs, as llama.cpp does."""
    rows = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def write_metadata(writer: gguf.GGUFWriter, config: dict, name: str, kind: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rope type {rope['rope_type']} cannot be written as GGUF yet; only the default can.")
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    """A byte-level BPE tokenizer from tokenizer.json."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no readable tokenizer.json, which a GGUF file needs.") from None
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UserError(f"a {model['type']} tokenizer cannot be written as GGUF; byte-level BPE can.")
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer["pre_tokenizer"]))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    first = lambda value: value[0] if isinstance(value, list) else value  # noqa: E731
    for add, key in (
        (writer.add_bos_token_id, "bos_token_id"),
        (writer.add_eos_token_id, "eos_token_id"),
        (writer.add_pad_token_id, "pad_token_id"),
    ):
        if config.get(key) is not None:
            add(first(config[key]))
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def pre_tokenizer_name(definition: dict | None) -> str:
    """llama.cpp's name of a tokenizer's way of cutting text into words."""
    steps = (definition or {}).get("pretokenizers") or [definition or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        for part, name in SPLITS.items():
            if part in pattern:
                return name
    raise UserError(
        f"the pre-tokenizer {' + '.join(map(str, kinds))} is unknown to GGUF export; those of GPT-2, SmolLM, Llama 3"
        " and Qwen2 are known."
    )
