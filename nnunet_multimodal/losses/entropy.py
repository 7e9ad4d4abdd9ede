"""Entropy of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_multimodal.losses.precision import at_least_single


class EntropyLoss(nn.Module):
    """Mean entropy of the voxels' class probabilities: minimised, it makes the network decide.

    L = -1/V sum_i sum_c p_i^c log p_i^c, in nats, over all V voxels of the batch.

    Source: Grandvalet and Bengio, Semi-supervised Learning by Entropy Minimization (NeurIPS 2004); "EM" in WSL4MIS,
    which divides by log C and weighs the result by 0.1.

    Raises:
        ValueError: probabilities have fewer than three axes.

    Example:
        >>> round(EntropyLoss()(torch.full((1, 2, 3, 3), 0.5)).item(), 4)  # log 2
        0.6931
    """

    def forward(self, probabilities: Tensor) -> Tensor:
        """The loss, a scalar, of probabilities [B, C, ...]; computed in fp32."""
        if probabilities.ndim < 3:
            raise ValueError(f"probabilities must be [B, C, ...]: found {tuple(probabilities.shape)}")
        with torch.autocast(probabilities.device.type, enabled=False):
            p = at_least_single(probabilities)
            # The logarithm is bounded: its slope at 0 is infinite, and times softmax's slope of 0 that is NaN.
            return -(p * p.clamp(min=1e-8).log()).sum(1).mean()
