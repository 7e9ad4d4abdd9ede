"""What the task tokens have become says how each class is found in the final features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.prior_fusion import start_at_zero

SHARE = 0.1  # of the posterior in a class's weights: SegEVOLution's
REDUCTION = 16  # SegEVOLution's 768 -> 48


class AdditivePrototypes(nn.Module):
    """Class weights w_k + 0.1 MLP(p_k): the 1x1 convolution that a U-Net has, moved by the posterior.

        logits_k = conv(F)_k + 0.1 <MLP(LN p_k), F>,   MLP: Linear(P, P/16), ReLU, Linear(P/16, channels)

    SegEVOLution adds to the output tokens of its mask decoder, which are what a class's weight vector is in a U-Net;
    the normalisation is Hermes'. The last layer begins at zero: the logits are then the convolution's. The first one
    serves all scales of deep supervision.

    Args:
        posterior: P, channels of a posterior token, all stages together.
        scales: channels of the final features of each scale, finest first.
    """

    def __init__(self, posterior: int, scales: list[int]) -> None:
        super().__init__()
        hidden = max(8, posterior // REDUCTION)
        self.hidden = nn.Sequential(nn.LayerNorm(posterior), nn.Linear(posterior, hidden), nn.ReLU())
        self.outs = nn.ModuleList(nn.Linear(hidden, channels) for channels in scales)
        start_at_zero(*self.outs)

    def forward(self, posterior: Tensor) -> Tensor:
        """[B, T, P] -> what ``logits`` wants of all scales, [B, T, hidden]."""
        hidden: Tensor = self.hidden(posterior)
        return hidden

    def logits(self, hidden: Tensor, features: Tensor, scale: int, plain: Any) -> Tensor:
        """features [B, C, ...] and their plain logits [B, T, ...] of a scale -> logits [B, T, ...]."""
        weights = SHARE * self.outs[scale](hidden)
        return plain + dot(weights, features)


class MultiplicativePrototypes(nn.Module):
    """Class weights from the posterior alone: logits_k = <MLP2(MLP1(LN p_k)), F>, as in Hermes.

    MLP1 is P -> P -> C and MLP2 C -> C -> C, with GELU in between, C the channels of the finest features. Scales of
    deep supervision, which Hermes does not have, get a linear layer each in place of MLP2.

    Args:
        posterior, scales: see ``AdditivePrototypes``.
    """

    def __init__(self, posterior: int, scales: list[int]) -> None:
        super().__init__()
        width = scales[0]
        self.hidden = nn.Sequential(
            nn.LayerNorm(posterior), nn.Linear(posterior, posterior), nn.GELU(), nn.Linear(posterior, width)
        )
        finest = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.outs = nn.ModuleList([finest, *(nn.Linear(width, channels) for channels in scales[1:])])

    def forward(self, posterior: Tensor) -> Tensor:
        """[B, T, P] -> [B, T, C]."""
        hidden: Tensor = self.hidden(posterior)
        return hidden

    def logits(self, hidden: Tensor, features: Tensor, scale: int, plain: Any = None) -> Tensor:
        """features [B, channels, ...] of a scale -> logits [B, T, ...]; ``plain`` is not used."""
        return dot(self.outs[scale](hidden), features)


def dot(weights: Tensor, features: Tensor) -> Tensor:
    """weights [B, T, C], features [B, C, ...] -> [B, T, ...], sums over C."""
    return torch.bmm(weights, features.flatten(2)).unflatten(2, features.shape[2:])
