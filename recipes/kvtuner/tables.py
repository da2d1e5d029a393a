"""Tables of KV-cache widths, one (key bits, value bits) pair a layer: read, check, write, and what they cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from zoo.errors import UserError
from zoo.kv_presets import PRESETS, kv_preset

Pair = tuple[int, int]  # (key bits, value bits)
Table = tuple[Pair, ...]  # one pair per attention layer
WIDTHS = (2, 4, 8, 16)  # 16: the layer is left as it is
PAIRS: tuple[Pair, ...] = tuple((k, v) for k in (8, 4, 2) for v in (8, 4, 2))
SCALE_BITS = 32  # a scale and a minimum in fp16


@dataclass(frozen=True)
class CacheFormat:
    """How numbers share a scale. per_token: all of one token and head; kivi: keys by channel over `group_size` tokens,
    values by `group_size` numbers of one token, and the newest S mod `residual_length` tokens stay in 16 bits."""

    mode: str = "per_token"
    group_size: int = -1
    residual_length: int = 0

    def group(self, head_dim: int) -> int:
        """Numbers that share one scale and minimum."""
        return head_dim if self.group_size == -1 else self.group_size


FORMATS = {"per_token": CacheFormat(), "kivi": CacheFormat("kivi", 32, 32)}


def cache_format(mode: str, group_size: int | None, residual_length: int | None) -> CacheFormat:
    """The format of a mode; None stands for its usual number. Raises UserError for numbers that the mode does not take."""
    usual = FORMATS[mode]
    group = usual.group_size if group_size is None else group_size
    residual = usual.residual_length if residual_length is None else residual_length
    if mode == "per_token" and (group, residual) != (-1, 0):
        raise UserError(
            f"--mode per_token: --group-size {group} and --residual-length {residual} are for --mode kivi; a token"
            " and head is one group, and there is no residual."
        )
    if mode == "kivi" and (group < 8 or group % 8):
        raise UserError(f"--group-size {group}: a multiple of 8 is needed with --mode kivi. Try 32, the default.")
    if mode == "kivi" and (residual < group or residual % group):
        raise UserError(f"--residual-length {residual}: a multiple of --group-size {group} is needed with --mode kivi.")
    return CacheFormat(mode, group, residual)


def pair_name(pair: Pair) -> str:
    """'K8V4', and 'KV8' for (8, 8)."""
    k, v = pair
    return f"KV{k}" if k == v else f"K{k}V{v}"


def pair_bits(pair: Pair) -> float:
    return sum(pair) / 2


def equivalent_bits(table: Table) -> float:
    """Mean of all widths, as the paper counts: without scales."""
    return sum(map(pair_bits, table)) / len(table)


def effective_bits(table: Table, form: CacheFormat, head_dim: int) -> float:
    """Mean bits per number with the scales and minima; the residual, which is short, is left out."""
    overhead = SCALE_BITS / form.group(head_dim)
    return sum(bits + (overhead if bits < 16 else 0) for pair in table for bits in pair) / (2 * len(table))


def bytes_per_token(table: Table, form: CacheFormat, kv_heads: int, head_dim: int) -> int:
    """Bytes that one more token takes in all layers together."""
    return round(effective_bits(table, form, head_dim) * 2 * len(table) * kv_heads * head_dim / 8)


def check_widths(table: Table, what: str, row: str = "layer") -> None:
    """Raises UserError naming the first width that is not in WIDTHS."""
    for index, pair in enumerate(table):
        for bits in pair:
            if bits not in WIDTHS:
                raise UserError(f"{what}: {row} {index} has {bits} bits; one of 2, 4, 8, 16 is needed.")


def parse_pairs(names: list[str]) -> tuple[Pair, ...]:
    """['K8V4', 'KV2'] -> ((8, 4), (2, 2)), without duplicates."""
    pairs = []
    for name in names:
        found = re.fullmatch(r"K(\d+)V(\d+)|KV(\d+)", name)
        if not found:
            raise UserError(f"--pairs {name}: key and value bits such as K8V4, or KV4 for both, are needed.")
        k, v, both = found.groups()
        pairs.append((int(k or both), int(v or both)))
    if not pairs:
        raise UserError("--pairs: one pair of widths or more is needed.")
    check_widths(tuple(pairs), "--pairs", "pair")
    return tuple(dict.fromkeys(pairs))


def table_text(table: Table) -> str:
    """'8,4 4,2': a key for files."""
    return " ".join(f"{k},{v}" for k, v in table)


def parse_table(text: str) -> Table:
    return tuple(tuple(map(int, pair.split(","))) for pair in text.split())


def cache_shape(config) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of a model."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, size


def read_table(source: str) -> tuple[str | None, Table]:
    """(mode or None where it is not said, table) of a preset, or of a YAML or JSON file.

    A file holds the official {layer: {nbits_key, nbits_value}}, or {mode, layers: [[8, 4], …]} as config.json does under
    `kv_cache_quantization`; a whole config.json will do.

    Raises: UserError if there is no such table, or it is not one.
    """
    known = presets()
    if source in known:
        return known[source]["mode"], known[source]["layers"]
    path, what = Path(source), f"--load-table {source}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{what}: neither a file that can be read ({error.strerror}) nor a preset: {', '.join(known)}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{what}: it is neither YAML nor JSON.") from None
    try:
        content = content.get("kv_cache_quantization", content)
        if "layers" in content:
            mode, rows = content.get("mode"), [tuple(row) for row in content["layers"]]
        else:
            numbers = sorted(content)
            mode, rows = None, [(content[i]["nbits_key"], content[i]["nbits_value"]) for i in numbers]
        table = tuple((int(k), int(v)) for k, v in rows)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{what}: a mapping from layers to nbits_key and nbits_value, or one with mode and layers, is needed."
        ) from None
    if not table:
        raise UserError(f"{what}: it has no layers.")
    if "layers" not in content and numbers != list(range(len(table))):
        raise UserError(f"{what}: every layer from 0 to the last is needed once, there are {numbers}.")
    check_widths(table, what)
    return mode, table


def given_table(source: str, mode: str, max_bits: float) -> Table:
    """The table of --load-table, if it is for this mode and within the bits."""
    own_mode, table = read_table(source)
    if own_mode not in (None, mode):
        raise UserError(f"--load-table {source}: it is for mode {own_mode}, not {mode}; pass --mode {own_mode}.")
    if (bits := equivalent_bits(table)) > max_bits:
        raise UserError(f"--load-table {source}: it has {bits:.4g} bits, --max-bits is {max_bits:g}; raise that.")
    return table


def official_yaml(table: Table) -> str:
    """The table in the form of the authors' code: {layer: {nbits_key, nbits_value}}."""
    return yaml.safe_dump({i: {"nbits_key": k, "nbits_value": v} for i, (k, v) in enumerate(table)}, sort_keys=False)


def presets() -> dict[str, dict]:
    """{name: {"model", "mode", "equivalent_bits", "layers": Table}} of the tables that the authors ship."""
    return {
        name: {
            "model": model,
            "mode": mode,
            "equivalent_bits": bits,
            "layers": tuple(map(tuple, kv_preset(name)["layers"])),
        }
        for name, (model, mode, bits, _) in PRESETS.items()
    }
