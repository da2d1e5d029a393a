"""Our GGUF exports run in llama.cpp itself and give the packed model's logits. `make test-peers`."""

import llama_cpp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401  (registers the slim classes)
from recipes.common.runner import main
from recipes.common.tools import export_as

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


def test_llama_cpp_tokenises_as_we_do(checkpoint, tmp_path):
    export_as(checkpoint, tmp_path / "model.gguf", "gguf-f16")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (PROMPT, "12345 + 67890 = 80235", "naïve café\n\tüber  straße", "def f(x):\n    return x**2  # ok"):
        theirs = model.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == tokenizer(text, add_special_tokens=False).input_ids
