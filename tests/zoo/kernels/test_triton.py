"""The Triton kernels: in the interpreter against the definitions, and compiled ahead of time for sm_80 and sm_90.

Run as a script it is the interpreter's side: TRITON_INTERPRET must be set before triton is imported, and would change
every other test of a process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.kernels.armor_linear import gpu as armor_gpu
from zoo.kernels.armor_linear.reference import armor_linear
from zoo.kernels.bitmask_linear import gpu as bitmask_gpu
from zoo.kernels.bitmask_linear.reference import bitmask_linear, pack_bitmask
from zoo.kernels.block_diagonal_linear import gpu as block_gpu
from zoo.kernels.block_diagonal_linear.reference import block_diagonal_linear
from zoo.kernels.block_sparse_linear import gpu as block_sparse_gpu
from zoo.kernels.block_sparse_linear.reference import block_sparse_linear, pack_blocks
from zoo.kernels.kv_attention import gpu as kv_gpu
from zoo.kernels.kv_attention.reference import Part, kv_attention, quantize_channels, quantize_tokens
from zoo.kernels.packed_linear import gpu as packed_gpu
from zoo.kernels.packed_linear.reference import SECTIONS, pack_codes, packed_linear

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHAPES = [(40, 76, 2, 4), (40, 96, 4, 8), (33, 300, 1, 4), (40, 77, 0, 0)]  # d_out, d_in, N, M; 0:0 is unstructured
TOKENS = [1, 3, 17, 70]


def integers(shape, dtype, bound, g):
    """Small integers: products and sums are exact in every dtype, so the kernels must agree to the bit."""
    return torch.randint(-bound, bound + 1, shape, generator=g).to(dtype)


def keep(d_out, d_in, n, m, g):
    if not n:
        mask = torch.rand(d_out, d_in, generator=g) < 0.4
        mask[3], mask[4] = False, True  # an empty row and a full one
        return mask
    scores = torch.rand(d_out, d_in // m, m, generator=g)
    return torch.zeros_like(scores).scatter_(-1, scores.topk(n).indices, 1).flatten(1).bool()


def interpret():
    """Every case in the interpreter; the process fails on the first that differs, and names it."""
    g = torch.Generator().manual_seed(0)
    for dtype in NAMES:
        for tokens in TOKENS:
            for d_out, d_in, n, m in SHAPES:
                mask = keep(d_out, d_in, n, m, g)
                values, bits, offsets = pack_bitmask(
                    integers((d_out, d_in), dtype, 2, g), mask, per_row=d_in * n // m if n else None
                )
                x, bias = integers((tokens, d_in), dtype, 1, g), integers((d_out,), dtype, 5, g)
                same(
                    bitmask_gpu.bitmask_linear_triton(x, values, bits, bias, offsets),
                    bitmask_linear(x, values, bits, bias, offsets),
                    f"bitmask {NAMES[dtype]} {d_out}x{d_in} {n}:{m}, {tokens} tokens",
                )
            for b_out, b_in, d_out, d_in in ((16, 16, 48, 80), (64, 64, 128, 192), (6, 8, 24, 40)):
                values, bits, _ = pack_bitmask(
                    integers((d_out, d_in), dtype, 1, g), keep(d_out, d_in, 2, 4, g), per_row=d_in // 2
                )
                x = integers((tokens, d_in), dtype, 1, g)
                wrap_in = torch.eye(b_in).roll(1, 0).repeat(d_in // b_in, 1, 1).to(dtype)  # keeps the numbers small
                wrap_out = torch.eye(b_out).roll(1, 0).repeat(d_out // b_out, 1, 1).to(dtype)
                wrap_in[0, 0, 1], wrap_out[0, 1, 0] = 2, 2
                name = f"{NAMES[dtype]} b {b_out},{b_in}, {tokens} tokens"
                same(
                    block_gpu.block_diagonal_linear_triton(x, wrap_in),
                    block_diagonal_linear(x, wrap_in),
                    f"block diagonal {name}",
                )
                same(
                    armor_gpu.armor_linear_triton(x, wrap_in, values, bits, wrap_out),
                    armor_linear(x, wrap_in, values, bits, wrap_out),
                    f"armor {name}",
                )

            for bits in SECTIONS:
                for d_out, d_in, group in ((40, 96, 32), (33, 160, -1)):
                    codes = torch.randint(0, min(2**bits, 8), (d_out, d_in), generator=g).to(torch.uint8)
                    shape = (d_out, 1 if group == -1 else d_in // group)
                    x, scales = integers((tokens, d_in), dtype, 1, g), integers(shape, dtype, 1, g)
                    integer = torch.randint(0, min(2**bits, 8), shape, generator=g).to(torch.uint8)
                    bias = integers((d_out,), dtype, 5, g)
                    for zeros in (integer, integer.to(dtype), None) if bits < 5 else (integer, integer.to(dtype)):
                        weight = (pack_codes(codes, bits, group), scales, zeros, bias)
                        same(
                            packed_gpu.packed_linear_triton(x, *weight, bits),
                            packed_linear(x, *weight, bits=bits, group_size=group),
                            f"packed {bits} bits {NAMES[dtype]} {d_out}x{d_in} group {group}, {tokens} tokens",
                        )
    for dtype in NAMES:
        interpret_blocks(dtype, g)
        interpret_kv(dtype, g)


def interpret_blocks(dtype, g):
    """Block-sparse products: square blocks, oblong and ragged ones, from nothing kept to everything."""
    for d_out, d_in, block in ((64, 96, (16, 16)), (96, 64, (32, 32)), (128, 128, (64, 64)), (70, 50, (20, 12))):
        for density in (0, 0.3, 1):
            kept = torch.rand(-(-d_out // block[0]), -(-d_in // block[1]), generator=g) < density
            packed = pack_blocks(integers((d_out, d_in), dtype, 2, g), kept, block)
            bias = integers((d_out,), dtype, 5, g)
            for tokens in (1, 17, 130):
                arguments = integers((tokens, d_in), dtype, 1, g), *packed.values(), bias, d_out
                same(
                    block_sparse_gpu.block_sparse_linear_triton(*arguments),
                    block_sparse_linear(*arguments),
                    f"block sparse {NAMES[dtype]} {d_out}x{d_in} {block}, density {density}, {tokens} tokens",
                )


def interpret_kv(dtype, g):
    """Attention over packed keys and values: pairs of widths, both modes, dense rests, masks, odd sizes, many stretches."""

    def part(x, bits, packed, group, by_channel):
        dense = x[:, :, packed:] if packed < x.shape[2] else None
        if not packed or bits == 16:
            return Part(None, None, None, x, 16)
        quantise = quantize_channels if by_channel else quantize_tokens
        return Part(*quantise(x[:, :, :packed], bits, group), dense, bits)

    for k_bits, v_bits, kv_heads, ratio, size, tokens, block in (
        (8, 4, 2, 3, 64, 33, 0),
        (4, 2, 1, 1, 80, 1, 0),
        (2, 8, 1, 8, 96, 600, 0),
        (4, 4, 2, 4, 64, 77, 32),
        (2, 2, 1, 2, 32, 530, 32),
        (8, 16, 1, 20, 128, 65, 32),
        (16, 4, 1, 2, 64, 40, 0),
    ):
        k, v = (torch.randn(2, kv_heads, tokens, size, generator=g).to(dtype) for _ in range(2))
        q = torch.randn(2, kv_heads * ratio, size, generator=g).to(dtype)
        mask = torch.rand(2, tokens, generator=g) < 0.7
        mask[0, 0], mask[1] = True, tokens == 33  # a row that attends to nothing
        packed = tokens // block * block if block else tokens
        keys = part(k, k_bits, packed, block or -1, bool(block))
        values = part(v, v_bits, packed, 16 if block else -1, False)
        for shown in (None, mask):
            ours = kv_gpu.kv_attention_triton(q, keys, values, shown, 0.2)
            wanted = kv_attention(q, keys, values, shown, 0.2)
            tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            name = f"kv {NAMES[dtype]} K{k_bits}V{v_bits} {kv_heads}x{ratio} heads of {size}, {tokens} tokens"
            difference = (ours.float() - wanted.float()).abs().max()
            assert difference <= tolerance * max(1, wanted.float().abs().max()), f"{name}: off by {difference}"


def same(ours, definition, name):
    assert torch.equal(ours, definition), f"{name}: off by {(ours.float() - definition.float()).abs().max()}"


@pytest.mark.slow
def test_interpreted_kernels_equal_their_definitions():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def compile_kernel(kernel, signature, constants, warps, stages, architecture, folder):
    """(registers, bytes spilled) of a kernel compiled for one architecture, from the resource table of its binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name] != "constexpr"}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    table = subprocess.run(
        [tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    registers, local = re.search(r"REG:(\d+) .*LOCAL:(\d+)", table).groups()
    return int(registers), int(local)


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_ahead_of_time_without_spills(architecture, tmp_path, record_property):
    element = torch.empty(1, dtype=torch.bfloat16)
    weights = {"values": "*bf16", "mask": "*u8"}
    sizes = dict.fromkeys(("n_tokens", "d_out", "d_in", "per_row"), "i32")
    for tokens in bitmask_gpu.TILES:
        options = bitmask_gpu.tile(tokens, element)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        cases = [
            (
                bitmask_gpu.bitmask_linear_kernel,
                {"x": "*bf16", **weights, "bias": "*bf16", "y": "*bf16", **sizes},
                options | {"HALF": True, "row_offsets": None},
                warps,
            )
        ]
        value_bytes, fused_warps = armor_gpu.FUSED_TILES[64]
        cases.append(
            (
                armor_gpu.armor_linear_kernel,
                {"u": "*fp32", **weights, "wrap_out": "*bf16", "bias": "*bf16", "y": "*bf16", **sizes},
                options | {"ROWS": 64, "COLS": value_bytes, "HALF": True},
                fused_warps,
            )
        )
        rows, columns, packed_warps = packed_gpu.TILES[tokens]
        for bits in (3, 4):
            codes = {"BITS": bits, "LOW": SECTIONS[bits][0], "ZEROS": packed_gpu.INTEGER}
            packed_tile = {"ROWS": rows, "COLS": columns, "TOKENS": tokens, "PRECISION": "tf32"}
            packed = {"qweight": "*u8", "scales": "*bf16", "zeros": "*u8"}
            cases.append(
                (
                    packed_gpu.packed_linear_kernel,
                    {"x": "*bf16", **packed, "bias": "*bf16", "y": "*bf16", **sizes, "group": "i32"},
                    codes | packed_tile,
                    packed_warps,
                )
            )
        for kernel, signature, constants, number in cases:
            registers, spilled = compile_kernel(kernel, signature, constants, number, stages, architecture, tmp_path)
            name = f"{kernel.__name__}, sm_{architecture}, {tokens} tokens"
            record_property(name, registers)
            assert spilled == 0, f"{name}: {spilled} bytes of spills"


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_block_sparse_product_compiles_ahead_of_time_without_spills(architecture, size, tmp_path, record_property):
    pointers = dict.fromkeys(("x", "blocks", "bias", "y"), "*bf16")
    pointers |= dict.fromkeys(("crow_indices", "col_indices"), "*i32")
    sizes = dict.fromkeys(("n_tokens", "d_out", "d_in"), "i32")
    for tokens in block_sparse_gpu.TILES:
        options = block_sparse_gpu.tile(tokens, torch.empty(1, size, size, dtype=torch.bfloat16))
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        kernel = block_sparse_gpu.block_sparse_linear_kernel
        registers, spilled = compile_kernel(kernel, pointers | sizes, options, warps, stages, architecture, tmp_path)
        name = f"{kernel.__name__}, sm_{architecture}, blocks of {size}, {tokens} tokens"
        record_property(name, registers)
        assert spilled == 0, f"{name}: {spilled} bytes of spills"


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("bits", "by_channel"), [((8, 4), False), ((4, 2), True), ((2, 16), False)])
def test_attention_compiles_ahead_of_time_without_spills(architecture, bits, by_channel, tmp_path, record_property):
    pointers = {"q": "*bf16", "mask": "*u8", "out": "*fp32", "peaks": "*fp32", "totals": "*fp32", "scaling": "fp32"}
    for side in "kv":
        pointers |= {f"{side}_codes": "*u8", f"{side}_dense": "*bf16"}
        pointers |= {f"{side}_{name}": "*fp16" for name in ("scale", "minimum")}
    kernel = kv_gpu.kv_attention_kernel
    constants = {"K_BITS": bits[0], "V_BITS": bits[1], "K_BY_CHANNEL": by_channel, "K_DENSE": by_channel}
    constants |= {"V_DENSE": bits[1] == 16, "MASKED": True, "HEADS": 16, "SIZE": 128, "TILE": kv_gpu.TOKENS}
    sizes = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in constants}
    signature = {name: (pointers | sizes).get(name, "constexpr") for name in kernel.arg_names}
    registers, spilled = compile_kernel(kernel, signature, constants, kv_gpu.WARPS, 2, architecture, tmp_path)
    record_property(f"kv_attention K{bits[0]}V{bits[1]}, sm_{architecture}", registers)
    assert spilled == 0, f"{spilled} bytes of spills, {registers} registers"


if __name__ == "__main__":
    interpret()
