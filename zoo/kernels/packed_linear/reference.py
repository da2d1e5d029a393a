"""The packed-bits format and packed_linear in plain torch: the definition that the other versions are tested against.

A weight (d_out, d_in) of b bits in groups of g inputs is w[i, j] = scales[i, j // g] (code[i, j] - zero[i, j // g]).
qweight, uint8 (d_out, d_in b / 8), holds each chunk of codes (a group; 64 or 32 codes where a group is a whole row) as
planes: an 8-, 4-, 2- or 1-bit plane is a run of bytes whose byte i holds codes i, i + n, i + 2n, ... from the low bits up,
n bytes in all. 3 bits are a 2-bit plane of the low bits and a 1-bit plane of the high bit, 5 are 4 + 1, 6 are 4 + 2:
exactly b bits per weight.
"""

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # widths from the low bits up


def chunk_size(group_size: int, d_in: int) -> int:
    """Codes that are packed together."""
    if group_size != -1:
        return group_size
    return 64 if d_in % 64 == 0 else 32


def pack_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """codes uint8 (d_out, d_in) below 2^bits -> qweight uint8 (d_out, d_in bits / 8)."""
    d_out, d_in = codes.shape
    chunks = codes.view(d_out, -1, chunk_size(group_size, d_in))
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = ((chunks >> shift) & (2**width - 1)).unflatten(-1, (8 // width, -1))  # (d_out, chunks, codes per byte, n)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part << places[:, None]).sum(2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, -1).flatten(1)


def unpack_codes(qweight: Tensor, bits: int, group_size: int, d_in: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 (d_out, d_in)."""
    size = chunk_size(group_size, d_in)
    chunks = qweight.view(len(qweight), d_in // size, size * bits // 8)
    codes, shift = 0, 0
    for width, plane in zip(PLANES[bits], chunks.split([size * w // 8 for w in PLANES[bits]], -1), strict=True):
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=qweight.device)
        codes = codes + (((plane.unsqueeze(2) >> places[:, None]) & (2**width - 1)).flatten(2) << shift)
        shift += width
    return codes.flatten(1)


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, d_in: int) -> Tensor:
    """The dense weight (d_out, d_in) in the dtype of scales, computed in fp32."""
    codes = unpack_codes(qweight, bits, group_size, d_in).float().view(*scales.shape, -1)
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return ((codes - zero) * scales.float().unsqueeze(-1)).flatten(1).to(scales.dtype)


def packed_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out), summed in fp32 and rounded once to the dtype of x."""
    weight = dequantize(qweight, scales.float(), zeros, bits, group_size, x.shape[-1])
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
