"""AWQ as a backend: its scales live in the checkpoint, in norms and in rows of v and up, and change only the rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_base
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401
from recipes.common.core.cli import parse
from recipes.common.core.state import World
from recipes.common.export.dense import export_dense
from recipes.common.loops.streaming import StreamedModel, compress_blocks
from recipes.common.parts.pruners import LayerStats
from recipes.common.parts.quantizers import awq, awq_scales, output_loss, rtn
from recipes.layerwise_quant.folding import folds_of
from recipes.layerwise_quant.mixtures import QuantRun
from zoo.checkpoint import write_checkpoint

METHOD = "layerwise-quant"
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
BIASED = {"attention_bias": True, "mlp_bias": True}


def write_plan(path, bits):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"seed": 0, "scores": {}, "stability": 1.0, "bits": bits}))


def quantised(folder, family, dtype="float32", flags=(), **settings):
    """(base, run, store of its matrices) with AWQ at 4 bits in block 0 and 3 in block 1, and the checkpoint."""
    base = make_base(folder / "base", family, **settings)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():  # a few inputs of every linear are far larger than the rest
        if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight")):
            tensor[::7] *= 8
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", str(base), "--output", str(folder / "out"), *flags]
    recipe = parse("layerwise-quant", ["--backend", "awq", "--group_size", "32", "--dtype", dtype, *flags])
    recipe.check()
    run = QuantRun(recipe, recipe.domain(), World())
    store = run.store(0)
    write_plan(run.plan_path(0), {0: 4, 1: 3})
    compress_blocks(run.streamed, IDS, recipe.methods(run, 0)[:1], store, ignore=recipe.ignored)
    specs = {name: store.facts(recipe.method, name)[recipe.method]["spec"] for name in run.modules}
    write_checkpoint(
        folder / "packed",
        base=base,
        compression={"method": "layerwise-quant", "format_version": 1, "modules": specs},
        tensors=recipe.packed_tensors(run, 0),
        dtype=getattr(torch, dtype),
        extra_files={},
    )
    return base, run, store


def logits(folder_or_model):
    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("llama", BIASED), ("qwen2", {}), ("gemma3_text", {})], ids=str
)
def test_the_checkpoint_computes_scaled_quantised_unscaled_weights(tmp_path, family, settings):
    base, run, store = quantised(tmp_path, family, **settings)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    for name in run.modules:
        folded = store.folded(METHOD, name, METHOD)
        stored = packed.get_submodule(name).dense_weight()
        weight = stored * folded["rows"][:, None] / folded["columns"]
        torch.testing.assert_close(weight, store.weight(METHOD, name, METHOD))
        original = dense.get_submodule(name).weight.data
        assert 0 < (weight - original).norm() / original.norm() < 0.6
        original.copy_(weight)
    expected = logits(dense)
    torch.testing.assert_close(logits(packed), expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-4)
    export_dense(tmp_path / "packed", tmp_path / "dense", dtype="float32")
    torch.testing.assert_close(logits(tmp_path / "dense"), expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-4)


def test_who_shares_scales_and_who_takes_their_inverse(tmp_path):
    base, run, store = quantised(tmp_path, "qwen2")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    for i in (0, 1):
        layer = f"model.layers.{i}"
        folded = lambda name, layer=layer: store.folded(METHOD, f"{layer}.{name}", METHOD)  # noqa: E731
        q, k, v, o = (folded(f"self_attn.{part}_proj") for part in "qkvo")
        gate, up, down = (folded(f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        for part in (q, gate, down, o):
            assert part["columns"].max() > 1.2 * part["columns"].min()
        assert torch.equal(q["columns"], k["columns"]) and torch.equal(q["columns"], v["columns"])
        assert torch.equal(gate["columns"], up["columns"])
        assert torch.equal(up["rows"], down["columns"])
        heads = o["columns"].view(4, 16)  # 4 query heads read 2 key-value heads in turn
        assert torch.equal(heads[[0, 2]], v["rows"].view(2, 16)) and torch.equal(heads[[0, 2]], heads[[1, 3]])
        assert all((part["rows"] == 1).all() for part in (q, k, o, gate, down))
        for norm, columns in (("input", q["columns"]), ("post_attention", gate["columns"])):
            name = f"{layer}.{norm}_layernorm.weight"
            torch.testing.assert_close(after[name] * columns, before[name])
        bias = f"{layer}.self_attn.v_proj.bias"
        torch.testing.assert_close(after[bias] * v["rows"], before[bias])
        assert torch.equal(after[f"{layer}.self_attn.k_proj.bias"], before[f"{layer}.self_attn.k_proj.bias"])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("gemma3_text", 1)])
def test_a_rounded_norm_makes_up_for_the_scales_exactly(tmp_path, family, offset):
    """In bfloat16 the scales follow the rounded norm, not the other way round."""
    base, _, store = quantised(tmp_path, family, dtype="bfloat16")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    columns = store.folded(METHOD, "model.layers.1.self_attn.k_proj", METHOD)["columns"]
    assert after[name].dtype == torch.bfloat16
    torch.testing.assert_close((offset + after[name].float()) * columns, offset + before[name], rtol=1e-6, atol=1e-6)


def test_only_what_is_packed_whole_is_scaled(tmp_path):
    """k stays dense, so the norm before q, k and v stays as it is; without v, o's inputs stay too."""
    base, run, store = quantised(tmp_path, "llama", flags=["--ignore", "lm_head", "0.self_attn.k_", "1.self_attn.v_"])
    assert {fold.source.partition("layers.")[2] for block in run.folds.values() for fold in block} == {
        "0.self_attn.v_proj",
        *(f"{i}.{name}" for i in (0, 1) for name in ("post_attention_layernorm", "mlp.up_proj")),
    }
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in run.modules:
        dense.get_submodule(name).weight.data.copy_(store.weight(METHOD, name, METHOD))
    torch.testing.assert_close(logits(tmp_path / "packed"), logits(dense), atol=1e-4, rtol=1e-4)


def test_blocks_of_another_structure_are_not_scaled(tmp_path):
    streamed = StreamedModel(make_base(tmp_path / "base", "llama"))
    names = {f"model.layers.0.{name}" for name, _ in streamed.layers[0].named_modules()}
    assert len(folds_of("model.layers.0", streamed.layers[0], streamed.config, names)) == 4
    streamed.layers[0].mlp.shared_gate = torch.nn.Linear(64, 1)  # would read the scaled norm
    assert folds_of("model.layers.0", streamed.layers[0], streamed.config, names) == []


def test_scales_are_searched_for_all_linears_together():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=g) * (torch.arange(64) % 8 == 0).float().mul(9).add(0.5)
    hessian = x.T @ x / len(x)
    stats = LayerStats(hessian, hessian.diagonal().clone(), len(x))
    weights = [torch.randn(rows, 64, generator=g) for rows in (16, 48)]
    options = (3, 32, False, torch.float32)

    def loss(s):
        return sum(output_loss(rtn(w * s, *options).dequantize() / s - w, stats) for w in weights)

    s = awq_scales(weights, stats, stats.second_moment, *options)
    powers = [stats.second_moment ** (step / 38) for step in range(20)]
    assert loss(s) == pytest.approx(min(loss(p / (p.max() * p.min()).sqrt()) for p in powers), rel=1e-5)
    assert loss(s) < 0.8 * loss(torch.ones(64))
    rows = torch.rand(48, generator=g) + 0.5
    q = awq(weights[1], stats, s, rows, *options)
    error = output_loss(q.dequantize() * rows[:, None] / s - weights[1], stats)
    assert error <= output_loss(rtn(weights[1] * s, *options).dequantize() / s - weights[1], stats) * (1 + 1e-4)
