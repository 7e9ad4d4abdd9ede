"""Cross-entropy and Dice of independent binary masks, over any number of spatial axes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of each mask, [B, K, ...] x [B, K, ...] -> [B, K]; targets in [0, 1] may be soft."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").flatten(2).mean(2)


def mask_dice(logits: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum p t + smooth) / (sum p + sum t + smooth) of each mask (SEEM's form), -> [B, K]."""
    probability, targets = logits.float().sigmoid().flatten(2), targets.float().flatten(2)
    overlap = (probability * targets).sum(2)
    return 1 - (2 * overlap + smooth) / (probability.sum(2) + targets.sum(2) + smooth)
