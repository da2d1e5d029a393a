"""A run of layer-wise quantisation: its blocks and plans, and models in which every block has a stored form of its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from recipes.common.core.plots import layer_index
from recipes.common.data.texts import calibration_windows
from recipes.common.loops.streamed import StreamedRun
from recipes.common.loops.streaming import MatrixStore
from recipes.common.metrics.metric import over_runs
from recipes.common.parts.quantizers import GPTQ_TOKENS
from recipes.layerwise_quant.folding import Fold, folds_of
from recipes.layerwise_quant.importance import least_first
from recipes.layerwise_quant.plans import Plan, mixture_digest, order_blocks, pinned, read_scores, step_down
from zoo.checkpoint import HEAD
from zoo.layers.packing import row_bytes

RANDOM_ORDERS = 3
SENSITIVITY_TOKENS = 4096
STABLE = 0.9  # Kendall's tau between two halves of the text that LIM should reach


@dataclass
class QuantRun(StreamedRun):
    """All maps are by number of block."""

    @cached_property
    def blocks(self) -> list[int]:
        return sorted({layer_index(name, 0) for name in self.linears})

    @cached_property
    def weights(self) -> dict[int, int]:
        """How many weights of each block are quantised."""
        found = dict.fromkeys(self.blocks, 0)
        for name, module in self.linears.items():
            found[layer_index(name, 0)] += module.in_features * module.out_features
        return found

    @cached_property
    def kept(self) -> set[int]:
        """Blocks that stay at the high width."""
        return pinned(self.recipe.keep, self.blocks)

    @cached_property
    def given(self) -> dict[int, float]:
        """Scores of `--importance file.json`."""
        return read_scores(self.recipe.importance, self.blocks)

    @cached_property
    def folds(self) -> dict[int, list[Fold]]:
        config, layers = self.streamed.config.get_text_config(), self.streamed.layers
        return {i: folds_of(f"{self.streamed.prefix}.{i}", layers[i], config, set(self.linears)) for i in self.blocks}

    def plan_path(self, seed: int) -> Path:
        return self.store(seed).folder / "plan.json"

    def plan(self, seed: int) -> Plan:
        return Plan.read(self.plan_path(seed))

    def average(self, bits: dict[int, int]) -> float:
        """Bits per weight, counted by weights, not by blocks."""
        return sum(self.weights[block] * b for block, b in bits.items()) / sum(self.weights.values())

    def rows(self, bits: dict[int, int], backend: str) -> list[dict]:
        """The shape and format of every matrix of the blocks in `bits`, as in the report's `layers`."""
        return [
            {"d_out": module.out_features, "d_in": module.in_features} | self.recipe.spec(backend, bits[block])
            for name, module in self.linears.items()
            if (block := layer_index(name, 0)) in bits
        ]

    def bytes_of(self, bits: dict[int, int]) -> int:
        itemsize = self.recipe.torch_dtype.itemsize
        return sum(row_bytes(row, itemsize) for row in self.rows(bits, self.recipe.backend))

    def unseen(self, seed: int) -> Tensor:
        """Windows (N, T) of calibration text that nothing is calibrated on: blocks and cuts are judged by them."""
        recipe, domain = self.recipe, self.domain
        count = max(1, SENSITIVITY_TOKENS // recipe.seqlen)
        windows = calibration_windows(domain.text, domain.tokenizer, recipe.nsamples + count, recipe.seqlen, seed)
        return windows[recipe.nsamples :]

    def assemble(self, store: MatrixStore, method: str, forms: dict[int, str]) -> nn.Module:
        """The dense model with a stored form of each block, and the packed head, swapped in; a block without one hands its
        input on.
        """
        model, own, missing = self.domain.load(self.domain.base.path), self.recipe.method, set()
        for name in self.modules:
            block = layer_index(name, 0)
            if name == HEAD:
                model.get_submodule(name).weight = nn.Parameter(
                    store.weight(own, name, own)
                )  # the table stays as it is
            elif block in forms:
                model.get_submodule(name).weight.data.copy_(store.weight(method, name, forms[block]))
            else:
                missing.add(block)
        for block in missing:
            model.get_decoder().layers[block].forward = lambda hidden_states, **_: hidden_states
        return model

    def mixture(self, seed: int, bits: dict[int, int]) -> nn.Module:
        """The dense model with these candidates swapped in."""
        forms = {block: f"{width}-bit" for block, width in bits.items()}
        return self.assemble(self.store(seed), f"{self.recipe.widths[0]}-bit", forms)

    def measure_mixtures(self, seed: int, mixtures: list[dict[int, int]]) -> dict[str, dict]:
        """The mean over mixtures; each is measured once, whichever order leads to it."""
        runs = {mixture_digest(bits): bits for bits in mixtures}
        return over_runs(
            [
                self.measure(f"mixture-{seed}-{digest}", lambda bits=bits: nullcontext(self.mixture(seed, bits)))
                for digest, bits in runs.items()
            ]
        )

    # ------------------------------------------------------------------------------------------------------- orders

    def order(self, name: str, scores: dict[str, dict[int, float]], seed: int) -> list[int]:
        return order_blocks(name, scores, self.blocks, self.kept, seed, own=self.recipe.own_order)

    def mixtures(self, name: str, plan: Plan, steps: int | None = None) -> list[dict[int, int]]:
        """{block: bits} of a baseline that swaps candidates, several of a random order; a missing block is dropped.

        steps: how far along an order blocks are lowered (`step_down`); None means to as many of each width as the
        checkpoint has.
        """
        widths = self.recipe.widths
        high = dict.fromkeys(self.blocks, widths[0])
        if name.endswith("-bit"):
            return [dict.fromkeys(self.blocks, int(name.removesuffix("-bit")))]
        if name == "dropped":
            for block in least_first(plan.scores["lim"]):
                if self.bytes_of(high) <= self.bytes_of(plan.bits):
                    break
                del high[block]
            return [high]
        draws = range(plan.seed, plan.seed + RANDOM_ORDERS) if name == "random" else [plan.seed]
        orders = [self.order(name, plan.scores, draw) for draw in draws]
        if steps is not None:
            return [high | step_down(order, steps, widths) for order in orders]
        return [high | dict(zip(order, sorted(plan.bits.values()), strict=False)) for order in orders]

    def curve(self, plan: Plan, name: str) -> list[dict]:
        """Quality as more and more blocks of an order are lowered, from all at the highest width to all at the lowest."""
        widths, points = self.recipe.widths, self.recipe.curve_points
        count = (len(self.blocks) - len(self.kept)) * (len(widths) - 1)
        steps = {round(count * point / (points + 1)) for point in range(points + 2)}
        if len(widths) == 2:  # of three, the checkpoint's own plan is not on this path
            steps.add(sum(bits == widths[-1] for bits in plan.bits.values()))
        found = []
        for lowered in sorted(steps):
            mixtures = self.mixtures(name, plan, lowered)
            metrics = self.measure_mixtures(plan.seed, mixtures)
            found.append({"lowered": lowered, "bits": self.average(mixtures[0]), "metrics": metrics})
        return found


def notes(run: QuantRun, plan: Plan) -> list[str]:
    """What a reader must know besides the numbers."""
    recipe = run.recipe
    nominal, stored = run.average(plan.bits), 8 * run.bytes_of(plan.bits) / sum(run.weights.values())
    notes = [
        f"the quantised weights of the blocks take {nominal:.2f} bits on average, {stored:.2f} with"
        f" scales and zero points; embeddings{'' if recipe.head_bits else ', head'} and norms are not quantised"
    ]
    if recipe.head_bits:
        notes.append(
            f"the output head takes {recipe.head_bits} bits, by round-to-nearest, here and in the compressed models that"
            " are compared with, not in the dense one"
        )
    if recipe.backend == "awq":
        notes.append(
            "AWQ's scales are folded into the norms before q, k, v, gate and up, and into the rows of v and up, so these"
            " differ from the base model's beyond rounding, and cancel out"
        )
    if plan.stability < STABLE:
        notes.append(
            f"the ranking by LIM is not stable: Kendall's tau between halves of the calibration text is"
            f" {plan.stability:.2f}, and {STABLE} is wanted; more --nsamples would settle it"
        )
    widest = max(module.in_features for module in run.linears.values())
    tokens = recipe.nsamples * recipe.seqlen
    if recipe.backend == "gptq" and tokens < GPTQ_TOKENS * widest:
        notes.append(f"GPTQ saw {tokens} tokens, fewer than {GPTQ_TOKENS} for each of {widest} inputs, which it wants")
    return notes
