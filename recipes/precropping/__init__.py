"""PreCropping and PreConfig: channels cropped before training, as many as a layer-wise density says.   arXiv 2203.02549.

Layer l of a network has alpha_l weights and beta_l multiply-accumulates (MACs) an image; it keeps the fraction p_l of
them. Channels come in groups that must stay equal (trunks of residual sums, both sides of a depth-wise layer); group g
keeps the fraction d_g, an ordinary layer then p_l = d_in d_out.

    1. groups  g, incidence A, alpha, beta at the image size                          log p = A log d
    2. SynExp: E[1^T prod_l |W_l * M_l| 1] = N_0 prod_l (p_l mu_l N_l) for any random masks M of densities p, so
               maximise sum_l log p_l                                                 no data, no weights
               with sum_l alpha_l p_l <= B_P and sum_l beta_l p_l <= B_F              `--mode params, flops, both`
       over u_g = log d_g, in which it is convex; p_l <= 1, in PreConfig p_l may pass 1.
       Or (v1) p_l = the fraction of layer l among the best D N scores of SynFlow, SNIP or GraSP, and d = sqrt(p):
               u_g = mean over the layers at g of log p_l / 2, shifted until the budgets are met
    3. widths  c_g = round(d_g C_g) to multiples, repaired greedily until both budgets hold and nothing more fits
    4. the network of those widths, fresh (or the first c_g channels of the dense one, rescaled to the new fan-in),
       trained from scratch like any dense one. The checkpoint is dense: no mask, no index, ordinary convolutions.

The paper leaves open how densities become widths; the rules of 2 and 3 are ours. Trunks never grow in PreConfig: the
objective would trade the inside of blocks for them. Baselines have the same weights, MACs or both, and the same training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.common.domains.classification import ClassificationRecipe
from recipes.common.loops.trained import Trained, TrainedRun
from recipes.common.metrics.metric import over_seeds
from recipes.common.parts.densities import erk, uniform
from recipes.common.parts.scores import (
    check_flow,
    grasp_scores,
    keep_fractions,
    prunable_weights,
    snip_scores,
    synflow_masks,
    top_masks,
)
from recipes.common.parts.width_fit import Budget, check_floor, fit_widths, width_limits
from recipes.common.parts.width_graph import WidthGraph, width_graph
from recipes.precropping.crop_rules import RULES, crop_wish, synexp_channels
from recipes.precropping.networks import (
    CROPPED,
    MASKED,
    NETWORKS,
    baseline_wish,
    cropped,
    initialised,
    network_row,
    random_masks,
    resized,
)
from zoo.errors import UserError

SCORED = ("synflow", "snip", "grasp")
SOURCES = ("synexp", *SCORED, "erk", "magnitude", "uniform")
RECORDED = ("source", "mode", "budget_params", "budget_flops", "trunk", "width_multiple", "min_width", "max_density")
MANY_AT_FLOOR = 0.2  # share of groups at their smallest width from which on a plain width multiplier tends to win


@dataclass(frozen=True)
class Precropping(Trained, ClassificationRecipe):
    """Crop the channels of a convolutional network before training, under budgets of weights and of MACs."""

    model: str = field(
        default="resnet-8",
        metadata={
            "help": "architecture, such as resnet-20, resnet-20-8 (width 8), vgg-16, mobilenet-v2, or a folder or Hub id"
        },
    )
    source: str = field(
        default="synexp",
        metadata={
            "help": "of the densities: synexp (the optimum, from shapes alone), the kept fractions of a score at"
            " initialisation (synflow, snip, grasp, magnitude), or a formula (erk, uniform)",
            "choices": list(SOURCES),
        },
    )
    mode: str = field(default="both", metadata={"help": "which budgets bind", "choices": ["params", "flops", "both"]})
    budget_params: float = field(
        default=0.4,
        metadata={
            "help": "weights of convolutions and linear layers, a fraction up to 1 or their number",
            "at_most": 10**15,
            "above": 0,
        },
    )
    budget_flops: float = field(
        default=0.4,
        metadata={
            "help": "multiply-accumulates per image, a fraction up to 1 or their number",
            "at_most": 1e18,
            "above": 0,
        },
    )
    preconfig: bool = field(
        default=False, metadata={"help": "layers may become wider than the base: redistribute widths, budgets up to 1"}
    )
    max_density: float = field(
        default=4.0, metadata={"help": "with --preconfig: largest width over base width", "at_least": 1, "at_most": 100}
    )
    trunk: str = field(
        default="tie",
        metadata={"help": "trunks of residual sums: tie crops them too, keep leaves them", "choices": ["tie", "keep"]},
    )
    density_map: str = field(
        default="geomean", metadata={"help": "how densities become widths (not synexp)", "choices": list(RULES)}
    )
    width_multiple: int = field(
        default=1,
        metadata={"help": "every width is a multiple: 1 here, 8 or 16 for GPUs", "at_least": 1, "at_most": 1024},
    )
    min_width: int = field(default=4, metadata={"help": "smallest width of a group", "at_least": 1, "at_most": 2**16})
    min_ratio: float = field(
        default=0.05, metadata={"help": "smallest width of a group over its base width", "at_most": 1, "above": 0}
    )
    init: str = field(
        default="fresh",
        metadata={
            "help": "of the cropped network: fresh, or crop (the first channels of the dense one, rescaled)",
            "choices": ["fresh", "crop"],
        },
    )
    score_rounds: int = field(default=100, metadata={"help": "rounds of SynFlow", "at_least": 1, "at_most": 10**5})
    score_samples: int = field(
        default=10,
        metadata={"help": "training images of each class that SNIP and GraSP see", "at_least": 1, "at_most": 10**6},
    )
    sweep: list[float] = field(
        default_factory=list,
        metadata={
            "help": "further budgets, as fractions, at which it is compared with a width multiplier",
            "above": 0,
            "below": 1,
        },
    )
    epochs: int = field(
        default=4, metadata={"help": "passes over the training images", "at_least": 0, "at_most": 10000}
    )
    batch_size: int = field(
        default=64, metadata={"help": "images per step, over all processes together", "at_least": 1, "at_most": 2**16}
    )
    baselines: list[str] = field(
        default_factory=lambda: [*CROPPED, "same-p-mask", "erk-mask", "synflow-mask"],
        metadata={
            "help": f"baselines to run beside it, of {', '.join(CROPPED + MASKED)}; 'none' for none",
            "empty": True,
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "print the widths and what they cost, and stop"})

    paper_title = "Structured Pruning is All You Need for Pruning CNNs at Initialization"
    arxiv = "2203.02549"

    # -------------------------------------------------------------------------------------------- before any work

    def check(self) -> None:
        super().check()
        if self.preconfig and self.source != "synexp":
            raise UserError(f"--preconfig: only --source synexp knows densities above 1, {self.source} does not.")
        if self.preconfig and self.init == "crop":
            raise UserError("--preconfig: channels that the dense network lacks cannot be cropped; use --init fresh.")

    def check_base(self, run: TrainedRun) -> None:
        """Every budget is within reach of the smallest widths."""
        graph = self.graph(run)
        fixed = graph.trunks if self.trunk == "keep" else ()
        limits = {group: limit for group, limit in self.limits(graph).items() if group not in fixed}
        for budget in (self.budget(graph), *(scaled(graph, share) for share in self.sweep)):
            check_floor(graph, budget, limits)

    def baseline_names(self) -> list[str]:
        return [*CROPPED, *MASKED]

    def graph(self, run: TrainedRun) -> WidthGraph:
        """Step 1."""
        with torch.device("meta"):
            model = run.domain.fresh(0)
        return width_graph(model, run.domain.side)

    def budget(self, graph: WidthGraph) -> Budget:
        """The flags' budgets in weights and MACs. Raises: UserError for one that passes the base."""
        found = {}
        totals = {"budget_params": graph.params.sum(), "budget_flops": graph.macs.sum()}
        for name, total in totals.items():
            value = getattr(self, name)
            found[name] = value * total if value <= 1 else value
            if found[name] > total:
                raise UserError(
                    f"--{name} {value:,.0f}: the base has {total:,.0f}; a fraction up to 1, or fewer, is needed."
                )
        return Budget(
            found["budget_params"] if self.mode != "flops" else None,
            found["budget_flops"] if self.mode != "params" else None,
        )

    def limits(self, graph: WidthGraph) -> dict[str, tuple[int, int]]:
        return width_limits(
            graph,
            multiple=self.width_multiple,
            min_width=self.min_width,
            min_ratio=self.min_ratio,
            max_ratio=self.max_density if self.preconfig else 1.0,
        )

    # ------------------------------------------------------------------------------------------------- steps 2 and 3

    def widths(
        self, graph: WidthGraph, budget: Budget, dense: PreTrainedModel, batches: list[dict[str, Tensor]]
    ) -> dict[str, int]:
        """{group: width} of the cropped network.

        dense, batches: the untrained network and a few labelled images, which only scores look at.
        """
        limits, keep = self.limits(graph), self.trunk == "keep"
        if self.source == "synexp":
            wish = synexp_channels(graph, budget, limits, keep)
            return fit_widths(graph, wish, budget, limits, multiple=self.width_multiple)
        p = self.densities(graph, budget, dense, batches)
        wish = crop_wish(graph, p, self.density_map, keep)
        return fit_widths(graph, wish, budget, limits, multiple=self.width_multiple, shift=True)

    def densities(
        self, graph: WidthGraph, budget: Budget, dense: PreTrainedModel, batches: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        """{layer: p_l} of the source, for a global density D that is the budget of weights (or of MACs alone)."""
        density = budget.macs / graph.macs.sum() if budget.params is None else budget.params / graph.params.sum()
        if self.source in ("erk", "uniform"):
            shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(dense).items()}
            p = (erk if self.source == "erk" else uniform)(shapes, density)
        elif self.source == "synflow":
            masks = synflow_masks(dense, self.pixel_shape(dense), density, self.score_rounds)
            p = {name: mask.double().mean().item() for name, mask in masks.items()}
        else:
            p = keep_fractions(scores(self.source, dense, batches), density)
        return {name.removesuffix(".weight"): value for name, value in p.items()}

    def pixel_shape(self, model: PreTrainedModel) -> tuple[int, int, int]:
        side = self.image_size or model.config.image_size
        return model.config.num_channels, side, side

    # ------------------------------------------------------------------------------------------------------- step 4

    def fresh(self, run: TrainedRun, seed: int) -> PreTrainedModel:
        return initialised(super().fresh(run, seed), seed)

    def produce(self, run: TrainedRun, seed: int) -> None:
        for variant in (*self.variants(run), *self.sweep_variants()):
            run.trained(variant, seed)

    def trainings(self, run: TrainedRun) -> int:
        return super().trainings(run) + len(self.sweep_variants())

    def make(self, run: TrainedRun, variant: str, seed: int) -> PreTrainedModel:
        name = variant.partition("@")[0]
        dense = self.fresh(run, seed)
        if name in MASKED:
            return run.train(dense, variant, seed, masks=self.masks(run, name, seed))
        if name == "dense":
            return run.train(dense, variant, seed)
        if run.processes.rank == 0:
            self.widths_of(run, variant, seed)
        run.processes.barrier()  # the others read what the first one found
        widths = self.widths_of(run, variant, seed)
        narrow = cropped(dense, widths) if self.init == "crop" else initialised(resized(dense, widths), seed)
        return run.train(narrow, variant, seed)

    def sweep_variants(self) -> list[str]:
        return [f"{name}@{budget:g}" for budget in self.sweep for name in (self.method, "width-params")]

    def widths_of(self, run: TrainedRun, variant: str, seed: int) -> dict[str, int]:
        """{group: width} of the recipe's own network or of a narrower baseline, computed once."""

        def make() -> dict[str, int]:
            graph = self.graph(run)
            name, _, fraction = variant.partition("@")
            if name == self.method:
                share = float(fraction) if fraction else None
                budget = self.budget(graph) if share is None else scaled(graph, share)
                return self.widths(graph, budget, self.fresh(run, seed), self.score_batches(run, self.source))
            own = self.method + (f"@{fraction}" if fraction else "")
            params, macs = graph.cost(self.widths_of(run, own, seed))
            budget = {"width-params": Budget(params, None), "width-macs": Budget(None, macs)}.get(
                name, Budget(params, macs)
            )
            limits = width_limits(graph, multiple=self.width_multiple, min_width=1, min_ratio=1e-9)
            wish = baseline_wish(graph, name, seed)
            return fit_widths(graph, wish, budget, limits, multiple=self.width_multiple, shift=True)

        return run.once(f"widths/{variant}-{seed}", make)

    def score_batches(self, run: TrainedRun, source: str) -> list[dict[str, Tensor]]:
        """`score_samples` training images of every class, in two batches at least, each with all classes; none for
        sources that look at no image.
        """
        if source not in ("snip", "grasp"):
            return []
        images = run.domain.train_images
        labels = images.labels
        count = min(self.score_samples, int(labels.unique(return_counts=True)[1].min()))
        rows = torch.stack([(labels == c).nonzero()[:count, 0] for c in labels.unique()]).T.flatten()
        size = min(self.batch_size, -(-len(rows) // 2))
        return [images.batch(some.tolist()) for some in rows.split(size)]

    def masks(self, run: TrainedRun, name: str, seed: int) -> dict[str, Tensor]:
        """{weight: bool} of a sparse baseline that keeps as many weights as the recipe's own network has."""
        graph, widths = self.graph(run), self.widths_of(run, self.method, seed)
        dense, params = self.fresh(run, seed), graph.cost(widths)[0]
        weights, density = prunable_weights(dense), params / graph.params.sum()
        if name == "synflow-mask":
            return synflow_masks(dense, self.pixel_shape(dense), density, self.score_rounds)
        source = name.removesuffix("-mask")
        if source in ("snip", "grasp"):
            masks = top_masks(scores(source, dense, self.score_batches(run, source)), params)
            check_flow(dense, masks, self.pixel_shape(dense), density)
            return masks
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        if name == "same-p-mask":
            p = {f"{key}.weight": value for key, value in graph.densities(widths).items()}
        else:
            p = erk(shapes, density) if name == "erk-mask" else uniform(shapes, density)
        return random_masks({key: p[key] for key in shapes}, shapes, seed)

    # ------------------------------------------------------------------------------------------ checkpoint and report

    def pack(self, run: TrainedRun, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        graph, widths = self.graph(run), self.widths_of(run, self.method, seed)
        params, macs = graph.cost(widths)
        model.config.compression_config = {
            "method": self.method,
            "format_version": 1,
            "modules": {},
            "precrop": {
                **{key: getattr(self, key) for key in RECORDED},
                "densities": graph.densities(widths),
                "widths": widths,
                "base_widths": graph.widths,
                "achieved": {"params": params, "macs": macs, "sum_log_p": graph.sum_log_p(widths)},
                "seed": seed,
            },
        }
        return model

    def baseline_bytes(self, run: TrainedRun) -> dict[str, int]:
        """Sparse baselines are stored with their zeros in place, as large as the dense network."""
        models = {name: run.trained(name, run.seeds[0]) for name in self.chosen_baselines()}
        return {name: sum(t.nbytes for t in model.state_dict().values()) for name, model in models.items()}

    def findings(self, run: TrainedRun) -> dict:
        graph, seed = self.graph(run), run.seeds[0]
        widths = self.widths_of(run, self.method, seed)
        rows = [[group, base, widths[group], widths[group] / base] for group, base in graph.widths.items()]
        findings = {
            "tables": {
                "Networks": {
                    "header": NETWORKS,
                    "rows": [network_row(name, run.trained(name, seed), graph) for name in self.variants(run)],
                },
                "Widths": {"header": ["group", "base", "width", "kept"], "rows": rows},
            },
            "notes": floor_notes(widths, self.limits(graph)),
        }
        if self.sweep:
            series: dict[str, list] = {}
            for variant in self.sweep_variants():
                name, _, fraction = variant.partition("@")
                metrics = self.measure(run, variant)
                series.setdefault(name, []).append({"x": float(fraction), "metrics": over_seeds(metrics)})
            findings["sweeps"] = {
                "Quality by budget": {"x": "fraction of weights and MACs", "log": True, "series": series}
            }
        return findings

    def show_plan(self, run: TrainedRun) -> None:
        """The widths and what they cost, of the first seed."""
        graph, batches = self.graph(run), self.score_batches(run, self.source)
        widths = self.widths(graph, self.budget(graph), self.fresh(run, self.seed), batches)
        for group, base in graph.widths.items():
            print(f"{group:32}{base:6}{widths[group]:6}{widths[group] / base:8.3f}")
        for name, value, total in zip(("weights", "MACs"), graph.cost(widths), graph.cost(graph.widths), strict=True):
            print(f"{name:32}{total:14,}{value:14,}{value / total:8.3f}")
        print(f"{'sum log p':32}{graph.sum_log_p(widths):14.4f}")
        print(*floor_notes(widths, self.limits(graph)), sep="\n")


# -------------------------------------------------------------------------------------------------- budgets and scores


def scaled(graph: WidthGraph, share: float) -> Budget:
    """The same fraction of weights and of MACs."""
    return Budget(share * graph.params.sum(), share * graph.macs.sum())


def scores(source: str, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Scores of all weights by one look at the untrained network; the largest are kept."""
    if source == "magnitude":
        return {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    return (snip_scores if source == "snip" else grasp_scores)(model, batches)


def floor_notes(widths: dict[str, int], limits: dict[str, tuple[int, int]]) -> list[str]:
    at_floor = sum(widths[group] == low < high for group, (low, high) in limits.items())
    if at_floor <= MANY_AT_FLOOR * len(limits):
        return []
    return [
        f"{at_floor} of {len(limits)} groups have their smallest width: a plain width multiplier may be better here."
    ]
