"""What a model is made of and measured on: one object a domain, chosen by the recipe when it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from recipes.common.metrics.fidelity import Reference


@dataclass
class Domain(ABC):
    """Everything around a method that depends on the kind of model, built from a recipe's settings alone, so that `verify`
    can build it from those in a report.

    settings: the flags by name. folder: where the tokenizer or processor is read from (default: the base model).
    """

    settings: dict
    folder: Path | None = None

    pipeline_tag: ClassVar[str]
    auto_class: ClassVar[str]
    exports: ClassVar[tuple[str, ...]]  # what --export takes

    @abstractmethod
    def check(self) -> None:
        """Raises UserError, before any work, for data, base models, metrics or limits that are impossible."""

    @abstractmethod
    def pins(self) -> dict[str, str]:
        """{what a run reads: its sha256}: a resumed run refuses others."""

    def check_weights(self) -> None:  # noqa: B027 (most have nothing to check)
        """Raises UserError for a base model whose weights are not finite."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report must know of the base model."""
        return ()

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """A model folder, packed or not, as it is measured."""

    @abstractmethod
    def base_row(self) -> dict:
        """`base_model` of a report."""

    @abstractmethod
    def data_rows(self, metrics: dict[str, dict]) -> dict:
        """`data` of a report: what was calibrated or trained on, and what `metrics` were measured on."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch, a scalar; differentiable."""

    @abstractmethod
    def metrics(self, model: nn.Module, reference: Reference | None = None) -> dict[str, dict]:
        """What a report claims of a model, measured on data that nothing was calibrated or trained on; with a reference
        also how near its predictions are to the dense model's (`fidelity`).
        """

    @abstractmethod
    def predictions(self, model: nn.Module, folder: Path) -> Reference:
        """What the dense model predicts on that data, put into an empty folder."""

    @property
    @abstractmethod
    def prediction_bytes(self) -> int:
        """Of the dense predictions on disk, at most."""

    @abstractmethod
    def speed(self, dense: Path, packed: Path) -> dict[str, dict[str, dict]]:
        """{phase: {"ratio_to_…": metric}} of two model folders, interleaved in this process."""


def dtype_of(settings: dict) -> torch.dtype:
    """The dtype that --dtype names."""
    return getattr(torch, settings["dtype"])
