"""Runs a decoder-only model one block at a time, so that peak memory follows the largest block, not the model.

`StreamedModel` reads blocks lazily from safetensors; `compress_blocks` is the loop that all layer-local methods share:
for every block, collect the statistics of each linear's inputs, compress its matrices, pass the hidden states on.
State is one file per matrix: a killed run recomputes the hidden states of finished blocks, which is deterministic, and
nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from recipes.common.data.base_models import check_shapes
from recipes.common.parts.pruners import LayerStats, StatsAccumulator
from zoo.cache import CACHE
from zoo.errors import UserError
from zoo.folder import open_folder
from zoo.layers.packing import dense_weight

logger = logging.get_logger(__name__)


@dataclass
class Variant:
    """One compressed form of a matrix: its packed tensors, (init, final) loss if the method has one, dense weight, and
    what config.json says of it in a checkpoint, if it can be packed.

    folded: {"columns": (d_in,), "rows": (d_out,)} if what is packed is diag(1/rows) dense diag(columns) (folding.py).
    seconds: its own share of the work, where a method makes several variants that differ in it.
    """

    tensors: dict[str, Tensor]
    losses: tuple[float, float] | None
    dense: Tensor
    spec: dict | None = None
    folded: dict[str, Tensor] = field(default_factory=dict)
    seconds: float | None = None


@dataclass
class Method:
    """A layer-local method as the loop sees it.

    compress(name, weight (d_out, d_in) fp32, stats) -> {variant name: Variant}; the first key is not special: the one
    that equals `name` is passed on unless `inputs` is "dense".
    inputs: "dense" = statistics of the dense model; "compressed" = of the blocks compressed so far (own stream);
    "sequential" = of those and of the block's own linears that come before (q, k, v, then o, gate and up, then down).
    hessian: whether `stats.hessian` is needed.
    prepare(weights, stats), {name: weight} of a block and its `InputStatistics`, runs before the block's matrices that
    share their statistics are compressed side by side.
    """

    name: str
    compress: Callable[[str, Tensor, LayerStats], dict[str, Variant]]
    inputs: str = "dense"
    hessian: bool = True
    packed: tuple[str, ...] = field(default_factory=tuple)  # variants stored packed; of the others the dense weight is
    prepare: Callable[[dict[str, Tensor], InputStatistics], None] = lambda *_: None


class StreamedModel:
    """A causal LM whose embedding runs whole and whose decoder blocks are materialised one at a time in fp32."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        check_shapes(self.path, "AutoModelForCausalLM")
        self.config = AutoConfig.from_pretrained(path)
        self.tensors = open_folder(self.path).tensors
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self.decoder = model.get_decoder()
        if not hasattr(self.decoder, "layers"):
            raise UserError(
                f"{type(model).__name__} is not supported: a decoder-only model with a list of blocks is needed."
            )
        self.layers = self.decoder.layers
        self.prefix = next(name for name, module in model.named_modules() if module is self.layers)
        self.decoder_prefix = self.prefix.removesuffix("layers")
        self.kwargs: list[dict] = []

    def __len__(self) -> int:
        return len(self.layers)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Full name -> nn.Linear of one block, in module order."""
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def embed(self, tokens: Tensor, batch: int) -> Tensor:
        """tokens (N, T) int64 -> inputs of block 0 (N, T, hidden) fp32; records each block's other arguments.

        Every block sees the same arguments for all samples (no padding, equal lengths, batches of `batch`).
        """
        decoder = self.decoder
        for name, module in decoder.named_children():
            if module is not self.layers:
                self._materialise(module, self.decoder_prefix + name)
        self._rebuild_buffers(decoder)
        self.kwargs = [{} for _ in self.layers]
        hidden = []
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(_recording(layer, self.kwargs[index]))
            norm, decoder.norm = decoder.norm, nn.Identity()
            stack.callback(setattr, decoder, "norm", norm)
            for chunk in tokens.split(batch):
                hidden.append(decoder(chunk.to(self.device), use_cache=False).last_hidden_state)
        for module in decoder.children():
            if module is not self.layers:
                module.to("meta")  # of no use any more
        return torch.cat(hidden)

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights in fp32 on the device."""
        layer = self.layers[index]
        self._materialise(layer, f"{self.prefix}.{index}")
        return layer

    def free_block(self, index: int) -> None:
        self.layers[index].to("meta")

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        state = {}
        for name, _ in module.named_parameters():
            state[name] = self.tensors.get(f"{prefix}.{name}").to(self.device, torch.float32)
        module.load_state_dict(state, assign=True, strict=False)
        module.eval().requires_grad_(False)

    def _rebuild_buffers(self, decoder: nn.Module) -> None:
        """Buffers that are computed, not stored (rotary frequencies), are made anew outside the meta device."""
        for name, module in list(decoder.named_modules()):
            if module is decoder or not any(b.is_meta for b in module.buffers(recurse=False)):
                continue
            parent = decoder.get_submodule(name.rpartition(".")[0]) if "." in name else decoder
            if hasattr(module, "rope_type") or "rotary" in name:
                setattr(parent, name.rpartition(".")[2], type(module)(config=self.config).to(self.device))
            elif hasattr(module, "embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=self.device)
            else:
                raise UserError(f"{type(decoder).__name__}: the computed buffers of {name} are not supported.")


@contextlib.contextmanager
def _recording(layer: nn.Module, kwargs: dict) -> Iterator[None]:
    """Replaces the block's forward by one that keeps its arguments and hands the hidden states through."""

    def forward(hidden_states: Tensor, **given: object) -> Tensor:
        kwargs.update({k: v for k, v in given.items() if k not in (CACHE, "use_cache")})
        return hidden_states

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict, batch: int) -> Tensor:
    """hidden (N, T, d) -> the block's output (N, T, d), `batch` samples at a time."""
    out = torch.empty_like(hidden)
    for start in range(0, len(hidden), batch):
        result = block(hidden[start : start + batch], **kwargs)
        out[start : start + batch] = result[0] if isinstance(result, tuple) else result
    return out


class _AllReached(Exception):
    """Ends a forward pass of which the rest is not needed."""


class InputStatistics:
    """Accumulates x x^T (or x^2 only) of the inputs of the named linears; linears that share an input share the sums."""

    def __init__(self, block: nn.Module, linears: dict[str, nn.Linear], hessian: bool):
        self.block, self.linears, self.hessian = block, linears, hessian
        self.leader: dict[str, str] = {}  # linear -> the first linear that has the same input
        self.sums: dict[str, StatsAccumulator] = {}

    def run(self, hidden: Tensor, kwargs: dict, batch: int) -> Tensor:
        out = torch.empty_like(hidden)
        for start in range(0, len(hidden), batch):
            part = slice(start, start + batch)
            out[part], inputs = self._inputs(hidden[part], kwargs)
            self._add(inputs)
        return out

    def collect(self, hidden: Tensor, kwargs: dict, batch: int) -> None:
        """As `run`, but the block runs only as far as its last linear of interest."""
        for part in hidden.split(batch):
            self._add(self._inputs(part, kwargs, stop=True)[1])

    def _add(self, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            if name not in self.sums:
                self.sums[name] = StatsAccumulator(x.shape[-1], hessian=self.hessian)
            self.sums[name].add(x)

    def _inputs(self, hidden: Tensor, kwargs: dict, stop: bool = False) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One batch through the block: its output (None when it was stopped once all linears had been reached), and the
        input of every group of linears under its leader's name."""
        seen: dict[str, Tensor] = {}
        reached: set[str] = set()

        def hook(name: str):
            def record(_, args):
                x = args[0]
                if name not in self.leader:
                    self.leader[name] = next((other for other, y in seen.items() if y is x), name)
                if self.leader[name] == name:
                    seen[name] = x
                reached.add(name)
                if stop and len(reached) == len(self.linears):
                    raise _AllReached

            return record

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in self.linears.items()]
        try:
            result = self.block(hidden, **kwargs)
        except _AllReached:
            return None, seen
        finally:
            for handle in handles:
                handle.remove()
        return (result[0] if isinstance(result, tuple) else result), seen

    def stats(self, name: str) -> LayerStats:
        return self.sums[self.leader[name]].stats()

    def groups(self, hidden: Tensor, kwargs: dict) -> list[list[str]]:
        """The linears by shared input, in the order of execution; hidden (1, T, d) is any sample."""
        _, seen = self._inputs(hidden, kwargs)
        return [[name for name, leader in self.leader.items() if leader == first] for first in seen]


# ---------------------------------------------------------------------------------------------------------- the loop


class MatrixStore:
    """One safetensors file per (method, matrix) under `folder`; a file appears whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, method: str, module: str) -> Path:
        return self.folder / method / f"{module}.safetensors"

    def has(self, method: str, module: str) -> bool:
        return self.path(method, module).exists()

    def save(self, method: Method, module: str, variants: dict[str, Variant], facts: dict[str, dict]) -> None:
        path = self.path(method.name, module)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, variant in variants.items():
            if name in method.packed:
                tensors |= {f"{name}/{key}": tensor.contiguous().cpu() for key, tensor in variant.tensors.items()}
                tensors |= {f"folded/{name}/{key}": tensor for key, tensor in variant.folded.items()}
                facts[name] |= {"spec": variant.spec, "shape": list(variant.dense.shape)}
            else:
                tensors[f"{name}/weight"] = variant.dense.to(torch.bfloat16).contiguous().cpu()
        partial = path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
        partial.replace(path)

    def tensors(self, method: str, module: str, variant: str) -> dict[str, Tensor]:
        """The packed tensors of one variant."""
        return self._below(method, module, f"{variant}/")

    def folded(self, method: str, module: str, variant: str) -> dict[str, Tensor]:
        """`Variant.folded` of one variant."""
        return self._below(method, module, f"folded/{variant}/")

    def _below(self, method: str, module: str, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.path(method, module), "pt") as f:
            keys = [k for k in f.keys() if k.startswith(prefix)]  # noqa: SIM118
            return {k.removeprefix(prefix): f.get_tensor(k) for k in keys}

    def weight(self, method: str, module: str, variant: str) -> Tensor:
        """The dense weight of one variant, in the place of the base model's: what a packed one multiplies out to, fp32,
        with what is folded undone; otherwise as stored, bf16."""
        tensors, facts = self.tensors(method, module, variant), self.facts(method, module)[variant]
        if not facts.get("spec"):
            return tensors["weight"]
        weight, folded = (
            dense_weight(module, facts["spec"], tensors, facts["shape"]),
            self.folded(method, module, variant),
        )
        return weight * folded["rows"][:, None] / folded["columns"] if folded else weight

    def facts(self, method: str, module: str) -> dict[str, dict]:
        """variant -> {loss_init, loss_final, output_error, seconds, and of a packed one spec and shape}."""
        with safe_open(self.path(method, module), "pt") as f:
            return json.loads(f.metadata()["facts"])


def output_error(weight: Tensor, compressed: Tensor, hessian: Tensor | None) -> float | None:
    """tr((W_hat - W) H (W_hat - W)^T) / tr(W H W^T): relative squared error of the layer's output; 0 where there is none,
    whether or not there is an output."""
    if hessian is None:
        return None
    delta = compressed - weight
    error, size = (torch.sum(matrix @ hessian * matrix).item() for matrix in (delta, weight))
    return error / size if error else 0.0


def select_linears(model: StreamedModel, index: int, include: str, ignore: list[str]) -> dict[str, nn.Linear]:
    """The linears of a block that a recipe compresses: full name matches `include` and holds no `ignore` part."""
    return {
        name: module
        for name, module in model.linears(index).items()
        if re.search(include, name) and not any(part in name for part in ignore)
    }


@torch.no_grad()
def compress_blocks(
    model: StreamedModel,
    tokens: Tensor,
    methods: list[Method],
    store: MatrixStore,
    *,
    include: str = "",
    ignore: list[str] = (),
    batch: int = 4,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    blocks: range | None = None,
    observe: Callable[[int, dict[str, Tensor], Tensor, Tensor], None] = lambda *_: None,
) -> None:
    """Runs `methods` over all blocks; afterwards `store` holds every (method, matrix).

    Args: tokens (N, T) calibration windows; `workers` matrices are compressed side by side, each on one thread, so
    that results depend neither on `workers` nor on `world` (ranks share out the matrices and meet at `barrier`).
    observe(block index, {name: weight}, inputs (N, T, d), outputs (N, T, d)) sees the dense model's hidden states before
    a block's first matrix is stored.
    """
    blocks = blocks or range(len(model))
    modules = [name for index in blocks for name in select_linears(model, index, include, ignore)]
    if all(store.has(method.name, name) for method in methods for name in modules):
        return  # a resumed run that was interrupted later
    keep_freed_memory()
    streams = {"dense": model.embed(tokens, batch)}
    for method in methods:
        if method.inputs != "dense":
            streams[method.name] = streams["dense"].clone()
    progress = tqdm(blocks, desc="blocks", disable=None if rank == 0 else True)
    for index in progress:
        started = time.perf_counter()
        block = model.load_block(index)
        linears = select_linears(model, index, include, ignore)
        weights = {name: module.weight.detach() for name, module in linears.items()}
        kwargs = model.kwargs[index]
        dense_stats, dense_out = _statistics(
            block, linears, streams["dense"], kwargs, batch, store, [m for m in methods if m.inputs == "dense"]
        )
        observe(index, weights, streams["dense"], dense_out)
        sample, streams["dense"] = streams["dense"][:1].clone(), dense_out  # the inputs are not needed any more
        del dense_out
        results = []
        for method in methods:
            stats, own = dense_stats, method.inputs != "dense"
            groups = [list(linears)]
            if method.inputs == "sequential":
                groups = InputStatistics(block, linears, hessian=False).groups(sample, kwargs)
            for group in groups:
                if own and not all(store.has(method.name, name) for name in group):
                    part = {name: linears[name] for name in group}
                    stats = InputStatistics(block, part, hessian=method.hessian)
                    stats.collect(streams[method.name], kwargs, batch)
                mine = [name for name in group[rank::world] if not store.has(method.name, name)]
                if mine:
                    method.prepare(weights, stats)
                _compress(method, mine, weights, stats, store, workers)
                barrier()
                for name in group if own else ():
                    linears[name].weight.data = store.weight(method.name, name, method.name).to(weights[name])
            if own:
                streams[method.name] = run_block(block, streams[method.name], kwargs, batch)
                for name, module in linears.items():
                    module.weight.data = weights[name]
            errors = [store.facts(method.name, name)[method.name]["output_error"] for name in linears]
            results.append((method.name, [e for e in errors if e is not None]))
        model.free_block(index)
        del dense_stats, stats  # before those of the next block
        line = "  ".join(f"{name} err {sum(errors) / len(errors):.2e}" for name, errors in results if errors)
        if rank == 0:
            seconds = time.perf_counter() - started
            progress.write(f"block {index + 1}/{len(model)}  {line}  {seconds:.1f} s")


def keep_freed_memory() -> None:
    """Makes glibc keep freed tensors instead of giving them back: two threads that do nothing but fault the same pages
    in again run no faster than one (45 against 22 ms per iteration of ARMOR on 1536 x 576, side by side)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Gives the system what `keep_freed_memory` kept: between matrices of different shapes it would only pile up (a 7B
    shape's peak was 7.8 GiB in its first block and 8.9 by its third)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _statistics(block, linears, hidden, kwargs, batch, store, methods):
    """(statistics or None if nothing is left to compress in this block, the block's dense output)."""
    todo = [m for m in methods if any(not store.has(m.name, name) for name in linears)]
    if not todo:
        return None, run_block(block, hidden, kwargs, batch)
    collected = InputStatistics(block, linears, hessian=any(m.hessian for m in todo))
    return collected, collected.run(hidden, kwargs, batch)


def _compress(method, names, weights, stats, store, workers) -> None:
    """Compresses the named matrices, largest first, `workers` at a time on one thread each, and stores them."""

    def one(name: str) -> None:
        if threaded:
            torch.set_num_threads(1)
        weight, layer_stats = weights[name], stats.stats(name)
        started = time.perf_counter()
        with torch.no_grad():
            variants = method.compress(name, weight, layer_stats)
        seconds = time.perf_counter() - started
        facts = {}
        for variant_name, variant in variants.items():
            loss_init, loss_final = variant.losses or (None, None)
            facts[variant_name] = {
                "loss_init": loss_init,
                "loss_final": loss_final,
                "output_error": output_error(weight, variant.dense, layer_stats.hessian),
                "seconds": seconds if variant.seconds is None else variant.seconds,
            }
        store.save(method, name, variants, facts)
        del variants, variant, layer_stats
        return_freed_memory()

    names = sorted(names, key=lambda name: -weights[name].numel())
    threads = torch.get_num_threads()
    threaded = weights[names[0]].device.type == "cpu" if names else False
    try:
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            list(pool.map(one, names))
    finally:
        torch.set_num_threads(threads)
