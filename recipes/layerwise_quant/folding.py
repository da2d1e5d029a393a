"""Scales of linears' inputs, folded into what computes those inputs, so that every runtime applies them for nothing.

In a decoder block of RMSNorms, attention and a gated MLP, the input of q, k and v, and that of gate and up, is a norm's
output; that of o is a mean of v's outputs, head by head; and that of down is up's output times a function of gate's.
Columns multiplied by s are made up for by the norm's weight, or by the rows and bias of v or up, divided by s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.common.parts.pruners import LayerStats

ATTENTION, MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
LINEARS = {*ATTENTION, "self_attn.o_proj", *MLP, "mlp.down_proj"}


@dataclass(frozen=True)
class Fold:
    """Linears of one input, and the norm or linear that is divided by the scales of it; all by full name.

    heads: (key-value heads, query heads that read each) where the input is attention's, whose channels follow the query
    heads while the source's follow the others; None where they are the same. offset: the norm multiplies by it + weight.
    """

    consumers: tuple[str, ...]
    source: str
    is_norm: bool
    heads: tuple[int, int] | None = None
    offset: float = 0.0

    def to_source(self, d: Tensor) -> Tensor:
        """Means (channels of the source,) of d (d_in,)."""
        return d if self.heads is None else d.view(*self.heads, -1).mean(1).flatten()

    def to_inputs(self, s: Tensor) -> Tensor:
        """s (channels of the source,) -> (d_in,)."""
        if self.heads is None:
            return s
        return s.view(self.heads[0], 1, -1).expand(-1, self.heads[1], -1).flatten()

    def storable(self, s: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The scales nearest to s that a norm of `weight` makes up for exactly once its weight is rounded to dtype."""
        gain = self.offset + weight
        rounded = self.offset + (gain / s - self.offset).to(dtype).float()
        return torch.where((gain != 0) & (rounded != 0), gain / rounded, 1.0)


def folds_of(prefix: str, block: nn.Module, config, selected: set[str]) -> list[Fold]:
    """The folds of a decoder block of which all linears are selected; none of a block of another structure."""
    if {name for name, module in block.named_modules() if isinstance(module, nn.Linear)} != LINEARS:
        return []
    kv_heads = config.num_key_value_heads
    before_mlp = (
        "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else "post_attention_layernorm"
    )
    folds = []
    for consumers, source in (
        (ATTENTION, "input_layernorm"),
        (("self_attn.o_proj",), "self_attn.v_proj"),
        (MLP, before_mlp),
        (("mlp.down_proj",), "mlp.up_proj"),
    ):
        is_norm = source not in LINEARS
        if selected.issuperset(f"{prefix}.{name}" for name in (consumers if is_norm else (*consumers, source))):
            heads = (kv_heads, config.num_attention_heads // kv_heads) if source in ATTENTION else None
            offset = gain_of_zero(block.get_submodule(source)) if is_norm else 0.0
            names = tuple(f"{prefix}.{name}" for name in consumers)
            folds.append(Fold(names, f"{prefix}.{source}", is_norm, heads, offset))
    return folds


def gain_of_zero(norm: nn.Module) -> float:
    """What a norm whose weight is 0 multiplies by: 0, or 1 in models of the Gemma kind."""
    zero, x = torch.zeros(norm.weight.shape), torch.ones(1, *norm.weight.shape)
    return torch.func.functional_call(norm, {"weight": zero}, (x,)).mean().round().item()


def block_scales(
    folds: list[Fold],
    weights: dict[str, Tensor],
    stats: Callable[[str], LayerStats],
    norms: Callable[[str], Tensor],
    dtype: torch.dtype,
    search: Callable[..., Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """{linear: (columns (d_in,), rows (d_out,))} of one block: its weight is stored as rows^-1 W columns.

    search(weights that share an input, its statistics, fold) -> scales (channels of the fold's source,).
    norms(name) is the weight, fp32, of a norm as it is.
    """
    columns = {name: torch.ones(weight.shape[1]) for name, weight in weights.items()}
    rows = {name: torch.ones(weight.shape[0]) for name, weight in weights.items()}
    for fold in folds:
        s = search([weights[name] for name in fold.consumers], stats(fold.consumers[0]), fold)
        if fold.is_norm:
            s = fold.storable(s, norms(fold.source), dtype)
        else:
            rows[fold.source] = s
        columns |= dict.fromkeys(fold.consumers, fold.to_inputs(s))
    return {name: (columns[name], rows[name]) for name in weights}


def sources(folds: list[Fold], tensors, folded: Callable[[str], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what folding changes besides packed weights: norms, and biases of v and up.

    tensors: those of the base model. folded(linear) -> {"columns", "rows"}.
    """
    for fold in folds:
        if fold.is_norm:
            gain = fold.offset + tensors.get(f"{fold.source}.weight").float()
            yield f"{fold.source}.weight", gain / folded(fold.consumers[0])["columns"] - fold.offset
        elif f"{fold.source}.bias" in tensors:
            yield f"{fold.source}.bias", tensors.get(f"{fold.source}.bias").float() / folded(fold.source)["rows"]
