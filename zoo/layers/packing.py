"""Swap the linears and convolutions of a model for packed layers, as the config of a checkpoint says."""

import math

import torch
from torch import Tensor, nn

from ..errors import UserError
from .armor import ArmorLinear
from .base import PackedLayer
from .bitmask import BitmaskConv2d, BitmaskLinear
from .block_sparse import BlockSparseLinear
from .packed_bits import PackedBitsLinear
from .seeded_bitmask import SeededBitmaskConv2d, SeededBitmaskLinear
from .siblings import join_siblings

FORMATS = [  # every weight format; one of convolutions has the name and the bytes of one of linears
    *(ArmorLinear, BitmaskLinear, BlockSparseLinear, PackedBitsLinear, SeededBitmaskLinear),
    *(BitmaskConv2d, SeededBitmaskConv2d),
]


def pack_layers(model: nn.Module, modules: dict[str, dict]) -> None:
    """Replace the layers of `model` named in `modules` by empty packed ones of the same shape, bias, dtype and device.

    modules: {"layers.0.mlp.up_proj": {"format": "armor", "block_in": 64, "block_out": 64, "pattern": [2, 4]}, ...} as
    in `compression_config["modules"]`. A meta model stays on meta.
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


def filled_layer(name: str, like: nn.Linear | nn.Conv2d, spec: dict, parts: dict[str, Tensor]) -> PackedLayer:
    """The packed layer in the place of `like`, a layer of its shape and bias on the meta device, that holds `parts`.

    Raises: UserError naming the module for what `pack_layers` refuses, tensors that are missing, unknown or wrongly shaped,
    and contents that its `validate` refuses.
    """
    layer = _packed_like(name, like, spec)
    try:
        layer.load_state_dict(parts, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None
    layer.validate(name)
    return layer


def dense_weight(name: str, spec: dict, parts: dict[str, Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
    """The dense weight of one packed module, multiplied out in fp32 by its own layer.

    Args:
        spec: what config.json says of the module. parts: its packed tensors without the bias, in any float dtype.
        shape: of the weight, 2 numbers or a convolution's 4. Needed where the packed tensors do not tell it: of
            unstructured masks, whose rows are padded, of blocks, which may reach beyond the matrix, and of seeded masks.
    Returns: fp32, of that shape. Raises: UserError as `filled_layer`, and for a shape that is needed.
    """
    shape = shape or _format_class(name, spec, nn.Linear).dense_shape(spec, parts)
    if shape is None:
        raise UserError(f"{name}: tensors of format {spec['format']} do not tell the weight's shape, which is needed.")
    like = nn.Linear(math.prod(shape[1:]), shape[0], bias=False, device="meta", dtype=torch.float32)
    floats = {part: tensor.float() if tensor.is_floating_point() else tensor for part, tensor in parts.items()}
    return filled_layer(name, like, spec, floats).dense_weight().view(shape)


def row_bytes(row: dict, itemsize: int) -> int:
    """Bytes of one packed matrix without its bias, whose numbers take `itemsize` bytes each, from its row in a report's
    `layers` alone. Raises: UserError for an unknown format."""
    return _format_class(row.get("name", "a row"), row).bytes_of(row, itemsize)


def format_keys() -> dict[str, type | list[type]]:
    """{"key?": type, or [type] of its items}: what all formats together say of a matrix, each of them a part of it."""
    return {f"{key.removesuffix('?')}?": kind for layer_class in FORMATS for key, kind in layer_class.keys.items()}


def _format_class(name: str, spec: dict, kind: type = nn.Module) -> type[PackedLayer]:
    """The class of the spec's format for that kind of layers; UserError naming the module if there is none."""
    formats = {layer_class.format: layer_class for layer_class in FORMATS if issubclass(layer_class, kind)}
    if not isinstance(spec, dict):
        raise UserError(f"{name}: {spec!r} is no weight format: a mapping with the key 'format' is needed.")
    if not isinstance(spec.get("format"), str) or spec["format"] not in formats:
        noun = {nn.Linear: "linear layer", nn.Conv2d: "convolution"}.get(kind, "layer")
        raise UserError(
            f"{name}: weight format {spec.get('format')!r} is unknown for a {noun}; one of {', '.join(formats)} is needed."
        )
    return formats[spec["format"]]


def _is_of(value, kind: type | list[type]) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and all(_is_of(item, kind[0]) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _packed_like(name: str, layer: nn.Linear | nn.Conv2d, spec: dict) -> PackedLayer:
    layer_class = _format_class(name, spec, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear)
    keys = {key: value for key, value in spec.items() if key != "format"}
    required = {key for key in layer_class.keys if not key.endswith("?")}
    optional = {key.removesuffix("?") for key in layer_class.keys} - required
    if not required <= keys.keys() <= required | optional:
        raise UserError(
            f"{name}: format {spec['format']} with keys {sorted(keys)}: {sorted(required)} are needed and "
            f"{sorted(optional)} are allowed; a newer slimzoo may be."
        )
    for key, value in keys.items():
        kind = layer_class.keys.get(key) or layer_class.keys[f"{key}?"]
        if not _is_of(value, kind):
            wanted = f"a list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            raise UserError(f"{name}: format {spec['format']} with {key} {value!r}: {wanted} is needed.")
    if isinstance(layer, nn.Conv2d):
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        keys |= {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    else:
        shape = (layer.in_features, layer.out_features)
    like = {"bias": layer.bias is not None, "dtype": layer.weight.dtype, "device": layer.weight.device}
    try:
        packed = layer_class(*shape, **like, **keys)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {str(error).rstrip('.')}.") from None
    return packed.train(layer.training)
