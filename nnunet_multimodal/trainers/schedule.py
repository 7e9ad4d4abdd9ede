"""AdamW, and a learning-rate schedule for it that works from nnU-Net's epoch hook."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnunet_multimodal.trainers.base import MultimodalTrainer


class WarmupPoly:
    """Linear warm-up, then (1 - progress)^0.9 per iteration, each parameter group at its own scale.

    nnU-Net's ``PolyLRScheduler`` writes one rate into all groups and moves once an epoch. Here a group may carry
    ``lr_scale``, and a hook before each optimiser step moves the rate smoothly. It also clips the gradient: nnU-Net's
    own limit of 12 is made for SGD.

    Args:
        optimizer: its groups may hold ``lr_scale`` (default 1).
        initial_lr: peak rate.
        epochs, iterations: length of the training, in epochs and in steps an epoch.
        warmup: steps of linear warm-up at the very start.
        clip: norm to which the gradient of all groups together is clipped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        epochs: int,
        iterations: int,
        warmup: int,
        clip: float,
        exponent: float = 0.9,
    ) -> None:
        self.optimizer, self.initial_lr, self.exponent = optimizer, initial_lr, exponent
        self.epochs, self.iterations, self.warmup, self.clip = epochs, iterations, warmup, clip
        self.count = 0  # optimiser steps since training began, this one included
        optimizer.register_step_pre_hook(self._before_step)

    def step(self, epoch: int) -> None:
        """nnU-Net's call at the start of an epoch; sets the count, so a continued training is where it was."""
        self.count = epoch * self.iterations
        self._set(self.count)

    def _before_step(self, *_: object) -> None:
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        self._set(self.count)
        self.count += 1

    def _set(self, count: int) -> None:
        progress = min(1.0, count / max(1, self.epochs * self.iterations))
        rate = self.initial_lr * self.decay(progress) * min(1.0, (count + 1) / max(1, self.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def decay(self, progress: float) -> float:
        """Share of the peak rate after this share of the training."""
        return (1 - progress) ** self.exponent


class WarmupCosine(WarmupPoly):
    """The same with half a cosine instead, which is MulModSeg's."""

    def decay(self, progress: float) -> float:
        """(1 + cos(pi progress)) / 2."""
        return (1 + math.cos(math.pi * progress)) / 2


def adamw(
    trainer: MultimodalTrainer, learned: Iterable[Any], schedule: type[WarmupPoly] = WarmupPoly
) -> tuple[torch.optim.AdamW, WarmupPoly]:
    """AdamW and its schedule by a trainer's settings: what its ``configure_optimizers`` returns.

    Args:
        trainer: its settings hold ``gradient_clip``, and ``warmup_iterations`` or ``warmup_epochs``; the latter count
            for a tenth of the training at most.
        learned: parameters, or groups of them.
        schedule: how the rate decays.
    """
    settings, epochs, iterations = trainer.settings, trainer.num_epochs, trainer.num_iterations_per_epoch
    warmup = settings.get("warmup_iterations")
    if warmup is None:
        warmup = round(min(settings["warmup_epochs"], epochs / 10) * iterations)
    optimizer = torch.optim.AdamW(learned, lr=trainer.initial_lr, weight_decay=trainer.weight_decay)
    clip = settings["gradient_clip"]
    return optimizer, schedule(optimizer, trainer.initial_lr, epochs, iterations, warmup, clip)
