"""Base models: a Hub id, a folder, or one of the offline aliases, always as a folder of safetensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from filelock import FileLock
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from recipes.common.core.flags import first_line
from recipes.common.data.assets import ASSETS, asset_path, cache_folder
from zoo.errors import UserError
from zoo.folder import atomic_folder, open_folder

# Of a Hub repository only the top folder's weights, config, tokenizer and card; never pickles, code or other formats.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
HUB_IGNORED = ["*/*", "consolidated*"]  # `consolidated` repeats the weights in another layout
DEGRID_SIGMA = 0.1
DEGRID_SEED = 0
LANGUAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": ["en"]}


@dataclass(frozen=True)
class BaseModel:
    """What a recipe starts from, and what its report says of it."""

    id: str  # the Hub id that cards name; a folder's name for a local model
    path: Path
    revision: str | None  # the Hub commit, or the package that an alias was converted from
    sha256: str  # of model.safetensors; of several files: of the output of `sha256sum` on them, in name order
    parameters: int  # numbers in the weights files, so tied weights count once
    license: str | None
    model_type: str
    notes: tuple[str, ...] = ()  # what a reader of the report must know about these weights

    def row(self) -> dict:
        """`base_model` of a report."""
        row = {key: getattr(self, key) for key in ("id", "revision", "sha256", "parameters", "license")}
        return row | {"language": self.languages()}

    def languages(self) -> list[str]:
        """As the base model's card states them; the packaged models come without one. Empty when unknown."""
        if self.id in LANGUAGES:
            return LANGUAGES[self.id]
        card = self.path / "README.md"
        stated = (metadata_load(card) or {}).get("language") if card.exists() else None
        return [stated] if isinstance(stated, str) else stated or []


def resolve_model(model: str, revision: str | None = None, *, compressed: bool = False) -> BaseModel:
    """The base model as a local folder of dense safetensors; no weight is loaded, all of them are hashed.

    Args:
        model: an alias of `ALIASES` (converted once and cached), a folder, or a Hub id (downloaded and cached).
        revision: branch, tag or commit; for a Hub id only.
        compressed: a checkpoint of this zoo will do too, for methods that leave the weights as they are.

    Raises:
        UserError: nothing of that name can be reached; the weights are not safetensors, damaged, incomplete, quantised
            or compressed already; transformers does not know the model's type.
    """
    folder = Path(model)
    if revision is not None and (model in ALIASES or folder.is_dir()):
        raise UserError(f"--revision {revision}: only a Hub id has revisions, --model {model} is local; leave it out.")
    if model in ALIASES:
        make, notes = ALIASES[model]
        asset = ASSETS["smollm2-135m-instruct"]
        folder = _make_once(cache_folder("models") / model, make)
        return _describe(folder, "HuggingFaceTB/SmolLM2-135M-Instruct", asset.package, asset.license, notes)
    if folder.is_dir():
        return _describe(folder, folder.resolve().name, None, compressed=compressed)
    folder = _download(model, revision)
    return _describe(folder, model, folder.name, compressed=compressed)


def _download(model: str, revision: str | None) -> Path:
    """The snapshot folder of a Hub repository; its name is the commit."""
    known = f"nor an alias ({', '.join(ALIASES)})"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except RevisionNotFoundError:
        reason = f"--revision {revision}: the Hub repository {model} has no such branch, tag or commit."
    except GatedRepoError:
        reason = f"--model {model}: the Hub asks to accept its terms first; do so on its page and run `hf auth login`."
    except (HFValidationError, RepositoryNotFoundError):
        reason = f"--model {model}: not a folder, {known}, nor a Hub id that you can see (`hf auth login` if private)."
    except LocalEntryNotFoundError:
        reason = (
            f"--model {model}: not a folder {known}, and as a Hub id it is not cached and the Hub is not reachable."
        )
    except (HfHubHTTPError, OSError) as error:
        reason = f"--model {model}: not a folder {known}, and fetching it failed ({str(error).splitlines()[0]})."
    raise UserError(reason)


def _describe(
    folder: Path,
    name: str,
    revision: str | None,
    license: str | None = None,
    notes: tuple[str, ...] = (),
    compressed: bool = False,
) -> BaseModel:
    """Reads what there is to know of a model folder, and refuses what no recipe can start from."""
    source = open_folder(folder)
    config, model_type = source.config, str(source.config.get("model_type"))
    packed = "compression_config" in config
    if packed and not compressed:
        raise UserError(
            f"--model {name}: it is a compressed checkpoint already; name the dense model it was made from."
        )
    if "quantization_config" in config:
        raise UserError(f"--model {name}: its weights are quantised; name the dense model it was made from.")
    if packed:
        model_type = model_type.removeprefix("slim_")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"--model {name}: model_type {model_type!r} is unknown to this transformers; update it or name another"
            " model (code from a model's folder is never run)."
        )
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and all(isinstance(n, str) for n in architectures)):
        raise UserError(
            f"--model {name}: its config.json names no architectures, so nobody knows what its head is; add a line such as"
            ' "architectures": ["LlamaForCausalLM"].'
        )
    parameters = sum(math.prod(source.tensors.shape(key)) for key in source.tensors)
    if packed:
        parameters = source.sizes()["parameters"]
    return BaseModel(
        name, folder, revision, hash_weights(source.files), parameters, license or _license(folder), model_type, notes
    )


def hash_weights(files: list[Path]) -> str:
    """`BaseModel.sha256` of weights files in name order."""
    lines = []
    for file in tqdm(files, desc="hashing weights", unit="file", leave=False, delay=2):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
    return lines[0].split()[0] if len(lines) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def _license(folder: Path) -> str | None:
    """As the model card states it; None without a card, or one that cannot be parsed."""
    try:
        value = (metadata_load(folder / "README.md") or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return value if isinstance(value, str) else None


def check_finite(folder: Path) -> None:
    """Reads every weight once, one tensor in memory at a time. Raises UserError naming the first with NaN or Inf."""
    tensors = open_folder(folder).tensors
    for name in tqdm(tensors, desc="checking weights", unit="tensor", leave=False, delay=2):
        tensor = tensors[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: the weight {name} holds NaN or Inf; such a model cannot be compressed.")


def check_shapes(folder: Path, auto_class: str) -> None:
    """Raises UserError, from the headers of the files, unless they hold every weight of such a model in its shape."""
    source = open_folder(folder)
    if source.auto_class != auto_class:
        raise UserError(f"{folder}: models of {source.config['architectures']} are no {auto_class}, which is needed.")
    try:
        model = source.empty_model
    except UserError:
        raise
    except Exception as error:  # sizes that do not go together fail wherever they meet first
        raise UserError(
            f"{folder}: its config.json describes no model that can be built ({first_line(error)})."
        ) from None
    for name, tensor in model.state_dict().items():
        if name not in source.tensors:
            if name not in model.all_tied_weights_keys:
                raise UserError(f"{folder}: the weight {name} is missing; the folder is not a complete model.")
        elif source.tensors.shape(name) != list(tensor.shape):
            raise UserError(
                f"{folder}: the weight {name} has shape {source.tensors.shape(name)}, the config asks for"
                f" {list(tensor.shape)}; the folder is damaged."
            )


def check_loads(folder: Path, auto_class: str) -> None:
    """As `check_shapes`, by loading the model: some families are stored under other names than they have in memory."""
    source = open_folder(folder)
    if source.auto_class != auto_class:
        raise UserError(f"{folder}: models of {source.config['architectures']} are no {auto_class}, which is needed.")
    try:
        _, found = getattr(transformers, auto_class).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: no model can be loaded from it ({first_line(error)}).") from None
    for name in sorted(found["missing_keys"]):
        raise UserError(f"{folder}: the weight {name} is missing; the folder is not a complete model.")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{folder}: the weight {name} has shape {list(stored)}, the config asks for {list(wanted)}; the folder is"
            " damaged."
        )


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder. Raises: UserError if there is none that can be read, or it makes no tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("A few words.", add_special_tokens=False)["input_ids"]
    except Exception as error:  # every kind of tokenizer raises what it likes
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"{folder} holds no tokenizer that can be read ({reason}); save the model's own there."
        ) from None
    if not ids or set(ids) == {tokenizer.unk_token_id}:
        raise UserError(
            f"{folder}: its tokenizer knows no words, as one without files does; save the model's own there."
        )
    return tokenizer


def check_vocabulary(config, windows: Iterable[Tensor], model: str) -> None:
    """Raises UserError if tokens of the windows (N, T) have no row in the model's embedding."""
    size, largest = config.get_text_config().vocab_size, max(int(rows.max()) for rows in windows)
    if largest >= size:
        raise UserError(f"--model {model}: its tokenizer gives the token {largest}, the model knows {size:,} of them.")


# ---------------------------------------------------------------------------------------------------- offline aliases


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there; processes wait for each other, and it appears whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            with atomic_folder(folder) as partial:
                make(partial)
    return folder


def convert_smollm2(folder: Path) -> None:
    """Writes the packaged GGUF, dequantised to fp32: 134,515,008 parameters, 538 MB, about half a minute.

    Without GgufConfig(dequantize=True) the weights would be dense too, but the model could not be saved.
    """
    gguf = asset_path("smollm2-135m-instruct")
    print("converting SmolLM2-135M-Instruct from GGUF to safetensors (once)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def convert_degridded(folder: Path) -> None:
    """The same function with weights off the 4-bit grid of the GGUF: quantisation recipes and their baselines start here.

    On the grid, 4-bit groups of 32 would be lossless by construction. Input columns are scaled by s = exp(sigma n),
    n standard normal, and what feeds them is divided by s: q, k, v and gate, up with their RMSNorm; down with up's
    rows; o with v's rows (s repeated over the query heads of a group). q and k's rows stay: RoPE ties pairs of them.
    """
    base = resolve_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(DEGRID_SEED)
    with torch.no_grad():
        for layer in model.model.layers:
            degrid_block(layer, generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.path).save_pretrained(folder)


@torch.no_grad()
def degrid_block(layer: torch.nn.Module, generator: torch.Generator) -> None:
    """Rescales one LLaMA block in place; see `convert_degridded`."""
    attention, mlp = layer.self_attn, layer.mlp

    def scales(size: int) -> Tensor:
        return torch.exp(DEGRID_SIGMA * torch.randn(size, generator=generator))

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
    s = scales(attention.v_proj.out_features)  # (kv heads * head_dim,)
    attention.v_proj.weight *= s[:, None]
    per_head = s.view(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
    attention.o_proj.weight /= per_head.reshape(-1)


DEQUANTISED = "the base weights are the dequantised Q4_1 GGUF of the model, so the dense reference is that"
ALIASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "smollm2-135m-instruct": (convert_smollm2, (DEQUANTISED,)),
    "smollm2-135m-instruct-degridded": (
        convert_degridded,
        (DEQUANTISED, "they were rescaled off the 4-bit grid first, which leaves the model's function as it was"),
    ),
}
