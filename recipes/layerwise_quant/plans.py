"""Bit widths of decoder blocks: from an average to a width for each block, and the flags that say how."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.layerwise_quant.importance import least_first
from zoo.errors import UserError

WIDTHS = (8, 6, 5, 4, 3, 2, 1)  # what the kernels compute on
MEASURED = ("lim", "zd", "zd-two-sided", "sensitivity")
ORDERS = (*MEASURED, "random", "depth", "ends")


@dataclass(frozen=True)
class Plan:
    """What was decided for one seed; all maps are by number of block."""

    seed: int
    scores: dict[str, dict[int, float]]
    stability: float  # of LIM: Kendall's tau between two halves of the calibration text
    bits: dict[int, int]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """From the JSON of the fields, whose keys are text."""
        plan = json.loads(path.read_text())
        scores = {name: numbered(values) for name, values in plan["scores"].items()}
        return cls(plan["seed"], scores, plan["stability"], numbered(plan["bits"]))


def numbered(values: dict[str, float]) -> dict[int, float]:
    return {int(block): value for block, value in values.items()}


def mixture_digest(bits: dict[int, int]) -> str:
    """A short name of a mixture of widths."""
    return hashlib.sha256(json.dumps(sorted(bits.items())).encode()).hexdigest()[:12]


def order_blocks(
    name: str, scores: dict[str, dict[int, float]], blocks: list[int], kept: set[int], seed: int, own: str = ""
) -> list[int]:
    """Step 2: the blocks, least important first, without those that are kept.

    name: one of ORDERS, a key of `scores`, or "reversed", the reverse of the order `own`. seed: of a random order.
    """
    if name == "reversed":
        return order_blocks(own, scores, blocks, kept, seed)[::-1]
    if name.startswith("zd"):
        importance = {i: -scores[name][i] for i in blocks}
    elif name == "random":
        shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
        importance = dict(zip(blocks, shuffled, strict=True))
    elif name == "depth":
        importance = {i: -i for i in blocks}
    elif name == "ends":
        importance = {i: abs(i - (blocks[0] + blocks[-1]) / 2) for i in blocks}
    else:
        importance = scores[name]
    return [i for i in least_first(importance) if i not in kept]


def plan_bits(order: list[int], weights: dict[int, int], average: float, high: int, low: int) -> dict[int, int]:
    """{block: width}: as few blocks of `order` as bring the average over weights down to `average` get `low`   (step 3)

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


def cut_plans(
    order: list[int], weights: dict[int, int], average: float, widths: tuple[int, ...]
) -> list[dict[int, int]]:
    """Every plan of two or three widths that cuts `order` so that the average is just met   (step 3)

    Of three, the first blocks of the order get the lowest width and as few as then are needed the middle one; the cuts
    differ in how many have the lowest. Raises: UserError as `plan_bits`.
    """
    if len(widths) == 2:
        return [plan_bits(order, weights, average, *widths)]
    high, middle, low = widths
    plans = [plan_bits(order, weights, average, high, low)]  # without the middle one: no plan has more at the lowest
    for count in range(sum(bits == low for bits in plans[0].values())):
        lowest = dict.fromkeys(order[:count], low)
        rest = {block: weight for block, weight in weights.items() if block not in lowest}
        spent = sum(low * weights[block] for block in lowest)
        left = (average * sum(weights.values()) - spent) / sum(rest.values())
        if left * sum(rest.values()) >= sum((middle if i in order else high) * rest[i] for i in rest):
            plans.append(plan_bits(order[count:], rest, left, high, middle) | lowest)
    return plans


def step_down(order: list[int], steps: int, widths: tuple[int, ...]) -> dict[int, int]:
    """{block: width} after `steps` steps: each lowers one block to the next width, all of the order before any twice."""
    rounds, more = divmod(steps, len(order))
    place = [min(rounds + (i < more), len(widths) - 1) for i in range(len(order))]
    return {block: widths[i] for block, i in zip(order, place, strict=True)}


def parse_levels(text: str, average: float) -> tuple[int, ...]:
    """'4,3' -> (4, 3), '4,3,2' -> (4, 3, 2); 'auto' -> the neighbouring widths with high > average >= low (8,6 for 8)."""
    if text == "auto" and WIDTHS[-1] <= average <= WIDTHS[0]:
        low = next(width for width in WIDTHS[1:] if width <= average)
        return WIDTHS[WIDTHS.index(low) - 1], low
    try:
        levels = tuple(map(int, text.split(",")))
    except ValueError:
        levels = () if text != "auto" else (WIDTHS[0], WIDTHS[-1])
    if not (len(levels) in (2, 3) and set(levels) <= set(WIDTHS) and list(levels) == sorted(set(levels), reverse=True)):
        widths = ", ".join(map(str, WIDTHS))
        raise UserError(
            f"--levels {text}: two or three different widths of {widths}, the highest first, or auto is needed."
        )
    if not levels[-1] <= average <= levels[0]:
        raise UserError(
            f"--avg_bits {average}: widths {levels[0]} and {levels[-1]} reach averages from {levels[-1]} to {levels[0]}"
            " only."
        )
    return levels


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
