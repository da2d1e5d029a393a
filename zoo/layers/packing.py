"""Swap the linears and convolutions of a model for packed layers, as the config of a checkpoint says."""

from torch import nn

from ..errors import UserError
from .armor import ArmorLinear
from .base import PackedLayer
from .bitmask import BitmaskLinear
from .bitmask_conv import BitmaskConv2d
from .block_sparse import BlockSparseLinear
from .packed_bits import PackedBitsLinear
from .seeded_bitmask import SeededBitmaskConv2d, SeededBitmaskLinear
from .siblings import join_siblings

SEEDED = {"nnz", "seed", "layer", "generator", "sha256"}

FORMATS = {
    "armor": (ArmorLinear, {"block_in", "block_out"}, {"pattern"}),
    "bitmask": (BitmaskLinear, set(), {"pattern", "nnz"}),
    "block_sparse": (BlockSparseLinear, {"block", "blocks"}, set()),
    "packed": (PackedBitsLinear, {"bits", "group_size", "zeros"}, set()),
    "seeded_bitmask": (SeededBitmaskLinear, SEEDED, set()),
}  # of linear layers: (class, keys that it needs, keys that it takes)
CONV_FORMATS = {
    "bitmask": (BitmaskConv2d, {"nnz"}, set()),
    "seeded_bitmask": (SeededBitmaskConv2d, SEEDED, set()),
}  # of convolutions


def pack_layers(model: nn.Module, modules: dict[str, dict]) -> None:
    """Replace the layers of `model` named in `modules` by empty packed ones of the same shape, bias, dtype and device.

    modules: {"layers.0.mlp.up_proj": {"format": "armor", "block_in": 64, "block_out": 64, "pattern": [2, 4]}, ...} as
    in `compression_config["modules"]`; format "bitmask" takes "pattern" or "nnz". A meta model stays on meta.
    Raises: UserError naming the module for a name that is no linear layer or 2-D convolution, an unknown format,
    unknown or missing keys, or sizes that do not fit.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name, spec in modules.items():
        layer = layers.get(name)
        if layer is None or isinstance(layer, PackedLayer):
            raise UserError(f"module {name} of the compression config is not a dense layer of this model.")
        model.set_submodule(name, _packed_like(name, layer, spec))
    join_siblings(model)


def _packed_like(name: str, layer: nn.Linear | nn.Conv2d, spec: dict) -> PackedLayer:
    keys = {key: value for key, value in spec.items() if key != "format"}
    formats = CONV_FORMATS if isinstance(layer, nn.Conv2d) else FORMATS
    if spec.get("format") not in formats:
        kind = "convolution" if formats is CONV_FORMATS else "linear layer"
        raise UserError(
            f"{name}: weight format {spec.get('format')!r} is unknown for a {kind}; one of {', '.join(formats)} is needed."
        )
    layer_class, required, optional = formats[spec["format"]]
    if not required <= keys.keys() <= required | optional:
        raise UserError(
            f"{name}: format {spec['format']} with keys {sorted(keys)}: {sorted(required)} are needed and "
            f"{sorted(optional)} are allowed; a newer slimzoo may be."
        )
    if isinstance(layer, nn.Conv2d):
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        keys |= {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    else:
        shape = (layer.in_features, layer.out_features)
    like = {"bias": layer.bias is not None, "dtype": layer.weight.dtype, "device": layer.weight.device}
    try:
        packed = layer_class(*shape, **like, **keys)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    return packed.train(layer.training)
