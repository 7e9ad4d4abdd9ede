"""The loss of open-set referring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.losses.mask import mask_bce, mask_dice
from nnunet_multimodal.losses.referring import mean_of_present


class OpenSetLoss(nn.Module):
    """BCE and Dice of the answer, and less of it on the two steps that lead there.

    L = L_mask(answer, t) + w (L_mask(reference, r) + mean_l L_mask(carried_l, t))

    with L_mask = beta BCE + gamma Dice, averaged over what was asked for; t is the mask on the target, r that on the
    reference; coarse ones are the share of each cell. The second term teaches to find the scribbled organ on the
    reference, the third to find the reference's places on the target.

    Args:
        bce, dice: beta and gamma.
        steps: w.
    """

    def __init__(self, bce: float = 2.5, dice: float = 2.5, steps: float = 0.4) -> None:
        super().__init__()
        self.bce, self.dice, self.steps = bce, dice, steps

    def forward(
        self, answer: Tensor, reference: Tensor, carried: list[Tensor], present: Tensor, target: Tensor, seen: Tensor
    ) -> Tensor:
        """The loss, a scalar; exactly 0 with a gradient of 0 where nothing was asked for.

        Args:
            answer: [B, D, ...], logits.
            reference: [B, D, ...coarse], logits.
            carried: per level [B, D, ...coarse], probabilities.
            present: bool [B, D].
            target, seen: [B, D, ...], masks on target and reference, 0 or 1.
        """
        with torch.autocast(answer.device.type, enabled=False):
            target, seen = target.float(), seen.float()
            loss = self._mask_loss(answer.float(), target, present)
            steps = self._mask_loss(reference.float(), shares(seen, reference), present)
            for level in carried:
                logits = torch.logit(level.float(), eps=1e-3)
                steps = steps + self._mask_loss(logits, shares(target, level), present) / len(carried)
            return loss + self.steps * steps

    def _mask_loss(self, logits: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        return mean_of_present(self.bce * mask_bce(logits, targets) + self.dice * mask_dice(logits, targets), present)


def shares(masks: Tensor, like: Tensor) -> Tensor:
    """[B, D, ...] at the resolution of ``like``: the share of each cell that is foreground."""
    pool: Any = F.adaptive_avg_pool2d if masks.ndim == 4 else F.adaptive_avg_pool3d
    return pool(masks, tuple(like.shape[2:]))
