"""What every packed layer shares: it takes the place of an nn.Linear or nn.Conv2d and computes a dense weight only on
request."""

from typing import ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UserError


class DenseView(torch.Tensor):
    """The dense weight of a packed layer: shape, dtype and device are free, the numbers are computed by the operation
    that reads them, and writing is refused because nothing would keep what is written.

    Adapters (peft) look at `layer.weight` of every linear layer for its device and dtype; a real tensor would be
    decompressed for each look, and `weight.data += update` (peft's merge) would be lost without a word.
    """

    @staticmethod
    def __new__(cls, layer):
        return torch.Tensor._make_wrapper_subclass(cls, layer.weight_shape, dtype=layer.dtype, device=layer.device)

    def __init__(self, layer):
        self.layer = layer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            _refuse_write()
        args, kwargs = tree_map(lambda x: x.layer.dense_weight() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def data(self):
        return self.layer.dense_weight()

    @data.setter
    def data(self, value):
        _refuse_write()

    def __repr__(self):
        return f"DenseView({tuple(self.shape)}, {self.dtype}, {self.device})"


def _refuse_write():
    raise UserError(
        "the weight of a packed layer cannot be changed, so an adapter cannot be merged into it: keep the adapter "
        "unmerged, or export the checkpoint dense first"
    )


class PackedTensor(nn.Parameter):
    """A tensor of whole numbers in a packed layer. Adapters that copy a layer to train it (peft's modules_to_save) ask
    every tensor of it for gradients: the answer is one sentence.
    """

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise UserError(
                "a packed layer cannot be trained as a whole, as modules_to_save would: leave it out, give it an adapter of "
                "its own (target_modules), or export the checkpoint dense first."
            )
        return self


class PackedLayer:
    """Mixed in before nn.Linear or nn.Conv2d: to whoever asks (peft does) it is one, without its weight.

    Tensors are frozen parameters rather than buffers: so device maps may offload them and `dtype=` casts the floats,
    while uint8 masks keep their type. Subclasses define `weight_shape`, `product(x) -> y` for x of the layer's dtype,
    `dense_weight() -> weight_shape`, `reset_parameters()` (a valid packing of the zero matrix) and `validate(name)`, which
    raises UserError.

    A weight format is one such class, or one for linears and one for convolutions, that packing.py lists. All that is to be
    known of the format is stated there: `format`, its name in config.json; `keys`, what config.json says of a matrix
    besides, {name: type, or [type] of every item}, where a name with "?" may be absent; `values_name`, the tensor that has
    the model's dtype; `bytes_of`; and `dense_shape`, if the tensors give it away. The tensors are those that are added.
    """

    format: ClassVar[str]
    keys: ClassVar[dict[str, type | list[type]]]
    values_name: ClassVar[str]

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Bytes of a packed matrix without its bias, whose numbers take `itemsize` bytes each, from its row of a report:
        `d_out`, `d_in` and the format's keys."""
        raise NotImplementedError

    @staticmethod
    def dense_shape(spec: dict, parts: dict[str, torch.Tensor]) -> tuple[int, int] | None:
        """(d_out, d_in) of the matrix that the tensors `parts` are the packing of; None if they do not tell."""
        return None

    def __init__(self):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self._is_hf_initialized = True  # transformers initialises layers at random while loading: not this one

    def add_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, device) -> None:
        """Register a frozen, uninitialised tensor."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def freeze(self) -> None:
        """Ask for no gradients any more: what a loaded layer is like."""
        for name, tensor in self.named_parameters(recurse=False):
            kind = nn.Parameter if tensor.is_floating_point() else PackedTensor
            self._parameters[name] = kind(tensor.data, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)  # autocast hands over other types
        if torch.is_autocast_enabled(x.device.type):  # it would reach into the operation and undo its fp32 sums
            with torch.autocast(x.device.type, enabled=False):
                return self.product(x)
        return self.product(x)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self, self.values_name).dtype

    @property
    def device(self) -> torch.device:
        return getattr(self, self.values_name).device

    @property
    def weight(self) -> DenseView:
        return DenseView(self)

    def check_finite(self, name: str) -> None:
        """Raise UserError if a floating-point tensor of this layer holds NaN or Inf; `name` is the module's name."""
        for key, tensor in self._parameters.items():
            if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
                raise UserError(f"{name}.{key} holds NaN or Inf; {REBUILD}.")


class PackedLinear(PackedLayer, nn.Linear):
    """Base of the linear layers that hold packed weights: product(x: (..., in_features)) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight as a matrix."""
        return self.weight_shape


class PackedConv2d(PackedLayer, nn.Conv2d):
    """Base of the convolutions that hold packed weights: product(x: (B, in_channels, H, W)) -> (B, out_channels, H', W').

    Their formats see the weight as a matrix (d_out, d_in) = (out_channels, in_channels / groups * kh * kw).
    Args: as of nn.Conv2d; borders are padded with zeros, alike on both sides. Raises: UserError for other padding.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"
    ):
        super().__init__()
        if padding_mode != "zeros":
            raise UserError(f"padding_mode {padding_mode!r}: packed convolutions pad with zeros.")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise UserError(f"groups {groups}: a divisor of {in_channels} and {out_channels} channels is needed.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.padding_mode = groups, padding_mode
        self.kernel_size, self.stride, self.dilation = map(_pair, (kernel_size, stride, dilation))
        if isinstance(padding, str):
            spans = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
            if any(span % 2 for span in spans):
                raise UserError(f"padding {padding!r} with kernel {self.kernel_size}: packed convolutions pad evenly.")
            padding = tuple(span // 2 for span in spans)
        self.padding = _pair(padding)
        self.output_padding, self.transposed = (0, 0), False  # read by nn.Conv2d's repr

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight as a matrix."""
        return self.out_channels, self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def geometry(self) -> dict:
        """What sparse_conv2d needs to know besides tensors."""
        named = {"kernel": self.kernel_size, "stride": self.stride, "padding": self.padding}
        return named | {"dilation": self.dilation, "groups": self.groups}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[None])[0] if x.ndim == 3 else super().forward(x)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


REBUILD = "the file is damaged, download or build the checkpoint again"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor Inf: one pass, no temporaries."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # both propagate NaN


def check_pattern(in_features: int, pattern: tuple[int, int]) -> tuple[int, int]:
    """Return the N:M pattern as a tuple of ints; raise UserError unless 0 < N < M and M divides in_features."""
    n, m = pattern if len(pattern) == 2 else (0, 0)
    if not 0 < n < m or in_features % m:
        shown = ":".join(map(str, pattern)) or "[]"
        raise UserError(
            f"pattern {shown} is impossible for {in_features} inputs: N:M, N < M, M dividing them, is needed."
        )
    return n, m


def valid_mask(out_features: int, in_features: int, pattern: tuple[int, int], device) -> torch.Tensor:
    """The mask, uint8 (out_features, ceil(in_features/8)), that keeps the first N of every M columns."""
    n, m = pattern
    bits = torch.arange(in_features, device=device) % m < n
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -in_features % 8)).view(-1, 8)
    row = (bits << torch.arange(8, dtype=torch.uint8, device=device)).sum(1, dtype=torch.uint8)
    return row.repeat(out_features, 1)


def check_mask(name: str, mask: torch.Tensor, in_features: int, counts: tuple[int, int] | torch.Tensor) -> None:
    """Raise UserError naming the tensor and the place if a mask does not say what its layer needs.

    mask: uint8 (d_out, ceil(in_features/8)), bit j of byte k = column 8k+j. counts: (N, M), so that every group of M
    columns keeps N, or int64 (d_out,), the number kept in each row. Padding bits must be 0.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    if isinstance(counts, tuple) and 8 % counts[1] == 0 and in_features % 8 == 0:  # whole groups in a byte: look it up
        every_byte = torch.arange(256, device=mask.device).to(torch.uint8)
        kept = (every_byte.unsqueeze(-1) >> shifts).bitwise_and_(1).view(256, -1, counts[1]).sum(-1)
        if (kept == counts[0]).all(-1)[mask.int()].all():
            return
    step = max(1, 2**24 // max(1, 8 * mask.shape[1]))  # rows at a time: 16 MB of unpacked bits
    for start in range(0, mask.shape[0], step):
        bits = (mask[start : start + step].unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)
        if bits[:, in_features:].any():
            raise UserError(f"{name} has bits set beyond column {in_features - 1}; {REBUILD}.")
        bits = bits[:, :in_features]
        if isinstance(counts, torch.Tensor):
            group, wanted = in_features, counts[start : start + step].unsqueeze(1)
        else:
            wanted, group = counts
        kept = bits.reshape(bits.shape[0], -1, group).sum(-1)
        if (kept != wanted).any():
            row, column = (kept != wanted).nonzero()[0].tolist()
            wanted = wanted if isinstance(wanted, int) else int(wanted[row])
            raise UserError(
                f"{name} keeps {int(kept[row, column])} weights where {wanted} of {group} are needed "
                f"(row {start + row}, from column {column * group}); {REBUILD}."
            )
