"""The flags of the recipe `layerwise-quant`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.common.domains.language import LanguageRecipe
from recipes.common.loops.streamed import Streamed
from recipes.layerwise_quant.plans import ORDERS, WIDTHS

BACKENDS = ("rtn", "hqq", "gptq", "awq")


@dataclass(frozen=True)
class QuantFlags(Streamed, LanguageRecipe):
    """How wide the blocks are and which of them, the quantiser, and what is measured."""

    model: str = field(
        default="smollm2-135m-instruct-degridded",
        metadata={"help": "base model: a Hub id, a folder, or an offline alias"},
    )
    sequential: bool = field(
        default=True,
        metadata={
            "help": "GPTQ calibrates each matrix on the outputs of the quantised ones before it, not of the dense"
        },
    )
    nsamples: int = field(default=64, metadata={"help": "calibration windows", "at_least": 2, "at_most": 10**6})
    avg_bits: float = field(
        default=3.5, metadata={"help": "average bits of the quantised weights", "at_least": 1, "at_most": 8}
    )
    levels: str = field(
        default="auto",
        metadata={
            "help": f"'high,low' or 'high,middle,low' of {', '.join(map(str, WIDTHS))}; auto: the closest two around"
            " --avg_bits"
        },
    )
    importance: str = field(
        default="lim",
        metadata={
            "help": f"which blocks keep more bits: {', '.join(ORDERS)} (depth: the first, ends: the first and last), or"
            " a .json list of one number per block, larger = more important"
        },
    )
    backend: str = field(
        default="awq",
        metadata={"help": "quantiser of one matrix; the paper has rtn (Quanto) and gptq", "choices": list(BACKENDS)},
    )
    group_size: int = field(
        default=64,
        metadata={
            "help": "inputs that share a scale: a multiple of 32 that divides them, -1 = all",
            "at_least": -1,
            "at_most": 2**16,
        },
    )
    symmetric: bool = field(default=False, metadata={"help": "no zero points"})
    scale_search: bool = field(
        default=False, metadata={"help": "RTN, and GPTQ without act-order: search each group's range, not its extremes"}
    )
    act_order: bool = field(
        default=True,
        metadata={"help": "GPTQ: the largest inputs first, and ranges searched in the matrices that lose less so"},
    )
    keep: list[str] = field(
        default_factory=list, metadata={"help": "blocks that stay at the high width: first, last, or numbers from 0"}
    )
    head_bits: int | None = field(
        default=None,
        metadata={
            "help": "bits of the output head; tied embeddings keep their table beside it (default: left alone)",
            "choices": list(WIDTHS),
        },
    )
    curve_points: int = field(
        default=2,
        metadata={
            "help": "points of each order's curve of quality against bits, besides its ends; 0 = none",
            "at_least": 0,
            "at_most": 1000,
        },
    )
