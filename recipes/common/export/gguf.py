"""GGUF files for llama.cpp."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recipes.common.export.compressed_tensors import Codes, read_codes
from zoo.errors import UserError
from zoo.folder import ModelFolder, open_folder, readable_config

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
ROPE_FREQS = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # (regular expression, whether words of the vocabulary skip the merges): llama.cpp's name of the pre-tokenizer
    (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", True): "llama-bpe",
    (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", False): "smaug-bpe",
    (rf"{WORDS}|\p{{N}}|{REST}", False): "qwen2",
    (TEKKEN, True): "tekken",
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
    config = stock_config(source)
    architecture = ARCHITECTURES[config.model_type]
    unfinished = output.with_name(f".{output.name}.part")
    writer = gguf.GGUFWriter(unfinished, architecture, use_temp_file=True)
    try:
        write_settings(writer, config, kind)
        write_tokenizer(writer, checkpoint, config.vocab_size)
        if (factors := write_rope(writer, config)) is not None:
            writer.add_tensor(ROPE_FREQS, factors.numpy())
        for key, value in source.stored_tensors():
            name = tensor_name(key, architecture, config.num_hidden_layers)
            reorder = lambda rows: rows  # noqa: E731
            if architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
                heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
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
        write_description(writer, checkpoint)
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
    config = stock_config(source)
    architecture = ARCHITECTURES[config.model_type]
    nowhere = gguf.GGUFWriter(None, architecture)
    write_settings(nowhere, config, "F16")
    write_tokenizer(nowhere, source.path, config.vocab_size)
    write_rope(nowhere, config)
    write_description(nowhere, source.path)
    for key in source.tensors:
        module = key.rpartition(".")[0]
        tensor_name(f"{module}.weight" if module in source.modules else key, architecture, config.num_hidden_layers)


def stock_config(source: ModelFolder) -> PreTrainedConfig:
    """The config of the base model, with defaults and legacy names filled in; UserError if GGUF has no such models."""
    stock = source.stock_config()
    if stock["model_type"] not in ARCHITECTURES:
        raise UserError(f"{stock['model_type']} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can.")
    with readable_config(source.path):
        return CONFIG_MAPPING[stock["model_type"]].from_dict(stock)


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


def write_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, kind: str) -> None:
    """Sizes and file type; key by key what llama.cpp's converter writes, and head sizes also where they are the usual."""
    head_dim = head_size(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> Tensor | None:
    """The rotary embedding; of type llama3 also the factors (head size / 2) that divide the frequencies, a tensor of GGUF.

    llama.cpp multiplies cos and sin of yarn by 0.1 ln(factor) + 1, and then by what the key `attn_factor` says; for these
    architectures it reads neither beta_fast nor beta_slow from the file, nor the key `yarn_attn_factor` of its converter.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    whole = rope.get("partial_rotary_factor") in (None, 1) and rope.get("truncate", True)
    betas = [rope.get("beta_fast") or 32, rope.get("beta_slow") or 1]
    llama = ARCHITECTURES[config.model_type] == "llama"
    if not (
        whole and (kind in ("default", "linear") or (kind, betas) == ("yarn", [32, 1]) or kind == "llama3" and llama)
    ):
        raise UserError(
            f"the rotary embedding {json.dumps(rope)} of {config.model_type} cannot be written as GGUF; the types default,"
            " linear and yarn can (of whole heads, beta_fast 32, beta_slow 1), and llama3 of llama and mistral."
        )
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        factor = rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast"):
            writer.add_rope_scaling_yarn_beta_fast(32)
        if rope.get("beta_slow"):
            writer.add_rope_scaling_yarn_beta_slow(1)
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        ratio = attention / (0.1 * math.log(max(factor, 1)) + 1)
        if not math.isclose(ratio, 1):
            writer.add_rope_scaling_attn_factors(ratio)
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        size = head_size(config)
        return 1 / rope["rope_theta"] ** (torch.arange(0, size, 2) / size) / scaled
    return None


def write_description(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Name, size, licence, origin and sampling, as gguf reads them from a model folder; after the tensors."""
    parameters = writer.get_total_parameter_count()
    try:
        description = gguf.Metadata.load(model_path=folder, total_params=parameters[0])
        description.name = description.name or folder.name
        if description.size_label is None and parameters[0]:
            description.size_label = gguf.size_label(*parameters)
        description.set_gguf_meta_model(writer)
    except Exception as error:  # whatever a README's front matter makes it raise
        raise UserError(f"{folder}: its model card or generation_config.json is broken ({error}).") from None


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of `size` tokens from tokenizer.json, and what tokenizer_config.json says of it."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        backend, tokenizer = Tokenizer.from_str(text), json.loads(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{folder} holds no readable tokenizer.json, which a GGUF file needs ({error}).") from None
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UserError(f"a {model['type']} tokenizer cannot be written as GGUF; byte-level BPE can.")
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        control = added["special"] or (added["content"].startswith("<|") and added["content"].endswith("|>"))
        types[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise UserError(f"{folder}: the tokenizer has token {max(tokens)}, the model's vocabulary only {size}.")
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        settings = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable tokenizer_config.json ({error}).") from None
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer["pre_tokenizer"], model.get("ignore_merges", False)))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    if settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    try:
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)  # merges, ids, templates
        files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
        if files[0].exists():  # transformers reads files before what tokenizer_config.json holds
            names = ["default", *(file.stem for file in files[1:])]
            texts = [file.read_text(encoding="utf-8") for file in files]
            named = [{"name": name, "template": text} for name, text in zip(names, texts, strict=True)]
            special.chat_template = named if named[1:] else texts[0]
    except Exception as error:  # what it does not expect in a JSON file
        raise UserError(f"{folder}: its tokenizer's files are broken ({error}).") from None
    special.add_special_token |= added_around(backend, settings, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def added_around(tokenizer: Tokenizer, settings: dict, ids: dict[str, int]) -> dict[str, bool]:
    """{"bos" | "eos": whether the token is put before | after a text}.

    What the post-processor of tokenizer.json adds, as in transformers; if it adds nothing, what tokenizer_config.json says.
    """
    bare, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    around = {"bos": whole[:start], "eos": whole[start + len(bare) :]}
    if len(whole) == len(bare):
        return {kind: settings.get(f"add_{kind}_token") is True and kind in ids for kind in around}
    if odd := [kind for kind, found in around.items() if found not in ([], [ids.get(kind)])]:
        raise UserError(
            f"the tokenizer puts the tokens {around[odd[0]]} {'before' if odd[0] == 'bos' else 'after'} a text, a GGUF"
            f" file can only say its {odd[0].upper()} token, {ids.get(odd[0])}."
        )
    return {kind: bool(found) for kind, found in around.items()}


def pre_tokenizer_name(definition: dict | None, ignore_merges: bool = False) -> str:
    """llama.cpp's name of a tokenizer's way of cutting text into words; UserError if it has none."""
    steps = (definition or {}).get("pretokenizers") or [definition or {}]
    kinds = [step.get("type") for step in steps]
    plain = not steps[-1].get("add_prefix_space", False)
    own_words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and plain and own_words and not ignore_merges:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and plain and own_words and not ignore_merges and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and plain and not own_words and not steps[0].get("invert"):
        split = steps[0]["pattern"].get("Regex"), ignore_merges
        if steps[0].get("behavior") == "Isolated" and split in SPLITS:
            return SPLITS[split]
    raise UserError(
        f"the pre-tokenizer {' + '.join(map(str, kinds))} is unknown to GGUF export; those of GPT-2, SmolLM, Llama 3,"
        " Qwen2 and Mistral's Tekken are known."
    )
