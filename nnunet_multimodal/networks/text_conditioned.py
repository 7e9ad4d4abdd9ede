"""A segmentation network that is told, or finds out, which modality an image is of (MulModSeg)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_multimodal.networks.dynamic_head import DynamicHead
from nnunet_multimodal.networks.modality_head import ModalityHead
from nnunet_multimodal.networks.told import LIMIT, ToldNetwork


class Features(NamedTuple):
    """What a backbone makes of an image [B, 1, ...].

    Attributes:
        scales: decoder features from which logits are made, finest first.
        encoder: encoder features, finest first; the last one is the bottleneck.
    """

    scales: list[Tensor]
    encoder: list[Tensor]


class TextOutput(NamedTuple):
    """What the network gives in training.

    Attributes:
        segmentation: logits [B, C, ...], or a list of them with deep supervision, finest first.
        modality_logits: [B, M].
        modality: [B] long, the modality that was told.
    """

    segmentation: Tensor | list[Tensor]
    modality_logits: Tensor
    modality: Tensor


class TextConditionedNetwork(ToldNetwork):
    """Backbone + dynamic head driven by frozen text embeddings of modality x class.

    In training ``tell`` must have said of which modality each image is. At prediction nobody has to: a small head on
    the encoder's features tells, image by image (contract 3).

    Subclasses bring the backbone and its ``features``. In eval mode ``forward`` gives logits [B, C, ...] within +-1000
    (a list with deep supervision), in train mode a ``TextOutput``.

    Args:
        scales: channels of the features from which logits are made, finest first.
        encoder: channels of the encoder's features, finest first.
        ndim: 2 or 3.
        modalities: their names, in the order of the embeddings' rows.
        classes: C, background included where the labels have one.
        text: E, length of an embedding.
        only: the one modality that is trained, if it is one: it is then every image's unless another one is told.

    Attributes:
        text_embeddings: buffer [M, C, E], frozen; filled by the trainer, at prediction by the checkpoint.
        deep_supervision: whether logits of all scales are returned.
    """

    text_embeddings: Tensor

    def __init__(
        self,
        scales: list[int],
        encoder: list[int],
        ndim: int,
        modalities: tuple[str, ...],
        classes: int,
        text: int,
        deep_supervision: bool,
        only: int | None = None,
    ) -> None:
        super().__init__(modalities)
        self.deep_supervision = deep_supervision
        self.only = only
        self.register_buffer("text_embeddings", torch.zeros(len(modalities), classes, text))
        self.head = DynamicHead(encoder[-1], scales, text, ndim)
        self.modality_head = ModalityHead(encoder, len(modalities))

    def features(self, image: Tensor) -> Features:
        """image: [B, 1, ...]."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | TextOutput:
        """image: [B, 1, (Z,) Y, X]."""
        features = self.features(image)
        modality_logits = self.modality_head(features.encoder)
        self.modality_logits = modality_logits.detach()
        if self.only is not None:  # the head has seen no other one to tell it from
            self.modality_logits = torch.full_like(self.modality_logits, -LIMIT)
            self.modality_logits[:, self.only] = LIMIT
        if self.told is not None:
            modality = self.told.expand(image.shape[0])
        else:
            modality = self.modality_logits.argmax(1)
        pooled = self.head.pool(features.encoder[-1])
        theta = self.head.parameters_of(pooled, self.text_embeddings[modality])
        wanted = features.scales if self.deep_supervision else features.scales[:1]
        logits = [self.head(feature, theta, scale) for scale, feature in enumerate(wanted)]
        if not self.training:
            logits = [each.clamp(-LIMIT, LIMIT) for each in logits]
        segmentation = logits if self.deep_supervision else logits[0]
        return TextOutput(segmentation, modality_logits, modality) if self.training else segmentation
