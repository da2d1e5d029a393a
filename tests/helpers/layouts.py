"""Tensors that hold the same numbers and lie otherwise in memory.

torch has no negative strides: `flip` copies, and numpy's are refused.
"""

import torch

LAYOUTS = ("contiguous", "strided", "offset", "transposed", "expanded")


def relaid(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`tensor` in another layout, among numbers that nobody may read: NaN, or the largest integer.

    strided: every second number of a row. offset: off its beginning, not aligned. transposed: the last axis varies
    slowest; of a vector, a column. expanded: its first row over and over (stride 0), so these are other numbers.
    """
    if layout == "expanded":
        return tensor[:1].expand_as(tensor) if len(tensor) else tensor
    if layout == "transposed" and tensor.ndim > 1:
        axes = tuple(range(tensor.ndim))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)
    foreign = float("nan") if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else None
    foreign = torch.iinfo(tensor.dtype).max if foreign is None else foreign
    if layout == "contiguous":
        return tensor
    if layout == "offset":
        view = tensor.new_full((tensor.numel() + 7,), foreign)[3 : 3 + tensor.numel()].view(tensor.shape)
    else:
        step = 3 if layout == "transposed" else 2
        view = tensor.new_full((*tensor.shape[:-1], step * tensor.shape[-1] + 1), foreign)[..., 1::step]
    return view.copy_(tensor)
