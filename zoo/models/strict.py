"""What is proved of a checkpoint while it is loaded: that config.json and the weights files describe one model, before any
memory is taken for it, and that the numbers are finite and agree with each other, wherever they were put.

transformers itself fills missing tensors with random numbers, casts whatever type is stored and takes the sizes that
config.json names, which for packed weights is never what anybody wants.
"""

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from ..errors import UserError
from ..layers.base import REBUILD, PackedLayer, is_finite
from ..tensors import TensorFiles, open_weights, read_index, weights_names

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
FOREIGN = ("quantization_config", "transformers_weights")  # would have other weights loaded than those checked here
IMPLEMENTATIONS = (
    "attn_implementation",
    "experts_implementation",
)  # by name; a repository's would have its code loaded
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 1  # of a number in config.json: no dimension is larger
MOST_BLOCKS, MOST_LABELS = 10_000, 1_000_000  # of which lists are made before anything can be compared
SHARES = ("_eps", "dropout", "_prob", "_rate")  # ends of names of numbers from 0 to 1
CHECKED_ELSEWHERE = ("compression_config", "kv_cache_quantization", "id2label", "label2id", "task_specific_params")
OLD_NAMES = ("rope_scaling", "rope_theta")  # that transformers still reads
MAY_BE_ZERO = ("_token_id", "max_window_layers")  # ends of names of whole numbers that may be


def reason(error: Exception) -> str:
    """What an exception says, on one line, with its type where the text alone says little."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, UserError) or len(text) > 40 else f"{type(error).__name__}: {text}"


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------------ config.json


def check_settings(config_class: type, settings: dict) -> None:
    """Raise UserError, naming the key, for a value of config.json that no model of the class can have: numbers that are
    not finite or beyond 2^31, sizes below 1 where the class expects one, and keys that would bring in other weights.
    """
    for key in FOREIGN:
        if settings.get(key) is not None:
            raise UserError(f"config.json names {key}: the weights of a compressed checkpoint are those beside it.")
    for key in (*IMPLEMENTATIONS, *(f"_{key}" for key in IMPLEMENTATIONS)):
        for name in _leaves(settings.get(key)):
            if name is not None and not re.fullmatch(r"\w+", str(name)):
                raise UserError(
                    f"config.json gives {key} {_short(name)}: the name of one of transformers' own is needed."
                )
    for key in ("dtype", "torch_dtype"):
        value = settings.get(key)
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"config.json gives {key} {_short(value)}: float32, bfloat16 or float16 is needed.")
    defaults = {field.name: field.default for field in fields(config_class)}
    for key, value in settings.items():
        if key in CHECKED_ELSEWHERE or key not in {*defaults, *OLD_NAMES, "num_labels"}:
            continue
        numbers = [x for x in _leaves(value) if isinstance(x, int | float) and not isinstance(x, bool)]
        default = defaults.get(key)
        most = 1 if key.endswith(SHARES) else LARGEST
        if not all(math.isfinite(x) and abs(x) <= LARGEST for x in numbers):
            needed = f"finite numbers up to {LARGEST} are"
        elif _is_size(default) and not key.endswith(MAY_BE_ZERO) and any(is_whole(x) and x < 1 for x in numbers):
            needed = "1 or more is"
        elif isinstance(default, float) and default >= 0 and not all(0 <= x <= most for x in numbers):
            needed = f"from 0 to {most} is"
        elif key in ("rope_parameters", *OLD_NAMES) and any(x <= 0 for x in numbers):
            needed = "numbers above 0 are"
        else:
            continue
        raise UserError(f"config.json gives {key} {_short(value)}: {needed} needed.")
    if is_whole(settings.get("num_labels")) and settings["num_labels"] > MOST_LABELS:
        raise UserError(f"config.json describes {settings['num_labels']} labels: {MOST_LABELS} at most are possible.")
    if _blocks(settings.get) > MOST_BLOCKS:
        raise UserError(f"config.json describes {_blocks(settings.get)} blocks: {MOST_BLOCKS} at most are possible.")


def check_blocks(config, tensors: Mapping) -> None:
    """Raise UserError if there are fewer tensors than blocks: the cost of building a model follows its files' size."""
    blocks = _blocks(lambda key: getattr(config, key, None))
    if blocks > len(tensors):
        raise UserError(f"config.json describes {blocks} blocks, there are only {len(tensors)} tensors; {REBUILD}.")


def _blocks(get) -> int:
    counts = [get("num_hidden_layers"), *(get("depths") if isinstance(get("depths"), list | tuple) else [])]
    return sum(count for count in counts if is_whole(count) and count > 0)


def _is_size(default: Any) -> bool:
    """Whether a field is a size, or sizes: by default whole numbers above 0."""
    values = list(default) if isinstance(default, list | tuple) else [default]
    return bool(values) and all(is_whole(value) and value > 0 for value in values)


def _leaves(value: Any) -> list:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


# ---------------------------------------------------------------------------------------------------------- weights files


def base_of(source: str | Path) -> str | Path:
    """The folder or repository of the model itself, if `source` is the folder of an adapter alone."""
    adapter = Path(source) / "adapter_config.json"
    if not adapter.is_file() or (Path(source) / "config.json").is_file():
        return source
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def find_weights(source: str | Path | None, options: dict) -> Mapping:
    """The tensors of a folder or of a Hub repository, whose weights files are fetched, or the state dict given instead.

    Args: options: what `from_pretrained` was given, of which `state_dict`, `variant` and those of HUB count.
    Raises: UserError as `open_weights` and for a GGUF file; OSError, as transformers says it, for a repository that cannot
        be read.
    """
    if options.get("gguf_file"):
        raise UserError(f"gguf_file {options['gguf_file']!r}: packed weights are read from safetensors files only.")
    if source is None:
        return options.get("state_dict") or {}
    variant, source = options.get("variant"), base_of(source)
    if Path(source).is_dir():
        return open_weights(Path(source) / (options.get("subfolder") or ""), variant)
    hub = {key: options[key] for key in HUB if key in options}
    single, index = weights_names(variant)
    try:
        found = cached_file(source, single, **hub)
    except OSError as missing:
        try:
            found = cached_file(source, index, **hub)
        except OSError:
            raise missing from None
        for name in sorted(set(read_index(Path(found)).values())):
            cached_file(source, name, **hub)
    return open_weights(Path(found).parent, variant)


def check_fit(model: nn.Module, tensors: Mapping, new_head: bool) -> dict[str, str]:
    """Raise UserError unless the tensors are, by name, shape and type, those of the empty model; no number is read.

    Floating-point tensors may be stored in any of fp32, bf16 and fp16, all others in their own type only. As in
    transformers, a model without its head reads a checkpoint with one, and the other way round.

    Args:
        model: on the meta device. tensors: TensorFiles, or a state dict.
        new_head: of `ignore_mismatched_sizes`: dense tensors outside of the base model may have other shapes.
    Returns: {name in the model: name in the files} of all that fits, hence will be loaded.
    """
    own, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."
    fitting, found, problems, of_head = {}, set(), [], []
    for stored in sorted(tensors):
        pair = (stored, stored.removeprefix(prefix), f"{prefix}{stored}")
        name = next((name for name in pair if name in own), None)
        if name is None or name in fitting:
            if model.base_model is not model or stored.startswith(prefix):  # else it is the head's
                problems.append(f"{stored} is unknown; {REBUILD}")
            continue
        found.add(id(own[name]))
        dtype, shape = _header(tensors, stored)
        if shape != tuple(own[name].shape):
            is_head = model.base_model is not model and not name.startswith(prefix) and not _is_packed(model, name)
            if is_head and new_head:
                continue
            way_out = f"ignore_mismatched_sizes=True starts it anew, or {REBUILD}" if is_head else REBUILD
            problem = f"{stored} has shape {shape} instead of {tuple(own[name].shape)}; {way_out}"
            (of_head if is_head else problems).append(problem)
        elif dtype != own[name].dtype and not (dtype in FLOATS and own[name].is_floating_point()):
            allowed = FLOATS if own[name].is_floating_point() else [own[name].dtype]
            wanted = " or ".join(_plain(dtype) for dtype in allowed)
            problems.append(f"{stored} is stored as {_plain(dtype)} instead of {wanted}; {REBUILD}")
        fitting[name] = stored
    for name in sorted(own, reverse=True):
        if id(own[name]) not in found:  # nor what it is tied to
            problems.insert(0, f"{name} is missing; {REBUILD}")
    problems += of_head
    if problems:
        problem, _, way_out = problems[0].partition("; ")
        more = f" and {len(problems) - 1} more tensors are wrong" if problems[1:] else ""
        raise UserError(f"tensor {problem}{more}; {way_out}.")
    return fitting


def _header(tensors: Mapping, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(tensors, TensorFiles):
        return tensors.dtype(name), tuple(tensors.shape(name))
    return tensors[name].dtype, tuple(tensors[name].shape)


def _is_packed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), PackedLayer)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- numbers


def check_contents(model: nn.Module, tensors: Mapping, names: dict[str, str]) -> None:
    """Raise UserError for a tensor of a loaded model that holds NaN or Inf, and for packed ones that contradict each other.

    Those that were offloaded, to disk or to the memory beside a GPU, are read from the files, layer by layer, as they
    will be when they are used. Costs one pass over the numbers.

    Args: tensors: what was loaded. names: what check_fit returned.
    """
    packed = set()
    for place, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            name, own = _below_adapter(place), dict(layer.named_parameters(recurse=False))
            packed.update(f"{name}.{key}" for key in own)
            if any(tensor.is_meta for tensor in own.values()):
                layer = copy.copy(layer)
                parts = {key: tensors[names[f"{name}.{key}"]].to(tensor.dtype) for key, tensor in own.items()}
                layer._parameters = {key: parts.get(key) for key in layer._parameters}
            layer.validate(name)
    for place, tensor in model.state_dict().items():
        name = _below_adapter(place)
        if name in packed or name not in names or not tensor.is_floating_point():
            continue
        if not is_finite(tensors[names[name]].to(tensor.dtype) if tensor.is_meta else tensor):
            raise UserError(f"tensor {name} holds NaN or Inf; {REBUILD}.")


def _below_adapter(name: str) -> str:
    """The name that a module or tensor had before an adapter was put on it."""
    return name.replace(".base_layer", "")
