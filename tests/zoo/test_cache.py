"""The quantised KV cache inside models: what it stores, what attention reads, and all that generation does with a cache."""

import itertools
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import zoo  # noqa: F401
import zoo.cache as cache_module
from zoo.cache import ATTENTION, CACHE, KVTunerCache, KVTunerLayer, check_table
from zoo.errors import UserError
from zoo.kv_presets import PRESETS, kv_preset

IDS = torch.randint(0, 256, (2, 45), generator=torch.Generator().manual_seed(0))


def table(layers=((8, 4), (4, 2)), mode="per_token", **changes):
    usual = (
        {"group_size": -1, "residual_length": 0} if mode == "per_token" else {"group_size": 8, "residual_length": 16}
    )
    return (
        {"method": "kvtuner", "version": 1, "mode": mode, "layers": [list(pair) for pair in layers]} | usual | changes
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("base") / "llama", "llama", max_position_embeddings=512)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=["sdpa", ATTENTION])
def attention(model, request):
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation("sdpa")


def run(model, cache, ids, chunks=(), mask=None):
    """Logits of every token: first chunks of the given lengths, then token by token."""
    logits, start = [], 0
    for length in (*chunks, *[1] * (ids.shape[1] - sum(chunks))):
        part = {"attention_mask": mask[:, : start + length]} if mask is not None else {}
        with torch.no_grad():
            out = model(ids[:, start : start + length], **{CACHE: cache}, use_cache=True, **part)
        logits.append(out.logits)
        start += length
    return torch.cat(logits, 1)


def stored(cache):
    """Everything that the cache holds, layer by layer."""
    return [
        tensor for layer in cache.layers for store in layer.stores for tensor in store.part()[:4] if tensor is not None
    ]


# ------------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_bytes_are_those_of_the_formula(model, mode):
    cache = KVTunerCache.from_config(model.config, table(mode=mode))
    run(model, cache, IDS, chunks=(40,))
    size, heads, tokens, total = 16, 2, 45, 0
    for pair in ((8, 4), (4, 2)):
        for bits in pair:
            if mode == "per_token":
                total += tokens * (size * bits // 8 + 4)
            else:
                packed, rest = 32, 13
                total += packed * size * bits // 8 + 4 * packed * size // 8 + rest * size * 4
    assert cache.nbytes == 2 * heads * total and cache.get_seq_length() == tokens
    assert (cache.batch_size, cache.get_max_length()) == (2, -1)


@pytest.mark.slow
def test_sixteen_bits_are_a_dynamic_cache(model, attention):
    found = run(model, KVTunerCache.from_config(model.config, table(((16, 16),) * 2)), IDS, chunks=(30,))
    wanted = run(model, DynamicCache(config=model.config), IDS, chunks=(30,))
    assert torch.equal(found, wanted)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cache = KVTunerCache.from_config(model.config, table(((16, 16),) * 2))
    assert torch.equal(model.generate(IDS, **{CACHE: cache}, **options), model.generate(IDS, **options))


def test_dense_keys_are_decoded_as_by_torch(model, monkeypatch):
    """Under "slimzoo_kv" a plain cache goes through the kernel while decoding, padded rows included, and only then."""
    calls, mask = [], torch.ones_like(IDS)
    mask[0, :7] = 0
    kernel = cache_module.kv_attention
    monkeypatch.setattr(cache_module, "kv_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    found = {}
    for implementation in ("sdpa", ATTENTION):
        model.set_attn_implementation(implementation)
        found[implementation] = run(model, DynamicCache(config=model.config), IDS, chunks=(20,), mask=mask)[:, 7:]
    model.set_attn_implementation("sdpa")
    assert len(calls) == (IDS.shape[1] - 20) * model.config.num_hidden_layers
    torch.testing.assert_close(found["sdpa"], found[ATTENTION], atol=2e-4, rtol=1e-4)


def test_decoding_that_dequantises_says_how_to_avoid_it(model, monkeypatch):
    said = []
    monkeypatch.setattr(cache_module.logger, "warning_once", said.append)
    model.set_attn_implementation(ATTENTION)
    run(model, KVTunerCache.from_config(model.config, table()), IDS, chunks=(40,))
    assert not said
    copy = type(model.config).from_dict(
        model.config.to_dict()
    )  # another config does not know what the model attends with
    run(model, KVTunerCache.from_config(copy, table()), IDS, chunks=(44,))
    model.set_attn_implementation("sdpa")
    run(model, KVTunerCache.from_config(model.config, table()), IDS, chunks=(45,))
    assert set(said) == {cache_module.SLOW} and len(said) == 2  # one a layer; none for a prompt


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize("pair", [*itertools.product((8, 4, 2), (8, 4, 2)), (16, 4), (8, 16)])
def test_packed_attention_is_dequantised_attention(model, mode, pair):
    """Wherever both ways of summing round to the same codes and 16-bit scales, at rounding's distance.

    What lies half-way between two may fall to either side (about one run in six), and then all that follows differs
    by a step of quantisation, on any processor.
    """
    for seed in range(6):
        ids, found, codes = torch.randint(0, 256, IDS.shape, generator=torch.Generator().manual_seed(seed)), {}, {}
        for implementation in ("sdpa", ATTENTION):
            model.set_attn_implementation(implementation)
            cache = KVTunerCache.from_config(model.config, table((pair, pair), mode))
            found[implementation] = run(model, cache, ids, chunks=(20,))
            codes[implementation] = [x for x in stored(cache) if x.dtype != torch.float32]
        model.set_attn_implementation("sdpa")
        if all(map(torch.equal, *codes.values())):
            break
    else:
        pytest.fail("the codes differ for six texts out of six")
    torch.testing.assert_close(found["sdpa"], found[ATTENTION], atol=2e-5, rtol=1e-4)
    if 16 not in pair and pair[0] < 8:
        dense = run(model, DynamicCache(config=model.config), ids, chunks=(20,))
        assert (found["sdpa"] - dense).abs().max() > 1e-3  # it is quantised


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_codes_do_not_depend_on_how_tokens_came_and_never_change(mode):
    config = type("Config", (), {"_attn_implementation": "sdpa", "num_attention_heads": 4, "head_dim": 16})()
    config.num_hidden_layers = 1
    g = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 2, 260, 16, generator=g), torch.randn(2, 2, 260, 16, generator=g)

    def layer(lengths):
        made = KVTunerLayer(4, 2, check_table(config, table(((4, 2),), mode))[0], config)
        start = 0
        for length in lengths:
            made.update(k[:, :, start : start + length], v[:, :, start : start + length])
            start += length
        return made

    whole = layer([260])
    for lengths in ([1] * 260, [7, 100, 1, 1, 51, 100]):
        for one, other in zip(whole.stores, layer(lengths).stores, strict=True):
            for a, b in zip(one.part()[:4], other.part()[:4], strict=True):
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    early = [tensor.clone() for store in layer([60]).stores for tensor in store.part()[:3]]
    later = layer([60, *[1] * 200])
    for before, after in zip(early, [t for store in later.stores for t in store.part()[:3]], strict=True):
        assert torch.equal(before, after[:, :, : before.shape[2]])


# --------------------------------------------------------------------------------------------------- what generation does


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_chunked_prefill_reads_what_is_stored(model, attention, mode):
    """Later chunks attend to earlier tokens as stored: with 8 bits that is near the exact model, chunk by chunk."""
    wanted = run(model, DynamicCache(config=model.config), IDS, chunks=(45,))
    cache = KVTunerCache.from_config(model.config, table(((8, 8),) * 2, mode))
    found = run(model, cache, IDS, chunks=(20, 20, 5))
    torch.testing.assert_close(
        found[:, :20], wanted[:, :20], atol=1e-5, rtol=1e-5
    )  # a prompt attends to itself exactly
    assert 0 < (found - wanted).abs().max() < 0.15
    rough = KVTunerCache.from_config(model.config, table(((8, 8),) * 2, mode, prefill="quantized"))
    assert not torch.equal(run(model, rough, IDS, chunks=(45,)), wanted)


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_left_padding_changes_nothing(model, attention, mode):
    """…also in blocks of keys by channel, whose range padding must not widen."""
    pair = table(((4, 4), (4, 4)), mode)
    prompt, padding = IDS[:1, :24], 8  # whole blocks: the same tokens share a block with and without padding
    ids = torch.cat([torch.cat([torch.full((1, padding), 258), prompt], 1), IDS[1:, : 24 + padding]])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 258}
    alone = model.generate(prompt, **{CACHE: KVTunerCache.from_config(model.config, pair)}, **options)
    cache = KVTunerCache.from_config(model.config, pair)
    if mode == "kivi":
        cache.form.padding = mask.bool()  # a model with the table does this by itself
    padded = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    assert torch.equal(alone[0, 24:], padded[0, 24 + padding :])


def test_padding_stays_out_of_a_blocks_range():
    config = type("Config", (), {"_attn_implementation": "sdpa", "num_attention_heads": 1, "head_dim": 16})()
    config.num_hidden_layers = 1
    k = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    k[:, :, :3] = 1e4
    layer = KVTunerLayer(8, 8, check_table(config, table(((8, 8),), "kivi"))[0], config)
    layer.form.padding = torch.arange(16)[None] >= 3
    layer.update(k, k)
    assert (layer.dense(layer.stores[0])[:, :, 3:] - k[:, :, 3:]).abs().max() < 0.02
    only = KVTunerLayer(8, 8, layer.form, config)
    layer.form.padding = torch.zeros(1, 16, dtype=torch.bool)  # nothing but padding
    only.update(k, k)
    assert torch.isfinite(only.dense(only.stores[0])).all()


def beams(model, pair):
    cache = KVTunerCache.from_config(model.config, pair)
    return model.generate(IDS[:1], **{CACHE: cache}, num_beams=3, max_new_tokens=20, min_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_beams_follow_their_histories(model, attention, mode):
    """With near-lossless widths beam search finds what it finds without a quantised cache."""
    found = beams(model, table(((8, 8), (16, 16)), mode))
    wanted = model.generate(IDS[:1], num_beams=3, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_crop_reorder_repeat_select(model, attention, mode):
    pair = table(((8, 4), (4, 8)), mode)
    cache = KVTunerCache.from_config(model.config, pair)
    run(model, cache, IDS, chunks=(45,))
    before = [layer.dense(store) for layer in cache.layers for store in layer.stores]
    cache.crop(-9)  # into a block
    after = [layer.dense(store) for layer in cache.layers for store in layer.stores]
    assert cache.get_seq_length() == 36
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old[:, :, :36], atol=1e-6, rtol=1e-6)
    run(model, cache, IDS[:, :12], chunks=(12,))  # it goes on
    assert cache.get_seq_length() == 48
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer in cache.layers:
        for store in layer.stores:
            dense = layer.dense(store)
            assert torch.equal(dense[0], dense[1])
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.batch_size == 2
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="minus the number"):
        cache.layers[0].crop(5)
    cache.reset()
    assert cache.nbytes == 0 and cache.batch_size == -1
    run(model, cache, IDS[:1], chunks=(10,))
    assert cache.batch_size == 1


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_a_saved_conversation_goes_on(model, attention, mode, tmp_path):
    pair = table(((8, 4), (4, 16)), mode)
    caches = [KVTunerCache.from_config(model.config, pair) for _ in range(2)]
    for cache in caches:
        run(model, cache, IDS[:, :30], chunks=(30,))
    caches[0].save(tmp_path / "state.safetensors")
    loaded = KVTunerCache.load(tmp_path / "state.safetensors", model.config, pair)
    assert loaded.nbytes == caches[1].nbytes
    found, wanted = (run(model, cache, IDS[:, 30:]) for cache in (loaded, caches[1]))
    assert torch.equal(found, wanted)
    for other in (table(((4, 4), (4, 16)), mode), table(((16, 16), (4, 16)), mode), table(((8, 4), (16, 16)), mode)):
        with pytest.raises(UserError, match="was saved with another table"):
            KVTunerCache.load(tmp_path / "state.safetensors", model.config, other)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """(tensors, metadata) of a saved cache that has every kind of tensor: two rows, 45 tokens, 32 of them packed."""
    cache = KVTunerCache.from_config(model.config, KINDS)
    cache.form.padding = torch.ones(2, 45, dtype=torch.bool)
    run(model, cache, IDS, chunks=(45,))
    path = tmp_path_factory.mktemp("saved") / "state.safetensors"
    cache.save(path)
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


KINDS = table(((8, 4), (4, 16)), "kivi")


def damage(name, change):
    """A change of one tensor of a saved cache."""
    return lambda tensors, facts: tensors.update({name: change(tensors[name])})


def poison(name, value):
    def change(tensors, facts):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: facts.clear(), "does not say that it is a saved cache"),
        (lambda tensors, facts: facts.update(format="pt"), "does not say that it is a saved cache"),
        (lambda tensors, facts: facts.update(version="2"), "does not say that it is a saved cache"),
        (lambda tensors, facts: facts.update(tokens="-45"), "does not say that it is a saved cache"),
        (lambda tensors, facts: facts.update(tokens="9" * 5000), "does not say that it is a saved cache"),
        (lambda tensors, facts: facts.update(layers="3"), "it holds 3 layers, the model has 2"),
        (lambda tensors, facts: facts.update(tokens="44"), r"0.keys.dense is float32 \(2, 2, 13, 16\)"),
        (lambda tensors, facts: facts.update(tokens="0"), "has a tensor 0.keys.codes"),
        (lambda tensors, facts: facts.update(tokens=str(10**18 - 1)), "0.keys.dense is float32"),
        (lambda tensors, facts: tensors.clear(), "lacks 0.keys.codes"),
        (lambda tensors, facts: tensors.pop("1.keys.minimum"), "lacks 1.keys.minimum"),
        (lambda tensors, facts: tensors.update({"01.keys.scale": tensors.pop("1.keys.scale")}), "tensor 01.keys.scale"),
        (
            lambda tensors, facts: tensors.update({"2.keys.dense": tensors["1.keys.dense"].clone()}),
            "a tensor 2.keys.dense",
        ),
        (
            lambda tensors, facts: tensors.update({"1.values.codes": tensors["0.values.codes"].clone()}),
            "1.values.codes",
        ),
        (damage("1.keys.codes", lambda x: x[:, :1].contiguous()), r"uint8 \(2, 1, .*uint8 \(2, 2, "),
        (damage("1.values.dense", lambda x: x[:, :1].contiguous()), r"1.values.dense is float32 \(2, 1, 45, 16\)"),
        (damage("0.values.scale", lambda x: x[:1].contiguous()), "0.values.scale is float16"),
        (damage("0.keys.dense", lambda x: x[:0].contiguous()), "0.keys.dense is float32"),
        (damage("0.keys.dense", lambda x: torch.tensor(1.0)), r"0.keys.dense is float32 \(\)"),
        (damage("0.keys.codes", lambda x: x.to(torch.int32)), "0.keys.codes is int32 .* uint8"),
        (damage("0.keys.scale", lambda x: x.float()), "0.keys.scale is float32 .* float16"),
        (damage("0.keys.dense", lambda x: x.double()), "0.keys.dense is float64 .* float32"),
        (damage("1.values.dense", lambda x: x.bfloat16()), "1.values.dense is bfloat16 .* float32"),
        (damage("padding", lambda x: x[:1].contiguous()), r"padding is bool \(1, 45\); bool of 2 rows"),
        (damage("padding", lambda x: x.long()), r"padding is int64 \(2, 45\)"),
        (poison("0.keys.scale", torch.nan), "0.keys.scale holds numbers that are not finite"),
        (poison("1.keys.minimum", torch.inf), "1.keys.minimum holds numbers that are not finite"),
        (poison("1.values.dense", -torch.inf), "1.values.dense holds numbers that are not finite"),
    ],
)
def test_a_damaged_conversation_is_refused_in_one_sentence(model, saved, tmp_path, change, message):
    tensors, facts = dict(saved[0]), dict(saved[1])
    change(tensors, facts)
    save_file(tensors, tmp_path / "state.safetensors", metadata=facts)
    with pytest.raises(UserError, match=message) as caught:
        KVTunerCache.load(tmp_path / "state.safetensors", model.config, KINDS)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_conversation_are_refused(model, saved, tmp_path):
    path = tmp_path / "state.safetensors"
    save_file(*saved[:1], path, metadata=saved[1])
    KVTunerCache.load(path, model.config, KINDS)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            KVTunerCache.load(path, model.config, KINDS)
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be read"):
            KVTunerCache.load(missing, model.config, KINDS)


def test_every_byte_is_a_code(model, saved, tmp_path):
    """Codes need no check of their values: whatever the bytes, attention stays within the cache and finite."""
    ones = {name: x.fill_(255) if x.dtype == torch.uint8 else x for name, x in load_tensors(saved).items()}
    save_file(ones, tmp_path / "state.safetensors", metadata=saved[1])
    model.set_attn_implementation(ATTENTION)
    logits = run(model, KVTunerCache.load(tmp_path / "state.safetensors", model.config, KINDS), IDS[:, :2])
    model.set_attn_implementation("sdpa")
    assert logits.isfinite().all()


def load_tensors(saved):
    return {name: tensor.clone() for name, tensor in saved[0].items()}


def test_what_could_not_be_loaded_is_not_saved(model, tmp_path):
    path = tmp_path / "state.safetensors"
    cache = KVTunerCache.from_config(model.config, KINDS)
    run(model, cache, IDS, chunks=(45,))
    cache.layers[1].crop(-3)
    with pytest.raises(UserError, match="the layers hold 42 and 45 tokens"):
        cache.save(path)
    cache.crop(-9)
    cache.layers[0].crop(-3)
    cache.layers[1].stores[1].dense[0, 1, 2, 3] = torch.nan
    with pytest.raises(UserError, match="1.values.dense holds numbers that are not finite"):
        cache.save(path)
    cache.layers[1].stores[1].dense[0, 1, 2, 3] = 0
    with pytest.raises(UserError, match="cannot be written"):
        cache.save(tmp_path / "nowhere" / "state.safetensors")
    assert not list(tmp_path.iterdir())
    cache.save(path)
    assert KVTunerCache.load(path, model.config, KINDS).get_seq_length() == 33


def test_an_empty_conversation_is_one_too(model, tmp_path):
    cache = KVTunerCache.from_config(model.config, KINDS)
    cache.save(tmp_path / "new.safetensors")
    run(model, cache, IDS, chunks=(45,))
    cache.crop(-45)
    cache.save(tmp_path / "forgotten.safetensors")
    for name in ("new", "forgotten"):
        loaded = KVTunerCache.load(tmp_path / f"{name}.safetensors", model.config, KINDS)
        assert loaded.get_seq_length() == 0 and loaded.batch_size == -1
        assert run(model, loaded, IDS[:1], chunks=(20,)).isfinite().all()


def test_tokens_newer_than_the_mask_are_real(model):
    """Who passes a mask with the prompt only goes on without one: later blocks have no padding."""
    caches = [KVTunerCache.from_config(model.config, KINDS) for _ in range(2)]
    for cache, length in zip(caches, (20, 45), strict=True):
        cache.form.padding = torch.ones(2, length, dtype=torch.bool)
        cache.form.padding[0, :3] = False
        run(model, cache, IDS, chunks=(20,))
    for one, other in zip(*map(stored, caches), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 31])
def test_short_prompts(model, attention, prompt):
    for mode in ("per_token", "kivi"):
        cache = KVTunerCache.from_config(model.config, table(mode=mode))
        logits = run(model, cache, IDS[:, : prompt + 3], chunks=(prompt,))
        assert torch.isfinite(logits).all() and cache.get_seq_length() == prompt + 3


def test_training_goes_through(model):
    cache = KVTunerCache.from_config(model.config, table())
    model.set_attn_implementation(ATTENTION)
    out = model(IDS, **{CACHE: cache}, labels=IDS)
    out.loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.zero_grad()
    model.set_attn_implementation("sdpa")


# --------------------------------------------------------------------------------------------- models that have a table


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Packed weights and a packed cache in one folder."""
    root = tmp_path_factory.mktemp("stacked")
    packing = Packing(make_base(root / "base", "qwen2", max_position_embeddings=512), (4, 3))
    return packing.write(root / "slim", settings={"kv_cache_quantization": table(mode="kivi")})


def test_generate_uses_the_table_by_itself(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config._attn_implementation == ATTENTION
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    out = model.generate(IDS, return_dict_in_generate=True, attention_mask=torch.ones_like(IDS), **options)
    cache = out[CACHE]
    assert type(cache).__name__ == "KVTunerCache"
    assert [(layer.key_bits, layer.value_bits) for layer in cache.layers] == [(8, 4), (4, 2)]
    explicit = KVTunerCache.from_config(model.config)
    assert torch.equal(model.generate(IDS, **{CACHE: explicit}, **options), out.sequences)
    eager = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    assert torch.equal(eager.generate(IDS, **options), out.sequences)  # dequantised: the same numbers
    with torch.no_grad():
        assert type(model(IDS)[CACHE]).__name__ == "KVTunerCache"
        assert CACHE not in model(IDS, use_cache=False)
        dense = model(IDS, use_cache=False).logits
    torch.testing.assert_close(model(IDS).logits, dense)  # the prompt itself is exact
    assert model.generate(IDS, use_cache=False, **options).shape == out.sequences.shape
    own = DynamicCache(config=model.config)
    model.generate(IDS, **{CACHE: own}, **options)
    assert own.get_seq_length() == 74
    assert model.generate(IDS, cache_implementation="static", **options).shape == out.sequences.shape
    assert model.generate(IDS, num_beams=3, **options).shape == out.sequences.shape


def test_padding_reaches_the_cache_by_itself(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    out = model.generate(IDS, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    assert not out[CACHE].form.padding[0, :5].any() and out[CACHE].form.padding[1].all()


def test_the_table_survives_saving(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["kv_cache_quantization"] == table(mode="kivi")
    assert (tmp_path / "again" / "slimzoo_cache.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_assisted_decoding_crops_and_agrees(checkpoint, mode):
    # prefill="quantized": a token is read as its codes whether it came alone or among the drafted ones
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    own = {"mode": mode, "prefill": "quantized"}
    if mode == "per_token":
        own |= {"group_size": -1, "residual_length": 0}
    table = model.config.kv_cache_quantization | own
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    plain, assisted = (KVTunerCache.from_config(model.config, table) for _ in range(2))
    wanted = model.generate(IDS[:1], **{CACHE: plain}, **options)
    crops, crop = [], assisted.crop
    assisted.crop = lambda length: (crops.append(length), crop(length))[1]
    found = model.generate(IDS[:1], prompt_lookup_num_tokens=3, **{CACHE: assisted}, **options)
    assert crops and torch.equal(found, wanted)


@pytest.mark.slow
def test_compiled_models_give_the_same(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    caches = [KVTunerCache.from_config(model.config) for _ in range(2)]
    compiled = torch.compile(model, backend="eager")
    found, wanted = (run(m, c, IDS[:, :20], chunks=(17,)) for m, c in zip((compiled, model), caches, strict=True))
    torch.testing.assert_close(found, wanted)


def test_sliding_window_layers_keep_their_own_cache(tmp_path):
    base = make_base(tmp_path / "base", "gemma3_text")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pair = table(((16, 16), (8, 4)))
    cache = KVTunerCache.from_config(model.config, pair)
    run(model, cache, IDS[:, :30], chunks=(20,))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "KVTunerLayer"]
    assert cache.layers[0].keys.shape[2] == 7 and cache.layers[1].get_seq_length() == 30
    cache.save(tmp_path / "state.safetensors")
    loaded = KVTunerCache.load(tmp_path / "state.safetensors", model.config, pair)
    found, wanted = (run(model, c, IDS[:, 30:40]) for c in (loaded, cache))
    assert torch.equal(found, wanted)
    with pytest.raises(UserError, match=r"layers\[0\] .*: a layer with a sliding window needs \[16, 16\]"):
        KVTunerCache.from_config(model.config, table())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [[8, 4]]}, "one pair for each of the model's 2 layers is needed, not 1"),
        ({"layers": [[8, 4], [8, 3]]}, r"layers\[1\] \[8, 3\]: key and value bits of 2, 4, 8 or 16"),
        ({"layers": [[8, 4], [8]]}, "key and value bits"),
        ({"mode": "magic"}, "mode 'magic': one of per_token, kivi"),
        ({"prefill": "maybe"}, "prefill 'maybe'"),
        ({"group_size": 32}, "mode per_token needs group_size -1"),
        ({"mode": "kivi"}, "group_size -1: mode kivi needs a multiple of 8 that divides the head size 16"),
        ({"mode": "kivi", "group_size": 32, "residual_length": 32}, "group_size 32"),
        ({"mode": "kivi", "group_size": 8, "residual_length": 12}, "residual_length 12"),
        ({"scale_dtype": "float32"}, "scale_dtype 'float32'"),
        ({"version": 2}, "update slimzoo"),
    ],
)
def test_impossible_tables_are_refused_in_one_sentence(model, changes, message):
    with pytest.raises(UserError, match=message):
        KVTunerCache.from_config(model.config, table() | changes)


def test_a_model_without_a_table_says_so(model):
    with pytest.raises(UserError, match="pass a table"):
        KVTunerCache.from_config(model.config)


@pytest.mark.parametrize("name", PRESETS)
def test_published_tables_make_a_cache_for_their_models_only(name):
    table = kv_preset(name)
    config = LlamaConfig(num_hidden_layers=len(table["layers"]), hidden_size=256, num_attention_heads=2)
    cache = KVTunerCache.from_config(config, table)
    assert [[layer.key_bits, layer.value_bits] for layer in cache.layers] == table["layers"]
    assert cache.form.mode == PRESETS[name][1]
    config.num_hidden_layers -= 1
    with pytest.raises(UserError, match="one pair for each of the model's"):
        KVTunerCache.from_config(config, table)


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(UserError, match="llama-3.1-8b-kivi-3.25"):
        kv_preset("llama-3.1-8b")


def test_reference_attention_is_what_it_says():
    """The definition itself against softmax written out, with a mask."""
    from zoo.kernels.kv_attention.reference import Part, kv_attention

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, *rest, generator=g) for heads, *rest in ((4, 8), (2, 5, 8), (2, 5, 8)))
    mask = torch.tensor([[True, False, True, True, False]])
    found = kv_attention(q, Part(None, None, None, k, 16), Part(None, None, None, v, 16), mask, 0.3)
    for head in range(4):
        weights = {t: math.exp(0.3 * (q[0, head] @ k[0, head // 2, t]).item()) for t in (0, 2, 3)}
        wanted = sum(w * v[0, head // 2, t] for t, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(found[0, head], wanted)
