"""The linear kernels against torch's own products: bitmask, ARMOR, packed bits, blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from recipes.bench.rounds import copies_of, rounds, rows_of
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.bitmask_linear import bitmask_linear
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.block_diagonal_linear import block_diagonal_linear
from zoo.kernels.block_sparse_linear import block_sparse_linear
from zoo.kernels.block_sparse_linear.reference import pack_blocks
from zoo.kernels.packed_linear import packed_linear

SHAPES = [(4096, 4096), (11008, 4096)]
BLOCK = 64  # of ARMOR's wrappers
GROUP = 128  # weights that share a scale
VIT_SHAPES = [(768, 768), (3072, 768), (768, 3072)]  # ViT-B: projections, fc1, fc2
VIT_TOKENS = (1, 8, 197, 8 * 197)  # the last two: one image of 224 x 224, and eight


def bench_linear(quick: bool) -> Iterator[dict]:
    """Rows of the kernels of language models, decoding and at a prompt of 512 tokens."""
    for d_out, d_in in SHAPES:
        for batch in (1, 8, 512):
            repeats = 3 if quick else 40 if batch < 512 else 7
            yield from bench_sparse(d_out, d_in, batch, repeats)
            yield from bench_packed(d_out, d_in, batch, repeats)


def bench_block_sparse(quick: bool) -> Iterator[dict]:
    """Rows of block_sparse_linear in the shapes of ViT-B."""
    for dtype in (torch.float32, torch.bfloat16):
        for d_out, d_in in VIT_SHAPES:
            for tokens in VIT_TOKENS:
                yield from bench_blocks(d_out, d_in, tokens, dtype, 3 if quick else 40 if tokens <= 8 else 7)


def two_of_four(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """(values bf16, mask) of a random 2:4 weight."""
    keep = (torch.rand(d_out, d_in // 4, 4).argsort(-1) < 2).view(d_out, d_in)
    values, mask, _ = pack_bitmask(torch.randn(d_out, d_in).bfloat16(), keep, per_row=d_in // 2)
    return values, mask


def bench_sparse(d_out: int, d_in: int, batch: int, repeats: int) -> list[dict]:
    """Rows for bitmask_linear and armor_linear in bf16 against torch's dense linear in bf16 and fp32."""
    copies = copies_of(d_out * d_in)
    dense = [torch.randn(d_out, d_in) for _ in range(copies)]
    dense16 = [w.bfloat16() for w in dense]
    packed = [two_of_four(d_out, d_in) for _ in range(copies)]
    wrap_in = [(torch.randn(d_in // BLOCK, BLOCK, BLOCK) / 8).bfloat16() for _ in range(copies)]
    wrap_out = [(torch.randn(d_out // BLOCK, BLOCK, BLOCK) / 8).bfloat16() for _ in range(copies)]
    x = torch.randn(batch, d_in)
    x16 = x.bfloat16()
    linear = nn.functional.linear

    def armor(i: int) -> Tensor:
        return armor_linear(x16, wrap_in[i % copies], *packed[i % copies], wrap_out[i % copies])

    seconds, bandwidth = rounds(
        {
            "torch bf16": lambda i: linear(x16, dense16[i % copies]),
            "torch fp32": lambda i: linear(x, dense[i % copies]),
            "bitmask_linear": lambda i: bitmask_linear(x16, *packed[i % copies]),
            "armor_linear": lambda i: armor(i + copies // 2),  # not the weights that were just read
            "block_diagonal_linear": lambda i: block_diagonal_linear(x16, wrap_in[i % copies]),
        },
        repeats,
    )
    core = sum(t.nbytes for t in packed[0])
    sizes = {
        "bitmask_linear": core,
        "armor_linear": core + wrap_in[0].nbytes + wrap_out[0].nbytes,
        "block_diagonal_linear": wrap_in[0].nbytes,
    }
    return rows_of(sizes, d_out, d_in, batch, seconds, bandwidth)


def bench_packed(d_out: int, d_in: int, batch: int, repeats: int) -> list[dict]:
    """Rows for packed_linear at 2, 3, 4 and 8 bits in groups of 128 with integer zeros, x in bf16; torch's own 4-bit
    product, of the same groups, is a peer up to 32 rows."""
    copies = copies_of(d_out * d_in // 2)
    dense = [torch.randn(d_out, d_in) for _ in range(copies)]
    dense16 = [w.bfloat16() for w in dense]
    groups = d_in // GROUP
    packed = {
        bits: [
            (
                torch.randint(0, 256, (d_out, d_in * bits // 8), dtype=torch.uint8),
                torch.rand(d_out, groups).bfloat16(),
                torch.randint(0, 2**bits, (d_out, groups), dtype=torch.uint8),
            )
            for _ in range(copies)
        ]
        for bits in (2, 3, 4, 8)
    }
    x = torch.randn(batch, d_in)
    x16 = x.bfloat16()
    linear = nn.functional.linear

    def run(bits: int, int8: bool) -> Callable[[int], object]:
        apart = copies // 2 if int8 else 0  # not the weights that were just read
        return lambda i: packed_linear(x16, *packed[bits][(i + apart) % copies], bits=bits, group_size=GROUP, int8=int8)

    peers = {
        "torch bf16": lambda i: linear(x16, dense16[i % copies]),
        "torch fp32": lambda i: linear(x, dense[i % copies]),
    }
    ours = {f"packed_linear {bits} bits": run(bits, False) for bits in packed}
    if batch <= 32:
        codes = torch.randint(0, 16, (d_out, d_in), dtype=torch.int32)
        torchs = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(copies)]
        scales_and_zeros = torch.rand(groups, d_out, 2).bfloat16()
        peers["torch int4"] = lambda i: torch._weight_int4pack_mm_for_cpu(
            x16, torchs[i % copies], GROUP, scales_and_zeros
        )
        ours |= {f"packed_linear {bits} bits, int8 x": run(bits, True) for bits in packed}
    seconds, bandwidth = rounds(peers | ours, repeats)
    sizes = {op: sum(w.nbytes for w in packed[int(op.split()[1])][0]) for op in ours}
    return rows_of(sizes, d_out, d_in, batch, seconds, bandwidth)


def bench_blocks(d_out: int, d_in: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Rows for block_sparse_linear with half of the blocks of 16, 32 and 64 kept, equally many in each block-row, against
    torch's dense product and, for blocks of 32 in fp32, its product with the same BSR weight. One copy of each: where
    arithmetic is the bound, no cache helps. That bound is the time that torch's dense product would need for the kept
    blocks alone."""
    x, dense, bias = (torch.randn(shape).to(dtype) for shape in ((tokens, d_in), (d_out, d_in), (d_out,)))
    packed = {
        size: pack_blocks(dense, torch.rand(d_out // size, d_in // size).argsort(-1) < d_in // size // 2, (size, size))
        for size in (16, 32, 64)
    }
    blocks, crow, col = packed[32].values()
    with warnings.catch_warnings(action="ignore"):  # torch calls BSR a beta
        bsr = torch.sparse_bsr_tensor(crow, col, blocks, (d_out, d_in), check_invariants=True)

    def run(size: int) -> Callable[[int], object]:
        return lambda _: block_sparse_linear(x, **packed[size], bias=bias, d_out=d_out)

    name = str(dtype).removeprefix("torch.")
    ours = {f"block_sparse_linear {size} {name}": run(size) for size in packed}
    peers = {f"torch {name}": lambda _: nn.functional.linear(x, dense, bias)}
    if dtype == torch.float32:  # the only one that torch's CPU product takes
        peers["torch BSR"] = lambda _: nn.functional.linear(x, bsr, bias)
    seconds, bandwidth = rounds(peers | ours, repeats)
    sizes = {op: sum(t.nbytes for t in packed[int(op.split()[1])].values()) for op in ours}
    rows = rows_of(sizes, d_out, d_in, tokens, seconds, bandwidth)
    return [row | {"dtype": name, "fraction_of_bound": row["ratio_to"][f"torch {name}"] / 2} for row in rows]
