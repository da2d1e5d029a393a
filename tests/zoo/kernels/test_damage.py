"""What a kernel indexes with is proved in range before it runs, at every call: a damaged tensor is a UserError, whichever
way the operation is computed, never a crash and never numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM

from zoo.errors import UserError
from zoo.kernels import libraries, ops
from zoo.kernels.armor_linear import armor_linear
from zoo.kernels.bitmask_linear import bitmask_expand, bitmask_linear
from zoo.kernels.bitmask_linear.reference import check_bitmask, pack_bitmask
from zoo.kernels.block_sparse_linear import block_sparse_linear
from zoo.kernels.block_sparse_linear.reference import check_blocks, pack_blocks
from zoo.kernels.sparse_conv2d import sparse_conv2d

BEST = libraries.LEVELS[libraries.level(libraries.library("bitmask_linear"))]
LEVELS = libraries.LEVELS[: libraries.LEVELS.index(BEST) + 1]
OPERATIONS = ("bitmask_linear", "armor_linear", "block_sparse_linear", "sparse_conv2d")


@pytest.fixture(params=[*LEVELS, "torch"])
def way(request, simd, monkeypatch):
    """Every SIMD level, and plain torch as without a compiler."""
    if request.param == "torch":
        for op in OPERATIONS:
            monkeypatch.setattr(f"zoo.kernels.{op}.library", lambda op: None)
    else:
        simd(request.param)
    return request.param


def regular(rows):
    """2:4 (40, 36): the last byte of a row of the mask has four bits of padding."""
    weight = torch.randn(40, 36)
    values, mask, _ = pack_bitmask(weight, (torch.arange(36) % 4 < 2).expand(40, 36), per_row=18)
    return {"x": torch.randn(rows, 36), "values": values, "mask": mask}


def ragged(rows):
    weight = torch.randn(40, 36) * (torch.arange(40 * 36).view(40, 36) % 5 > 1)
    values, mask, row_offsets = pack_bitmask(weight)
    return {"x": torch.randn(rows, 36), "values": values, "mask": mask, "row_offsets": row_offsets}


def run_expand(x, values, mask, row_offsets):
    return bitmask_expand(values, mask, row_offsets, 36)


def run_armor(x, values, mask):
    return armor_linear(x, torch.eye(4).repeat(9, 1, 1), values, mask, torch.eye(4).repeat(10, 1, 1))


def run_conv(x, values, mask, row_offsets):
    image = x.repeat(1, 25)[:, : 4 * 25].view(-1, 4, 5, 5)
    return sparse_conv2d(image, values, mask, row_offsets, kernel=(3, 3))


MASKED = {
    "2:4": (bitmask_linear, regular),
    "ragged": (lambda **t: bitmask_linear(**t), ragged),
    "expanded": (run_expand, ragged),
    "armor": (run_armor, regular),
    "convolution": (run_conv, ragged),
}


def every_bit(t):
    t["mask"].fill_(255)


def one_bit_more(t):
    t["mask"][7, 1] |= 255


def one_bit_less(t):
    t["mask"][7, 1] &= t["mask"][7, 1] - 1


def padding_bit(t):
    """As many as there should be, one of them beyond the last column."""
    t["mask"][9, 0] &= t["mask"][9, 0] - 1
    t["mask"][9, 4] |= 128


def far_away(t):
    t["row_offsets"][1:] = 2**40


def negative(t):
    t["row_offsets"][3] = -(2**62)


def shifted(t):
    t["row_offsets"] += 1


def exchanged(t):
    t["row_offsets"][4] = t["row_offsets"][5]


def short(t):
    """The last values are missing."""
    t["values"] = t["values"][:-3] if t["values"].ndim == 1 else t["values"][:, :-1]


MASKS = [every_bit, one_bit_more, one_bit_less, padding_bit, short]
OFFSETS = [far_away, negative, shifted, exchanged]


@pytest.mark.parametrize("rows", [0, 1, 5, 40])  # none, from the packed weight, through the dense one
@pytest.mark.parametrize("name", MASKED)
def test_masks_values_and_offsets_must_belong_together(name, rows, way):
    run, example = MASKED[name]
    torch.manual_seed(0)
    assert run(**example(rows)).isfinite().all()
    for damage in MASKS + (OFFSETS if "row_offsets" in example(1) else []):
        tensors = example(rows)
        damage(tensors)
        with pytest.raises(UserError, match="each row of the mask must keep .* the file is damaged, download or build"):
            run(**tensors)
            pytest.fail(f"{damage.__name__} was computed")


@pytest.mark.parametrize("name", ["convolution", "expanded"])
def test_the_direct_convolution_looks_too(name, simd, monkeypatch):
    """At the density of `ragged` the weight would be expanded."""
    monkeypatch.setattr("zoo.kernels.sparse_conv2d.DENSEST", 1.0)
    for damage in MASKS + OFFSETS:
        tensors = ragged(2)
        damage(tensors)
        with pytest.raises(UserError, match="sparse_conv2d: each row of the mask"):
            run_conv(**tensors)


def blocks(rows):
    keep = torch.arange(5 * 6).view(5, 6) % 3 > 0
    return {"x": torch.randn(rows, 48), **pack_blocks(torch.randn(40, 48), keep, (8, 8))}


def place(name, index, value):
    def damage(t):
        t[name][index] = value

    return damage


def twice(t):
    t["col_indices"][1] = t["col_indices"][0]


BLOCKS = [
    place("crow_indices", slice(1, None), 2**30),
    place("crow_indices", 2, -5),
    place("crow_indices", 0, 1),
    place("crow_indices", -1, 19),
    place("col_indices", 3, 6),
    place("col_indices", 3, -1),
    place("col_indices", slice(None), 2**30),
    twice,
]


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_indices_of_blocks_must_be_in_order_and_range(rows, way):
    gradient = torch.ops.slimzoo.block_sparse_linear_gradient.default
    block_sparse_linear(**blocks(rows), d_out=40)
    for damage in BLOCKS:
        tensors = blocks(rows)
        damage(tensors)
        with pytest.raises(UserError, match="crow_indices must rise from 0 to nnz, .* the file is damaged"):
            block_sparse_linear(**tensors, d_out=40)
        indices = tensors["crow_indices"], tensors["col_indices"]
        with pytest.raises(UserError, match="crow_indices must rise from 0 to nnz, .* the file is damaged"):
            gradient(torch.randn(rows, 40), tensors["x"], *indices, 8, 8)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_is_refused_or_harmless(data):
    """Bytes of what is indexed with are changed at random: refused by kernel and definition alike, or equal numbers."""
    name = data.draw(st.sampled_from([*MASKED, "blocks"]))
    run, example = (lambda **t: block_sparse_linear(**t, d_out=40), blocks) if name == "blocks" else MASKED[name]
    rows = data.draw(st.sampled_from([1, 40]))
    torch.manual_seed(0)
    tensors = example(rows)
    key = data.draw(st.sampled_from([key for key, t in tensors.items() if not t.is_floating_point()]))
    raw = tensors[key].view(torch.uint8).view(-1)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    results = []
    for library in (libraries.library, lambda op: None):
        with pytest.MonkeyPatch.context() as patch:
            for op in OPERATIONS:
                patch.setattr(f"zoo.kernels.{op}.library", library)
            try:
                results.append(run(**tensors))
            except UserError:
                results.append(None)
    if results[1] is None:
        assert results[0] is None
    else:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_gpus_tensors_are_looked_at_once_while_they_stay_as_they_are():
    """`prove` does not ask where tensors are."""
    t, looks = ragged(1), []

    def look(mask, row_offsets, *sizes):
        def check():
            looks.append(mask)
            check_bitmask("op", t["values"], mask, 36, row_offsets)

        ops.prove(check, (mask, row_offsets), sizes)
        return len(looks)

    assert [look(t["mask"], t["row_offsets"], 36) for _ in range(3)] == [1, 1, 1]
    assert look(t["mask"], t["row_offsets"], 40) == 2  # other sizes
    assert look(t["mask"], t["row_offsets"].clone(), 40) == 3  # another tensor
    assert look(t["mask"].clone(), t["row_offsets"], 40) == 4
    t["row_offsets"].add_(0)  # perhaps other numbers
    assert look(t["mask"], t["row_offsets"], 40) == 5
    t["mask"].data = t["mask"].clone()  # other memory
    assert look(t["mask"], t["row_offsets"], 40) == 6
    t["mask"].fill_(255)
    for _ in range(2):  # what has failed is looked at again
        with pytest.raises(UserError, match="op: each row"):
            look(t["mask"], t["row_offsets"], 40)
    with torch.inference_mode():
        kept = ragged(1)
        assert look(kept["mask"], kept["row_offsets"], 36) == 9
        assert look(kept["mask"], kept["row_offsets"], 36) == 10  # these keep no version


def test_checks_of_the_definitions_agree_with_packing():
    for d_in in (1, 8, 13):
        for weight in (torch.zeros(4, d_in), torch.ones(4, d_in), torch.zeros(0, d_in)):
            values, mask, row_offsets = pack_bitmask(weight)
            check_bitmask("op", values, mask, d_in, row_offsets)
    for keep in (torch.zeros(3, 2).bool(), torch.ones(3, 2).bool()):
        packed = pack_blocks(torch.randn(12, 8), keep, (4, 4))
        check_blocks(packed["crow_indices"], packed["col_indices"], 2)


def test_what_is_read_from_disk_at_every_forward_is_looked_at_then(tmp_path):
    """The file of a loaded model is damaged: the second layer is read from it again."""
    folder = Packing(make_base(tmp_path / "base", "qwen2"), "ragged").write(tmp_path / "slim")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.row_offsets"][1:] = 2**40
        save_file(tensors, path)
        with pytest.raises(UserError, match="each row of the mask must keep .* the file is damaged"):
            model(ids)
