"""USTM: a mean teacher that teaches only where it is sure."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunet_multimodal.data.sides import sided_pairs
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.losses import ramp_up
from nnunet_multimodal.losses.pseudo_labels import sure_consistency
from nnunet_multimodal.trainers.weak import WeakTrainer


class nnUNetTrainerUSTM(WeakTrainer):
    """The moving average of the network answers for the noisy, turned image; where it is sure, the network follows.

    paper: USTM (Liu et al., Pattern Recognition 2022), as in WSL4MIS.
    dataset: scribbles, with nnU-Net's ignore label for what nobody drew (``scribbles import``).
    differs: a teacher beside the network, kept in the checkpoint and not used at prediction; one mean of the teacher's
        passes is both its answer and its uncertainty, where the code takes one more pass for the answer.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **WeakTrainer.settings_defaults,
        "ramp_up": 1.0,
        "consistency_weight": 1.0,
        "teacher_decay": 0.99,  # of its average, a step
        "teacher_passes": 8,  # each with noise of its own, and with dropout where the plans have any
        "teacher_noise": 0.1,  # deviation, in the unit of the normalised image; cut at twice that
        "teacher_turns": True,  # quarter turns in the slice; half turns where the patch is not square
    }
    teacher: Any

    def check_dataset(self) -> None:
        """Numbers in their range."""
        super().check_dataset()
        settings = self.settings
        for key in ("consistency_weight", "teacher_noise"):
            if settings[key] < 0:
                raise UsageError(f"{key}: expected at least 0, found {settings[key]!r}.")
        if not 0 <= settings["teacher_decay"] < 1:
            raise UsageError(f"teacher_decay: expected 0 to below 1, found {settings['teacher_decay']!r}.")
        if settings["teacher_passes"] < 1:
            raise UsageError(f"teacher_passes: expected at least 1, found {settings['teacher_passes']!r}.")

    # --- the teacher -------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """nnU-Net's, then the teacher: a copy outside the network's state, which stays the plans' own."""
        super().initialize()
        self.teacher = deepcopy(self.bare_network()).requires_grad_(False)
        self.teacher.decoder.deep_supervision = False

    def on_train_start(self) -> None:
        """A starting model is the teacher's start, too."""
        super().on_train_start()
        if self.current_epoch == 0:
            self.load_state({})

    def state(self) -> dict[str, Any]:
        """The teacher's weights."""
        return {"teacher": self.teacher.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The teacher's weights; the network's own where there are none."""
        self.teacher.load_state_dict(state.get("teacher") or self.bare_network().state_dict())

    def after_step(self) -> None:
        """The teacher follows; the true average until that is shorter than the moving one."""
        steps = self.current_epoch * self.num_iterations_per_epoch + self.step
        decay = min(1 - 1 / (steps + 1), self.settings["teacher_decay"])
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.bare_network().parameters()):
                slow.lerp_(fast, 1 - decay)
            for kept, current in zip(self.teacher.buffers(), self.bare_network().buffers()):
                kept.copy_(current)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def training_loss(self, image: Tensor, target: Tensor | list[Tensor], batch: dict) -> Tensor:
        """What is drawn, and agreement with the teacher."""
        output = self.network(image)
        loss: Tensor = self.loss(output, target)
        turns = self.draw_turns(image)
        wanted = self.ask_teacher(torch.rot90(image, turns, (-2, -1)))
        logits = output if isinstance(output, Tensor) else output[0]
        with torch.autocast(image.device.type, enabled=False):
            student = torch.rot90(logits.float().softmax(1), turns, (-2, -1))
            # ln 2 for any number of classes, as in the code
            threshold = (0.75 + 0.25 * ramp_up(self.progress, 1.0)) * math.log(2)
            term = self.settings["consistency_weight"] * sure_consistency(student, wanted, threshold)
        self.loss.parts["consistency"] = term.detach()
        return loss + self.ramp * term

    def draw_turns(self, image: Tensor) -> int:
        """Quarter turns, 0 to 3; none where labels have sides, which a turn would exchange."""
        if not self.settings["teacher_turns"] or sided_pairs(list(self.dataset_json["labels"])):
            return 0
        turns = int(torch.randint(4, ()))
        square = image.shape[-1] == image.shape[-2]
        return turns if square else turns // 2 * 2

    @torch.no_grad()
    def ask_teacher(self, image: Tensor) -> Tensor:
        """Mean probabilities of the teacher's passes, [B, C, ...], fp32."""
        noise, passes = self.settings["teacher_noise"], self.settings["teacher_passes"]
        total: Tensor | float = 0.0
        for _ in range(passes):
            noisy = image + (noise * torch.randn_like(image)).clamp(-2 * noise, 2 * noise)
            total = total + self.teacher(noisy).float().softmax(1)
        assert isinstance(total, Tensor)
        return total / passes
