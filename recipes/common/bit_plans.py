"""Bit widths of decoder blocks: from an average to a width for each block, and the flags that say how."""

from __future__ import annotations

import json
import math
from pathlib import Path

from zoo.errors import UserError

WIDTHS = (8, 6, 5, 4, 3, 2, 1)  # what the kernels compute on


def plan_bits(order: list[int], weights: dict[int, int], average: float, high: int, low: int) -> dict[int, int]:
    """{block: width}: as few blocks of `order` as bring the average over weights down to `average` get `low`   [3.4]

    Raises: UserError when all of them are not enough (some are pinned).
    """
    bits = dict.fromkeys(weights, high)
    excess = (high - average) * sum(weights.values())
    slack = 1e-9 * sum(weights.values())
    for block in order:
        if excess <= slack:
            return bits
        bits[block] = low
        excess -= (high - low) * weights[block]
    if excess > slack:
        reached = average + excess / sum(weights.values())
        raise UserError(f"--avg_bits {average}: --keep pins too many blocks, {reached:.2f} is the least; keep fewer.")
    return bits


def parse_levels(text: str, average: float) -> tuple[int, int]:
    """'4,3' -> (4, 3); 'auto' -> the neighbouring widths with high > average >= low (8,6 for 8)."""
    if text == "auto" and WIDTHS[-1] <= average <= WIDTHS[0]:
        low = next(width for width in WIDTHS[1:] if width <= average)
        return WIDTHS[WIDTHS.index(low) - 1], low
    try:
        high, low = (int(part) for part in text.split(","))
    except ValueError:
        high, low = (0, 0) if text != "auto" else (WIDTHS[0], WIDTHS[-1])
    if not (high in WIDTHS and low in WIDTHS and high > low):
        widths = ", ".join(map(str, WIDTHS))
        raise UserError(f"--levels {text}: two different widths of {widths}, the higher first, or auto is needed.")
    if not low <= average <= high:
        raise UserError(f"--avg_bits {average}: widths {high} and {low} reach averages from {low} to {high} only.")
    return high, low


def pinned(keep: list[str], blocks: list[int]) -> set[int]:
    """Numbers of the blocks that --keep names."""
    names = {"first": blocks[0], "last": blocks[-1]} | {str(block): block for block in blocks}
    for name in keep:
        if name not in names:
            raise UserError(f"--keep {name}: first, last or a block from {blocks[0]} to {blocks[-1]} is needed.")
    return {names[name] for name in keep}


def read_scores(path: str, blocks: list[int]) -> dict[int, float]:
    """The importance of every block from a .json list."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = dict(zip(blocks, map(float, values), strict=True))
    except OSError as error:
        raise UserError(f"--importance {path}: cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError):
        raise UserError(f"--importance {path}: a JSON list of {len(blocks)} numbers, one a block, is needed.") from None
    if not all(map(math.isfinite, scores.values())):
        raise UserError(f"--importance {path}: it holds NaN or Infinity.")
    return scores
