"""Layers that share an input compute in one call: the same bits as alone, and alone whenever the input is not the same."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo.layers.siblings as siblings
from zoo.kernels.ops import SKINNY
from zoo.kernels.packed_linear import packed_linear, packed_linears
from zoo.layers.packing import pack_layers

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self, d_in=64, d_outs=(48, 16, 16), bias=False):
        super().__init__()
        for name, d_out in zip(NAMES, d_outs, strict=True):
            setattr(self, name, nn.Linear(d_in, d_out, bias=bias))

    def forward(self, x):
        return [getattr(self, name)(x) for name in NAMES]


def packed(bits=(4, 4, 4), **shape):
    model, g = Attention(**shape), torch.Generator().manual_seed(0)
    spec = {"format": "packed", "group_size": 32, "zeros": "integer"}
    pack_layers(model, {name: spec | {"bits": b} for name, b in zip(NAMES, bits, strict=True)})
    for layer in model.children():
        layer.qweight.copy_(torch.randint(0, 256, layer.qweight.shape, dtype=torch.uint8, generator=g))
        layer.scales.copy_(torch.rand(layer.scales.shape, generator=g))
        layer.zeros.copy_(torch.randint(0, 2**layer.bits, layer.zeros.shape, generator=g))
    return model


def alone(model, x):
    """What every layer computes by itself."""
    return [
        packed_linear(x, m.qweight, m.scales, m.zeros, m.bias, bits=m.bits, group_size=m.group_size)
        for m in model.children()
    ]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def calls(monkeypatch):
    """The number of matrices of every joint call."""
    seen, real = [], siblings.packed_linears
    monkeypatch.setattr(siblings, "packed_linears", lambda x, w, **k: seen.append(len(w)) or real(x, w, **k))
    siblings._kept.last = None
    return seen


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, SKINNY + 2),
    d_outs=st.tuples(*[st.integers(1, 40)] * 3),
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    zeros=st.sampled_from(["none", "integer", "float"]),
    bias=st.booleans(),
    odd=st.sampled_from([None, float("nan")]),
)
def test_one_call_is_many_calls(tokens, d_outs, bits, dtype, zeros, bias, odd):
    g = torch.Generator().manual_seed(1)
    weights = []
    for d_out in d_outs:
        qweight = torch.randint(0, 256, (d_out, 96 * bits // 8), dtype=torch.uint8, generator=g)
        scales = torch.rand(d_out, 3, generator=g).to(dtype)
        kinds = {"none": None, "integer": torch.randint(0, 2**bits, (d_out, 3), dtype=torch.uint8, generator=g)}
        weights.append(
            (qweight, scales, kinds.get(zeros, scales + 1), torch.rand(d_out, generator=g).to(dtype) if bias else None)
        )
    x = normal(tokens, 96).to(dtype)
    if odd is not None and tokens:
        x[0, 5] = odd
    wanted = [packed_linear(x, *weight, bits=bits, group_size=32) for weight in weights]
    for a, b in zip(packed_linears(x, weights, bits=bits, group_size=32), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_decoding_calls_once(calls):
    model = packed()
    for seed in range(3):
        x = normal(1, 1, 64, seed=seed)
        with torch.no_grad():
            assert_same(model(x), alone(model, x))
    assert calls == [3, 3, 3] and siblings._kept.last is None


def test_other_inputs_compute_alone(calls):
    model, x = packed(), normal(2, 64)
    with torch.no_grad():
        q = model.q_proj(x)
        y = normal(2, 64, seed=1)
        assert torch.equal(model.k_proj(y), alone(model, y)[1])  # another tensor
        assert torch.equal(model.k_proj(x.clone()), alone(model, x)[1])
        before = alone(model, x)
        x.mul_(2)  # the same tensor, changed in place
        after = alone(model, x)
        assert torch.equal(q, before[0]) and torch.equal(model.v_proj(x), after[2])
        assert_same(model(x), after)
    assert calls == [3, 3]


def test_the_input_is_not_kept_alive(calls):
    model = packed()
    with torch.no_grad():
        model.q_proj(normal(2, 64))
        assert siblings._kept.last.x() is None
        x = normal(2, 64, seed=1)  # perhaps at the same place in memory
        assert torch.equal(model.k_proj(x), alone(model, x)[1])


@pytest.mark.parametrize("case", ["gradients", "inference", "long", "widths", "one dense"])
def test_when_nothing_is_shared(calls, case):
    model = packed(bits=(4, 3, 4)) if case == "widths" else packed()
    if case == "one dense":
        dense = nn.Linear(64, 16, bias=False)
        model = Attention()
        pack_layers(model, {"q_proj": {"format": "packed", "bits": 4, "group_size": 32, "zeros": "integer"}})
        model.k_proj = dense
    x = normal(SKINNY + 1 if case == "long" else 2, 64)
    if case == "gradients":
        x.requires_grad_()
        sum(y.sum() for y in model(x)).backward()
        assert x.grad.abs().sum() > 0
    else:
        with torch.inference_mode(case == "inference"), torch.no_grad():
            x = x.clone()
            found = model(x)
        if case != "one dense":
            assert_same(found, alone(model, x))
    assert calls == []


def test_hooks_that_change_what_a_sibling_reads(calls):
    model, x = packed(), normal(1, 64)
    model.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.v_proj.register_forward_hook(lambda _, args, y: y + 1)
    with torch.no_grad():
        q, k, v = model(x)
        wanted, doubled = alone(model, x), alone(model, 2 * x)
    assert torch.equal(q, wanted[0]) and torch.equal(k, doubled[1]) and torch.equal(v, wanted[2] + 1)


def test_siblings_that_compute_in_vain_give_up(calls):
    model, x = packed(), normal(1, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3 * siblings.MISSES):
            assert_same(model(x.bfloat16()), alone(model, x.bfloat16().float()))
    assert len(calls) == siblings.MISSES + 1


def test_an_interrupted_forward_leaves_nothing_behind(calls):
    model, other = packed(), packed()
    with torch.no_grad():
        x = normal(1, 64)
        model.q_proj(x)  # and no more
        assert_same(other(x), alone(other, x))  # the same tensor, other layers
        assert_same(model(x), alone(model, x))
    assert model.q_proj.siblings.misses == 1 and calls == [3, 3, 3]


def test_weights_that_change_between_siblings(calls):
    model, x = packed(), normal(1, 64)
    with torch.no_grad():
        model.q_proj(x)
        model.k_proj.scales.mul_(2)
        assert torch.equal(model.k_proj(x), alone(model, x)[1])
        wanted = alone(model, x)
        model.k_proj.to(torch.bfloat16)  # another type than its siblings
        q, k, v = model(x)
        assert torch.equal(q, wanted[0]) and torch.equal(v, wanted[2]) and k.dtype == torch.bfloat16
    assert calls == [3]


def test_a_model_that_is_gone_is_gone(calls):
    model, x = packed(), normal(1, 64)
    with torch.no_grad():
        model.q_proj(x)  # its siblings are never asked
    scales = weakref.ref(model.k_proj.scales)
    del model
    gc.collect()
    assert scales() is None


def test_threads_do_not_meet(calls):
    model, wrong = packed(), []

    def work(seed):
        with torch.no_grad():
            for step in range(20):
                x = normal(1, 64, seed=100 * seed + step)
                wrong.extend(not torch.equal(a, b) for a, b in zip(model(x), alone(model, x), strict=True))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(wrong) == 240 and not any(wrong)


def test_copies_have_siblings_of_their_own(calls):
    model = packed()
    clone, x = copy.deepcopy(model), normal(1, 64)
    clone.k_proj.scales.mul_(2)
    with torch.no_grad():
        assert_same(clone(x), alone(clone, x))
        assert_same(model(x), alone(model, x))
    assert clone.q_proj.siblings is clone.k_proj.siblings is not model.q_proj.siblings


def test_compiled(calls):
    model, x = packed(), normal(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), alone(model, x), rtol=1e-6, atol=1e-5)
    assert calls == []
