"""Packed layers that read the same input (q, k and v; gate and up) compute in one call when a token is decoded.

The first of them computes for all and keeps what the others will ask for: for this very tensor, unchanged, on this thread.
Whoever gets another tensor (an adapter's cast, a hook's change), or has other weights by then, computes alone, so results
do not depend on it. Changes through `.data`, which torch does not count, are not seen between two siblings.
"""

import threading
import weakref

import torch
from torch import Tensor, nn

from ..kernels.ops import SKINNY
from ..kernels.packed_linear import packed_linears
from .packed_bits import PackedBitsLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what transformers' decoders call them
MISSES = 8  # products in vain, as under autocast, which casts x anew for each layer, before siblings give up
_kept = threading.local()  # .last: the latest call's `_Kept` of this thread, of whichever siblings


class _Kept:
    """Products that siblings have not asked for yet, by their place, and what they are of, which is not kept alive."""

    def __init__(self, group: "Siblings", x: Tensor, products: list[Tensor]):
        self.group, self.x = weakref.ref(group), weakref.ref(x)
        self.versions = [_versions(x, layer) for layer in group.layers]
        self.products = dict(enumerate(products))


def _versions(x: Tensor, layer: PackedBitsLinear) -> tuple[int, ...]:
    """How often what a product is made of was changed in place."""
    tensors = (x, layer.qweight, layer.scales, layer.zeros, layer.bias)
    return tuple(-1 if tensor is None else tensor._version for tensor in tensors)


class Siblings:
    """PackedBitsLinear layers of one input and one format, in the order in which their model calls them."""

    def __init__(self, layers: list[PackedBitsLinear]):
        self.layers, self.misses = layers, 0

    def product(self, layer: PackedBitsLinear, x: Tensor) -> Tensor | None:
        """The layer's product of x (..., in_features), or None: it has to compute alone."""
        if torch.is_grad_enabled() or x.is_inference() or x.numel() > SKINNY * layer.in_features or not x.is_cpu:
            return None  # gradients; no count of changes in place; long prompts, and GPUs, gain nothing
        kept = getattr(_kept, "last", None)
        if layer is not self.layers[0]:
            if kept is None or kept.group() is not self or kept.x() is not x:
                return None
            place = self.layers.index(layer)
            if kept.versions[place] != _versions(x, layer):
                return None
            y = kept.products.pop(place, None)
            if not kept.products:
                _kept.last = None
            return y
        if kept is not None:  # nobody asked for what was computed last
            _kept.last = None
            if (group := kept.group()) is not None:
                group.misses += 1
        if self.misses > MISSES:
            return None
        if not all(sib.scales.is_cpu and sib.dtype == x.dtype for sib in self.layers):  # some offloaded, some cast
            return None
        weights = [(sib.qweight, sib.scales, sib.zeros, sib.bias) for sib in self.layers]
        _kept.last = _Kept(self, x, packed_linears(x, weights, bits=layer.bits, group_size=layer.group_size))
        return _kept.last.products.pop(0)


def join_siblings(model: nn.Module) -> None:
    """Lets packed layers of one parent, one format and one input compute together."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if not all(isinstance(layer, PackedBitsLinear) for layer in layers):
                continue
            if len({(la.in_features, la.bits, la.group_size, la.zeros_kind, la.dtype) for la in layers}) == 1:
                group = Siblings(layers)
                for layer in layers:
                    layer.siblings = group
