"""Base models: a Hub id, a folder, or one of the offline aliases, always as a folder of safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from recipes.common.assets import ASSETS, asset_path, cache_folder
from zoo.errors import UserError

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*"]
DEGRID_SIGMA = 0.1
DEGRID_SEED = 0


@dataclass(frozen=True)
class BaseModel:
    """What a recipe starts from, and what its report says of it."""

    id: str  # the Hub id that cards name
    path: Path
    revision: str | None  # resolved commit, or what was converted
    sha256: str  # over the sha256 of every weights file, in name order
    parameters: int
    license: str | None
    model_type: str
    notes: tuple[str, ...] = ()  # what a reader of the report must know about these weights


def resolve_model(model: str, revision: str | None = None) -> BaseModel:
    """The base model as a local folder. Raises UserError when it cannot be found or is not safetensors."""
    if model in ALIASES:
        make, note = ALIASES[model]
        folder = cache_folder("models") / model
        if not (folder / "config.json").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(f".{model}.{os.getpid()}")
            make(partial)
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
        asset = ASSETS["smollm2-135m-instruct"]
        return describe(
            folder, "HuggingFaceTB/SmolLM2-135M-Instruct", asset.archive.requirement, asset.license, (note,)
        )
    if Path(model).is_dir():
        return describe(Path(model), Path(model).resolve().name, revision, None, ())
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=FILES))
    except HFValidationError:
        raise UserError(f"--model {model}: no such folder, alias ({', '.join(ALIASES)}) or Hub id.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--model {model}: not a folder nor an alias ({', '.join(ALIASES)}), and the Hub gives no such model ({reason})."
        ) from None
    return describe(folder, model, folder.name, None, ())


def describe(folder: Path, name: str, revision: str | None, license: str | None, notes: tuple) -> BaseModel:
    """Reads what there is to know of a model folder."""
    tensors = open_tensors(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"--model {folder}: config.json is missing or not JSON; name a model folder.") from None
    digest = hashlib.sha256()
    for file in tensors.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    card = folder / "README.md"
    if license is None and card.exists():
        license = ModelCard.load(card).data.get("license")
    parameters = sum(math.prod(tensors.shape(key)) for key in tensors.keys())
    return BaseModel(name, folder, revision, digest.hexdigest(), parameters, license, config.get("model_type"), notes)


class TensorFiles:
    """Lazy access to the tensors of a folder of safetensors, sharded or not."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            found = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            other = f" (found {', '.join(found)})" if found else ""
            raise UserError(f"--model {folder}: no .safetensors weights{other}; only safetensors are read.")
        self.file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                with safe_open(file, "pt") as opened:
                    self.file_of |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise UserError(f"--model {folder}: {file.name} is damaged ({error}); fetch it again.") from None

    def keys(self) -> list[str]:
        return list(self.file_of)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def get(self, name: str) -> Tensor:
        with safe_open(self.file_of[name], "pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        with safe_open(self.file_of[name], "pt") as opened:
            return opened.get_slice(name).get_shape()


def open_tensors(folder: Path) -> TensorFiles:
    return TensorFiles(folder)


def check_finite(folder: Path) -> None:
    """Raises UserError naming the first tensor that holds NaN or Inf; one tensor in memory at a time."""
    tensors = open_tensors(folder)
    for name in tensors.keys():
        tensor = tensors.get(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"--model {folder}: the weight {name} holds NaN or Inf; the model cannot be compressed.")


# ------------------------------------------------------------------------------------------------- offline aliases


def convert_smollm2(folder: Path) -> None:
    """The packaged GGUF, dequantised to fp32 safetensors. Without GgufConfig(dequantize=True) it could not be saved."""
    source = asset_path("smollm2-135m-instruct")
    with_suffix = folder.with_name(f"{folder.name}.gguf.d")
    with_suffix.mkdir(parents=True)
    try:
        (with_suffix / "model.gguf").symlink_to(source)
        model = AutoModelForCausalLM.from_pretrained(
            with_suffix,
            gguf_file="model.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(with_suffix, gguf_file="model.gguf")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        shutil.rmtree(with_suffix)


def convert_degridded(folder: Path) -> None:
    """The same function with weights off the 4-bit grid: quantisation recipes start here.

    Input columns are scaled by s = exp(0.1 n), n normal, and what feeds them is divided by s: q/k/v and gate/up with
    their RMSNorm; down with up's rows; o with v's rows (repeated over the group of query heads).
    """
    base = resolve_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(DEGRID_SEED)

    def scales(size: int) -> Tensor:
        return torch.exp(DEGRID_SIGMA * torch.randn(size, generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = scales(norm.weight.numel())
                norm.weight /= s
                for linear in linears:
                    linear.weight *= s
            s = scales(mlp.down_proj.in_features)
            mlp.up_proj.weight *= s[:, None]
            mlp.down_proj.weight /= s
            s = scales(attention.v_proj.out_features)
            attention.v_proj.weight *= s[:, None]
            groups = model.config.num_attention_heads // model.config.num_key_value_heads
            per_head = s.view(model.config.num_key_value_heads, 1, -1).expand(-1, groups, -1)
            attention.o_proj.weight /= per_head.reshape(-1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.path).save_pretrained(folder)


DEQUANTISED = "the dense reference is the packaged Q4_1 GGUF, dequantised"
ALIASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "smollm2-135m-instruct": (convert_smollm2, DEQUANTISED),
    "smollm2-135m-instruct-degridded": (convert_degridded, f"{DEQUANTISED} and rescaled off its 4-bit grid"),
}
