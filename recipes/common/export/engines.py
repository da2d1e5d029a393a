"""Checkpoints for other engines: dense weights that stock transformers loads, packed bits as compressed-tensors (vLLM,
transformers), and GGUF for llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.common.data.base_models import open_tensors
from zoo.checkpoint import CARRIED_FILES, atomic_folder
from zoo.errors import UserError
from zoo.kernels.packed_linear.reference import unpack_codes
from zoo.layers.packing import pack_layers

SHARD_BYTES = 5 * 10**9
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
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one matrix in vLLM, so of one scheme
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SPLITS = {  # the number part of a byte-level tokenizer's regular expression tells llama.cpp's pre-tokenizers apart
    r"\p{N}{1,3}": "llama-bpe",
    r"\p{N}|": "qwen2",
}


def read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable config.json ({error}): a model folder is needed.") from None


def stock_config(config: dict) -> dict:
    """The base model's config: our model_type, classes and compression taken out."""
    config = {key: value for key, value in config.items() if key not in ("auto_map", "compression_config")}
    config["model_type"] = config["model_type"].removeprefix("slim_")
    config["architectures"] = [name.removeprefix("Slim") for name in config["architectures"]]
    return config


def packed_modules(config: dict) -> dict[str, dict]:
    """The packed modules of a checkpoint, by name."""
    return (config.get("compression_config") or {}).get("modules", {})


def stored_tensors(folder: Path, config: dict) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
    """(name, tensor) of the model, one at a time; a packed module's weight is the dict of its parts."""
    tensors = open_tensors(folder)
    modules = packed_modules(config)
    packed: dict[str, list[str]] = {name: [] for name in modules}
    for key in tensors.keys():  # noqa: SIM118 (not a dict)
        module, _, part = key.rpartition(".")
        if module in packed and part != "bias":
            packed[module].append(part)
        else:
            yield key, tensors.get(key)
    for name in modules:
        yield f"{name}.weight", {part: tensors.get(f"{name}.{part}") for part in packed[name]}


def dense_tensors(folder: Path, config: dict) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the dense model, one at a time; packed modules give their product W_hat in fp32."""
    modules = packed_modules(config)
    for key, value in stored_tensors(folder, config):
        if isinstance(value, dict):
            name = key.removesuffix(".weight")
            value = dense_weight(name, modules[name], value)
        yield key, value


def dense_weight(name: str, spec: dict, parts: dict[str, Tensor]) -> Tensor:
    """The dense weight (d_out, d_in) of one packed module, computed in fp32 by its own layer."""
    rows = parts["scales" if "scales" in parts else "core_mask" if "core_mask" in parts else "mask"].shape[0]
    if spec["format"] == "packed":
        columns = parts["qweight"].shape[1] * 8 // spec["bits"]
    elif spec["format"] == "armor":
        columns = parts["wrap_in"].shape[0] * parts["wrap_in"].shape[1]
    else:
        n, m = spec["pattern"]
        columns = parts["values"].shape[1] * m // n
    holder = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.float32)})
    pack_layers(holder, {"layer": spec})
    floats = {part: t.float() if t.is_floating_point() else t for part, t in parts.items()}
    frozen = {part: nn.Parameter(t, requires_grad=False) for part, t in floats.items()}
    holder["layer"].load_state_dict(frozen, assign=True)
    holder["layer"].validate(name)
    return holder["layer"].dense_weight()


def export_dense(checkpoint: Path, output: Path, dtype: str = "bfloat16") -> Path:
    """Writes `checkpoint` as an ordinary Hugging Face folder with dense weights in `dtype`; one shard in memory."""
    config = read_config(checkpoint)
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

        for key, tensor in dense_tensors(checkpoint, config):
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
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        stock = stock_config(config) | {"dtype": dtype}
        (folder / "config.json").write_text(json.dumps(stock, indent=2), encoding="utf-8")
        for pattern in CARRIED_FILES:
            for file in checkpoint.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        (folder / "README.md").write_text(
            f"# Dense export\n\nThe weights of the compressed checkpoint `{checkpoint.name}`, multiplied out to {dtype}."
            "\nIt loads in any engine and is neither smaller nor faster than the base model.\n",
            encoding="utf-8",
        )
    return output


# ------------------------------------------------------------------------------------- packed bits as compressed-tensors


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


def export_compressed_tensors(checkpoint: Path, output: Path) -> Path:
    """Writes packed bits in the format `pack-quantized` of compressed-tensors, one config group per scheme.

    A module's codes run densely along its inputs, b words of 32 bits for 32 codes, low bits first; integer zero points
    run likewise along its outputs. q, k, v (and gate, up), which vLLM merges, must be of one scheme.
    transformers 5.23 with compressed-tensors 0.20 loads symmetric groups, and refuses asymmetric ones of any origin.
    """
    config = read_config(checkpoint)
    modules = packed_modules(config)
    if not modules or any(spec["format"] != "packed" or spec["zeros"] == "float" for spec in modules.values()):
        raise UserError(f"{checkpoint}: compressed-tensors holds packed bits with integer zero points only; use dense.")
    for siblings in MERGED:
        for name in (name for name in modules if name.endswith(siblings[0])):
            prefix = name.removesuffix(siblings[0])
            if len({json.dumps(modules.get(prefix + s), sort_keys=True) for s in siblings}) > 1:
                raise UserError(
                    f"{prefix}{{{','.join(siblings)}}} differ in bits or groups; engines merge them, so they must agree."
                )
    tensors = open_tensors(checkpoint)
    out: dict[str, Tensor] = {}
    for key in tensors.keys():  # noqa: SIM118 (not a dict)
        module, _, part = key.rpartition(".")
        if module not in modules or part == "bias":
            out[key] = tensors.get(key)
    for name, spec in modules.items():
        parts = {part: tensors.get(f"{name}.{part}") for part in ("qweight", "scales")}
        if spec["zeros"] == "integer":
            parts["zeros"] = tensors.get(f"{name}.zeros")
        c = read_codes(spec, parts)
        out[f"{name}.weight_packed"] = pack_words(c.codes, c.bits)
        out[f"{name}.weight_scale"] = c.scales.contiguous()
        out[f"{name}.weight_shape"] = torch.tensor(c.codes.shape)
        if spec["zeros"] == "integer":
            out[f"{name}.weight_zero_point"] = pack_words(c.zeros.T, c.bits).T.contiguous()
    with atomic_folder(output) as folder:
        save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
        stock = stock_config(config) | {"quantization_config": quantization_config(modules)}
        (folder / "config.json").write_text(json.dumps(stock, indent=2), encoding="utf-8")
        for pattern in CARRIED_FILES:
            for file in checkpoint.glob(pattern):
                shutil.copyfile(file, folder / file.name)
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


# ----------------------------------------------------------------------------------------------------------- GGUF


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
    config = read_config(checkpoint)
    stock = stock_config(config)
    if stock["model_type"] not in ARCHITECTURES:
        raise UserError(f"{stock['model_type']} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can.")
    architecture = ARCHITECTURES[stock["model_type"]]
    partial = output.with_name(f".{output.name}.part")
    writer = gguf.GGUFWriter(partial, architecture, use_temp_file=True)
    try:
        write_metadata(writer, stock, checkpoint.name, kind)
        write_tokenizer(writer, checkpoint, stock)
        names = gguf.get_tensor_name_map(
            next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture),
            stock["num_hidden_layers"],
        )
        modules = packed_modules(config)
        for key, value in stored_tensors(checkpoint, config):
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"{key} has no place in a GGUF file of architecture {architecture}.")
            reorder = lambda rows: rows  # noqa: E731
            if architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
                heads = stock["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
                reorder = partial_of(interleave_rope, heads=heads)
            spec = modules.get(key.removesuffix(".weight"), {})
            if kind == "packed" and spec.get("format") == "packed" and spec["bits"] <= 5:
                blocks, quantised = gguf_blocks(read_codes(spec, value).rows(reorder))
                writer.add_tensor(name, blocks.numpy(), raw_dtype=quantised)
                continue
            dense = dense_weight(key, spec, value) if isinstance(value, dict) else value
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
        partial.rename(output)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return output


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
