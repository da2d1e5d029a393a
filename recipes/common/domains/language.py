"""Causal language models: calibrated on one text, measured on three others, and on lm-eval's tasks."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.common.core.recipe import Recipe
from recipes.common.data.assets import ASSETS
from recipes.common.data.base_models import (
    BaseModel,
    check_finite,
    check_shapes,
    check_vocabulary,
    load_tokenizer,
    resolve_model,
)
from recipes.common.data.texts import CalibrationText, Text, chat_of, evaluation_windows, load_text
from recipes.common.domains import Domain
from recipes.common.export import EXPORTS
from recipes.common.metrics.fidelity import Reference, compared_windows
from recipes.common.metrics.language import check_tasks, run_tasks, text_metrics
from recipes.common.metrics.speed import compare_speed, ratio
from zoo.errors import UserError
from zoo.folder import readable_config
from zoo.models import slim_class_for

EVALUATION_TEXTS = ("A", "B", "C")
BATCH = 4  # windows of a forward pass
DENSE = {"dense_bf16": torch.bfloat16, "dense_fp32": torch.float32}  # what speed is compared with


@dataclass(frozen=True)
class LanguageRecipe(CalibrationText, Recipe):
    """Flags shared by recipes for causal language models."""

    nsamples: int = field(default=32, metadata={"help": "calibration windows", "at_least": 1, "at_most": 10**6})
    seqlen: int = field(
        default=512, metadata={"help": "tokens per calibration window", "at_least": 2, "at_most": 2**24}
    )
    eval_windows: int = field(
        default=12,
        metadata={"help": "held-out windows of each of the texts A, B and C", "at_least": 1, "at_most": 10**6},
    )
    eval_seqlen: int = field(
        default=512, metadata={"help": "tokens per held-out window", "at_least": 2, "at_most": 2**24}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["step_inference"],
        metadata={"help": "lm-eval tasks: the local ones, or any task name when a hub is reachable; 'none' for none"},
    )
    task_limit: int = field(default=100, metadata={"help": "items per task", "at_least": 1, "at_most": 10**6})

    def domain(self) -> Domain:
        return Language(self.settings())


@dataclass
class Language(Domain):
    """compressed: a checkpoint of this zoo will do as the base model, for methods that leave the weights as they are."""

    compressed: bool = False

    pipeline_tag: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    exports: ClassVar[tuple[str, ...]] = tuple(EXPORTS)
    windowed: ClassVar[tuple[str, ...]] = ("seqlen", "eval_seqlen")  # flags that are lengths of the model's input

    @cached_property
    def base(self) -> BaseModel:
        return resolve_model(self.settings["model"], self.settings["revision"], compressed=self.compressed)

    @cached_property
    def config(self):
        with readable_config(self.base.path):
            return AutoConfig.from_pretrained(self.base.path)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder or self.base.path)

    @cached_property
    def text(self) -> Text:
        """Calibrated on."""
        of = {key: self.settings[f"calibration_{key}"] for key in ("config", "split", "column")}
        return load_text(self.settings["calibration"], **of, chat=chat_of(self.tokenizer))

    @cached_property
    def texts(self) -> dict[str, Text]:
        """Measured on."""
        return {name: load_text(name) for name in EVALUATION_TEXTS}

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Token windows (N, T) of the held-out texts."""
        seqlen, windows = self.settings["eval_seqlen"], self.settings["eval_windows"]
        return {name: evaluation_windows(text, self.tokenizer, seqlen, windows) for name, text in self.texts.items()}

    def check(self) -> None:
        slim_class_for(self.base.model_type)  # a family that no checkpoint can be written for
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        for name in self.windowed:
            if longest and self.settings[name] > longest:
                raise UserError(
                    f"--{name} {self.settings[name]}: {self.settings['model']} takes {longest} tokens at most."
                )
        check_shapes(self.base.path, self.auto_class)
        if self.settings["tasks"] != ["none"]:
            check_tasks(self.settings["tasks"])
        self.text  # noqa: B018 (both are read now, not after the work)
        check_vocabulary(self.config, self.windows.values(), self.settings["model"])

    def pins(self) -> dict[str, str]:
        return {"base_model": self.base.sha256, "calibration_text": self.text.sha256}

    def check_weights(self) -> None:
        check_finite(self.base.path)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.base.notes

    def load(self, folder: Path) -> nn.Module:
        """In fp32: what is measured is the weights, not the rounding of activations."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def base_row(self) -> dict:
        return self.base.row()

    def data_rows(self, metrics: dict[str, dict]) -> dict:
        """Texts calibrated and measured on, tasks, and how much of each."""
        seqlen = self.settings["eval_seqlen"]
        evaluation = {
            name: text.facts() | {"windows": metrics[f"perplexity/{name}"]["n"], "seqlen": seqlen}
            for name, text in self.texts.items()
        }
        tasks = {key.partition("/")[2]: m["n"] for key, m in metrics.items() if m["n_of"] == "items"}
        if tasks:
            evaluation["tasks"] = {name: task_row(name, items) for name, items in tasks.items()}
        used = {"windows": self.settings["nsamples"], "seqlen": self.settings["seqlen"]}
        return {"calibration": self.text.facts() | used, "evaluation": evaluation}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of tokens 2..T of "input_ids" (B, T), in nats, from fp32 logits."""
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def metrics(self, model: nn.Module, reference: Reference | None = None) -> dict[str, dict]:
        """Perplexity on every held-out text, there also the fidelity to the reference, and the tasks of the settings."""
        found = self.text_metrics(model, reference)
        if self.settings["tasks"] != ["none"]:
            found |= run_tasks(model, self.tokenizer, self.settings["tasks"], self.settings["task_limit"])
        return found

    def text_metrics(self, model: nn.Module, reference: Reference | None) -> dict[str, dict]:
        compared = compared_windows(self.windows, model.config.get_text_config().vocab_size)
        return text_metrics(model, self.windows, BATCH, reference, compared)

    def predictions(self, model: nn.Module, folder: Path) -> Reference:
        self.text_metrics(model, Reference(folder, writing=True))
        return Reference(folder)

    @property
    def prediction_bytes(self) -> int:
        vocabulary = self.config.get_text_config().vocab_size
        tokens = sum(rows.shape[1] for rows in self.windows.values())
        return 2 * compared_windows(self.windows, vocabulary) * tokens * vocabulary

    def speed(self, dense: Path, packed: Path) -> dict[str, dict[str, dict]]:
        """Decode and prefill of the checkpoint against dense bf16 and fp32."""
        load = AutoModelForCausalLM.from_pretrained
        models = {"packed": load(packed)}
        models |= {name: load(dense, dtype=dtype) for name, dtype in DENSE.items()}
        raw = compare_speed(models, prompt_tokens=512, new_tokens=32, repeats=3)
        return {
            phase: {f"ratio_to_{name}": ratio(*order(raw["packed"][key], raw[name][key])) for name in DENSE}
            for phase, key, order in (
                ("decode", "decode_tokens_per_s", lambda own, other: (own, other)),
                ("prefill", "prefill_seconds", lambda own, other: (other, own)),
            )
        }


def task_row(name: str, items: int) -> dict:
    """The row of `data.evaluation.tasks` of a local task, or of one that lm-eval fetched by itself."""
    if name in ASSETS:
        asset = ASSETS[name]
        row = {"name": asset.archive.package, "version": asset.archive.version, "license": asset.license}
        return row | {"sha256": asset.sha256, "size": None, "items": items}
    version = f"lm-eval {importlib.metadata.version('lm-eval')}"
    return {"name": name, "version": version, "sha256": None, "size": None, "items": items}
