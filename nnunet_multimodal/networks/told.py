"""A network that can be told of which modality an image is, or finds it out (design.md, contract 3)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

LIMIT = 1000.0  # of logits at prediction: nnU-Net sums them in half precision (design.md, contract 9)


class ToldNetwork(nn.Module):
    """What prediction asks of any network that depends on the modality: ``tell``, and what it takes an image for.

    A subclass reads ``told`` in its ``forward`` (None: it decides itself) and leaves ``modality_logits`` there.

    Args:
        modalities: their names, in the order of the indices.

    Attributes:
        told: [1] or [B] long, None while nobody says anything.
        modality_logits: [B, M] of the last forward, without gradient; None before.
    """

    lowest: ClassVar[int] = 0  # index that may be told; -1 for a network that knows what to do with an unknown modality

    def __init__(self, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.modalities = modalities
        # Plain attributes: a buffer would be overwritten by each fold's weights, and by rank 0 in distributed training.
        self.told: Tensor | None = None
        self.modality_logits: Tensor | None = None

    def tell(self, modality: Tensor | int | None) -> None:
        """Say of which modality the next images are, until told otherwise.

        Args:
            modality: index into ``modalities``, one for all images or [B]; None lets the network find out.

        Raises:
            IndexError: there is no such modality.
        """
        if modality is None:
            self.told = None
            return
        ids = torch.as_tensor(modality, dtype=torch.long).reshape(-1)
        if ids.device.type == "cpu" and (ids.min() < self.lowest or ids.max() >= len(self.modalities)):
            raise IndexError(f"modality {ids.tolist()}: there are {len(self.modalities)}, {', '.join(self.modalities)}")
        self.told = ids.to(next(self.parameters()).device, non_blocking=True)
