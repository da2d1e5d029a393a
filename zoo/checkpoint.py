"""Write a compressed checkpoint folder, streaming and whole-or-not-at-all, and read what is on record in one."""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .errors import UserError
from .layers.base import REBUILD, PackedLinear
from .models import slim_class_for, slim_class_of

SHARD_BYTES = 5 * 10**9
HEAD = "lm_head"  # the output head of every causal language model of transformers that we have
CARRIED_FILES = (  # what a base folder may hold besides weights and config
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "special_tokens_map.json",
    "tokenizer*.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
)
TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}  # by their names in safetensors; all that a compressed checkpoint may hold


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
    Raises: UserError for a base that is unsupported or not readable, modules that do not fit it, packed tensors that
        are missing, unknown, of wrong shape or dtype or not finite, an output that exists or cannot be written, and
        for a disk that is too small.
    """
    output, base = Path(output), Path(base)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype}: torch.float32, torch.bfloat16 or torch.float16 is needed.")
    for name in extra_files:
        if Path(name).name != name:
            raise UserError(f"extra file {name!r}: a plain file name is needed.")
    config = _slim_config(base, compression, dtype, settings or {})
    base_files = {}
    for file in _weight_files(base):
        with _opened(file) as opened:
            base_files |= dict.fromkeys(opened.keys(), file)
    shards = _plan_shards(_stored_tensors(config, dtype, base, base_files), max_shard_bytes)
    with atomic_folder(output, sum(shard.size for shard in shards)) as folder:
        _write_weights(folder, shards, tensors, base_files)
        config.save_pretrained(folder)  # the bundled code with it
        for pattern in CARRIED_FILES:
            for file in filter(Path.is_file, base.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        _pin_tokenizer_class(base, folder)
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


def load_compression(folder: Path) -> dict:
    """The `compression_config` of a checkpoint folder; UserError if the folder holds no compressed checkpoint."""
    compression = _read_config(Path(folder)).get("compression_config")
    if not compression:
        raise UserError(f"{folder} is not a compressed checkpoint: its config.json has no compression_config.")
    return compression


def read_checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Sizes for a report, from the config and the headers of the weights files; no tensor is read.

    Returns: {"parameters": of the dense model, "dense_bytes": of those in the checkpoint's dtype,
    "nonzero": floating-point numbers stored, "compressed_bytes": of all stored tensors}.
    Raises: UserError if the folder holds no compressed checkpoint or a file is damaged.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    if not config.model_type.startswith("slim_"):
        raise UserError(f"{folder} is not a compressed checkpoint: its model_type is {config.model_type}.")
    with torch.device("meta"):
        dense = slim_class_of(config)(config).dense_model()
    dtype = config.dtype or torch.float32
    buffers = dense.state_dict().keys() - dict(dense.named_parameters(remove_duplicate=False)).keys()
    sizes = {"parameters": sum(parameter.numel() for parameter in dense.parameters())}
    sizes["dense_bytes"] = sizes["parameters"] * dtype.itemsize
    for name in buffers:  # running statistics, which are stored too
        buffer = dense.get_buffer(name)
        sizes["dense_bytes"] += buffer.numel() * (dtype if buffer.is_floating_point() else buffer.dtype).itemsize
    sizes |= {"nonzero": 0, "compressed_bytes": 0}
    for file in _weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                entry = tensors.get_slice(name)
                dtype, numel = TORCH_DTYPES[entry.get_dtype()], math.prod(entry.get_shape())
                sizes["nonzero"] += numel * dtype.is_floating_point
                sizes["compressed_bytes"] += numel * dtype.itemsize
    return sizes


@contextmanager
def atomic_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well, and vanishes if it fails.

    Left-overs of earlier runs of this machine that were killed are removed first. Files are synced before the rename.

    Args:
        path: the folder to make; an empty folder may be there.
        needed: bytes that will be written, refused at once if the disk has less.
    Raises: UserError if `path` exists and is not empty, cannot be made, or the disk is too small.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"output {path} exists already: name another folder, or remove this one first.")
    mine = f".{path.name}.partial-{socket.gethostname()}-"
    temporary = path.with_name(f"{mine}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in list(path.parent.iterdir()):
            pid = other.name.removeprefix(mine)
            if other.name.startswith(mine) and (pid == str(os.getpid()) or not _is_running(pid)):
                shutil.rmtree(other)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"output {path} cannot be written ({error.strerror}): name another folder.") from None
    try:
        if needed > shutil.disk_usage(temporary).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            _sync(item)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        _sync(path.parent)
    except BaseException as error:
        needed = max(needed, sum(item.stat().st_size for item in temporary.rglob("*")))
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"output {path}: the disk is full, at least {needed:,} bytes are needed and {free:,} are free."
            ) from None
        raise


def _is_running(pid: str) -> bool:
    if os.name != "posix" or not pid.isdigit():
        return True  # cannot tell: leave its files alone
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    if os.name == "posix" or path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable config.json ({error}): a model folder is needed.") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; an index can only name files inside it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise UserError(f"{folder} holds no model.safetensors: weights are only read from safetensors files.")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of weights files; {REBUILD}.") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names the file {name!r}: files inside the folder are allowed.")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path):
    """safe_open, with damage and absence as UserError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{file} cannot be read ({error}); {REBUILD}.") from None


def _slim_config(base: Path, compression: dict, dtype: torch.dtype, more: dict):
    """The config of the compressed model: the base's settings under our model_type, and how each module is packed."""
    settings = _read_config(base) | more
    if settings.get("quantization_config"):
        raise UserError(f"{base} is quantized already: an unquantized base model is needed.")
    model_type, packed = settings.pop("model_type", None), settings.pop("compression_config", None)
    if packed and (compression.get("modules") or not more):
        raise UserError(f"{base} is compressed already: the dense model it was made from is needed.")
    compression = packed or compression
    model_class = slim_class_for(model_type.removeprefix("slim_") if packed else model_type)
    for key in ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"):
        settings.pop(key, None)
    if not compression.get("modules") and not more:
        raise UserError("compression_config.modules is empty: at least one packed module is needed.")
    try:
        config = model_class.config_class.from_dict({**settings, "compression_config": compression})
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{base}: config.json does not describe a model of its type ({reason}).") from None
    if HEAD in compression.get("modules", {}) and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        config.compression_config = {**compression, "untied_head": True}  # the dense model ties
    config.architectures = [model_class.__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    return config


def _stored_tensors(config, dtype: torch.dtype, base: Path, base_files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """{name: empty tensor} of all that the checkpoint holds; UserError if the base lacks something."""
    with torch.device("meta"):
        model = slim_class_of(config)._from_config(config, dtype=dtype)
    packed = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    stored = {}
    for name, tensor in model.state_dict().items():
        module, _, key = name.rpartition(".")
        if name in base_files or (module in packed and key != "bias"):
            stored[name] = tensor
        elif name not in model.all_tied_weights_keys:
            raise UserError(f"base {base} lacks the tensor {name}: a complete {config.model_type[5:]} model is needed.")
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


def _write_weights(folder: Path, shards: list[_Shard], tensors, base_files: dict[str, Path]) -> None:
    """Put every tensor into its place: the packed ones as they come, the others from the base, file by file."""
    todo = {name: shard for shard in shards for name in shard.tensors}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())},
            "weight_map": {name: shard.name for name, shard in todo.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
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
        for path in sorted(set(base_files.values())):
            with _opened(path) as opened:
                for name in [name for name in todo if base_files.get(name) == path]:
                    put(name, opened.get_tensor(name))
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
