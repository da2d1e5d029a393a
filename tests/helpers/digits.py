"""A short training on the digits that scikit-learn carries, to tell networks apart."""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn

from recipes.common.core.cli import parse
from recipes.common.loops.training import apply_masks, make_optimizer, mask_gradients


def train_digits(model: nn.Module, masks: dict | None, epochs: int = 6) -> float:
    """Accuracy on held-out digits after a short training."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    schedule = parse("precropping", ["--epochs", str(epochs)]).training
    optimizer = make_optimizer(model.train(), schedule)
    apply_masks(model, masks)
    mask_gradients(model, masks)
    generator, steps = torch.Generator().manual_seed(0), epochs * 15
    for step in range(steps):
        rows = torch.randint(900, (60,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
        optimizer.step()
        apply_masks(model, masks)
    with torch.no_grad():
        return (model.eval()(pixels[900:]).logits.argmax(-1) == labels[900:]).double().mean().item()
