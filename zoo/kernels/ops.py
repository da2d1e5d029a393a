"""Registers our operations with torch: custom ops with shape functions and gradients, so that compile and export work."""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from transformers.utils import is_triton_available

from ..errors import UserError

NAMESPACE = "slimzoo"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SKINNY = 32  # rows of x up to which a product is read straight from the packed weight
_kept = threading.local()  # scratch memory by use
_proved = WeakTensorKeyDictionary()  # by the first of the tensors that passed a check: what they were then


def define(
    name: str,
    schema: str,
    compute: Callable,
    shape: Callable,
    dense_weight: Callable[..., Tensor] | None = None,
    gradients: Callable | None = None,
) -> Callable[..., Tensor]:
    """Defines torch.ops.slimzoo.<name> unless a copy of this code already has, and returns the op.

    Args: compute(x, *weights) -> result, to which all tensors come contiguous and on one device; shape(x, *weights) ->
    empty result; dense_weight(x, *weights) -> (d_out, d_in), which the gradient by x, then the only one there is, needs:
    grad_x = grad_y W; or gradients(grad_y, needs, x, *weights) -> one per argument, None where needs[i] is false.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        full = _register(name, schema, compute, shape)

        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
            ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]

        def backward(ctx, grad):
            saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
            x, *weights = (number if tensor is None else tensor for tensor, number in saved)
            if gradients:
                return tuple(gradients(grad, ctx.needs_input_grad, x, *weights))
            grad_x = grad @ dense_weight(x, *weights).to(grad.dtype) if ctx.needs_input_grad[0] else None
            return grad_x, *(None for _ in weights)

        torch.library.register_autograd(full, backward, setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_plain(
    name: str, schema: str, compute: Callable, shape: Callable, strided: bool = False
) -> Callable[..., Tensor]:
    """As `define`, for an operation that has no gradient: one on weights alone, or a gradient itself.

    Args: strided: compute takes tensors as they lie in memory, where a copy would cost too much.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _register(name, schema, compute, shape, strided)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _register(name: str, schema: str, compute: Callable, shape: Callable, strided: bool = False) -> str:
    full = f"{NAMESPACE}::{name}"

    def checked_compute(*args):
        _check_devices(name, args)
        return compute(*(args if strided else map(_contiguous, args)))

    def checked_shape(*args):  # one tensor on "meta" is enough to come here
        _check_devices(name, args)
        return shape(*args)

    torch.library.define(full, schema)
    torch.library.impl(full, "default", checked_compute)
    torch.library.register_fake(full, checked_shape)
    return full


def _contiguous(value):
    if isinstance(value, Tensor):
        return value.contiguous()
    return [_contiguous(item) for item in value] if isinstance(value, list) else value


def _check_devices(name: str, args: tuple) -> None:
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else (arg,)) if isinstance(t, Tensor)]
    if any(tensor.device != tensors[0].device for tensor in tensors):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"{name}: tensors are on {devices}; all must be on one device")


def prove(check: Callable[[], None], tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Calls check() unless these very tensors, unchanged and with these sizes, have passed it before.

    For what a GPU's kernels index with: to look at it is to wait for the device, and layers hand over the same tensors at
    every call. Tensors that keep no version (of inference mode) are looked at every time.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() for tensor in given):
        return check()
    states = [(tensor.data_ptr(), tensor._version) for tensor in given]
    known = _proved.get(given[0])
    if (
        known is not None
        and known[1:] == (states, sizes)
        and all(r() is t for r, t in zip(known[0], given, strict=True))
    ):
        return
    check()
    _proved[given[0]] = ([TensorWeakRef(tensor) for tensor in given], states, sizes)


def damaged(op: str, what: str) -> UserError:
    """The error for tensors that name places which do not exist: never a caller's mistake alone."""
    return UserError(f"{op}: {what}; the file is damaged, download or build the checkpoint again")


def linear_shape(x: Tensor, d_out: int) -> Tensor:
    """An empty result (..., d_out) for x (..., d_in)."""
    return x.new_empty(*x.shape[:-1], d_out)


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that each thread keeps for its next call: the kernel's fresh pages would cost more time than
    what is written into them."""
    size = math.prod(shape) * dtype.itemsize
    kept = getattr(_kept, use, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, use, kept)
    return kept[:size].view(dtype).view(shape)


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels run: x is on a CUDA device and triton is installed."""
    return x.is_cuda and is_triton_available()


def check_floats(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless x and all given tensors are of one floating dtype (fp32, bf16, fp16) and on one device.

    This, like all checks before a pointer is taken, runs at every call: messages are made only when they are needed.
    """
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS:
        raise ValueError(f"{op}: x is {dtype}; fp32, bf16 or fp16 is needed")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype} and x is {dtype}; they must be equal")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and x on {device}")
