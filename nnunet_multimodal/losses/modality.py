"""Segmentation loss + telling the modality."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ModalityLoss(nn.Module):
    """L = L_seg + weight * cross-entropy(modality head, told modality), the weight 0.01 of Hermes' modality head.

    Images of an unknown modality (-1) are left out of the cross-entropy.

    Args:
        segmentation: nnU-Net's loss, with or without deep supervision.
        weight: of the cross-entropy.
    """

    def __init__(self, segmentation: nn.Module, weight: float = 0.01) -> None:
        super().__init__()
        self.segmentation, self.weight = segmentation, weight

    def forward(self, output: Any, target: Tensor | list[Tensor]) -> Tensor:
        """output: a ``TextOutput`` or ``ContextOutput`` in training, logits in validation; target: nnU-Net's."""
        if not hasattr(output, "modality_logits"):
            loss: Tensor = self.segmentation(output, target)
            return loss
        known = (output.modality >= 0).sum().clamp(min=1)  # torch's own mean is NaN where none is
        told = F.cross_entropy(output.modality_logits.float(), output.modality, ignore_index=-1, reduction="sum")
        return self.segmentation(output.segmentation, target) + self.weight * told / known
