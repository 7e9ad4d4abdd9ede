"""Tells the modality of an image by what the encoder sees of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOWEST = 0.01  # share of a batch in the running statistics, once they are of a hundred batches

FARTHEST = 10.0  # deviations: what is farther off is no modality that was seen


class ModalityHead(nn.Module):
    """A linear layer on the mean of every encoder feature, standardised.

    After Hermes' modality head, with two changes. It reads all stages, because the deep ones learn to look alike in
    every modality. And it standardises with running statistics: a batch holds one modality, so that without them each
    step would push all weights one way, the next one back, and little would be learned (50 % right after 300 steps on
    two modalities, whose features differed by 2 % of their mean).

    The features are read, not shaped: no gradient goes into the encoder.

    Args:
        channels: of the encoder's stages.
        modalities: M.
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, channels: list[int], modalities: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("square", torch.ones(sum(channels)))
        self.register_buffer("batches", torch.zeros(()))
        self.linear = nn.Linear(sum(channels), modalities)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """stages: [B, channels, ...] each -> logits [B, M]."""
        with torch.no_grad():
            pooled = torch.cat([stage.flatten(2).mean(2).float() for stage in stages], dim=1)
            if self.training:
                self.batches += 1
                share = (1 / self.batches).clamp(min=SLOWEST)
                self.mean += share * (pooled.mean(0) - self.mean)
                self.square += share * (pooled.square().mean(0) - self.square)
            deviation = (self.square - self.mean.square()).clamp(min=1e-8).sqrt()
            standard = ((pooled - self.mean) / deviation).clamp(-FARTHEST, FARTHEST)
        return self.linear(standard)
