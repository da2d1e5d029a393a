"""The flags of the recipe `kvtuner`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.common.domains.language import LanguageRecipe
from recipes.kvtuner.tables import FORMATS, pair_name


@dataclass(frozen=True)
class KVFlags(LanguageRecipe):
    """How the cache is quantised, what the search sees and may spend, and what is measured."""

    mode: str = field(
        default="per_token",
        metadata={
            "help": "what shares a scale: one token of a head, or KIVI's channels (keys) and groups of 32 (values)",
            "choices": list(FORMATS),
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "numbers per scale; -1 = a whole token (default: -1, with kivi 32)",
            "at_least": -1,
            "at_most": 2**16,
        },
    )
    residual_length: int | None = field(
        default=None,
        metadata={
            "help": "kivi: tokens kept in 16 bits until a block is full (default: 0, with kivi 32)",
            "at_least": 0,
            "at_most": 2**20,
        },
    )
    pairs: list[str] = field(
        default_factory=lambda: [pair_name((k, v)) for k in (8, 4, 2) for v in (8, 4, 2)],
        metadata={"help": "widths to choose from, such as KV8 K8V4 K4V2; 2, 4, 8 or 16 bits"},
    )
    max_bits: float = field(
        default=3.25, metadata={"help": "mean width allowed, scales not counted", "at_least": 2, "at_most": 16}
    )
    evals: int = field(
        default=60,
        metadata={
            "help": "tables to evaluate at most, uniform ones included, those of one layer alone not",
            "at_least": 1,
            "at_most": 10**6,
        },
    )
    population: int = field(default=16, metadata={"help": "of the genetic search", "at_least": 2, "at_most": 10**5})
    objective: str = field(
        default="kl",
        metadata={
            "help": "what the search lowers: kl (to the 16-bit model), ppl, gsm8k (share of wrong answers; needs a"
            " hub), or module:function called with model and tokenizer"
        },
    )
    calib_samples: int = field(
        default=20,
        metadata={"help": "prompts on which the errors of the layers are measured", "at_least": 1, "at_most": 10**5},
    )
    nsamples: int = field(
        default=4,
        metadata={
            "help": "windows (gsm8k: questions) of the search; twice as many others, 16 at most, choose from its finds",
            "at_least": 1,
            "at_most": 10**5,
        },
    )
    seqlen: int = field(
        default=256, metadata={"help": "tokens per calibration window", "at_least": 16, "at_most": 2**24}
    )
    eps: float = field(default=0.05, metadata={"help": "DBSCAN's radius in e_o", "at_most": 100, "above": 0})
    min_samples: int = field(
        default=2, metadata={"help": "DBSCAN's neighbours that make a cluster", "at_least": 1, "at_most": 10000}
    )
    max_groups: int = field(default=8, metadata={"help": "groups of layers at most", "at_least": 1, "at_most": 10000})
    prune: bool = field(default=True, metadata={"help": "keep only the pairs on each layer's Pareto front"})
    cluster: bool = field(
        default=False,
        metadata={"help": "let like layers share a pair, as in the paper; else every layer has its own"},
    )
    prefill: str = field(
        default="exact",
        metadata={
            "help": "what a prompt attends to: its own keys and values, or the quantised ones",
            "choices": ["exact", "quantized"],
        },
    )
    load_table: str | None = field(
        default=None, metadata={"help": "take this table instead of searching: a YAML or JSON file, or a preset's name"}
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={
            "help": "baselines to measure beside it; 'none' for none (default: uniform ones of few bits, and rules)"
        },
    )
    eval_windows: int = field(
        default=4,
        metadata={"help": "held-out windows of each of the texts A, B and C", "at_least": 1, "at_most": 10**6},
    )
    eval_seqlen: int = field(
        default=512, metadata={"help": "tokens per held-out window", "at_least": 2, "at_most": 2**24}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "lm-eval tasks, local or from a hub; 'none' for none"}
    )
    retrieval_items: int = field(
        default=6,
        metadata={"help": "long prompts from which a code is retrieved; 0 = none", "at_least": 0, "at_most": 10**5},
    )
    retrieval_tokens: int = field(
        default=768, metadata={"help": "tokens of such a prompt", "at_least": 1, "at_most": 2**24}
    )
    speed_tokens: int = field(
        default=1024,
        metadata={
            "help": "prompt after which decoding is timed; 0 = do not measure speed",
            "at_least": 0,
            "at_most": 2**24,
        },
    )
