"""Swap the nn.Linears of a model for packed layers, as the config of a checkpoint says."""

from torch import nn

from ..errors import UserError
from .armor import ArmorLinear
from .bitmask import BitmaskLinear
from .block_sparse import BlockSparseLinear
from .packed_bits import PackedBitsLinear
from .packed_linear import PackedLinear

FORMATS = {
    "armor": (ArmorLinear, {"block_in", "block_out"}, {"pattern"}),
    "bitmask": (BitmaskLinear, set(), {"pattern", "nnz"}),
    "block_sparse": (BlockSparseLinear, {"block", "blocks"}, set()),
    "packed": (PackedBitsLinear, {"bits", "group_size", "zeros"}, set()),
}


def pack_linears(model: nn.Module, modules: dict[str, dict]) -> None:
    """Replace `model`'s linears named in `modules` by empty packed layers of the same shape, bias, dtype and device.

    modules: {"layers.0.mlp.up_proj": {"format": "armor", "block_in": 64, "block_out": 64, "pattern": [2, 4]}, ...} as
    in `compression_config["modules"]`; format "bitmask" takes "pattern" or "nnz". A meta model stays on meta.
    Raises: UserError naming the module for a name that is no linear layer, an unknown format, unknown or missing
    keys, or sizes that do not fit.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, spec in modules.items():
        linear = linears.get(name)
        if linear is None or isinstance(linear, PackedLinear):
            raise UserError(f"module {name} of the compression config is not a dense linear layer of this model.")
        model.set_submodule(name, _packed_like(name, linear, spec))


def _packed_like(name: str, linear: nn.Linear, spec: dict) -> PackedLinear:
    sizes = {key: value for key, value in spec.items() if key != "format"}
    if spec.get("format") not in FORMATS:
        raise UserError(
            f"{name}: weight format {spec.get('format')!r} is unknown; one of {', '.join(FORMATS)} is needed."
        )
    layer_class, required, optional = FORMATS[spec["format"]]
    if not required <= sizes.keys() <= required | optional:
        raise UserError(
            f"{name}: format {spec['format']} with keys {sorted(sizes)}: {sorted(required)} are needed and "
            f"{sorted(optional)} are allowed; a newer slimzoo may be."
        )
    try:
        packed = layer_class(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
            **sizes,
        )
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    return packed.train(linear.training)
