"""Retrieval from a long context: codes hidden between SQuAD paragraphs, one of them asked for at the end.

Questions on the paragraphs themselves are beyond the small default model (0 to 3 % right at 1000 tokens, whatever the
cache), while it finds nine codes of ten; a rounded cache loses them long before the perplexity of prose tells.
"""

from __future__ import annotations

import json
import math
import random
import statistics

import torch
from torch import nn
from tqdm.auto import tqdm

from recipes.common.data.assets import asset_path
from recipes.common.metrics.metric import metric
from zoo.errors import UserError

TASK = "squad-dev"
CODES = 4  # hidden in every context
Item = tuple[list[int], list[int]]  # prompt ids, answer ids


def hidden_codes(tokenizer, items: int, tokens: int, seed: int = 0) -> list[Item]:
    """`items` prompts of at most `tokens` tokens, with the answer: paragraphs of random articles, and between them
    "The code of <article> is <five digits>." for `CODES` articles; the prompt ends with one of these sentences, cut off
    before its code. The same arguments give the same items.

    Raises: UserError if `tokens` leaves no room for a paragraph.
    """
    rng = random.Random(seed)
    articles = json.loads(asset_path(TASK).read_text(encoding="utf-8"))["data"]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    made = []
    for _ in range(items):
        titles = [article["title"].replace("_", " ") for article in rng.sample(articles, CODES)]
        codes = {title: str(rng.randrange(10_000, 100_000)) for title in titles}
        sentences = [f"The code of {title} is {code}." for title, code in codes.items()]
        room = tokens - sum(len(ids(sentence)) + 1 for sentence in [*sentences, sentences[0]])
        texts = []
        while (paragraph := rng.choice(rng.choice(articles)["paragraphs"])["context"]) and room > 0:
            room -= len(ids(paragraph)) + 1
            if room >= 0:
                texts.append(paragraph)
        if not texts:
            raise UserError(
                f"--retrieval-tokens {tokens}: too few for a paragraph and {CODES} codes; take 500 or more."
            )
        for sentence in sentences:
            texts.insert(rng.randrange(len(texts) + 1), sentence)
        asked = rng.choice(titles)
        made.append((ids("\n\n".join([*texts, f"The code of {asked} is"])), ids(f" {codes[asked]}")))
    return made


@torch.inference_mode()
def retrieval(model: nn.Module, items: list[Item]) -> dict[str, dict]:
    """{"retrieval/squad-dev": fraction of items whose code greedy decoding gives, "perplexity/squad-dev": of the codes'
    tokens}, as metrics over items. One forward pass an item tells both.
    """
    found, nlls = [], []
    for prompt, answer in tqdm(items, desc="retrieval", unit="item", leave=False):
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        target = ids[0, -len(answer) :]
        found.append((logits.argmax(-1) == target).all().item())
        nlls.append(nn.functional.cross_entropy(logits, target).item())
    n, share, ppl = len(items), statistics.fmean(found), math.exp(min(statistics.fmean(nlls), 700.0))
    return {
        f"retrieval/{TASK}": metric(share, math.sqrt(share * (1 - share) / n), n, "items", raw=found),
        f"perplexity/{TASK}": metric(
            ppl, ppl * statistics.stdev(nlls) / math.sqrt(n) if n > 1 else None, n, "items", "ppl", False, nlls
        ),
    }
