"""What a language model is worth: perplexity on token windows, and lm-eval tasks."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.data.assets import asset_path
from recipes.common.metrics.fidelity import Reference, fidelity
from recipes.common.metrics.metric import metric
from zoo.errors import UserError

# The multiple-choice tasks that need no hub: name -> (metric, prompt of an item). The metric is the one that a small
# model does better at: by the sum of the answer's log-likelihoods (acc), or that divided by its length (acc_norm).
LOCAL_TASKS = {
    "step_inference": ("acc", "{q}"),
    "goal_inference": ("acc_norm", "{q}"),
    "social_iqa": ("acc_norm", "Question: {q}\nAnswer:"),
    "similarities_abstraction": ("acc", "Q: {q}\nA:"),
}
TASK_BATCH = 8


# ------------------------------------------------------------------------------------------------------- perplexity


def window_nlls(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 1,
    look: Callable[[int, Tensor], None] = lambda window, logits: None,
) -> Tensor:
    """Mean negative log-likelihood of each window's tokens 2..T given those before them in the window.

    Args:
        windows: (N, T) int64 token ids, T >= 2; nothing is added to them.
        batch_size: windows per forward pass; it changes the speed, and the result only by rounding.
        look: called with the number of each window and the logits (T - 1, V) that predict its tokens 2..T.

    Returns:
        (N,) float64, in nats per token. Logits are taken to fp32 first, whatever the model's dtype.

    Raises:
        UserError: the model's outputs are NaN, which half-precision overflow gives.
    """
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        with torch.inference_mode(), tqdm(total=len(windows), desc="perplexity", unit="window", leave=False) as bar:
            for batch in windows.split(batch_size):
                batch = batch.to(model.device)
                logits = model(input_ids=batch, use_cache=False).logits
                for row, ids in zip(logits, batch, strict=True):  # one window's log-softmax in memory at a time
                    losses.append(nn.functional.cross_entropy(row[:-1].float(), ids[1:]).item())
                    if math.isnan(losses[-1]):
                        raise UserError(
                            f"Window {len(losses) - 1} has no perplexity: the model's outputs are NaN; with --dtype"
                            " float16 they may have overflowed, use bfloat16 or float32."
                        )
                    look(len(losses) - 1, row[:-1])
                bar.update(len(batch))
                bar.set_postfix_str(f"{_exp(statistics.fmean(losses)):.2f}")
    finally:
        model.train(was_training)
    return torch.tensor(losses, dtype=torch.float64)


def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 1) -> dict:
    """Token perplexity exp(mean NLL) over `windows` (N, T) int64, as a metric of unit "ppl".

    `spread` is the standard error of the mean NLL over windows times the perplexity (first-order), so it says how far
    another draw of windows of this text would move the value. Two models measured on the same windows differ with much
    less noise than that: they are compared by `raw`, the mean NLL of each window. It is None for a single window, and if
    it overflows.
    """
    return _perplexity(window_nlls(model, windows, batch_size))


def text_metrics(
    model: nn.Module,
    windows: dict[str, Tensor],
    batch_size: int = 1,
    reference: Reference | None = None,
    compared: int = 0,
) -> dict[str, dict]:
    """{"perplexity/A": metric, …} of texts (N, T) int64 by their names and, with a reference, how near the predictions of
    the first `compared` windows of each are to its own (`fidelity`, over all texts together).
    """
    found, kl, agrees = {}, [], []
    for name, rows in windows.items():

        def look(window: int, logits: Tensor, name: str = name) -> None:
            if reference is not None and window < compared:
                divergences, same = reference.compare(f"{name}-{window}", logits)
                kl.append(divergences)
                agrees.append(same)

        found[f"perplexity/{name}"] = _perplexity(window_nlls(model, rows, batch_size, look))
    return found | (fidelity(kl, agrees, "windows") if kl else {})


def _perplexity(nlls: Tensor) -> dict:
    value = _exp(nlls.mean().item())
    spread = value * nlls.std(correction=1).item() / math.sqrt(len(nlls)) if len(nlls) > 1 else math.nan
    finite = spread if math.isfinite(spread) else None
    return metric(value, finite, len(nlls), "windows", "ppl", higher_is_better=False, raw=nlls.tolist())


def _exp(nll: float) -> float:
    """exp, capped at the largest float, so that a ruined model still has a number that JSON can hold."""
    return math.exp(min(nll, 709.0))


# ------------------------------------------------------------------------------------------------------------ tasks


def run_tasks(
    model: nn.Module, tokenizer, tasks: list[str], limit: int | None = None, seed: int = 0
) -> dict[str, dict]:
    """Scores on lm-eval tasks: {"acc/step_inference": metric, …}, `spread` being lm-eval's standard error.

    Args:
        tasks: names of `LOCAL_TASKS`, which need no network and shadow lm-eval's tasks of the same name, or of any of
            lm-eval's own tasks, which it downloads.
        limit: the first `limit` items of each task; None for all.
        seed: of lm-eval's few-shot sampling; the local tasks are zero-shot and do not depend on it.

    Raises:
        UserError: a task is unknown, or its data cannot be fetched.
    """
    from lm_eval.tasks import TaskManager

    check_tasks(tasks)
    local = [local_task(name) for name in tasks if name in LOCAL_TASKS]
    foreign = [name for name in tasks if name not in LOCAL_TASKS]
    scores: dict[str, dict] = {}
    with _quiet_lm_eval():
        if local:  # apart from the others: lm-eval would merge a task of ours with its own of the same name
            scores |= _evaluate(model, tokenizer, local, TaskManager(include_defaults=False), limit, seed)
        try:
            if foreign:
                scores |= _evaluate(model, tokenizer, foreign, TaskManager(), limit, seed)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--tasks {', '.join(foreign)}: the data cannot be fetched ({reason}).") from None
    return {key: scores[key] for name in tasks for key in scores if key.partition("/")[2] == name}


def check_tasks(tasks: list[str]) -> None:
    """Raises UserError for a name that is neither a local task nor one of lm-eval's; nothing is downloaded."""
    from lm_eval.tasks import TaskManager

    foreign = [name for name in tasks if name not in LOCAL_TASKS]
    known = TaskManager().all_tasks if foreign else []
    for name in foreign:
        if name not in known:
            raise UserError(
                f"--tasks {name}: no such task; there are {', '.join(LOCAL_TASKS)} and, with a hub, lm-eval's own."
            )


def _evaluate(model: nn.Module, tokenizer, tasks: list, manager, limit: int | None, seed: int) -> dict[str, dict]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=TASK_BATCH, backend="causal"),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        log_samples=True,
        bootstrap_iters=1000,  # only metrics without a closed-form standard error use it
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    names = [task["task"] if isinstance(task, dict) else task for task in tasks]
    return {key: value for name in names for key, value in _scores(results, name)}


def local_task(name: str) -> dict:
    """The lm-eval configuration of a local task, its items read from the packaged BIG-bench file."""
    score, prompt = LOCAL_TASKS[name]
    items = read_items(name)

    def dataset(**_) -> dict:
        from datasets import Dataset

        return {"validation": Dataset.from_list(items)}

    return {
        "task": name,
        "custom_dataset": dataset,
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": lambda item: prompt.format(q=item["q"]),
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": score, "aggregation": "mean", "higher_is_better": True}],
    }


def read_items(name: str) -> list[dict]:
    """BIG-bench examples as {q, choices, gold}, in file order; those without exactly one right answer are left out."""
    items = []
    for example in json.loads(asset_path(name).read_text(encoding="utf-8"))["examples"]:
        scores = example["target_scores"]
        right = [index for index, score in enumerate(scores.values()) if score > 0]
        if len(right) == 1:
            items.append({"q": example["input"].strip(), "choices": list(scores), "gold": right[0]})
    return items


def _scores(results: dict, task: str) -> Iterator[tuple[str, dict]]:
    """lm-eval's result of one task or group as our metrics; a filter other than "none" becomes part of the name."""
    n = _items(results, task)
    for key, value in results["results"][task].items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results["results"][task].get(f"{name}_stderr,{filtered}")
        spread = stderr if isinstance(stderr, float) and math.isfinite(stderr) else None
        better = results["higher_is_better"][task].get(name, True)
        unit = "ppl" if "perplexity" in name else "fraction"
        label = name if filtered == "none" else f"{name}-{filtered}"
        raw = _item_scores(results, task, name, filtered)
        if raw is not None and not math.isclose(statistics.fmean(raw), value, abs_tol=1e-9):
            raw = None  # another aggregation than the mean
        yield f"{label}/{task}", metric(value, spread, n, "items", unit, better, raw)


def _item_scores(results: dict, task: str, name: str, filtered: str) -> list[float] | None:
    """The score of every item of a task, in the order of the data; None where lm-eval keeps no number for each."""
    samples = [row for row in results.get("samples", {}).get(task, ()) if row.get("filter", "none") == filtered]
    scores = [row.get(name) for row in sorted(samples, key=lambda row: row["doc_id"])]
    return scores if scores and all(isinstance(score, int | float) for score in scores) else None


def _items(results: dict, task: str) -> int:
    """Items of a task, or of all tasks in a group of tasks and groups."""
    members = results.get("group_subtasks", {}).get(task)
    if members:
        return sum(_items(results, member) for member in members)
    return results["n-samples"][task]["effective"]


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """lm-eval's remarks on its own defaults are not for the reader of a run."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
