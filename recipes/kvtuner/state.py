"""What a run of KVTuner keeps in memory: the model, and what the search found for each seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from recipes.common.core.run import Run
from recipes.kvtuner.allocation import Group
from recipes.kvtuner.searching import Archive
from recipes.kvtuner.simulation import log_probabilities
from recipes.kvtuner.tables import CacheFormat, Pair, Table, cache_shape


class Tuned(NamedTuple):
    """What the search found for one seed."""

    table: Table
    picks: dict[float, list[Table]]  # by the bits allowed, the better first; one each, two of --max-bits
    archive: Archive
    groups: list[Group]
    errors: list[dict[Pair, float]]  # e_o, one dict a layer
    baselines: dict[str, list[tuple[Table, CacheFormat]]]  # several of a random one; of the first seed only
    held: Tensor  # windows to choose on
    held_out: dict[Table, float]  # KL on those, of the picks and of the best uniform tables
    seconds: float  # of the search


@dataclass
class KVRun(Run):
    tuned: dict[int, Tuned] = field(default_factory=dict)  # by seed

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(layers, KV heads, head size)."""
        return cache_shape(self.domain.config)

    @cached_property
    def model(self) -> nn.Module:
        return self.domain.load(self.domain.base.path).to(self.recipe.device).eval()

    @property
    def first(self) -> Tuned:
        return self.tuned[self.seeds[0]]

    @cached_property
    def held_predictions(self) -> list[Tensor]:
        """What the 16-bit model predicts on the windows held back from the search."""
        return log_probabilities(self.model, self.first.held)
