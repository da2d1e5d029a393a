"""Write a compressed checkpoint folder, streaming and whole-or-not-at-all."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from .errors import UserError
from .folder import ModelFolder, atomic_folder, open_folder, readable_config
from .layers.base import PackedLinear
from .models import slim_class_for, slim_class_of
from .models.strict import check_blocks
from .tensors import INDEX, TORCH_DTYPES, TensorFiles

SHARD_BYTES = 5 * 10**9
HEAD = "lm_head"  # the output head of every causal language model of transformers that we have


def write_checkpoint(
    output: Path,
    *,
    base: Path,
    compression: dict,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    extra_files: dict[str, str | bytes],
    max_shard_bytes: int = SHARD_BYTES,
    settings: dict | None = None,
) -> Path:
    """Write the checkpoint folder of a compressed causal language model; it appears whole, by rename, or not at all.

    Memory: one tensor at a time, whatever the model's size, since names and shapes, hence the place of every byte, are
    known beforehand from an empty model.

    Args:
        output: the folder to make; it may exist if it is empty.
        base: folder of the base model: config.json, safetensors, tokenizer files; with `settings` and no modules, it may
            be a compressed checkpoint, whose weights then stay packed as they are.
        compression: the `compression_config`; its "modules" say which linears are packed, and how.
        tensors: (name, tensor) of the packed tensors, and of any others that take the place of the base's, in any
            order, read once. Everything else, biases of packed linears included, is copied from the base; tied
            embeddings stay as the base stores them, but if the modules name the head, it becomes a matrix of its own
            beside the table, and `tie_word_embeddings` false.
        dtype: torch.float32, bfloat16 or float16, of all floating-point tensors of the result.
        extra_files: {file name: content} to add, such as the card and the report.
        max_shard_bytes: size of the tensors in one weights file; a larger tensor gets a file to itself.
        settings: more keys of config.json, such as `kv_cache_quantization`; with some, no module need be packed.
    Returns: output.
    Raises: UserError for a base that is unsupported, not readable or links its files elsewhere, modules that do not fit
        it, packed tensors that are missing, unknown, of wrong shape or dtype or not finite, an output that exists or
        cannot be written, and for a disk that is too small.
    """
    output = Path(output)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype}: torch.float32, torch.bfloat16 or torch.float16 is needed.")
    for name in extra_files:
        if Path(name).name != name:
            raise UserError(f"extra file {name!r}: a plain file name is needed.")
    source = open_folder(base)
    source.carried_files()  # refused before the work
    config = _slim_config(source, compression, dtype, settings or {})
    shards = _plan_shards(_stored_tensors(config, dtype, source), max_shard_bytes)
    with atomic_folder(output, sum(shard.size for shard in shards)) as folder:
        _write_weights(folder, shards, tensors, source.tensors)
        config.save_pretrained(folder)  # the bundled code with it
        source.carry_files(folder)
        _pin_tokenizer_class(source.path, folder)
        for name, content in extra_files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return output


def save_checkpoint(
    output: Path, model: PreTrainedModel, *, processor=None, extra_files: dict[str, str | bytes]
) -> Path:
    """Write the checkpoint folder of a model of ours that is in memory, whole or not at all.

    Args:
        output: the folder to make; it may exist if it is empty.
        processor: the image processor or tokenizer to save beside it.
        extra_files: {file name: content} to add.
    Returns: output. Raises: UserError for an output that exists or cannot be written, and for weights with NaN or Inf.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"tensor {name} holds NaN or Inf: finite weights are needed.")
    with atomic_folder(output, sum(tensor.nbytes for tensor in model.state_dict().values())) as folder:
        model.save_pretrained(folder)  # the bundled code with it
        if processor is not None:
            processor.save_pretrained(folder)
        for name, content in extra_files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return output


def _slim_config(base: ModelFolder, compression: dict, dtype: torch.dtype, more: dict):
    """The config of the compressed model: the base's settings under our model_type, and how each module is packed."""
    settings = base.config | more
    if settings.get("quantization_config"):
        raise UserError(f"{base.path} is quantized already: an unquantized base model is needed.")
    model_type, packed = settings.pop("model_type", None), settings.pop("compression_config", None)
    if packed and (compression.get("modules") or not more):
        raise UserError(f"{base.path} is compressed already: the dense model it was made from is needed.")
    compression = packed or compression
    model_class = slim_class_for(model_type.removeprefix("slim_") if packed else model_type)
    for key in ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"):
        settings.pop(key, None)
    if not compression.get("modules") and not more:
        raise UserError("compression_config.modules is empty: at least one packed module is needed.")
    with readable_config(base.path):
        config = model_class.config_class.from_dict({**settings, "compression_config": compression})
    if config.tie_word_embeddings and not ties_head(base):
        config.tie_word_embeddings = False  # says what from_pretrained makes of these weights
    if HEAD in compression.get("modules", {}) and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        config.compression_config = {**compression, "untied_head": True}  # the dense model ties
    config.architectures = [model_class.__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    return config


def ties_head(base: ModelFolder) -> bool:
    """Whether the output head of a causal language model is the table of its embeddings, as from_pretrained decides: a
    head that the weights hold beside the table, and that differs from it, is one of its own, whatever the config says.
    """
    head, tensors = f"{HEAD}.weight", base.tensors
    table = base.empty_model.all_tied_weights_keys.get(head)
    if table is None or head not in tensors or table not in tensors:
        return table is not None
    return torch.equal(tensors[head], tensors[table])


def _stored_tensors(config, dtype: torch.dtype, base: ModelFolder) -> dict[str, torch.Tensor]:
    """{name: empty tensor} of all that the checkpoint holds; UserError if the base lacks something."""
    with readable_config(base.path), torch.device("meta"):
        check_blocks(config, base.tensors)
        model = slim_class_of(config)._from_config(config, dtype=dtype)
    packed = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    stored = {}
    for name, tensor in model.state_dict().items():
        module, _, key = name.rpartition(".")
        if name in base.tensors or (module in packed and key != "bias"):
            stored[name] = tensor
        elif name not in model.all_tied_weights_keys:
            raise UserError(
                f"base {base.path} lacks the tensor {name}: a complete {config.model_type[5:]} model is needed."
            )
    return stored


@dataclass
class _Shard:
    """One weights file to be: header, and where each tensor's bytes go."""

    name: str
    tensors: dict[str, torch.Tensor]  # empty ones

    def __post_init__(self):
        # Wider types first, so that every tensor is aligned to its type, as safetensors' own writer does.
        order = sorted(self.tensors, key=lambda name: (-self.tensors[name].itemsize, name))
        entries, end = {"__metadata__": {"format": "pt"}}, 0
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        for name in order:
            tensor, start = self.tensors[name], end
            end += tensor.nbytes
            entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = {name: len(self.header) + entries[name]["data_offsets"][0] for name in order}
        self.size = len(self.header) + end


def _plan_shards(stored: dict[str, torch.Tensor], max_shard_bytes: int) -> list[_Shard]:
    """Cut the tensors, in their order in the model, into files of at most `max_shard_bytes`."""
    groups, used = [{}], 0
    for name, tensor in stored.items():
        if groups[-1] and used + tensor.nbytes > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = tensor
        used += tensor.nbytes
    if len(groups) == 1:
        return [_Shard("model.safetensors", groups[0])]
    return [_Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, start=1)]


def _write_weights(folder: Path, shards: list[_Shard], tensors, base: TensorFiles) -> None:
    """Put every tensor into its place: the packed ones as they come, the others from the base, file by file."""
    todo = {name: shard for shard in shards for name in shard.tensors}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())},
            "weight_map": {name: shard.name for name, shard in todo.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with ExitStack() as stack:
        files = {shard.name: stack.enter_context((folder / shard.name).open("wb")) for shard in shards}
        for shard in shards:
            files[shard.name].write(shard.header)

        def put(name: str, tensor: torch.Tensor) -> None:
            shard = todo.pop(name)
            file = files[shard.name]
            file.seek(shard.offsets[name])
            file.write(_bytes(name, tensor, shard.tensors[name]))

        for name, tensor in tensors:
            if name not in todo:
                raise UserError(f"packed tensor {name} is unknown or comes twice: the modules of the config rule.")
            put(name, tensor)
        for name in [name for name in base if name in todo]:  # file by file
            put(name, base[name])
    if todo:
        raise UserError(f"packed tensor {next(iter(todo))} is missing, {len(todo)} in all: every module needs its own.")


def _bytes(name: str, tensor: torch.Tensor, wanted: torch.Tensor) -> memoryview:
    """The bytes of a tensor, cast to the wanted floating-point type."""
    if tensor.shape != wanted.shape:
        raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}, {tuple(wanted.shape)} is needed.")
    if tensor.is_floating_point() and wanted.is_floating_point():
        tensor = tensor.to(wanted.dtype)
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"tensor {name} holds NaN or Inf in {wanted.dtype}: finite weights are needed.")
    if tensor.dtype != wanted.dtype:
        raise UserError(f"tensor {name} has dtype {tensor.dtype}, {wanted.dtype} is needed.")
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _pin_tokenizer_class(base: Path, folder: Path) -> None:
    """Name the tokenizer class in the checkpoint, because transformers knows a default one only for stock models."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return
    try:
        tokenizer_class = type(AutoTokenizer.from_pretrained(base, trust_remote_code=False)).__name__
    except (OSError, ValueError) as error:
        raise UserError(f"{base}: the tokenizer cannot be read ({error}): one of transformers' is needed.") from None
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if settings.get("tokenizer_class") != tokenizer_class:
        settings["tokenizer_class"] = tokenizer_class
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
