"""Packed layers that read the same input (q, k and v; gate and up) compute in one call when a token is decoded.

The first of them computes for all and keeps what the others will ask for: for this very tensor, unchanged, on this thread.
Whoever gets another tensor (an adapter's cast, a hook's change) computes alone, so results never depend on it.
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
    """Products that siblings have not asked for yet, by their place, and the x they are of, which is not kept alive."""

    def __init__(self, group: "Siblings", x: Tensor, products: list[Tensor]):
        self.group, self.x, self.version = group, weakref.ref(x), x._version
        self.products = dict(enumerate(products))


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
            if kept is None or kept.group is not self or kept.x() is not x or kept.version != x._version:
                return None
            y = kept.products.pop(self.layers.index(layer), None)
            if not kept.products:
                _kept.last = None
            return y
        if kept is not None:  # nobody asked for what was computed last
            kept.group.misses += 1
            _kept.last = None
        if self.misses > MISSES or not all(sibling.scales.is_cpu for sibling in self.layers):  # some may be offloaded
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
