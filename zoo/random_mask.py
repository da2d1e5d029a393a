"""Random masks that anybody can draw again: a counter-based generator of our own, alike on every machine and version.

Element i of layer l has the key  mix(mix(mix(seed) ^ l) + (i + 1) * GAMMA)  in arithmetic modulo 2^64, where mix is the
finaliser of SplitMix64 (Steele, Lea, Flood 2014) and GAMMA its odd increment. mix is a bijection, so no two elements of
a layer share a key, and the k smallest keys are a uniformly random subset of k elements. torch's own stream is promised
neither across versions nor across devices, and a checkpoint that stores only a seed needs that promise.
"""

import hashlib

import numpy as np
import torch

from .errors import UserError

GENERATOR = "splitmix64-v1"  # a change of any bit below needs a new name
GAMMA = 0x9E3779B97F4A7C15
FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
SEEDS = 2**63  # seeds are below: they are stored as JSON integers


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection whose output bits look independent of the input."""
    for shift, factor in FACTORS:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def keys(seed: int, layer: int, count: int) -> np.ndarray:
    """uint64 (count,), all different: the keys of a layer's elements."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"mask seed {seed}: a whole number from 0 to {SEEDS - 1} is needed.")
    start = mix(mix(np.array([seed], np.uint64)) ^ np.uint64(layer))
    return mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA))


def random_mask(seed: int, layer: int, count: int, kept: int) -> torch.Tensor:
    """bool (count,) on the CPU: a uniformly random choice of `kept` elements, the same wherever it is drawn."""
    if not 0 <= kept <= count:
        raise UserError(f"{kept} weights cannot be kept of {count}.")
    if kept in (0, count):
        return torch.full((count,), kept > 0, device="cpu")
    drawn = keys(seed, layer, count)
    return torch.from_numpy(drawn <= np.partition(drawn, kept - 1)[kept - 1])


def bernoulli_count(seed: int, layer: int, count: int, density: float) -> int:
    """How many elements a coin of this density keeps; `random_mask` with that number keeps the very same ones."""
    if density >= 1:
        return count
    return int((keys(seed, layer, count) < np.uint64(density * 2.0**64)).sum())


def digest(packed: torch.Tensor) -> str:
    """sha256, in hex, of a packed mask, uint8 (rows, ceil(columns / 8)): what a seed-coded checkpoint stores of it."""
    return hashlib.sha256(packed.cpu().contiguous().numpy().tobytes()).hexdigest()
