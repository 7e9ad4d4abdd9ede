"""Segmentation loss + no adapter may take everything."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LoadBalanceLoss(nn.Module):
    """L = L_seg + weight * CV(importance)^2, importance_e = sum over the batch of gate e (Shazeer et al., ICLR 2017).

    CV is the coefficient of variation, standard deviation (of the population) by mean; 0 where all get the same.

    Args:
        segmentation: nnU-Net's loss, with or without deep supervision.
        weight: of the balance.
    """

    def __init__(self, segmentation: nn.Module, weight: float = 0.01) -> None:
        super().__init__()
        self.segmentation, self.weight = segmentation, weight

    def forward(self, output: Any, target: Tensor | list[Tensor]) -> Tensor:
        """output of the network: with ``gates`` [B, N] in training, logits in validation; target: nnU-Net's."""
        if not hasattr(output, "gates"):
            loss: Tensor = self.segmentation(output, target)
            return loss
        return self.segmentation(output.segmentation, target) + self.weight * imbalance(output.gates)


def imbalance(gates: Tensor) -> Tensor:
    """[B, N] -> CV^2 of their sums over the batch."""
    importance = gates.float().sum(0)
    return importance.var(correction=0) / importance.mean().square()
