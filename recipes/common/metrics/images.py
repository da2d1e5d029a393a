"""What an image classifier is worth: accuracy, calibration, detection of foreign images, robustness to attack.

Attacks and foreign images live in pixel space, [0, 1] before normalisation; logits are taken in eval mode, so batch
normalisation uses its running statistics, and in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from recipes.common.core.state import module_seed
from recipes.common.data.image_batches import ImageTensors
from recipes.common.data.images import PACKAGED, ImageData, load_images
from recipes.common.metrics.fidelity import Reference, fidelity
from recipes.common.metrics.metric import mean_of, metric
from zoo.errors import UserError

DETECTION = ("auroc", "fpr95", "auroc_energy", "fpr95_energy")  # once for every set of foreign images
ATTACKS = ("fgsm", "pgd")  # on some of the test images
METRICS = ("accuracy", "nll", "brier", "ece", "ece_scaled", *DETECTION, *ATTACKS)  # accuracy brings top5 along
SYNTHETIC = ("inverted", "uniform", "gaussian")  # foreign images made of the test images, or of nothing
ECE_BINS = 15
EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 10  # of the attacks, in pixel space; STEP and STEPS are PGD's


def measure_images(
    model: nn.Module,
    data: ImageData,
    which: list[str],
    processor,
    *,
    batch_size: int = 256,
    attacked: int | None = None,
    seed: int = 0,
    reference: Reference | None = None,
) -> dict[str, dict]:
    """The metrics `which` (of `METRICS`) of a classifier on the test images: {"accuracy": M, "auroc/uniform": M, …}.

    Args:
        model: called as model(pixel_values=…), with `.logits` in its output; attacks differentiate it.
        processor: the model's; see `ImageTensors`.
        batch_size: images per forward pass.
        attacked: test images that are attacked, evenly spread; None for all. An attack costs 2 passes, PGD 22.
        seed: of the noise images and of PGD's random starts.
        reference: the dense model's predictions; how near the model's are to them is then told too (`fidelity`).

    Raises:
        UserError: a metric is unknown, or the model's outputs are NaN.
    """
    check_metrics(which)
    test = ImageTensors(data.test, processor)
    logits = predict(model, test, batch_size)
    metrics: dict[str, dict] = {}
    if "accuracy" in which:
        metrics["accuracy"] = _mean(correct(logits, test.labels))
        if len(data.classes) > 10:
            metrics["top5"] = _mean(correct(logits, test.labels, k=5))
    if "nll" in which:
        metrics["nll"] = _mean(nll(logits, test.labels), "nats", higher_is_better=False)
    if "brier" in which:
        metrics["brier"] = _mean(brier(logits, test.labels), "score", higher_is_better=False)
    if "ece" in which:
        metrics["ece"] = _ece_metric(logits, test.labels)
    if "ece_scaled" in which:
        validation = ImageTensors(data.validation, processor)
        temperature = fit_temperature(predict(model, validation, batch_size), validation.labels)
        metrics["ece_scaled"] = _ece_metric(logits / temperature, test.labels)
    if any(kind in DETECTION for kind in which):
        metrics |= _measure_detection(model, which, test, logits, foreign_sets(data), batch_size, seed)
    for attack in ATTACKS:
        if attack in which:
            metrics[attack] = _mean(survives(model, test, attack, batch_size=batch_size, items=attacked, seed=seed))
    if reference is not None:
        kl, agrees = reference.compare("test", logits)
        metrics |= fidelity([kl], [agrees], "items")
    return metrics


def check_metrics(which: list[str]) -> None:
    """Raises UserError for a name that is not one of `METRICS`."""
    for name in which:
        if name not in METRICS:
            raise UserError(f"--metrics {name}: no such metric; there are {', '.join(METRICS)}.")


def evaluation_rows(data: ImageData, metrics: dict[str, dict]) -> dict[str, dict]:
    """`data.evaluation` of a report: the test images, those that were attacked, and every set of foreign images."""
    rows = {"test": data.row("test")}
    for key, m in metrics.items():
        where = key.partition("/")[2]
        if key in ATTACKS:
            rows[key] = data.row("test", m["n"])
        if where == "inverted":
            rows[where] = data.row("test") | {"name": f"{data.name}, inverted"}
        elif where in SYNTHETIC:
            noise = {"name": f"{where} noise", "version": None, "sha256": None, "size": None}
            rows[where] = noise | {"items": m["n"]}
        elif where:
            rows[where] = load_images(where).row("test", m["n"])
    return rows


def _mean(values: Tensor, unit: str = "fraction", higher_is_better: bool = True) -> dict:
    """The mean of one number per item as a metric, with its standard error."""
    return mean_of(values, "items", unit, higher_is_better)


def _ece_metric(logits: Tensor, labels: Tensor) -> dict:
    return mean_of(ece_parts(logits, labels), "items", higher_is_better=False)


# --------------------------------------------------------------------------------------------------------------- logits


def predict(model: nn.Module, images: ImageTensors, batch_size: int = 256) -> Tensor:
    """(N, C) fp32 logits on the CPU, in the order of the images. Raises UserError if any is NaN."""
    batches = (pixels for pixels, _ in images.batches(batch_size))
    return _predict(model, batches, images.normalize, len(images))


def _predict(model: nn.Module, batches: Iterator[Tensor], normalize: Callable, total: int) -> Tensor:
    logits = []
    with _evaluating(model), torch.inference_mode(), tqdm(total=total, desc="images", leave=False) as bar:
        for pixels in batches:
            logits.append(_logits(model, normalize(pixels)).cpu())
            if logits[-1].isnan().any():
                raise UserError(
                    "The model's outputs are NaN; with --dtype float16 they may have overflowed, use float32."
                )
            bar.update(len(pixels))
    return torch.cat(logits)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(pixel_values=inputs.to(model.device, model.dtype)).logits.float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------------------------- accuracy and calibration, of logits


def correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """(N,) bool: whether the label (N,) is among the `k` largest logits (N, C)."""
    return (logits.topk(min(k, logits.shape[1])).indices == labels[:, None]).any(1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) negative log-likelihood of the label in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) squared distance of the softmax to the one-hot label, summed over classes: 0 to 2."""
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).square().sum(1)


def ece(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error, sum_b |B_b| / n * |accuracy(B_b) - confidence(B_b)|.

    B_b holds the items whose confidence, the largest softmax output, is in ((b - 1) / bins, b / bins].
    """
    return ece_parts(logits, labels, bins).mean().item()


def ece_parts(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> Tensor:
    """(N,) float64 whose mean is `ece`: of an item in B_b, right - confidence with the sign of its bin's sum of them."""
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    parts = (predicted == labels).double() - confidence
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, parts)
    return parts * gap.sign()[place]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T > 0 that minimises the mean NLL of logits / T; from 0.01 to 100.

    The NLL is convex in b = 1 / T, with derivative mean(E_softmax(b z)[z] - z_label), so its root is bisected in log b.
    """
    z = logits.double()
    target = z.gather(1, labels[:, None])[:, 0]
    low, high = math.log(0.01), math.log(100)
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * z).softmax(1) * z).sum(1)
        if (expected - target).mean() > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


# ------------------------------------------------------------------------------------------------------ foreign images


def _measure_detection(
    model: nn.Module, which: list[str], test: ImageTensors, logits: Tensor, names: list[str], batch_size: int, seed: int
) -> dict[str, dict]:
    metrics = {}
    for name in names:
        batches, total = foreign_batches(name, test, batch_size, seed)
        foreign = _predict(model, batches, test.normalize, total)
        for ending, score in (("", confidence), ("_energy", energy)):
            area, error = auroc(score(logits), score(foreign))
            metrics[f"auroc{ending}/{name}"] = metric(area, error, total, "items")
            passed = passes_at_95(score(logits), score(foreign))
            metrics[f"fpr95{ending}/{name}"] = _mean(passed, higher_is_better=False)
    return {f"{kind}/{name}": metrics[f"{kind}/{name}"] for kind in DETECTION if kind in which for name in names}


def foreign_sets(data: ImageData) -> list[str]:
    """Names of the sets that `data` is told from: made ones, and the packaged images that are none of its classes."""
    return [*SYNTHETIC, "cifar10" if data.name == PACKAGED["easy-vqa"][0] else "easy-vqa"]


def foreign_batches(name: str, test: ImageTensors, batch_size: int, seed: int) -> tuple[Iterator[Tensor], int]:
    """(batches of (B, 3, H, W) pixels in [0, 1], their total), as many as there are test images, or all of a set.

    `inverted`: 1 - x of the test images. `uniform`: noise in [0, 1]. `gaussian`: noise with the mean and deviation of
    the processor's channels, clipped. Any other name: the test images of `load_images(name)`.
    """
    if name not in SYNTHETIC:
        other = ImageTensors(load_images(name).test, test.processor)
        return (pixels for pixels, _ in other.batches(batch_size)), len(other)
    if name == "inverted":
        return (1 - pixels for pixels, _ in test.batches(batch_size)), len(test)
    generator = Generator().manual_seed(module_seed(seed, name))
    counts = [len(rows) for rows in torch.arange(len(test)).split(batch_size)]
    shapes = [(count, 3, *test.size) for count in counts]
    if name == "uniform":
        return (torch.rand(shape, generator=generator) for shape in shapes), len(test)
    noise = (torch.randn(shape, generator=generator) for shape in shapes)
    return ((test.mean + test.std * x).clamp(0, 1) for x in noise), len(test)


def confidence(logits: Tensor) -> Tensor:
    """(N,) the largest softmax output, as its logarithm: the same order, but no ties where it rounds to 1."""
    return logits.double().log_softmax(1).amax(1)


def energy(logits: Tensor) -> Tensor:
    """(N,) log-sum-exp of the logits: the negative free energy, larger for familiar images."""
    return logits.double().logsumexp(1)


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """(P(inside > outside) + P(inside = outside) / 2, its standard error after DeLong) of two sets of scores."""
    below = _rank(inside, outside) / len(outside)  # (N,) for each score inside, the part of outside below it
    above = 1 - _rank(outside, inside) / len(inside)
    variance = sum(part.var(correction=1) / len(part) if len(part) > 1 else 0 for part in (below, above))
    return below.mean().item(), math.sqrt(variance)


def _rank(scores: Tensor, among: Tensor) -> Tensor:
    """(N,) float64: how many of `among` are smaller than each score, equal ones counted half."""
    ordered = among.sort().values
    smaller, not_larger = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    return (smaller + not_larger).double() / 2


def passes_at_95(inside: Tensor, outside: Tensor) -> Tensor:
    """(M,) bool: which foreign images score at least as high as 95 % of the model's own do."""
    threshold = inside.sort(descending=True).values[math.ceil(0.95 * len(inside)) - 1]
    return outside >= threshold


# ------------------------------------------------------------------------------------------------------------- attacks


def survives(
    model: nn.Module,
    images: ImageTensors,
    attack: str,
    *,
    epsilon: float = EPSILON,
    batch_size: int = 256,
    items: int | None = None,
    seed: int = 0,
) -> Tensor:
    """(n,) bool: which of the images, or of `items` of them evenly spread, are classified right under `fgsm` or `pgd`.

    The attacker knows the weights and the labels, and moves every pixel by up to `epsilon` within [0, 1].
    """
    rows = torch.linspace(0, len(images) - 1, min(items or len(images), len(images))).round().long()
    generator = Generator().manual_seed(seed)
    right = []
    with _evaluating(model), tqdm(total=len(rows), desc=attack, unit="image", leave=False) as bar:
        for chunk in rows.split(batch_size):
            pixels, labels = images.pixels(chunk.tolist()), images.labels[chunk]
            if attack == "fgsm":
                moved = fgsm(model, images.normalize, pixels, labels, epsilon)
            else:
                moved = pgd(model, images.normalize, pixels, labels, epsilon, generator=generator)
            with torch.inference_mode():
                right.append(correct(_logits(model, images.normalize(moved)).cpu(), labels))
            bar.update(len(chunk))
    return torch.cat(right)


def fgsm(model: nn.Module, normalize: Callable, pixels: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """clip(x + epsilon * sign(dCE/dx), 0, 1) of pixels (B, 3, H, W) in [0, 1]; the model has to be in eval mode."""
    return (pixels + epsilon * _gradient(model, normalize, pixels, labels).sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    normalize: Callable,
    pixels: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    step: float = STEP,
    steps: int = STEPS,
    generator: Generator | None = None,
) -> Tensor:
    """From a random start in the ball, `steps` steps along the sign of the gradient, each projected back into it."""
    low, high = (pixels - epsilon).clamp(min=0), (pixels + epsilon).clamp(max=1)
    moved = low + (high - low) * torch.rand(pixels.shape, generator=generator)
    for _ in range(steps):
        moved = moved + step * _gradient(model, normalize, moved, labels).sign()
        moved = moved.clamp(low, high)
    return moved


def _gradient(model: nn.Module, normalize: Callable, pixels: Tensor, labels: Tensor) -> Tensor:
    """d sum(CE) / d pixels, on the CPU. In double precision a softmax of nearly 1 still has a gradient."""
    pixels = pixels.detach().requires_grad_()
    logits = _logits(model, normalize(pixels)).double()
    loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]
