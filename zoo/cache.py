"""A KV cache with widths of its own for every layer (KVTuner, arXiv 2502.04420): packed codes, never quantised twice.

A checkpoint whose config.json has `kv_cache_quantization` gets this cache by itself, in `generate()` and in `forward`.
With any other model: `KVTunerCache.from_config(model.config, table)` as `cache=` (`past_key_values=` before
transformers 5.24).

{"method": "kvtuner", "version": 1, "mode": "per_token" | "kivi", "group_size": -1 | g, "residual_length": 0 | r,
 "prefill": "exact" | "quantized", "scale_dtype": "float16", "layers": [[key bits, value bits], …]}
has one pair a layer of 2, 4, 8 or 16 bits (16 = as it is; also what sliding-window layers must have).
per_token: a group is one token of one head, quantised as it is written. kivi: keys by channel in blocks of g tokens,
values by token in groups of g numbers; the newest S mod r tokens are kept as they are.

With the attention function "slimzoo_kv" (what such a checkpoint uses instead of "sdpa") decoding reads the codes directly;
with any other one, layers hand out dequantised tensors: the same numbers, more slowly.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .errors import UserError
from .kernels.kv_attention import kv_attention, quantize_channels, quantize_tokens
from .kernels.kv_attention.reference import Part, dequantize

logger = logging.get_logger(__name__)
ATTENTION = "slimzoo_kv"
SLOW = (
    f"KVTunerCache: every token dequantises the whole cache. model.set_attn_implementation({ATTENTION!r}) reads the codes"
    " instead; make the cache from the config of that very model, KVTunerCache.from_config(model.config)."
)
# What models call their cache, as an argument and in their output: renamed in transformers 5.24.
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
MODES, PREFILLS, BITS = ("per_token", "kivi"), ("exact", "quantized"), (2, 4, 8, 16)
GROWTH, LEAST_UNITS = 1.5, 64  # of the buffers, in tokens or blocks
SAVED = {"format": "slimzoo kv cache", "version": "1"}  # what a saved cache says of itself, beside layers and tokens
PARTS = ("codes", "scale", "minimum")  # the packed tensors of a store, in the order of `Part`
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of dense keys and values


@dataclass
class Format:
    """How the layers of a cache quantise; `padding` (B, S) bool is False at tokens that must not widen a block's range."""

    mode: str
    group_size: int
    residual_length: int
    prefill: str
    padding: Tensor | None = field(default=None, repr=False)


# -------------------------------------------------------------------------------------------------------------- checks


def layer_types(config) -> list[str]:
    """What each layer of a text model attends to: "full_attention", "sliding_attention", …"""
    types = getattr(config, "layer_types", None)
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(types) if types else [kind] * config.num_hidden_layers


def check_table(config, table: dict) -> tuple[Format, list[tuple[int, int]]]:
    """The format and the (key bits, value bits) of every layer; UserError, naming the value, for what is impossible."""
    name = "kv_cache_quantization"
    if not isinstance(table, dict) or table.get("method") != "kvtuner" or table.get("version") != 1:
        raise UserError(f"{name}: method 'kvtuner' of version 1 is needed; update slimzoo if it is a newer one.")
    mode, prefill = table.get("mode"), table.get("prefill", "exact")
    group, residual = table.get("group_size", -1), table.get("residual_length", 0)
    for key, value, allowed in (("mode", mode, MODES), ("prefill", prefill, PREFILLS)):
        if value not in allowed:
            raise UserError(f"{name}.{key} {value!r}: one of {', '.join(allowed)} is needed.")
    if table.get("scale_dtype", "float16") != "float16":
        raise UserError(f"{name}.scale_dtype {table['scale_dtype']!r}: float16 is needed.")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if mode == "per_token" and (group, residual) != (-1, 0):
        raise UserError(
            f"{name}: mode per_token needs group_size -1 and residual_length 0, not {group} and {residual}."
        )
    if mode == "kivi":
        if not isinstance(group, int) or group < 8 or group % 8 or size % group:
            raise UserError(
                f"{name}.group_size {group}: mode kivi needs a multiple of 8 that divides the head size {size}."
            )
        if not isinstance(residual, int) or residual < group or residual % group:
            raise UserError(f"{name}.residual_length {residual}: mode kivi needs a multiple of group_size {group}.")
    kinds, rows = layer_types(config), table.get("layers")
    if not isinstance(rows, list | tuple) or len(rows) != len(kinds):
        found = len(rows) if isinstance(rows, list | tuple) else rows
        raise UserError(f"{name}.layers: one pair for each of the model's {len(kinds)} layers is needed, not {found}.")
    pairs = []
    for index, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        if not (isinstance(row, list | tuple) and len(row) == 2 and all(bits in BITS for bits in row)):
            raise UserError(f"{name}.layers[{index}] {row}: key and value bits of 2, 4, 8 or 16 are needed.")
        for bits in row:
            if bits < 16 and size * bits % 8:
                raise UserError(f"{name}.layers[{index}]: {bits} bits need a head size of a multiple of {8 // bits}.")
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"{name}.layers[{index}]: a layer with {kind} has no such cache.")
        if kind == "sliding_attention" and tuple(row) != (16, 16):
            raise UserError(f"{name}.layers[{index}] {row}: a layer with a sliding window needs [16, 16].")
        pairs.append(tuple(row))
    return Format(mode, group, residual, prefill), pairs


# --------------------------------------------------------------------------------------------------------------- layers


class Store:
    """The keys or the values of one layer: packed units (tokens or blocks) in buffers that grow, and a dense rest."""

    def __init__(self, bits: int, block: int):
        self.bits, self.block = bits, block  # tokens of a unit; 0: quantised by token
        self.buffers: list[Tensor] | None = None  # codes, scale, minimum
        self.units = 0
        self.dense: Tensor | None = None

    def part(self) -> Part:
        packed = [buffer[:, :, : self.units] for buffer in self.buffers] if self.units else [None] * 3
        dense = self.dense if self.dense is not None and self.dense.shape[2] or not self.units else None
        return Part(*packed, dense, self.bits)

    def append_packed(self, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        """Adds units; nothing that is there already is touched."""
        needed = self.units + tensors[0].shape[2]
        if self.buffers is None or needed > self.buffers[0].shape[2]:
            room = max(needed, int(GROWTH * self.units), LEAST_UNITS)
            grown = [t.new_empty(*t.shape[:2], room, *t.shape[3:]) for t in tensors]
            for new, old in zip(grown, self.buffers or (), strict=self.buffers is not None):
                new[:, :, : self.units] = old[:, :, : self.units]
            self.buffers = grown
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer[:, :, self.units : needed] = tensor
        self.units = needed

    def tokens(self) -> int:
        """Packed tokens."""
        return self.units * (self.block or 1)

    def apply(self, change) -> None:
        """change(tensor) -> tensor on everything that is held."""
        if self.buffers is not None:
            self.buffers = [change(buffer) for buffer in self.buffers]
        if self.dense is not None:
            self.dense = change(self.dense)

    def cut(self, tokens: int, keep_packed: int) -> None:
        """Keeps the first `tokens` tokens: `keep_packed` of them packed, what comes after that dense."""
        if keep_packed == self.tokens():
            self.dense = self.dense[:, :, : tokens - keep_packed]
            return
        unit = self.block or 1
        first, part = keep_packed // unit, self.part()
        tail = Part(*(tensor[:, :, first:] for tensor in part[:3]), None, self.bits)
        rest = dequantize(tail)[:, :, : tokens - keep_packed].to(self.dense.dtype)
        missing = tokens - keep_packed - rest.shape[2]
        self.dense = torch.cat([rest, self.dense[:, :, :missing]], 2)
        self.units = first

    def nbytes(self) -> int:
        """Bytes of what is stored, spare capacity not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.part()[:4] if tensor is not None)


@dataclass
class PackedKV:
    """What a layer hands to attention in place of keys or values when it decodes: read by "slimzoo_kv" only."""

    part: Part
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dequantize(self) -> Tensor:
        """(B, Hkv, S, D) in the model's dtype."""
        return dequantize(self.part).to(self.dtype)


class KVTunerLayer(CacheLayerMixin):
    """The cache of one layer: keys of `key_bits`, values of `value_bits` (2, 4, 8, or 16 for one of them)."""

    is_sliding = False
    is_croppable = True

    def __init__(self, key_bits: int, value_bits: int, form: Format, config):
        super().__init__()
        self.key_bits, self.value_bits, self.form, self.config = key_bits, value_bits, form, config
        self.length = 0
        by_channel = form.group_size if form.mode == "kivi" else 0
        self.stores = (Store(key_bits, by_channel), Store(value_bits, 0))

    def __repr__(self) -> str:
        return f"KVTunerLayer(K{self.key_bits}V{self.value_bits}, {self.form.mode}, {self.length} tokens)"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.dense = states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Adds tokens (B, Hkv, T, D); returns what attention is to read: all tokens, dense, or `PackedKV`s for T = 1.

        A prompt attends to its own exact keys and values unless `prefill` is "quantized", and to earlier tokens as stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        decoding, exact = key_states.shape[2] == 1, self.form.prefill == "exact"
        history = None
        if exact and not decoding and self.length:
            history = [self.dense(store) for store in self.stores]
        self.append(key_states.detach(), value_states.detach())
        if decoding and not torch.is_grad_enabled():
            if self.config._attn_implementation == ATTENTION:
                return tuple(self.handle(store) for store in self.stores)
            if not torch.compiler.is_compiling():
                logger.warning_once(SLOW)
        if decoding or not exact:
            return tuple(self.dense(store) for store in self.stores)
        if history is None:
            return key_states, value_states
        return torch.cat([history[0], key_states], 2), torch.cat([history[1], value_states], 2)

    def handle(self, store: Store) -> PackedKV:
        rows, heads, _, size = store.dense.shape
        return PackedKV(store.part(), torch.Size((rows, heads, self.length, size)), self.dtype, store.dense.device)

    def dense(self, store: Store) -> Tensor:
        """All tokens (B, Hkv, S, D) as stored, in the model's dtype."""
        return dequantize(store.part()).to(self.dtype)

    @torch.no_grad()
    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Quantises what is complete: every token (per_token), or whole blocks (kivi)."""
        self.length += key_states.shape[2]
        packed = self.length - self.length % (self.form.residual_length or 1)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            waiting = torch.cat([store.dense, states], 2) if store.dense.shape[2] else states
            ready = 0 if store.bits == 16 else packed - store.tokens()
            if ready > 0:
                store.append_packed(self.quantized(store, waiting[:, :, :ready]))
            store.dense = waiting[:, :, ready:] if ready <= 0 else waiting[:, :, ready:].clone()

    def quantized(self, store: Store, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not store.block:
            return quantize_tokens(states, store.bits, self.form.group_size)
        if self.form.padding is not None:
            start, tokens = store.tokens(), states.shape[2]
            real = self.form.padding[:, start : start + tokens]
            real = torch.nn.functional.pad(real, (0, tokens - real.shape[1]), value=True)  # newer than the mask
            states = within_real(states, real, store.block)
        return quantize_channels(states, store.bits, store.block)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.__init__(self.key_bits, self.value_bits, self.form, self.config)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens; of a block that is cut the rest becomes dense again."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): minus the number of tokens to forget is needed")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.length = max(0, self.length + tokens_to_remove)
        packed = self.length - self.length % (self.form.residual_length or 1)
        for store in self.stores:
            store.cut(self.length, 0 if store.bits == 16 else packed)

    def apply(self, change) -> None:
        for store in self.stores:
            store.apply(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.apply(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        self.apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def nbytes(self) -> int:
        return sum(store.nbytes() for store in self.stores) if self.is_initialized else 0


def within_real(states: Tensor, real: Tensor, block: int) -> Tensor:
    """states (B, Hkv, T, D) with tokens that are not `real` (B, T) moved into the range of their block's real ones."""
    if real.all():
        return states
    blocks = states.unflatten(2, (-1, block))
    shown = real.to(states.device).unflatten(1, (-1, block))[:, None, :, :, None]
    low = blocks.masked_fill(~shown, torch.inf).amin(3, keepdim=True)
    high = blocks.masked_fill(~shown, -torch.inf).amax(3, keepdim=True)
    inside = torch.where(low <= high, blocks.clamp(low, high), 0)  # a block of padding alone: any range will do
    return torch.where(shown, blocks, inside).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------- cache


class KVTunerCache(Cache):
    """The cache of a whole model; see `from_config`. `generate`, beams, crop, chunked prefill, batches as DynamicCache."""

    def __init__(self, layers: list[CacheLayerMixin], form: Format):
        super().__init__(layers=layers)
        self.form = form

    @classmethod
    def from_config(cls, config, table: dict | None = None) -> "KVTunerCache":
        """An empty cache for a model's config; table: as `kv_cache_quantization`, by default the config's own.

        Raises: UserError if the table is not for this model, or there is none.
        """
        config = config.get_text_config(decoder=True)
        table = getattr(config, "kv_cache_quantization", None) if table is None else table
        if table is None:
            raise UserError("the config has no kv_cache_quantization: pass a table.")
        form, pairs = check_table(config, table)
        layers = []
        for pair, kind in zip(pairs, layer_types(config), strict=True):
            if kind == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(sliding_window=config.sliding_window))
            elif pair == (16, 16):
                layers.append(DynamicLayer())
            else:
                layers.append(KVTunerLayer(*pair, form, config))
        return cls(layers, form)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        for layer in self.layers:
            if layer.is_initialized:
                return len(layer.stores[0].dense if isinstance(layer, KVTunerLayer) else layer.keys)
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values as stored, spare capacity of buffers not counted."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, KVTunerLayer):
                total += layer.nbytes()
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def reset(self) -> None:
        super().reset()
        self.form.padding = None

    def save(self, path: str | Path) -> None:
        """The state of a conversation as one safetensors file, to go on from with `load`.

        Raises: UserError if it could not be loaded again (layers of several lengths, numbers that are not finite), or the
        file cannot be written.
        """
        lengths = sorted({layer.get_seq_length() for layer in self.layers})
        if len(lengths) > 1:
            raise UserError(f"{path}: the layers hold {' and '.join(map(str, lengths))} tokens; as many are needed.")
        tensors = {}
        if lengths[0]:
            for index, layer in enumerate(self.layers):
                tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in _stored(layer).items()}
            _check_finite(path, tensors)
            if self.form.padding is not None:
                tensors["padding"] = self.form.padding.contiguous()
        partial = Path(f"{path}.part")
        try:
            facts = SAVED | {"layers": str(len(self.layers)), "tokens": str(lengths[0])}
            save_file(tensors, partial, metadata=facts)
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{path} cannot be written ({error}).") from None

    @classmethod
    def load(cls, path: str | Path, config, table: dict | None = None, device="cpu") -> "KVTunerCache":
        """The cache that `save` wrote, for the same model and table.

        Names, shapes and dtypes of all tensors follow from the model, the table and the number of tokens and are compared
        with that; then every code has a place and every byte is a valid code, so that kernels need not look again.
        Raises: UserError, naming what is wrong, if the file is damaged, incomplete, or of another model or table.
        """
        cache = cls.from_config(config, table)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): a file of KVTunerCache.save is needed.") from None
        tokens = _saved_tokens(path, facts, len(cache.layers))
        padding = tensors.pop("padding", None)
        if not tokens and not tensors:
            return cache
        rows = _check_tensors(path, tensors, cache.layers, config.get_text_config(decoder=True), tokens)
        _check_finite(path, tensors)
        if padding is not None and not (padding.dtype == torch.bool and padding.ndim == 2 and len(padding) == rows):
            raise UserError(f"{path}: padding is {_described(padding)}; bool of {rows} rows is needed.")
        cache.form.padding = padding
        for index, layer in enumerate(cache.layers):
            _restore(layer, {name: tensors[f"{index}.{name}"] for name in _shapes(layer, tokens, 1, 1, 1)}, tokens)
        return cache


# ------------------------------------------------------------------------------------------------- saving and loading


def _stored(layer: CacheLayerMixin) -> dict[str, Tensor]:
    """{"keys.codes": tensor, …} of an initialised layer, without spare capacity."""
    if not isinstance(layer, KVTunerLayer):
        kept = layer.sliding_window - 1 if layer.is_sliding else layer.get_seq_length()
        return {"keys.dense": layer.keys[:, :, -kept:], "values.dense": layer.values[:, :, -kept:]}
    stored = {}
    for name, store in zip(("keys", "values"), layer.stores, strict=True):
        stored[f"{name}.dense"] = store.dense
        if store.units:
            packed = zip(PARTS, store.part()[:3], strict=True)
            stored |= {f"{name}.{part}": tensor for part, tensor in packed}
    return stored


def _restore(layer: CacheLayerMixin, stored: dict[str, Tensor], tokens: int) -> None:
    """Fills an empty layer with what `_stored` gave."""
    layer.lazy_initialization(stored["keys.dense"], stored["values.dense"])
    if not isinstance(layer, KVTunerLayer):
        layer.keys, layer.values = stored["keys.dense"], stored["values.dense"]
        if layer.is_sliding:
            layer.cumulative_length = tokens
        return
    layer.length = tokens
    for name, store in zip(("keys", "values"), layer.stores, strict=True):
        store.dense = stored[f"{name}.dense"]
        if f"{name}.codes" in stored:
            store.buffers = [stored[f"{name}.{part}"] for part in PARTS]
            store.units = store.buffers[0].shape[2]


def _shapes(layer: CacheLayerMixin, tokens: int, rows: int, heads: int, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all that `_stored` gives for a layer of `tokens` tokens, in order."""
    if not isinstance(layer, KVTunerLayer):
        kept = min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens
        return {"keys.dense": (rows, heads, kept, size), "values.dense": (rows, heads, kept, size)}
    shapes, form = {}, layer.form
    for name, store in zip(("keys", "values"), layer.stores, strict=True):
        packed = 0 if store.bits == 16 else tokens - tokens % (form.residual_length or 1)
        shapes[f"{name}.dense"] = (rows, heads, tokens - packed, size)
        if packed and store.block:  # by channel
            units = packed // store.block
            shapes[f"{name}.codes"] = (rows, heads, units, store.block * store.bits // 8, size)
            shapes[f"{name}.scale"] = shapes[f"{name}.minimum"] = (rows, heads, units, size)
        elif packed:
            groups = 1 if form.group_size == -1 else size // form.group_size
            shapes[f"{name}.codes"] = (rows, heads, packed, size * store.bits // 8)
            shapes[f"{name}.scale"] = shapes[f"{name}.minimum"] = (rows, heads, packed, groups)
    return shapes


def _saved_tokens(path: str | Path, facts: dict[str, str], layers: int) -> int:
    """How many tokens a saved cache holds, from its metadata; UserError if that is none of `save`, or of other layers."""
    counts = [facts.get(key, "") for key in ("layers", "tokens")]
    known = all(facts.get(key) == value for key, value in SAVED.items())
    if not known or not all(count.isdecimal() and len(count) < 19 for count in counts):
        raise UserError(f"{path} does not say that it is a saved cache: a file of KVTunerCache.save is needed.")
    if int(counts[0]) != layers:
        raise UserError(f"{path}: it holds {counts[0]} layers, the model has {layers}.")
    return int(counts[1])


def _check_tensors(path: str | Path, tensors: dict[str, Tensor], layers: list, config, tokens: int) -> int:
    """The number of rows; UserError if the tensors are not exactly those of such layers after `tokens` tokens."""
    first = tensors.get("0.keys.dense")
    rows = len(first) if first is not None and first.ndim else 0
    dtype = first.dtype if first is not None and first.dtype in DTYPES else torch.float32
    wanted = {}
    for index, (layer, own) in enumerate(zip(layers, config.per_layer_config, strict=True)):
        heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        size = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        for name, shape in _shapes(layer, tokens, max(rows, 1), heads, size).items():
            kind = {"codes": torch.uint8, "dense": dtype}.get(name.rpartition(".")[2], torch.float16)
            wanted[f"{index}.{name}"] = (shape, kind)
    other = "it was saved with another table or for another model, or is damaged"
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        raise UserError(f"{path} {'lacks' if odd[0] in wanted else 'has a tensor'} {odd[0]}: {other}.")
    for name, (shape, kind) in wanted.items():
        if (tuple(tensors[name].shape), tensors[name].dtype) != (shape, kind):
            needed = f"{str(kind).removeprefix('torch.')} {shape}"
            raise UserError(f"{path}: {name} is {_described(tensors[name])}, {needed} is needed: {other}.")
    return rows


def _check_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite: such a cache cannot be gone on from.")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


# ------------------------------------------------------------------------------------------------ attention and models


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """ "slimzoo_kv": as transformers' "sdpa", but what a layer of this cache hands out is read from its codes, and dense
    keys and values are read once for all query heads where one token is decoded on a CPU without gradients."""
    packed = not isinstance(key, Tensor)
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1))
    if packed and not plain:
        key, value, packed = key.dequantize(), value.dequantize(), False
    decoding = plain and query.shape[2] == 1 and query.is_cpu and not torch.is_grad_enabled()
    if not packed and not (decoding and key.shape == value.shape):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, tokens = query.shape[0], key.shape[2]
    mask = None if attention_mask is None else attention_mask[:, 0, 0, :tokens].expand(rows, -1)
    parts = (key.part, value.part) if packed else (Part(None, None, None, key, 16), Part(None, None, None, value, 16))
    return kv_attention(query[:, :, 0], *parts, mask=mask, scaling=scaling)[:, None], None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def give_cache(model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of a base model with `kv_cache_quantization`: makes the cache, and tells it what is padding."""
    if len(args) > 3:  # a cache by position
        return args, kwargs
    use_cache = kwargs.get("use_cache")
    name = "past_key_values" if "past_key_values" in kwargs else CACHE  # the old name is still understood
    if kwargs.get(name) is None and (model.config.use_cache if use_cache is None else use_cache):
        kwargs[name] = KVTunerCache.from_config(model.config)
    form = getattr(kwargs.get(name), "form", None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if form is not None and isinstance(mask, Tensor) and mask.ndim == 2:
        form.padding = mask.bool()
    return args, kwargs
