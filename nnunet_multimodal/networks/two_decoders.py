"""A U-Net whose encoder feeds two decoders, one of them through dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class TwoDecoders(nn.Module):
    """The plans' U-Net with a second decoder that sees the same features with whole channels dropped.

    Source: the dual-branch networks of Luo et al. (MICCAI 2022) and DMSPS (Han et al., Medical Image Analysis 2024).
    In eval mode it is the plans' U-Net.

    Args:
        network: an nnU-Net U-Net (``encoder`` and ``decoder``); its state_dict keys are kept.
        second: another decoder of the same plans.
        dropout: share of the channels of each scale that the second decoder does not see in training.
    """

    def __init__(self, network: Any, second: Any, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.second: Any = second
        self.second.encoder = self.encoder  # nnU-Net's decoder holds its encoder
        self.dropout = dropout

    def forward(self, image: Tensor) -> Any:
        """[B, C, (Z,) Y, X] -> logits, or in training the pair (decoder's, second's); each a list with deep
        supervision."""
        features = self.encoder(image)
        answer = self.decoder(features)
        if not self.training:
            return answer
        drop = F.dropout2d if image.ndim == 4 else F.dropout3d
        return answer, self.second([drop(feature, self.dropout) for feature in features])
