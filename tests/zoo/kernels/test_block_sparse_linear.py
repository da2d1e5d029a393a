"""block_sparse_linear and its layer against the masked dense weight: levels, dtypes, shapes, gradients, damage, files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.errors import UserError
from zoo.kernels import libraries
from zoo.kernels.block_sparse_linear import block_sparse_linear
from zoo.kernels.block_sparse_linear.reference import block_sparse_linear as definition
from zoo.kernels.block_sparse_linear.reference import pack_blocks, unpack_blocks
from zoo.layers.block_sparse import BlockSparseLinear
from zoo.layers.packing import pack_layers, row_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = libraries.LEVELS[: libraries.library("bitmask_linear").slimzoo_level() + 1]
SHAPES = [  # d_out, d_in, block: whole, ragged, of few outputs, wider than a register, larger than the matrix
    (96, 128, (16, 16)),
    (128, 96, (32, 32)),
    (100, 75, (32, 16)),
    (33, 23, (4, 8)),
    (130, 70, (64, 20)),
    (50, 90, (12, 36)),
    (20, 100, (128, 128)),
]
TOKENS = [1, 2, 5, 8, 9, 14, 15, 43]  # vectors of the dot products, then micro-tiles, whole and uneven


def example(d_out, d_in, block, density=0.5, dtype=torch.float32, seed=0):
    """(the dense weight with zeros in place, its packing, bias); with density 0.5 the second block-row is empty."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(-(-d_out // block[0]), -(-d_in // block[1]), generator=g) < density
    if density == 0.5:
        keep[1:2] = False
    weight = torch.randn(d_out, d_in, generator=g).to(dtype)
    mask = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:d_out, :d_in]
    return weight * mask, pack_blocks(weight, keep, block), torch.randn(d_out, generator=g).to(dtype)


def close(y, x, weight, bias):
    """Within 1e-5 of sum |x| |w| + |bias| in fp32, and within one rounding of the result in 16 bits."""
    exact, scale = x.double() @ weight.double().T + bias.double(), x.double().abs() @ weight.double().abs().T
    scale += bias.double().abs()
    bound = 1e-5 * scale if x.dtype == torch.float32 else torch.finfo(x.dtype).eps * exact.abs() + 1e-5 * scale
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_out", "d_in", "block"), SHAPES)
def test_equals_the_masked_dense_weight_on_every_level(dtype, d_out, d_in, block, simd):
    g = torch.Generator().manual_seed(1)
    for density in (0, 0.5, 1):
        weight, packed, bias = example(d_out, d_in, block, density, dtype)
        assert torch.equal(unpack_blocks(**packed, d_out=d_out, d_in=d_in), weight)
        for tokens in TOKENS:
            x = torch.randn(tokens, d_in, generator=g).to(dtype)
            close(definition(x, **packed, bias=bias, d_out=d_out), x, weight, bias)
            for level in LEVELS:
                simd(level)
                close(block_sparse_linear(x, **packed, bias=bias, d_out=d_out), x, weight, bias)


@given(
    d_out=st.integers(1, 150),
    d_in=st.integers(1, 150),
    block=st.tuples(st.integers(1, 32), st.integers(1, 32)).map(lambda pair: (4 * pair[0], 4 * pair[1])),
    tokens=st.integers(0, 60),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_any_block(d_out, d_in, block, tokens, density, dtype, level, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMZOO_SIMD", level)
        libraries.level.cache_clear()
        weight, packed, bias = example(d_out, d_in, block, density, dtype, seed)
        x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
        close(block_sparse_linear(x, **packed, bias=bias, d_out=d_out), x, weight, bias)
    libraries.level.cache_clear()


@pytest.mark.parametrize("tokens", [3, 300])
def test_threads_change_nothing(tokens):
    weight, packed, bias = example(160, 224, (32, 16))
    x = torch.randn(tokens, 224)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(block_sparse_linear(x, **packed, bias=bias, d_out=160))
    finally:
        torch.set_num_threads(before)
    close(results[0], x, weight, bias)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [2, 30])
def test_views_leading_dimensions_and_missing_bias(tokens):
    weight, packed, bias = example(96, 80, (16, 20))
    big = torch.randn(2 * tokens, 83)
    x = big[::2, 3:]  # neither contiguous nor aligned
    close(block_sparse_linear(x, **packed, bias=bias, d_out=96), x, weight, bias)
    shifted = packed | {"blocks": torch.cat([torch.zeros(1), packed["blocks"].flatten()])[1:].view_as(packed["blocks"])}
    y = block_sparse_linear(x[None, :, None], **shifted, d_out=96)
    assert y.shape == (1, tokens, 1, 96)
    close(y[0, :, 0], x, weight, torch.zeros(96))
    one = block_sparse_linear(x[0], **packed, bias=bias, d_out=96)
    assert one.shape == (96,)
    close(one[None], x[:1], weight, bias)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [4, 40])
def test_what_was_pruned_is_not_read_and_padding_counts_as_zero(level, tokens, simd):
    simd(level)
    weight, packed, bias = example(36, 44, (16, 16), density=1)
    keep = torch.ones(3, 3, dtype=torch.bool)
    keep[:, 1] = False  # inputs 16 to 31
    packed = pack_blocks(weight, keep, (16, 16))
    beyond = packed["blocks"].clone()
    beyond[1::2, :, 12:] = 7.0  # inputs 44 to 47
    beyond[4:, 4:] = 7.0  # outputs 36 to 47
    x = torch.randn(tokens, 44)
    x[:, 16:32] = float("nan")
    weight[:, 16:32] = 0
    y = block_sparse_linear(x, **packed | {"blocks": beyond}, bias=bias, d_out=36)
    close(y, x.nan_to_num(), weight, bias)


def test_the_tensors_are_torchs_bsr():
    weight, packed, _ = example(96, 128, (32, 16))
    bsr = torch.sparse_bsr_tensor(packed["crow_indices"], packed["col_indices"], packed["blocks"], (96, 128))
    assert torch.equal(bsr.to_dense(), weight)
    theirs = weight.to_sparse_bsr((32, 16))
    for ours, tensor in zip(
        packed.values(), (theirs.values(), theirs.crow_indices(), theirs.col_indices()), strict=True
    ):
        assert torch.equal(ours, tensor.to(ours.dtype))
    with pytest.raises(ValueError, match=r"keep is \(3, 3\); \(3, 8\) blocks of 32x16"):
        pack_blocks(weight, torch.ones(3, 3, dtype=torch.bool), (32, 16))


@pytest.mark.parametrize("how", [*LEVELS, "torch"])
@pytest.mark.parametrize(("d_out", "d_in", "block"), SHAPES)
def test_gradients_equal_those_of_the_masked_dense_weight(how, d_out, d_in, block, simd, monkeypatch):
    if how == "torch":  # no compiler
        monkeypatch.setattr("zoo.kernels.block_sparse_linear.library", lambda op: None)
    else:
        simd(how)
    g = torch.Generator().manual_seed(2)
    weight, packed, bias = example(d_out, d_in, block)
    x, upstream = torch.randn(2, 70, d_in, generator=g), torch.randn(2, 70, d_out, generator=g)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, packed["blocks"], bias)]
    block_sparse_linear(leaves[0], **packed | {"blocks": leaves[1]}, bias=leaves[2], d_out=d_out).backward(upstream)
    dense = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    nn.functional.linear(*dense).backward(upstream)
    torch.testing.assert_close(leaves[0].grad, dense[0].grad, rtol=1e-4, atol=1e-4)
    found = unpack_blocks(**packed | {"blocks": leaves[1].grad}, d_out=d_out, d_in=d_in)
    mask = unpack_blocks(**packed | {"blocks": torch.ones_like(packed["blocks"])}, d_out=d_out, d_in=d_in)
    torch.testing.assert_close(found, dense[1].grad * mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaves[2].grad, dense[2].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_rounded_once(dtype):
    _, packed, _ = example(40, 52, (16, 20), dtype=dtype)
    x, upstream = torch.randn(300, 52).to(dtype), (torch.randn(300, 40) / 16).to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, packed["blocks"])]
    block_sparse_linear(leaves[0], **packed | {"blocks": leaves[1]}, d_out=40).backward(upstream)
    exact = [tensor.double().requires_grad_() for tensor in (x, packed["blocks"])]
    dense = unpack_blocks(**packed | {"blocks": exact[1]}, d_out=40, d_in=52)
    (exact[0] @ dense.T).backward(upstream.double())
    for leaf, tensor in zip(leaves, exact, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(leaf.grad.double(), tensor.grad, rtol=eps, atol=1e-5)
        assert leaf.grad.dtype == dtype


@pytest.mark.slow
def test_operator_contracts_and_compilation_without_a_graph_break():
    _, packed, bias = example(40, 48, (16, 8))
    x = torch.randn(3, 48, requires_grad=True)
    arguments = (packed["blocks"].requires_grad_(), packed["crow_indices"], packed["col_indices"], bias, 40)
    torch.library.opcheck(torch.ops.slimzoo.block_sparse_linear.default, (x, *arguments))
    gradient = (torch.randn(3, 40), x.detach(), packed["crow_indices"], packed["col_indices"], 16, 8)
    torch.library.opcheck(torch.ops.slimzoo.block_sparse_linear_gradient.default, gradient)

    def loss(x):
        return block_sparse_linear(torch.relu(x), **packed, bias=bias, d_out=40).square().sum()

    loss(x).backward()
    wanted = [x.grad, packed["blocks"].grad]
    x.grad = packed["blocks"].grad = None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    for tensor, gradient in zip((x, packed["blocks"]), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 65)}, None),  # still 4 block-columns and a ragged fifth, which nothing names
        ({"x": torch.zeros(2, 16)}, "col_indices be block-columns"),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, "fp32, bf16 or fp16 is needed"),
        ({"x": torch.tensor(1.0)}, "x needs a last dimension"),
        ({"blocks": torch.zeros(12, 16, 16, dtype=torch.float16)}, "must be equal"),
        ({"blocks": torch.zeros(12, 16)}, "multiples of 4 from 4 to 128"),
        ({"blocks": torch.zeros(12, 16, 6)}, "multiples of 4 from 4 to 128"),
        ({"blocks": torch.zeros(12, 132, 16)}, "multiples of 4 from 4 to 128"),
        ({"crow_indices": torch.zeros(4)}, r"crow_indices must be int32 \(4,\)"),
        ({"crow_indices": torch.zeros(5, dtype=torch.int32)}, r"crow_indices must be int32 \(4,\)"),
        ({"crow_indices": torch.tensor([0, 9, 4, 12]).int()}, "crow_indices must rise from 0 to nnz"),
        ({"crow_indices": torch.tensor([0, 4, 8, 13]).int()}, "crow_indices must rise from 0 to nnz"),
        ({"col_indices": torch.zeros(11, dtype=torch.int32)}, r"col_indices must be int32 \(12,\)"),
        ({"col_indices": torch.full((12,), -1).int()}, "col_indices be block-columns"),
        ({"bias": torch.zeros(47)}, r"bias must be \(48,\)"),
    ],
)
def test_misfits_are_refused_before_any_pointer_is_taken(change, message):
    _, packed, bias = example(48, 64, (16, 16), density=1)
    arguments = {"x": torch.zeros(2, 64), **packed, "bias": bias, "d_out": 48} | change
    if message is None:
        assert block_sparse_linear(**arguments).shape == (2, 48)
        return
    with pytest.raises(ValueError, match=message):
        block_sparse_linear(**arguments)


# ---------------------------------------------------------------------------------------------------------- the layer


def layer_of(d_out=100, d_in=75, block=(32, 16), bias=True):
    weight, packed, b = example(d_out, d_in, block)
    layer = BlockSparseLinear(d_in, d_out, bias, block=block, blocks=len(packed["blocks"]))
    layer.load_state_dict(packed | ({"bias": b} if bias else {}))
    layer.validate("fc1")
    return layer, weight


@pytest.mark.parametrize("bias", [True, False])
def test_layer_stands_in_for_the_masked_linear(bias):
    layer, weight = layer_of(bias=bias)
    x = torch.randn(2, 7, 75)
    wanted = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.dense_weight(), weight) and torch.equal(layer.weight.data, weight)
    assert isinstance(layer, nn.Linear) and "block=32x16" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.float()))
    layer.bfloat16()
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert types.pop("crow_indices") == types.pop("col_indices") == torch.int32
    assert set(types.values()) == {torch.bfloat16} == {layer.dtype}
    assert layer(x).dtype == torch.bfloat16


def test_fine_tuning_changes_blocks_and_nothing_else():
    layer, weight = layer_of()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.blocks.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    x, target = torch.randn(64, 75), torch.randn(64, 100)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (layer.dense_weight()[weight == 0] == 0).all()
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"blocks"}
    assert {state.shape for state in optimizer.state[layer.blocks].values() if state.ndim} == {layer.blocks.shape}


@pytest.mark.parametrize("sizes", [(64, 48, 7), (64, 48, 0), (64, 48, 12), (50, 30, 3)])
def test_a_fresh_layer_is_a_valid_zero_matrix(sizes):
    d_in, d_out, blocks = sizes
    layer = BlockSparseLinear(d_in, d_out, block=(16, 16), blocks=blocks)
    layer.validate("fresh")
    assert torch.equal(layer.dense_weight(), torch.zeros(d_out, d_in))
    assert torch.equal(layer(torch.randn(2, d_in)), torch.zeros(2, d_out))


def set_at(name, index, value):
    def damage(layer):
        getattr(layer, name).data[index] = value

    return damage


def swap_columns(layer):
    first = int((layer.crow_indices.diff() > 1).nonzero()[0, 0])
    at = int(layer.crow_indices[first])
    layer.col_indices[[at, at + 1]] = layer.col_indices[[at + 1, at]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_at("col_indices", 3, 5), r"fc1\.col_indices hold 5, there are 5 block-columns"),
        (set_at("col_indices", 3, -1), r"fc1\.col_indices hold -1, there are 5 block-columns"),
        (swap_columns, r"fc1\.col_indices do not ascend in every block-row"),
        (set_at("crow_indices", 0, 1), r"fc1\.crow_indices do not rise from 0 to "),
        (set_at("crow_indices", 4, 99), r"fc1\.crow_indices do not rise from 0 to "),
        (set_at("crow_indices", 2, 99), r"fc1\.crow_indices do not rise from 0 to "),
        (set_at("blocks", (0, 1, 1), float("nan")), r"fc1\.blocks holds NaN or Inf"),
        (set_at("bias", 0, float("inf")), r"fc1\.bias holds NaN or Inf"),
    ],
)
def test_validate_names_the_damaged_tensor(damage, message):
    layer, _ = layer_of()
    damage(layer)
    with pytest.raises(UserError, match=f"^{message}.*damaged, download or build"):
        layer.validate("fc1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"block": [16, 16], "blocks": 9}, "up: blocks 9: from 0 to 8 can be kept"),
        ({"block": [16, 16], "blocks": -1}, "up: blocks -1: from 0 to 8 can be kept"),
        ({"block": [16, 18], "blocks": 1}, r"up: block \[16, 18\]: two multiples of 4 from 4 to 128"),
        ({"block": [0, 16], "blocks": 1}, r"up: block \[0, 16\]: two multiples"),
        ({"block": [16], "blocks": 1}, r"up: block \[16\]: two multiples"),
        ({"block": [16, 16]}, "up: format block_sparse with keys .*blocks"),
        ({"block": 16, "blocks": 1}, "up: "),
        ({"block": [16, 16], "blocks": "1"}, "up: "),
    ],
)
def test_pack_layers_builds_the_layer_or_names_the_module(spec, message):
    def model():
        return nn.ModuleDict({"up": nn.Linear(64, 32)})

    with pytest.raises(UserError, match=f"^{message}"):
        pack_layers(model(), {"up": {"format": "block_sparse"} | spec})
    packed = model()
    pack_layers(packed, {"up": {"format": "block_sparse", "block": [16, 16], "blocks": 5}})
    assert packed["up"].blocks.shape == (5, 16, 16) and packed["up"].bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_takes_what_the_format_says_and_gives_the_layer_back(dtype, tmp_path):
    """Bytes per dense weight = density (item + 4 / (b_r b_c)), and 4 for each block-row's beginning."""
    d_out, d_in, block, density = 768, 512, (32, 32), 0.5
    keep = torch.arange(24 * 16).view(24, 16) % 2 == 0
    weight = torch.randn(d_out, d_in).to(dtype)
    packed = pack_blocks(weight, keep, block)
    save_file(packed, tmp_path / "model.safetensors")
    formula = d_out * d_in * density * (dtype.itemsize + 4 / (block[0] * block[1]))
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(formula, rel=0.01)
    row = {
        "format": "block_sparse",
        "d_out": d_out,
        "d_in": d_in,
        "block": list(block),
        "blocks": len(packed["blocks"]),
    }
    assert row_bytes(row, dtype.itemsize) == sum(tensor.nbytes for tensor in packed.values())
    layer = BlockSparseLinear(d_in, d_out, bias=False, block=block, blocks=len(packed["blocks"]), dtype=dtype)
    layer.load_state_dict(load_file(tmp_path / "model.safetensors"))
    layer.validate("fc1")
    mask = keep.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(layer.dense_weight(), weight * mask)
