"""Registers our operations with torch: custom ops with shape functions and gradients, so that compile and export work."""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import is_triton_available

NAMESPACE = "slimzoo"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SKINNY = 32  # rows of x up to which a product is read straight from the packed weight
_kept = threading.local()  # scratch memory by use


def define(
    name: str,
    schema: str,
    compute: Callable,
    shape: Callable,
    dense_weight: Callable[..., Tensor] | None = None,
    gradients: Callable | None = None,
) -> Callable[..., Tensor]:
    """Defines torch.ops.slimzoo.<name> unless a copy of this code already has, and returns the op.

    Args: compute(x, *weights) -> result; shape(x, *weights) -> empty result; dense_weight(x, *weights) -> (d_out, d_in),
    which the gradient by x, then the only one there is, needs: grad_x = grad_y W; or gradients(grad_y, needs, x, *weights)
    -> one per argument, None where needs[i] is false.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        full = f"{NAMESPACE}::{name}"
        torch.library.define(full, schema)
        torch.library.impl(full, "default", compute)
        torch.library.register_fake(full, shape)

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


def define_plain(name: str, schema: str, compute: Callable, shape: Callable) -> Callable[..., Tensor]:
    """As `define`, for an operation that has no gradient: one on weights alone, or a gradient itself."""
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        full = f"{NAMESPACE}::{name}"
        torch.library.define(full, schema)
        torch.library.impl(full, "default", compute)
        torch.library.register_fake(full, shape)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


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
