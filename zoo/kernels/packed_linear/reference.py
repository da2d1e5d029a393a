"""The packed integer format and the linear layer on it, in plain torch: the definition that every other version is tested
on.

w[i, j] = scales[i, j // g] * (code[i, j] - zero[i, j // g]), codes of b bits, groups of g columns (g = -1: the whole row).

`qweight` uint8 (d_out, d_in * b / 8), exactly b bits a weight, d_in a multiple of 32. A row is one section of b = 1, 2, 4
or 8 bits a code, or two: the low 2 bits of all its codes and then the third (b = 3), the low 4 and then the fifth (b = 5)
or the fifth and sixth (b = 6). In a section of w bits, 4 bytes hold 32 / w consecutive columns: column j of them lies in
byte j % 4 from bit w * (j // 4) on. The packing does not depend on the group size: four bytes never belong to two groups,
so that a SIMD register of any width sums groups lane by lane.
`scales` (d_out, d_in / g), floating. Zeros: "integer", uint8 of the same shape; "float", the dtype of the scales (HQQ);
"none", absent, which means 2^(b-1).
"""

import torch
from torch import Tensor

SECTIONS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits of the sections of a row


def pack_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """uint8 codes (d_out, d_in) below 2^bits -> qweight uint8 (d_out, d_in * bits / 8).

    Raises ValueError for a number of bits or a group size that the format does not have, or a code that is too large.
    """
    check_format(codes.shape[1], bits, group_size)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: {int(codes.max())} does not fit {bits} bits, the largest code is {2**bits - 1}")
    sections, below = [], 0
    for width in SECTIONS[bits]:
        part = (codes >> below) & (2**width - 1)
        part = part.unflatten(1, (-1, 8 // width, 4)) << _shifts(width, codes.device)
        sections.append(part.sum(-2, dtype=torch.uint8).flatten(1))
        below += width
    return torch.cat(sections, 1)


def unpack_codes(qweight: Tensor, bits: int, group_size: int, d_in: int) -> Tensor:
    """qweight uint8 (d_out, d_in * bits / 8) -> uint8 codes (d_out, d_in). Raises ValueError when they do not fit."""
    check_format(d_in, bits, group_size)
    if qweight.ndim != 2 or 8 * qweight.shape[1] != d_in * bits:
        raise ValueError(f"qweight {tuple(qweight.shape)} does not hold rows of {d_in} codes of {bits} bits")
    codes = torch.zeros(len(qweight), d_in, dtype=torch.uint8, device=qweight.device)
    start = below = 0
    for width in SECTIONS[bits]:
        section = qweight[:, start : start + d_in * width // 8].unflatten(1, (-1, 1, 4))
        part = (section >> _shifts(width, qweight.device)) & (2**width - 1)
        codes |= part.flatten(1) << below
        start, below = start + d_in * width // 8, below + width
    return codes


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, d_in: int) -> Tensor:
    """The dense weight (d_out, d_in): computed in fp32, rounded once to the dtype of `scales`."""
    codes = unpack_codes(qweight, bits, group_size, d_in).float().unflatten(1, (scales.shape[1], -1))
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return (scales.float().unsqueeze(-1) * (codes - zero)).flatten(1).to(scales.dtype)


def packed_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), W and sums in fp32, in the dtype of x."""
    weight = dequantize(qweight, scales.float(), zeros, bits, group_size, x.shape[-1])
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)


def check_format(d_in: int, bits: int, group_size: int) -> None:
    """Raises ValueError unless rows of d_in codes can be stored with these bits and groups."""
    if bits not in SECTIONS:
        raise ValueError(f"bits {bits}: one of {', '.join(map(str, SECTIONS))} is needed")
    if d_in % 32 or not d_in:
        raise ValueError(f"d_in {d_in}: a multiple of 32 is needed; keep this layer dense")
    if group_size != -1 and (group_size <= 0 or group_size % 32 or d_in % group_size):
        raise ValueError(
            f"group_size {group_size}: a multiple of 32 that divides {d_in}, or -1 for whole rows, is needed"
        )


def _shifts(width: int, device: torch.device) -> Tensor:
    """How far up the values of each quadruple of columns lie in their 4 bytes, (8 / width, 1)."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device).unsqueeze(1)
