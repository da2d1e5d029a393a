"""Convolutional networks in which every group of channels has a width of its own, under the stock module names.

A group is a set of tensor dimensions that must stay equal: what a residual sum adds, both sides of a depth-wise
convolution. Every convolution and linear layer reads one group and writes one; its normalization goes with what it
writes. The pixels and the labels belong to no group (None).
"""

import copy

from torch import nn

from ..errors import UserError

STEMS = ("imagenet", "cifar")  # how much the first layers shrink the image
Groups = dict[str, tuple[str | None, str | None]]  # {module name: (group that it reads, group that it writes)}


class WidthsConfigMixin:
    """Mixed in before a PackedConfigMixin, beside the field `widths: dict[str, int] | None`: the width of every group
    that differs from the base, which is what the stock fields describe.
    """

    def dense_config(self):
        """The config of the model at its base widths, nothing packed."""
        config = copy.deepcopy(super().dense_config())
        config.widths = None
        return config


def base_widths(model: nn.Module, groups: Groups) -> dict[str, int]:
    """{group: width that it has in `model`}, in the order in which the groups are first written."""
    return {target: _sides(model.get_submodule(name))[1] for name, (_, target) in groups.items() if target is not None}


def resize_channels(model: nn.Module, groups: Groups, widths: dict[str, int]) -> None:
    """Replace the layers at the groups in `widths` by new ones, uninitialised, of those widths.

    Raises: UserError for a group that the model does not have, and for a width below 1.
    """
    known = base_widths(model, groups)
    for group, width in widths.items():
        if group not in known:
            raise UserError(f"config.widths names the group {group!r}: one of {', '.join(known)} is needed.")
        if width < 1:
            raise UserError(f"config.widths gives {group} the width {width}: 1 or more is needed.")
    for name, (source, target) in groups.items():
        layer = model.get_submodule(name)
        sides = _sides(layer)
        wanted = widths.get(source, sides[0]), widths.get(target, sides[1])
        if wanted == sides:
            continue
        model.set_submodule(name, _resized(layer, *wanted))
        norm_name = f"{name.rpartition('.')[0]}.normalization"
        if isinstance(layer, nn.Conv2d) and wanted[1] != sides[1]:
            norm = model.get_submodule(norm_name)
            like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
            model.set_submodule(norm_name, type(norm)(wanted[1], eps=norm.eps, momentum=norm.momentum, **like))


def _sides(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _resized(layer: nn.Conv2d | nn.Linear, width_in: int, width_out: int) -> nn.Conv2d | nn.Linear:
    like = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(width_in, width_out, **like)
    is_depthwise = layer.groups == layer.in_channels > 1
    return nn.Conv2d(
        width_in,
        width_out,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=width_in if is_depthwise else layer.groups,
        padding_mode=layer.padding_mode,
        **like,
    )
