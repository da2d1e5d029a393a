"""Damaged and hostile folders, systematically: of every family and format, each tensor, each key of config.json, each file.

A folder either loads and computes what it did, or is refused in one sentence; it never crashes, takes memory or computes
something else. Some dozens of cases run by default, all of them, some thousands, with SLIMZOO_LONG=1.
"""

import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SETTINGS, SIZE, write_tiny

from zoo.errors import UserError

LONG = bool(os.environ.get("SLIMZOO_LONG"))
MEMORY = 400 * 2**20  # that all cases together may add to the process
VALUES = (None, [], {}, "x", "", -1, 0, 1, 3, 10**7, 2**40, -0.5, 1e300, float("nan"), True, [None], [-1], {"x": -1})
FREE = {  # keys whose other values make another model, or the same one; wrong ones are refused all the same
    *(
        "rms_norm_eps",
        "layer_norm_eps",
        "hidden_act",
        "hidden_activation",
        "rope_parameters",
        "sliding_window",
        "tf_padding",
    ),
    *("layer_types", "use_sliding_window", "max_window_layers", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *(
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "layer_norm",
        "stride",
        "padding",
        "tie_word_embeddings",
    ),
    *("pooler_act", "downsample_in_first_stage", "downsample_in_bottleneck", "output_stride", "window_size", "stem"),
    *(
        "first_layer_is_expansion",
        "finegrained_output",
        "dtype",
        "num_attention_heads",
        "is_causal",
        "attention_scaling",
    ),
    *("kv_cache_quantization", "interpolate_pos_encoding", "use_cache", "model_type", "num_heads"),
}
STOCK = ("model_type", "auto_map")  # what transformers looks at first, before any class of ours


@dataclass(frozen=True)
class Case:
    """One damage: `apply` changes a copy of the folder."""

    name: str
    apply: Any
    free: bool = False  # may compute something else
    stock: bool = False  # may be refused by transformers, in its own words
    must_fail: bool = False


def edit_json(file: str, change):
    def apply(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def edit_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def put(path: tuple, value):
    """Put a value at a place of nested dicts; `...` removes the key."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        if value is ...:
            content.pop(path[-1])
        else:
            content[path[-1]] = value

    return change


def config_cases(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    modules = config["compression_config"]["modules"]
    one_of_each = {json.dumps([spec["format"], sorted(spec)]): name for name, spec in modules.items()}
    paths = [(key,) for key in config] + [("transformers_weights",), ("quantization_config",), ("num_labels",)]
    paths += [("compression_config", key) for key in ("format_version", "modules", "untied_head")]
    for name in one_of_each.values():
        place = ("compression_config", "modules", name)
        paths += [place, *((*place, key) for key in (*modules[name], "bits", "unknown"))]
    for path in paths:
        for value in (*VALUES, ...):
            found = config
            for key in path:
                found = found.get(key, ...) if isinstance(found, dict) else ...
            if found is value:
                continue
            name = f"config {'.'.join(path)} = {'absent' if value is ... else repr(value)}"
            free = path[0] in FREE
            yield Case(name, edit_json("config.json", put(path, value)), free, path[0] in STOCK)
    for key in ("rope_theta", "rope_type", "factor"):
        for value in VALUES:
            if "rope_parameters" in config:
                apply = edit_json("config.json", put(("rope_parameters", key), value))
                yield Case(f"config rope_parameters.{key} = {value!r}", apply, free=True)


def tensor_cases(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    others = (torch.float64, torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
    for name, tensor in tensors.items():

        def with_(change, name=name):
            return edit_tensors(lambda t: t.update({name: change(t[name])}))

        yield Case(f"tensor {name} absent", edit_tensors(put((name,), ...)), must_fail=True)
        yield Case(
            f"tensor {name} renamed", edit_tensors(lambda t, n=name: t.update({f"{n}_": t.pop(n)})), must_fail=True
        )
        for dtype in others:
            if dtype != tensor.dtype and not (dtype == torch.float32 and tensor.is_floating_point()):
                yield Case(f"tensor {name} as {dtype}", with_(lambda t, d=dtype: t.to(d)), must_fail=True)
        yield Case(f"tensor {name} unsqueezed", with_(lambda t: t[None].clone()), must_fail=True)
        if tensor.ndim and tensor.numel():
            yield Case(f"tensor {name} shorter", with_(lambda t: t[:-1].clone()), must_fail=True)
            yield Case(f"tensor {name} empty", with_(lambda t: t[:0].clone()), must_fail=True)
            yield Case(f"tensor {name} doubled", with_(lambda t: torch.cat([t, t])), must_fail=True)
        if tensor.is_floating_point():
            for bad in (float("nan"), float("inf"), -float("inf")):
                yield Case(f"tensor {name} with {bad}", with_(lambda t, b=bad: poked(t, b)), must_fail=True)
        elif not name.endswith(("qweight", "num_batches_tracked")):  # any codes are some weights
            info = torch.iinfo(tensor.dtype)
            for bad in (info.min, info.max):
                whole = name.endswith("zeros") and bad == 0
                yield Case(f"tensor {name} all {bad}", with_(lambda t, b=bad: torch.full_like(t, b)), free=whole)
                yield Case(f"tensor {name} one {bad}", with_(lambda t, b=bad: poked(t, b)), free=whole)
            yield Case(f"tensor {name} reversed", with_(lambda t: t.flip(0)), free=name.endswith("zeros"))
    extra = edit_tensors(lambda t: t.update(extra=torch.zeros(2)))
    yield Case("tensor extra", extra, must_fail=True)


def poked(tensor, value):
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


def file_cases(folder: Path):
    def write(name, content):
        return lambda folder: (folder / name).write_bytes(content)

    def elsewhere(folder):
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "../out.safetensors"),
        }
        shutil.move(folder / "model.safetensors", folder.parent / "out.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def link(name):
        def apply(folder):
            (folder.parent / "linked").mkdir(exist_ok=True)
            shutil.move(folder / name, folder.parent / "linked" / name)
            (folder / name).symlink_to(folder.parent / "linked" / name)

        return apply

    for file in sorted(folder.iterdir()):
        size, stock = file.stat().st_size, file.suffix == ".json"
        for share in (0, 0.01, 0.5, 0.99):
            yield Case(
                f"file {file.name} cut to {share}",
                lambda f, n=file.name, s=int(share * size): os.truncate(f / n, s),
                stock=stock,
            )
        for content in (b"\x00" * 200, b"[1, 2]", b"null", b'"text"', b"\xff\xfe{}", b"[" * 5000, b"{}"):
            yield Case(f"file {file.name} = {content[:8]!r}", write(file.name, content), stock=stock)
        yield Case(f"file {file.name} absent", lambda f, n=file.name: (f / n).unlink(), stock=stock)
        yield Case(f"file {file.name} linked", link(file.name))
    yield Case("index names ../out.safetensors", elsewhere, must_fail=True)
    for content in (
        b"{}",
        b"[]",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}, "metadata": {}}',
        b'{"weight_map": []}',
    ):

        def replaced(folder, content=content):
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors.index.json").write_bytes(content)

        yield Case(f"index {content!r}", replaced, must_fail=True)
    yield Case("a training state beside", write("shard-00001-model-00001-of-00001.safetensors", b"x"), must_fail=True)
    yield Case("a pickle beside", write("pytorch_model.bin", b"x"))


def chosen(folder: Path) -> list[Case]:
    groups = [list(cases(folder)) for cases in (config_cases, tensor_cases, file_cases)]
    if LONG:
        return [case for group in groups for case in group]
    generator = random.Random(folder.name)
    return [case for group, share in zip(groups, (3, 3, 1), strict=True) for case in generator.sample(group, share)]


@torch.no_grad()
def logits(model):
    if model.can_generate():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9]])).logits
    return model(torch.linspace(-1, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)).logits


def judged(case: Case, folder: Path, auto, wanted) -> str | None:
    """What is wrong with the way in which the damaged folder was met."""
    try:
        found = logits(auto.from_pretrained(folder, trust_remote_code=False))  # asks nobody
    except UserError as error:
        text = str(error)
        return None if "\n" not in text and text.endswith(".") and len(text) < 600 else f"no sentence: {text}"
    except Exception as error:
        return None if case.stock else f"{type(error).__name__}: {error}"
    if case.must_fail:
        return "it loads"
    if not found.isfinite().all():
        return "its logits are not finite"
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return None if same or case.free else "its logits are others"


def memory() -> int:
    """Bytes that the process has held at most; 0 where that is not told."""
    if not sys.platform.startswith("linux"):
        return 0
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
@pytest.mark.parametrize("family", SETTINGS)
def test_a_damaged_folder_is_refused_in_one_sentence_or_means_the_same(family, tmp_path):
    folder = write_tiny(tmp_path / "whole" / family, family)
    for code in folder.glob("*.py"):
        code.unlink()  # what is installed is used
    auto = getattr(transformers, list(transformers.AutoConfig.from_pretrained(folder).auto_classes)[1])
    wanted = logits(auto.from_pretrained(folder))
    assert wanted.isfinite().all()
    wrong, before = [], memory()
    for case in chosen(folder):
        damaged = shutil.copytree(folder, tmp_path / "damaged" / "model")
        case.apply(damaged)
        problem = judged(case, damaged, auto, wanted)
        if problem:
            wrong.append(f"{case.name}: {problem}")
        shutil.rmtree(tmp_path / "damaged")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert memory() - before < MEMORY
