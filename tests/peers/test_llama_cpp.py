"""Our GGUF exports run in llama.cpp itself, give the packed model's logits, and say what its own converter says.

`make test-peers`. The converter is in the sources that llama-cpp-python is built from, not in what is installed: they are
fetched once a session, unless LLAMA_CPP names a checkout of llama.cpp.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401  (registers the slim classes)
from recipes.common.core.cli import main
from recipes.common.data.base_models import resolve_model
from recipes.common.export import export_as
from recipes.common.export.gguf import export_gguf

PROMPT = "The river rises in the mountains and flows past three old towns before it reaches the sea. In spring the"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """SmolLM2 with two blocks in ARMOR's format: packed and dense matrices in one file."""
    folder = tmp_path_factory.mktemp("run") / "armor"
    flags = ["--include", r"layers\.[34]\.", "--iters", "3", "--nsamples", "2", "--seqlen", "128", "--tasks", "none"]
    main(["armor", "--output", str(folder), "--baselines", "none", "--eval_windows", "1", *flags])
    return folder


def logits_of(path, ids):
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


# llama.cpp also rounds the activations of Q8_0 products to 8 bits, which single positions show
@pytest.mark.parametrize(("kind", "mean", "least"), [("gguf-f16", 0.9999, 0.9999), ("gguf-q8_0", 0.998, 0.99)])
def test_llama_cpp_gives_our_logits(checkpoint, tmp_path, kind, mean, least):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    export_as(checkpoint, tmp_path / "model.gguf", kind)
    theirs = logits_of(tmp_path / "model.gguf", ids)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert cosine.mean() > mean and cosine.min() > least
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("bits", [(4, 3), (5, 2), (8, 6)])
def test_packed_bits_of_each_layer_run_in_llama_cpp(tmp_path, bits):
    """Types per tensor: 2 to 4 bits as Q4_1, 5 as Q5_1, 6 and 8 as Q8_0. Their products round activations to 8 bits."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 260}
    base = make_base(tmp_path / "base", "llama", **sizes)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"], tokenizer["model"]["merges"] = 259, [["a", "b"]]  # llama.cpp wants merges
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    Packing(base, bits).write(tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "model.gguf", "packed")
    ids = [5, 60, 7, 200, 31, 9, 101, 77]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(torch.tensor([ids]))
    theirs = logits_of(tmp_path / "model.gguf", ids)
    assert torch.nn.functional.cosine_similarity(ours.logits[0], theirs, dim=-1).min() > 0.999


# ------------------------------------------------------------------------------------ tokens, positions, the converter

PROMPTS = (
    PROMPT,
    "12345 + 67890 = 80235",
    "naïve café\n\tüber  straße",
    "def f(x):\n    return x**2  # ok",
    "a",
    " leading and trailing ",
    "\n\n\n",
    "don't, WON'T, it's, we'll",
    "3.14159, 1e-9, 0x1F, ½, ²",
    "日本語のテキスト and 한국어",
    "🙂👩‍👩‍👧‍👦 emoji",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "tabs\tand\r\nlines\r",
    "https://example.org/a?b=c&d=%20#e",
    "ALL CAPS and MiXeD",
    "…—“quotes” ‘single’",
    "   indented\n        more",
    "{'key': [1, 2, 3], \"other\": null}",
    "ﬁ ligature, Å and Å, \u00a0non-breaking\u200bzero",
    "x" * 300,
)
START, END = "<|im_start|>", "<|im_end|>"
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(*single):
    """A post-processor that puts special tokens of SmolLM2 around a text (None)."""
    special = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in ((START, 1), (END, 2))}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} if name else TEXT for name in single]
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT, TEXT], "special_tokens": special}


def small(folder, family="llama", processor=None, **config):
    """A small model of a family with the tokenizer of SmolLM2, and a config.json as transformers 4 wrote it."""
    make_base(folder, family, vocab_size=49152, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    source = resolve_model("smollm2-135m-instruct").path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    for name, changes in (("tokenizer", {"post_processor": processor}), ("config", {"rope_theta": 10000.0} | config)):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) | changes
        if name == "config":
            del content["rope_parameters"]
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("around", [(None,), (START, None), (START, None, END)])
def test_llama_cpp_tokenises_as_we_do(tmp_path, around):
    folder = small(tmp_path / "base", processor=template(*around))
    export_gguf(folder, tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(PROMPTS) == 20
    for text in PROMPTS:
        theirs = model.tokenize(text.encode(), add_bos=True, special=True)  # add_bos: as the file says
        assert theirs == tokenizer(text).input_ids, text


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3["original_max_position_embeddings"] = 64


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"type": "linear", "factor": 2.5}),
        ("qwen2", YARN),
        ("llama", YARN | {"attention_factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}),
        ("llama", LLAMA_3),
    ],
)
def test_llama_cpp_rotates_as_we_do(tmp_path, family, scaling):
    folder = small(tmp_path / "base", family, rope_scaling=scaling)
    export_gguf(folder, tmp_path / "model.gguf")
    ids = torch.randint(3, 49000, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    theirs = logits_of(tmp_path / "model.gguf", ids)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.9999


@pytest.fixture(scope="session")
def converter(tmp_path_factory):
    """The folder of llama.cpp's sources with convert_hf_to_gguf.py."""
    if os.environ.get("LLAMA_CPP"):
        return Path(os.environ["LLAMA_CPP"])
    root = tmp_path_factory.mktemp("llama.cpp")
    name = "llama-cpp-python"
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, "--dest", str(root)]
    subprocess.run([*fetch, f"{name}=={version(name)}"], check=True)
    (archive,) = root.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(root, filter="data")
    return next(root.glob("*/vendor/llama.cpp"))


CONVERT = """
import sys
root, folder, output = sys.argv[1:]
sys.path.insert(0, root)
sys.argv = ["convert", folder, "--outfile", output, "--outtype", "f16"]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows tokenizers by what they give for one text
convert_hf_to_gguf.main()
"""


def contents(path):
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type.name, t.data) for t in reader.tensors}


OWN = {"attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"}  # the usual, written out


@pytest.mark.parametrize(
    ("family", "processor", "config"),
    [
        ("llama", template(START, None, END), {"rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("llama", None, {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 64}),
        ("mistral", template(START, None), {}),
        ("qwen2", None, {"rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}),
        ("qwen3", None, {}),
    ],
)
def test_every_field_is_that_of_llama_cpps_converter(converter, tmp_path, family, processor, config):
    folder = small(tmp_path / "small-model", family, processor, **config)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n")
    command = [sys.executable, "-c", CONVERT, str(converter), str(folder), str(tmp_path / "theirs.gguf")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    export_gguf(folder, tmp_path / "ours.gguf")
    (theirs, tensors), (ours, our_tensors) = contents(tmp_path / "theirs.gguf"), contents(tmp_path / "ours.gguf")
    if family in ("llama", "mistral"):  # the converter takes every llama with this many tokens for another one
        assert theirs.pop("tokenizer.ggml.add_bos_token") is False
        assert ours.pop("tokenizer.ggml.add_bos_token") is (processor is not None)
    assert {key: ours.get(key) for key in theirs} == theirs
    more = {key.partition(".")[2] for key in ours.keys() - theirs.keys()}
    assert more <= OWN | {"ggml.add_bos_token", "ggml.add_eos_token"}
    assert {name: kind for name, (kind, _) in tensors.items()} == {
        name: kind for name, (kind, _) in our_tensors.items()
    }
    for name, (_, data) in tensors.items():
        np.testing.assert_allclose(our_tensors[name][1], data, rtol=1e-6, atol=0, err_msg=name)
