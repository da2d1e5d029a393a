"""Our GGUF exports run in llama.cpp itself and give the packed model's logits. `make test-peers`."""

import json

import llama_cpp
import numpy as np
import pytest
import torch
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401  (registers the slim classes)
from recipes.common.core.cli import main
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


def test_llama_cpp_tokenises_as_we_do(checkpoint, tmp_path):
    export_as(checkpoint, tmp_path / "model.gguf", "gguf-f16")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (PROMPT, "12345 + 67890 = 80235", "naïve café\n\tüber  straße", "def f(x):\n    return x**2  # ok"):
        theirs = model.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == tokenizer(text, add_special_tokens=False).input_ids
