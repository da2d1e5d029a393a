"""The one reader of a checkpoint folder, packed or stock, and the one way to write a folder: whole or not at all."""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from .errors import UserError
from .layers.packing import dense_weight
from .models.packed import PackedModelMixin, check_compression
from .models.strict import check_blocks, reason
from .tensors import TensorFiles, open_weights

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageClassification")
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
        """The `compression_config`; empty for a stock folder. Raises: UserError for one that is none."""
        check_compression(self.config.get("compression_config"))
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
    def tensors(self) -> TensorFiles:
        """The weights, read lazily. Raises: UserError if they are missing, damaged or not safetensors."""
        return open_weights(self.path)

    @property
    def files(self) -> list[Path]:
        """The weights files, all of them inside the folder, in name order."""
        return self.tensors.files

    @cached_property
    def empty_model(self) -> nn.Module:
        """The model on the meta device. Raises: UserError for a config.json that describes none."""
        with readable_config(self.path):
            config = AutoConfig.from_pretrained(self.path)
            check_blocks(config, self.tensors)
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

    def carried_files(self) -> list[Path]:
        """What a copy of the model takes along besides weights and config: tokenizer, chat template, licence.

        Raises: UserError for one that is a link to another place, whose content nobody meant to publish. Links between
        snapshots and blobs of a Hub cache are within the repository.
        """
        files = sorted({file for pattern in CARRIED_FILES for file in self.path.glob(pattern) if file.is_file()})
        home = self.path.resolve()
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        for file in files:
            if not any(file.resolve().is_relative_to(home) for home in homes):
                raise UserError(f"{file} is a link to {file.resolve()}: put the file itself there, or remove the link.")
        return files

    def carry_files(self, target: Path) -> None:
        """Copies the carried files. Raises: UserError as `carried_files`."""
        for file in self.carried_files():
            shutil.copyfile(file, target / file.name)


@contextmanager
def readable_config(path: Path) -> Iterator[None]:
    """What transformers and we say of a config.json that describes no model, as UserError naming the folder."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (ImportError, OSError):
        raise
    except Exception as error:  # whatever classes of transformers raise for values that they did not expect
        raise UserError(f"{path}: config.json does not describe a model of its type ({reason(error)}).") from None


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
