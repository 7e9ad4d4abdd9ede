"""The loss of the referring network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.losses.mask import mask_bce, mask_dice
from nnunet_multimodal.losses.matching import match_any, match_organs, matching_cost


class ReferringLoss(nn.Module):
    """2.5 BCE + 2.5 Dice on each layer's matched masks and on the answer, plus a loss on the queries' scores.

    L = L_mask(answer) + mean_l L_mask(masks_l[matched]) + w_s CE(softmax(-cost / tau), softmax(scores))

    with L_mask = beta BCE + gamma Dice (CrossMR, 3.2) averaged over the organs that have a scribble. The score's target
    is soft: a prototype lost two to nine points of Dice by choosing one query with a hard target (methods.md 1.4).
    Targets of the coarse masks are the share of each cell that is organ.

    Args:
        bce, dice: beta and gamma.
        match_bce, match_dice: beta' and gamma' of the matching cost.
        selection: w_s (SEEM: 0.4).
        temperature: tau, in units of the matching cost.
        organ_match: False matches over all queries (ablation noOrganMatch), with the matched query as hard target.
    """

    def __init__(
        self,
        bce: float = 2.5,
        dice: float = 2.5,
        match_bce: float = 2.0,
        match_dice: float = 2.0,
        selection: float = 0.4,
        temperature: float = 0.1,
        organ_match: bool = True,
    ) -> None:
        super().__init__()
        self.bce, self.dice = bce, dice
        self.match_bce, self.match_dice = match_bce, match_dice
        self.selection, self.temperature = selection, temperature
        self.organ_match = organ_match

    def forward(self, masks: list[Tensor], scores: Tensor, answer: Tensor, present: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar; exactly 0 with a gradient of 0 where no organ has a scribble.

        Args:
            masks: per layer [B, K, N, ...coarse], logits.
            scores: [B, K, N] ([B, K, K N] without organ_match).
            answer: [B, K, ...], logits.
            present: bool [B, K].
            targets: [B, K, ...], 0 or 1.
        """
        targets = targets.float()
        pool: Any = F.adaptive_avg_pool2d if targets.ndim == 4 else F.adaptive_avg_pool3d
        coarse = pool(targets, tuple(masks[0].shape[3:]))
        loss = self._mask_loss(answer, targets, present)
        for layer in masks:
            loss = loss + self._mask_loss(self._matched(layer, coarse, present), coarse, present) / len(masks)
        return loss + self.selection * self._selection_loss(masks[-1], scores, coarse, present)

    def _mask_loss(self, logits: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        return mean_of_present(self.bce * mask_bce(logits, targets) + self.dice * mask_dice(logits, targets), present)

    def _matched(self, masks: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        """The matched mask of each organ, [B, K, ...]."""
        if self.organ_match:
            index = match_organs(masks, targets, self.match_bce, self.match_dice)
        else:
            index = match_any(masks, targets, present, self.match_bce, self.match_dice)
            masks = masks.flatten(1, 2).unsqueeze(1).expand(-1, targets.shape[1], *[-1] * (masks.ndim - 2))
        index = index.view(*index.shape, *[1] * (masks.ndim - 2))
        return masks.gather(2, index.expand(*index.shape[:3], *masks.shape[3:])).squeeze(2)

    def _selection_loss(self, masks: Tensor, scores: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        with torch.no_grad():
            if self.organ_match:
                cost = matching_cost(masks, targets.unsqueeze(2), self.match_bce, self.match_dice).squeeze(2)
                wanted = (-cost / self.temperature).softmax(-1)
            else:
                index = match_any(masks, targets, present, self.match_bce, self.match_dice)
                wanted = F.one_hot(index, scores.shape[-1]).float()
        return mean_of_present(-(wanted * scores.float().log_softmax(-1)).sum(-1), present)


def mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """Mean of [B, K] over the present organs; 0 if there is none."""
    return (values * present).sum() / present.sum().clamp(min=1)
