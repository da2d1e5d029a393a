"""The one reader of a checkpoint folder, packed or stock, and the one way to write a folder: whole or not at all."""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from .errors import UserError
from .layers.base import REBUILD
from .layers.packing import dense_weight
from .models.packed import PackedModelMixin

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageClassification")
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CARRIED_FILES = (  # what a folder may hold besides weights and config
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
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}  # by their names in safetensors; all that a checkpoint may hold


def open_folder(path: Path | str) -> "ModelFolder":
    """The model folder at `path`; its weights are not opened yet. Raises: UserError if it has no readable config.json."""
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no readable config.json ({error}): a model folder is needed.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no readable config.json (it is no mapping): a model folder is needed.")
    return ModelFolder(path, config)


@dataclass(frozen=True)
class ModelFolder:
    """One model on disk: a packed checkpoint of ours, or a stock folder of transformers, of which nothing is packed.

    A pipeline of several models is a folder with one of these for each component.
    """

    path: Path
    config: dict  # config.json

    @property
    def compression(self) -> dict:
        """The `compression_config`; empty for a stock folder."""
        return self.config.get("compression_config") or {}

    @property
    def modules(self) -> dict[str, dict]:
        """{packed module: what config.json says of it}."""
        return self.compression.get("modules", {})

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads the model with its head; UserError if it is none of AUTO_CLASSES."""
        architectures = self.config.get("architectures") or []
        for auto in AUTO_CLASSES:
            if any(auto.removeprefix("AutoModel") in name for name in architectures):
                return auto
        raise UserError(
            f"{self.path}: models of {architectures} are unknown; one of {', '.join(AUTO_CLASSES)} is needed."
        )

    @cached_property
    def tensors(self) -> "TensorFiles":
        """The weights, read lazily. Raises: UserError if they are missing, damaged or not safetensors."""
        return TensorFiles(_weight_files(self.path))

    @property
    def files(self) -> list[Path]:
        """The weights files, all of them inside the folder, in name order."""
        return self.tensors.files

    @cached_property
    def empty_model(self) -> nn.Module:
        """The model on the meta device. Raises: UserError for a config.json that describes none."""
        with readable_config(self.path):
            config = AutoConfig.from_pretrained(self.path)
        with torch.device("meta"):
            return getattr(transformers, self.auto_class).from_config(config)

    def stock_config(self) -> dict:
        """The config of the base model: our model_type, classes and compression taken out."""
        config = {key: value for key, value in self.config.items() if key not in ("auto_map", "compression_config")}
        config["model_type"] = config["model_type"].removeprefix("slim_")
        config["architectures"] = [name.removeprefix("Slim") for name in config.get("architectures") or []]
        return config

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of one module by their names in it."""
        return {key.rpartition(".")[2]: self.tensors[key] for key in self.tensors if key.rpartition(".")[0] == module}

    def stored_tensors(self) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
        """(name, tensor) of the model, one at a time; a packed module's weight is the dict of its parts."""
        for key in self.tensors:
            module, _, part = key.rpartition(".")
            if module not in self.modules or part == "bias":
                yield key, self.tensors[key]
        for module in self.modules:
            yield f"{module}.weight", {part: tensor for part, tensor in self.parts(module).items() if part != "bias"}

    def dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the dense model, one at a time; packed modules give their product in fp32."""
        for key, value in self.stored_tensors():
            yield key, self.dense_weight(key.removesuffix(".weight"), value) if isinstance(value, dict) else value

    def dense_weight(self, module: str, parts: dict[str, Tensor]) -> Tensor:
        """The dense weight of a packed module, in fp32 and its own shape, from what `stored_tensors` gives."""
        shape = self.empty_model.get_submodule(module).weight_shape
        return dense_weight(module, self.modules[module], parts, shape)

    def sizes(self) -> dict[str, int]:
        """Sizes for a report, from the config and the headers of the weights files; no tensor is read.

        Returns: {"parameters": of the dense model, "dense_bytes": of those in the checkpoint's dtype,
        "nonzero": floating-point numbers stored, "compressed_bytes": of all stored tensors}. A stock folder does not know
        what it was made from: its dense model is itself.
        """
        model = self.empty_model
        dense = model.dense_model() if isinstance(model, PackedModelMixin) else model
        dtype = model.config.dtype or torch.float32
        buffers = dense.state_dict().keys() - dict(dense.named_parameters(remove_duplicate=False)).keys()
        sizes = {"parameters": sum(parameter.numel() for parameter in dense.parameters())}
        sizes["dense_bytes"] = sizes["parameters"] * dtype.itemsize
        for name in buffers:  # running statistics, which are stored too
            buffer = dense.get_buffer(name)
            sizes["dense_bytes"] += buffer.numel() * (dtype if buffer.is_floating_point() else buffer.dtype).itemsize
        stored = [(self.tensors.dtype(name), math.prod(self.tensors.shape(name))) for name in self.tensors]
        sizes["nonzero"] = sum(numel for dtype, numel in stored if dtype.is_floating_point)
        sizes["compressed_bytes"] = sum(numel * dtype.itemsize for dtype, numel in stored)
        return sizes

    def carry_files(self, target: Path) -> None:
        """Copies what is neither weights nor config: tokenizer, chat template, licence."""
        for pattern in CARRIED_FILES:
            for file in filter(Path.is_file, self.path.glob(pattern)):
                shutil.copyfile(file, target / file.name)


class TensorFiles(Mapping):
    """{name: tensor} of safetensors files, each read when it is asked for, in its stored dtype, on the CPU.

    A file is mapped only while a tensor of it is alive, so memory follows the tensors in use, not the model.
    Raises: UserError if a file is absent or damaged.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[list[int], str]] = {}
        for file in files:
            with _opened(file) as opened:  # checks that the file is as long as its header says
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    entry = opened.get_slice(name)
                    self.file_of[name], self._headers[name] = file, (entry.get_shape(), entry.get_dtype())

    def __iter__(self):
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.file_of[name]) as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Raises: UserError for a type that no checkpoint here may hold."""
        stored = self._headers[name][1]
        if stored not in TORCH_DTYPES:
            raise UserError(f"{self.file_of[name]}: {name} is of type {stored}; {', '.join(TORCH_DTYPES)} are read.")
        return TORCH_DTYPES[stored]


@contextmanager
def readable_config(path: Path) -> Iterator[None]:
    """What transformers says of a config.json that describes no model, as UserError."""
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: config.json does not describe a model of its type ({reason}).") from None


@contextmanager
def _opened(file: Path):
    """safe_open, with damage and absence as UserError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); {REBUILD}.") from None


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index names, in name order; as from_pretrained chooses them."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        hint = f"{', '.join(pickled)} could run code when unpickled and is never opened; " if pickled else ""
        raise UserError(
            f"{folder} has no model.safetensors; {hint}save the model with save_pretrained: weights are only read from"
            " safetensors files."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of weights files; {REBUILD}.") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index} names {name!r}, which is not a file of the folder; {REBUILD}.")
    return [folder / name for name in names]


# ------------------------------------------------------------------------------------------------------------- writing


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
