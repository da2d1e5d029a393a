"""sparse_conv2d: every path computes the convolution that its definition says, at every SIMD level and number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zoo.kernels import sparse_conv2d as package
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.kernels.libraries import LEVELS, level
from zoo.kernels.sparse_conv2d import sparse_conv2d
from zoo.kernels.sparse_conv2d.reference import sparse_conv2d as reference


def example(
    d_out=6, channels=4, size=(9, 11), batch=2, kernel=(3, 3), groups=1, density=0.15, dtype=torch.float32, seed=0
):
    """(x, packed weight, bias, dense weight); the second filter is empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, channels // groups, *kernel, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    weight[1 % d_out] = 0
    x = torch.randn(batch, channels, *size, generator=generator).to(dtype)
    bias = torch.randn(d_out, generator=generator).to(dtype)
    weight = weight.to(dtype)
    return x, pack_bitmask(weight.flatten(1)), bias, weight


GEOMETRIES = {
    "3x3": {"padding": (1, 1)},
    "strided": {"padding": (1, 1), "stride": (2, 2)},
    "no padding, strides 3 and 1": {"stride": (3, 1)},
    "dilated": {"padding": (2, 0), "dilation": (2, 1)},
    "dilated and strided": {"padding": (3, 2), "dilation": (3, 2), "stride": (2, 3)},
    "grouped": {"groups": 2, "padding": (1, 1)},
    "1x1, strided": {"kernel": (1, 1), "stride": (2, 2)},
    "5x1": {"kernel": (5, 1), "padding": (2, 0)},
    "7x7, strided": {"kernel": (7, 7), "padding": (3, 3), "stride": (2, 2)},
}


@pytest.mark.parametrize("simd", range(len(LEVELS)))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_conv2d_with_the_masked_weight(name, simd, monkeypatch):
    monkeypatch.setattr(package, "DENSEST", 1.0)
    monkeypatch.setattr(package, "level", lambda lib: min(simd, level(lib)))
    geometry = {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | GEOMETRIES[
        name
    ]
    x, packed, bias, weight = example(kernel=geometry["kernel"], groups=geometry["groups"])
    keys = ("stride", "padding", "dilation", "groups")
    for shift in (None, bias):
        wanted = F.conv2d(x, weight, shift, *(geometry[key] for key in keys))
        found = sparse_conv2d(x, *packed, shift, **geometry)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reference(x, *packed, shift, **geometry), wanted, rtol=1e-5, atol=1e-5)
    assert (sparse_conv2d(x, *packed, bias, **geometry)[:, 1] == bias[1]).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    kernel, dilation = (tuple(draw(st.integers(1, top)) for _ in range(2)) for top in (4, 3))
    stride, padding = (tuple(draw(st.integers(low, 3)) for _ in range(2)) for low in (1, 0))
    groups = draw(st.sampled_from([1, 2, 3]))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(draw(st.integers(max(1, span - 2 * pad), span + 40)) for span, pad in zip(spans, padding, strict=True))
    channels, d_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    x, packed, bias, weight = example(d_out, channels, size, draw(st.integers(1, 3)), kernel, groups, density=0.5)
    wanted = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "DENSEST", 1.0)
        found = sparse_conv2d(
            x, *packed, bias, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    x, packed, bias, weight = example(channels=64, density=0.1, dtype=dtype)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = sparse_conv2d(x, *packed, bias, kernel=(3, 3), padding=(1, 1))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_many_images_and_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(package, "DENSEST", 1.0)
    x, packed, bias, weight = example(d_out=5, channels=16, size=(64, 64), batch=20)  # more than one chunk
    options = {"kernel": (3, 3), "padding": (1, 1)}
    whole = sparse_conv2d(x, *packed, bias, **options)
    torch.testing.assert_close(whole, F.conv2d(x, weight, bias, padding=1), rtol=1e-5, atol=1e-5)
    single = torch.cat([sparse_conv2d(image[None], *packed, bias, **options) for image in x])
    assert torch.equal(single, whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sparse_conv2d(x, *packed, bias, **options), whole)
    finally:
        torch.set_num_threads(threads)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(sparse_conv2d(strided, *packed, bias, **options), whole)


@pytest.mark.parametrize("density", [0.1, 0.9])  # by the kernel, and by expansion
def test_gradient_shapes_and_export(density):
    x, packed, bias, weight = example(density=density, groups=2)
    options = {"kernel": (3, 3), "padding": (1, 1), "stride": (2, 1), "groups": 2}
    images = [x.clone().requires_grad_() for _ in range(2)]
    found = sparse_conv2d(images[0], *packed, bias, **options)
    wanted = F.conv2d(images[1], weight, bias, (2, 1), 1, groups=2)
    for y in (found, wanted):
        y.square().sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad, rtol=1e-4, atol=1e-4)
    geometry = [3, 3, 2, 1, 1, 1, 1, 1, 2]
    torch.library.opcheck(torch.ops.slimzoo.sparse_conv2d.default, (x, *packed, bias, geometry))


def test_empty_batches_and_no_kept_weight():
    x, packed, bias, _ = example()
    assert sparse_conv2d(x[:0], *packed, bias, kernel=(3, 3)).shape == (0, 6, 7, 9)
    nothing = pack_bitmask(torch.zeros(6, 36))
    assert torch.equal(sparse_conv2d(x, *nothing, bias, kernel=(3, 3)), bias[:, None, None].expand(2, 6, 7, 9))


def test_what_does_not_fit_is_refused():
    x, (values, mask, row_offsets), bias, _ = example()
    good = {"kernel": (3, 3)}
    for arguments, options in (
        ((x[0], values, mask, row_offsets, bias), good),
        ((x, values.double(), mask, row_offsets, bias), good),
        ((x, values, mask[:, :2], row_offsets, bias), good),
        ((x, values, mask, row_offsets[:-1], bias), good),
        ((x, values, mask, row_offsets, bias[:3]), good),
        ((x, values, mask, row_offsets, bias), good | {"groups": 3}),
        ((x, values, mask, row_offsets, bias), good | {"stride": (0, 1)}),
        ((x, values, mask, row_offsets, bias), good | {"padding": (-1, 0)}),
    ):
        with pytest.raises(ValueError, match="sparse_conv2d"):
            sparse_conv2d(*arguments, **options)
