"""Weights files: where a folder keeps them, and their tensors by name, each read when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError
from .layers.base import REBUILD

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}  # by their names in safetensors; all that a checkpoint may hold


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
def _opened(file: Path) -> Iterator:
    """safe_open, with damage and absence as UserError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); {REBUILD}.") from None


def open_weights(folder: Path, variant: str | None = None) -> TensorFiles:
    """The tensors of model.safetensors, or of the files that the index names, in name order; as from_pretrained chooses
    them, which is why a sharded training state beside them, which it would prefer, is refused.

    Args: variant: "fp16" for model.fp16.safetensors.
    Raises: UserError if there are none, or an index that is damaged, contradicts the files or names one elsewhere.
    """
    single, index = (folder / name for name in weights_names(variant))
    state = sorted(file.name for file in folder.glob("shard-*.safetensors"))
    if state:
        raise UserError(f"{folder} holds {state[0]}, of a training state: a folder with the model's weights is needed.")
    if single.is_file():
        return TensorFiles([single])
    if not index.is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
        hint = f"{', '.join(pickled)} could run code when unpickled and is never opened; " if pickled else ""
        raise UserError(
            f"{folder} has no {single.name}; {hint}save the model with save_pretrained: weights are only read from"
            " safetensors files."
        )
    places = read_index(index)
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name!r}, which is not a file of the folder; {REBUILD}.")
    tensors = TensorFiles([folder / name for name in sorted(set(places.values()))])
    for name, place in sorted(places.items()):
        if name not in tensors or tensors.file_of[name].name != place:
            raise UserError(f"{index} has {name} in {place}, which it is not in or not alone; {REBUILD}.")
    return tensors


def weights_names(variant: str | None = None) -> tuple[str, str]:
    """Names of the one weights file and of the index of several."""
    if variant is None:
        return SINGLE, INDEX
    return SINGLE.replace(".safetensors", f".{variant}.safetensors"), INDEX.replace(".json", f".{variant}.json")


def read_index(index: Path) -> dict[str, str]:
    """{tensor: name of its file, a plain one}. Raises: UserError for an index that is damaged or names other folders."""
    wrong = UserError(f"{index} is not an index of weights files; {REBUILD}.")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise wrong from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise wrong
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a file of the folder; {REBUILD}.")
    if not places or not isinstance(content.get("metadata"), dict):  # transformers needs both
        raise wrong
    return places
