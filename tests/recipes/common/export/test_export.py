"""Exports load in stock transformers and give the packed model's logits."""

import json
import math
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, ResNetConfig, ResNetForImageClassification
from transformers.utils.quantization_config import GgufConfig

from recipes.common.data.base_models import resolve_model
from recipes.common.export import EXPORTS, export_as
from recipes.common.export.compressed_tensors import export_compressed_tensors
from recipes.common.export.dense import export_dense
from recipes.common.export.gguf import SPLITS, check_gguf, export_gguf, pre_tokenizer_name
from zoo.errors import UserError
from zoo.folder import open_folder

IDS = torch.tensor([[5, 60, 7, 200, 31, 9, 101, 77]])


def logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(IDS).logits


def packed(tmp_path, family, kind="armor"):
    packing = Packing(make_base(tmp_path / "base", family), kind)
    packing.write(tmp_path / "packed", dtype=torch.float32)
    return tmp_path / "packed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "armor"), ("qwen2", "2:4"), ("llama", "ragged"), ("gemma3_text", "armor")]
)
def test_dense_export_is_a_stock_folder(tmp_path, family, kind, monkeypatch):
    folder = packed(tmp_path, family, kind)
    monkeypatch.setattr("recipes.common.export.dense.SHARD_BYTES", 50_000)
    export_dense(folder, tmp_path / "dense", dtype="float32")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == family and "auto_map" not in config and "compression_config" not in config
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("Q8_0", 3e-2)])
def test_gguf_gives_the_logits(tmp_path, family, kind, tolerance):
    folder = packed(tmp_path, family)
    export_gguf(folder, tmp_path / "model.gguf", kind)
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    expected = logits(folder)
    assert (back - expected).norm() < tolerance * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bits"), [("llama", (4, 3)), ("qwen2", (5, 2)), ("llama", (8, 6))])
def test_packed_bits_keep_their_codes_in_gguf(tmp_path, family, bits):
    folder = packed(tmp_path, family, bits)
    export_gguf(folder, tmp_path / "model.gguf", "packed")
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    expected = logits(folder)
    assert (back - expected).norm() < (2e-3 if max(bits) <= 5 else 3e-2) * expected.norm()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}
    assert [types[f"blk.{i}.attn_q.weight"] for i in (0, 1)] == [names[b] for b in bits]
    assert types["token_embd.weight"] == "F16" and types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_1"), (8, "Q8_0")])
def test_a_packed_head_of_tied_embeddings_is_exported(tmp_path, bits, type_name):
    packing = Packing(make_base(tmp_path / "base", "llama"), (4,), head_bits=bits)
    folder = packing.write(tmp_path / "packed")
    expected = logits(folder)
    export_dense(folder, tmp_path / "dense", dtype="float32")
    torch.testing.assert_close(logits(tmp_path / "dense"), expected, atol=1e-4, rtol=1e-4)
    export_gguf(folder, tmp_path / "model.gguf", "packed")
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))
    assert (back - expected).norm() < (2e-3 if bits == 4 else 3e-2) * expected.norm()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == (type_name, "F16")
    export_compressed_tensors(folder, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert [g["weights"]["num_bits"] for g in groups if "lm_head" in g["targets"]] == [bits]
    assert config["quantization_config"]["ignore"] == [] and config["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "ct" / "model.safetensors")
    codes = unpack_words(weights["lm_head.weight_packed"], bits, 64)
    zeros = unpack_words(weights["lm_head.weight_zero_point"].T, bits, 259).T.repeat_interleave(32, 1)
    w = (codes - zeros) * weights["lm_head.weight_scale"].repeat_interleave(32, 1)
    torch.testing.assert_close(w, packing.dense.lm_head.weight.data)
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights


def unpack_words(words, bits, n):
    """compressed-tensors' packing read bit by bit: code i is at bit i * bits of its row of int32 words."""
    out = torch.zeros(len(words), n, dtype=torch.int64)
    stream = [[(int(word) & 0xFFFFFFFF) >> b & 1 for word in row for b in range(32)] for row in words]
    for r, row in enumerate(stream):
        for i in range(n):
            out[r, i] = sum(row[i * bits + b] << b for b in range(bits))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_hold_the_same_codes(tmp_path, bits):
    folder = packed(tmp_path, "qwen2", (bits, 4))
    export_compressed_tensors(folder, tmp_path / "ct")
    weights = load_file(tmp_path / "ct" / "model.safetensors")
    quantization = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    schemes = {name: group["weights"] for group in quantization["config_groups"].values() for name in group["targets"]}
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        width, layer = schemes[name]["num_bits"], dense.get_submodule(name)
        d_out, d_in = weights[f"{name}.weight_shape"].tolist()
        codes = unpack_words(weights[f"{name}.weight_packed"], width, d_in)
        zeros = unpack_words(weights[f"{name}.weight_zero_point"].T, width, d_out).T
        scales = weights[f"{name}.weight_scale"]
        w = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        torch.testing.assert_close(w, layer.dense_weight())
        assert schemes[name]["group_size"] == 32 and schemes[name]["symmetric"] is False
    assert torch.equal(weights["model.layers.0.self_attn.k_proj.bias"], dense.model.layers[0].self_attn.k_proj.bias)


def test_compressed_tensors_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="packed bits with integer zero points only"):
        export_compressed_tensors(packed(tmp_path, "llama"), tmp_path / "ct")
    packing = Packing(make_base(tmp_path / "base2", "llama"), (4,))
    name = "model.layers.0.self_attn.k_proj"
    spec, _, tensors = packing.pack_bits(packing.dense.get_submodule(name), 8, torch.Generator())
    packing.compression["modules"][name] = spec
    packing.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    packing.write(tmp_path / "mixed")
    with pytest.raises(UserError, match="differ in bits or groups"):
        export_compressed_tensors(tmp_path / "mixed", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


@pytest.mark.slow
def test_the_real_base_survives_gguf(tmp_path):
    """SmolLM2: grouped queries, tied embeddings, a real tokenizer."""
    base = resolve_model("smollm2-135m-instruct")
    export_gguf(base.path, tmp_path / "model.gguf", "F16")
    dequantize = GgufConfig(dequantize=True)
    back = logits(tmp_path, gguf_file="model.gguf", quantization_config=dequantize)
    expected = logits(base.path)
    assert (back - expected).norm() < 2e-3 * expected.norm()
    text = "Tokens: 12, 'quoted'  spaced\n"
    ours = AutoTokenizer.from_pretrained(base.path)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(text).input_ids == ours


# ---------------------------------------------------------------------------------------------- what a GGUF file says


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: folder} of dense bases; tests change files of copies."""
    root = tmp_path_factory.mktemp("bases")
    return {family: make_base(root / family, family) for family in ("llama", "qwen2", "qwen3", "mistral")}


@pytest.fixture
def base(bases, tmp_path):
    """base(family, **changes): a copy of the base whose JSON files are changed, {file stem: {key: value or None}}."""

    def copy(family="llama", **changes):
        folder = shutil.copytree(bases[family], tmp_path / "base")
        for stem, fields in changes.items():
            path = folder / f"{stem}.json"
            content = {**json.loads(path.read_text()), **fields}
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return folder

    return copy


def written(folder, kind="F16"):
    """({key: value}, {tensor: numbers}) of a folder's GGUF file."""
    path = folder.with_suffix(".gguf")
    export_gguf(folder, path, kind)
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


TEMPLATE = {"Sequence": {"id": "A", "type_id": 0}}
PAIR = [TEMPLATE, {"Sequence": {"id": "B", "type_id": 1}}]
IDS_OF = {"<s>": 256, "</s>": 257, "<pad>": 258}


def around(*tokens):
    """A post-processor: a text where None stands, special tokens elsewhere."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}} if token else TEMPLATE for token in tokens]
    special = {token: {"id": token, "ids": [IDS_OF[token]], "tokens": [token]} for token in tokens if token}
    return {"type": "TemplateProcessing", "single": single, "pair": PAIR, "special_tokens": special}


ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 257], "cls": ["<s>", 256], "trim_offsets": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("settings", "processor", "adds"),
    [
        ({}, None, (False, False)),
        ({}, LEVEL, (False, False)),
        ({}, around("<s>", None), (True, False)),
        ({}, around(None, "</s>"), (False, True)),
        ({}, {"type": "Sequence", "processors": [LEVEL, around("<s>", None, "</s>")]}, (True, True)),
        ({}, ROBERTA | {"add_prefix_space": False}, (True, True)),
        ({"add_bos_token": False}, around("<s>", None, "</s>"), (True, True)),
        ({"add_bos_token": True}, None, (True, False)),
        ({"add_eos_token": True, "add_bos_token": None}, LEVEL, (False, True)),
    ],
)
def test_gguf_says_what_the_tokenizer_puts_around_a_text(base, settings, processor, adds):
    folder = base(tokenizer_config=settings)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    found = written(folder)[0]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == adds
    if processor not in (None, LEVEL):  # which is all that transformers looks at
        ids = AutoTokenizer.from_pretrained(folder)("abc").input_ids
        assert (ids[0] == 256, ids[-1] == 257) == adds and len(ids) == 3 + sum(adds)


def test_gguf_refuses_what_it_cannot_put_around_a_text(base):
    folder = base(tokenizer={"post_processor": around("<s>", "<pad>", None)})
    with pytest.raises(UserError, match=r"puts the tokens \[256, 258\] before a text, .* its BOS token, 256"):
        check_gguf(open_folder(folder))
    with pytest.raises(UserError, match="before a text"):
        export_gguf(folder, folder.with_suffix(".gguf"))
    assert not folder.with_suffix(".gguf").exists()


def test_gguf_takes_special_tokens_from_the_tokenizer(base):
    """config.json may list several ends of a text, or another start than the tokenizer's."""
    changes = {"eos_token_id": [1, 257], "bos_token_id": 3}
    found = written(base(config=changes, tokenizer_config={"unk_token": "<pad>"}))[0]
    kinds = ("bos", "eos", "padding", "unknown")
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in kinds] == [256, 257, 258, 258]


@pytest.mark.parametrize(
    ("jinja", "settings", "template", "others"),
    [
        ("in a file", None, "in a file", None),
        (None, "in the settings", "in the settings", None),
        ("in a file", "in the settings", "in a file", None),
        (["in a file", "of tools"], "in the settings", "in a file", "of tools"),
        (None, [{"name": "default", "template": "usual"}, {"name": "tool_use", "template": "tools"}], "usual", "tools"),
        (None, None, None, None),
    ],
)
def test_gguf_keeps_the_chat_template_wherever_it_is(base, jinja, settings, template, others):
    folder = base(tokenizer_config={"chat_template": settings})
    if isinstance(jinja, list):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(jinja[1])
        jinja = jinja[0]
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    found = written(folder)[0]
    assert found.get("tokenizer.chat_template") == template
    assert found.get("tokenizer.chat_template.tool_use") == others
    ours = AutoTokenizer.from_pretrained(folder).chat_template
    assert (ours["default"] if isinstance(ours, dict) else ours) == template


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FULL = 0.1 * math.log(4) + 1  # what llama.cpp multiplies by anyway


@pytest.mark.parametrize(
    ("family", "scaling", "keys"),
    [
        ("llama", None, {}),
        ("llama", {"type": "linear", "factor": 2.5}, {"type": "linear", "factor": 2.5}),
        ("qwen3", {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ("qwen2", YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 32}),
        (
            "llama",
            YARN | {"beta_fast": 32, "beta_slow": 1.0, "attention_factor": 2.0},
            {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "attn_factor": 2 / FULL},
        ),
        ("mistral", YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, {"attn_factor": 1 / FULL}),
        ("qwen2", YARN | {"factor": None}, {"factor": 4.0}),  # 128 positions over 32
    ],
)
def test_gguf_keeps_legacy_rope_scaling(base, family, scaling, keys):
    """…of a config.json as transformers 4 wrote it, with `rope_theta` beside `rope_scaling`."""
    folder = base(family, config={"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": scaling})
    found, tensors = written(folder)
    architecture = found["general.architecture"]
    assert found[f"{architecture}.rope.freq_base"] == 500000.0
    scaled = {key.rpartition(".")[2]: value for key, value in found.items() if ".rope.scaling." in key}
    assert scaled.keys() >= keys.keys() and (keys or not scaled)
    for key, value in keys.items():
        assert scaled[key] == value if isinstance(value, str) else math.isclose(scaled[key], value, rel_tol=1e-6)
    assert ("attn_factor" in scaled) == ("attn_factor" in keys) and "rope_freqs.weight" not in tensors


@pytest.mark.parametrize("packed", [False, True])
def test_gguf_divides_the_frequencies_of_llama_3(base, tmp_path, packed):
    """Head size 16 and base 10000: 8 frequencies, of wavelengths 2 pi 10^(i / 2)."""
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    folder = base(config={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": scaling})
    if packed:
        folder = Packing(folder, (4,)).write(tmp_path / "packed")
    found, tensors = written(folder)
    wanted = []
    for i in range(8):
        wavelength = 2 * math.pi * 10 ** (i / 2)
        smooth = (64 / wavelength - 1) / (4 - 1)
        wanted.append(1 if wavelength < 16 else 8 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert 1 in wanted and 8 in wanted and len(set(wanted)) == 4
    torch.testing.assert_close(torch.tensor(tensors["rope_freqs.weight"]), torch.tensor(wanted), atol=0, rtol=1e-5)
    assert "llama.rope.scaling.type" not in found and found["llama.rope.freq_base"] == 10000.0


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"type": "dynamic", "factor": 2.0}),
        ("llama", YARN | {"truncate": False}),
        ("llama", YARN | {"beta_fast": 16.0}),  # which llama.cpp would not read
        ("llama", YARN | {"partial_rotary_factor": 0.5}),
        ("qwen2", {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_gguf_refuses_other_rotary_embeddings(base, family, scaling):
    folder = base(family, config={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": scaling})
    with pytest.raises(UserError, match="the types default, linear and yarn can"):
        check_gguf(open_folder(folder))


def test_gguf_describes_the_model_with_defaults_filled_in(base):
    left_out = {"num_key_value_heads": None, "head_dim": None, "architectures": None, "rms_norm_eps": None}
    folder = base("llama", config=left_out | {"num_key_value_heads": 2})
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\nText.\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    found = written(folder)[0]
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    wanted = {
        "general.type": "model",
        "general.license": "mit",
        "general.languages": ["en"],
        "general.sampling.temp": 0.5,
        "general.size_label": f"{round(numbers / 1000)}K",
        "llama.attention.key_length": 16,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 259,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert math.isclose(found["llama.attention.layer_norm_rms_epsilon"], 1e-6, rel_tol=1e-6)
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match="its model card or generation_config.json is broken"):
        check_gguf(open_folder(folder))


def test_gguf_writes_the_vocabulary_as_its_kinds_of_tokens(base):
    folder = base(config={"vocab_size": 262}, tokenizer_config={"add_prefix_space": False})
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [added | {"id": 259, "content": "<|fim|>"}, added | {"id": 260, "content": "plain"}]
    tokenizer["model"]["merges"] = [["a", "b"], ["c", "d"]]
    tokenizer["model"]["vocab"] |= {"ab": 250, "cd": 251}
    path.write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.zeros(262, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = written(folder)[0]
    kinds = gguf.TokenType
    wanted = [kinds.CONTROL] * 3 + [kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED]
    assert found["tokenizer.ggml.token_type"][256:] == wanted
    assert found["tokenizer.ggml.tokens"][256:] == ["<s>", "</s>", "<pad>", "<|fim|>", "plain", "[PAD261]"]
    assert found["tokenizer.ggml.merges"] == ["a b", "c d"] and found["tokenizer.ggml.add_space_prefix"] is False
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 259}))
    with pytest.raises(UserError, match="the tokenizer has token 260, the model's vocabulary only 259"):
        check_gguf(open_folder(folder))
    (folder / "config.json").write_text(json.dumps(config))
    for name, message in (("tokenizer_config", "no readable tokenizer_config.json"), ("tokenizer", "tokenizer.json")):
        (folder / f"{name}.json").write_text("{")
        with pytest.raises(UserError, match=message):
            check_gguf(open_folder(folder))


def test_gguf_names_only_the_pre_tokenizers_it_knows_exactly():
    (llama, _), *_ = SPLITS

    def split(regex, **changes):
        first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | changes
        return {"type": "Sequence", "pretokenizers": [first, LEVEL | {"use_regex": False}]}

    digits = {"type": "Digits", "individual_digits": True}
    assert [pre_tokenizer_name(split(regex), ignore) for regex, ignore in SPLITS] == list(SPLITS.values())
    assert pre_tokenizer_name(LEVEL) == "gpt-2"
    assert pre_tokenizer_name({"type": "Sequence", "pretokenizers": [digits, LEVEL]}) == "smollm"
    digits["individual_digits"] = False
    for definition, ignore in (
        (None, False),
        (LEVEL, True),
        (LEVEL | {"add_prefix_space": True}, False),
        (LEVEL | {"use_regex": False}, False),
        ({"type": "Sequence", "pretokenizers": [digits, LEVEL]}, False),
        (split(r"\p{N}{1,3}"), True),  # the number part of Llama 3's
        (split(r"\p{N}| ?\p{L}+"), False),  # and of Qwen2's
        (split(llama, behavior="Removed"), True),
        (split(llama, invert=True), True),
    ):
        with pytest.raises(UserError, match="is unknown to GGUF export; those of GPT-2"):
            pre_tokenizer_name(definition, ignore)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_exports_by_name_refuse_what_they_cannot_write(tmp_path):
    folder = packed(tmp_path, "llama")
    with pytest.raises(UserError, match="--export onnx: one of dense, gguf-f16"):
        export_as(folder, tmp_path / "out", "onnx")
    export_as(folder, tmp_path / "out", "dense")
    assert torch.allclose(logits(tmp_path / "out"), logits(folder), atol=0.1)  # bfloat16
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "images")
    for kind in EXPORTS.keys() - {"dense"}:
        with pytest.raises(UserError, match=f"--export {kind}: image models export as dense only"):
            export_as(tmp_path / "images", tmp_path / "images-out", kind)
    assert not (tmp_path / "images-out").exists()


def test_refusals_leave_nothing(tmp_path):
    folder = packed(tmp_path, "gemma3_text")
    with pytest.raises(UserError, match="gemma3_text cannot be written as GGUF"):
        export_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="pre-tokenizer Metaspace is unknown"):
        pre_tokenizer_name({"type": "Metaspace"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_dense(folder, tmp_path / "full")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
