"""Train a model with transformers' Trainer: masks that stay masks, any loss, groups and step hooks, resume, processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction

from zoo.errors import UserError

CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", TRAINER_STATE_NAME)  # and states of random numbers
Masks = dict[str, Tensor]  # {parameter name: bool, True where the weight is kept}
# loss(model, batch, label smoothing) -> (mean loss of the batch, {name: what the score looks at}).
Loss = Callable[[nn.Module, dict[str, Tensor], float], tuple[Tensor, dict[str, Tensor]]]
Score = tuple[str, Callable[[EvalPrediction], float]]  # less is better if the name ends in "loss"
Groups = Callable[[nn.Module], list[dict]]  # parameter groups of an optimiser


@dataclass(frozen=True)
class Schedule:
    """How a model is trained; the same for dense, compressed and baselines."""

    epochs: int
    batch_size: int  # over all processes together
    lr: float
    optimizer: str = "sgd"  # Nesterov momentum 0.9, or AdamW
    weight_decay: float = 5e-4  # not on biases and normalisation
    schedule: str = "cosine"  # to zero, or "step": times 0.1 at every one of `lr_drops`
    lr_drops: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    max_grad_norm: float = 0.0  # 0 = gradients are not clipped

    def check(self) -> None:
        """Raises UserError, before any work, for values that are impossible together; alone, flags are in their range."""
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs}: fewer than --epochs {self.epochs} are needed.")
        late = [drop for drop in self.lr_drops if not 0 < drop < self.epochs]
        if self.schedule == "step" and (late or not self.lr_drops):
            raise UserError(f"--lr_drops {late or 'none'}: epochs between 0 and --epochs {self.epochs} are needed.")

    def factor(self, epoch: float) -> float:
        """Learning rate at a (fractional) epoch, over its peak."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.schedule == "step":
            return 0.1 ** sum(epoch >= drop for drop in self.lr_drops)
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)))


def train(
    model: PreTrainedModel,
    items: Dataset,
    validation: Dataset,
    schedule: Schedule,
    folder: Path,
    *,
    loss: Loss,
    score: Score,
    seed: int,
    masks: Masks | None = None,
    groups: Groups | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    device: str = "cpu",
) -> list[dict]:
    """Trains `model` in place; it ends with the weights of the epoch of the best score.

    Args:
        items: what is trained on, dicts of tensors with "labels". validation: chooses the epoch, nothing else.
        folder: of Trainer's checkpoints; if there is a whole one, training continues from it.
        loss: of a batch; labels are smoothed while the model trains. score: its name, and what it is of all outputs.
        seed: of the order of the items.
        masks: weights outside stay exactly zero: they are zeroed first, their gradients before clipping and stepping,
            and they themselves after every step, because momentum of a step taken earlier may still move them.
        groups: of the parameters that are trained, with their own settings (default: `decayed_groups`).
        callbacks: hooks of Trainer, such as those after every step.
    Returns: Trainer's log, one dict an entry. Raises: UserError if the loss becomes NaN.
    """
    apply_masks(model, masks)
    if schedule.epochs == 0:
        return []
    world = TrainingArguments(output_dir=str(folder), use_cpu=device == "cpu").world_size
    name, function = score
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=max(1, schedule.batch_size // world),
        per_device_eval_batch_size=256,
        learning_rate=schedule.lr,
        max_grad_norm=schedule.max_grad_norm,
        label_smoothing_factor=0.0,  # the loss has it
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,  # with 1, Trainer removes the newest at its end, and a run killed then has less to go on from
        load_best_model_at_end=True,
        metric_for_best_model=name,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=None,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=0,
        ddp_find_unused_parameters=False,
    )
    trainer = ScheduledTrainer(
        model=model,
        args=arguments,
        train_dataset=items,
        eval_dataset=validation,
        compute_metrics=lambda predicted: {name: function(predicted)},
        callbacks=[*callbacks, *([KeepMasks(masks)] if masks else []), FindBest()],
        schedule=schedule,
        loss=loss,
        groups=groups,
    )
    handles = mask_gradients(model, masks)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        for handle in handles:
            handle.remove()
    apply_masks(model, masks)
    log = trainer.state.log_history
    if not all(math.isfinite(entry[key]) for entry in log for key in ("loss", "eval_loss") if key in entry):
        raise UserError(f"Training diverged: the loss is not finite; lower --lr {schedule.lr}.")
    return log


def last_checkpoint(folder: Path) -> str | None:
    """The newest of Trainer's checkpoints in `folder` that is whole, however the run ended that wrote or removed it."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    return next((str(path) for path in found if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Trainer's state is the last file to be written; the others may go before it."""
    if not all((checkpoint / name).exists() for name in CHECKPOINT) or not any(checkpoint.glob("rng_state*")):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


class ScheduledTrainer(Trainer):
    """Trainer with our optimiser, schedule by epoch, and loss."""

    def __init__(self, *, schedule: Schedule, loss: Loss, groups: Groups | None, **kwargs):
        super().__init__(**kwargs)
        self.schedule, self.loss, self.groups = schedule, loss, groups
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.schedule, self.groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            per_epoch = num_training_steps / self.schedule.epochs
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedule.factor((step + 0.5) / per_epoch)
            )
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # save_pretrained would give some stock families (ViT) their tensors' older names, under which Trainer's own
        # loading, of the best epoch and on resume, does not find them and only warns.
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in (state_dict or self.model.state_dict()).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state, which makes the checkpoint whole, comes after everybody's files

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = self.loss(model, inputs, self.schedule.label_smoothing if model.training else 0.0)
        return (loss, outputs) if return_outputs else loss


class KeepMasks(TrainerCallback):
    """Zeroes the weights outside the masks after every step."""

    def __init__(self, masks: Masks):
        self.masks = masks

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        apply_masks(model, self.masks)


class FindBest(TrainerCallback):
    """Looks for the best epoch's checkpoint in the folder as it is called now: it may have been moved since the kill."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")


def make_optimizer(model: nn.Module, schedule: Schedule, groups: Groups | None = None) -> Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW."""
    found = groups(model) if groups else decayed_groups(model, schedule.weight_decay)
    if schedule.optimizer == "adamw":
        return AdamW(found, lr=schedule.lr)
    return SGD(found, lr=schedule.lr, momentum=0.9, nesterov=True)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks | None) -> None:
    """Zeroes the weights outside the masks."""
    for name, mask in (masks or {}).items():
        parameter = model.get_parameter(name)
        parameter.mul_(mask.to(parameter.device))


def mask_gradients(model: nn.Module, masks: Masks | None) -> list:
    """Hooks that zero the gradients outside the masks before anybody sees them; returns their handles."""
    handles = []
    for name, mask in (masks or {}).items():
        parameter = model.get_parameter(name)
        handles.append(parameter.register_hook(partial(torch.mul, mask.to(parameter.device))))
    return handles
