"""A U-Net with a mixture of adapters, chosen by the image's modality or by a learned gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.adapters import Gates, MixtureHead
from nnunet_multimodal.networks.modality_head import ModalityHead
from nnunet_multimodal.networks.text_conditioned import LIMIT, TextOutput
from nnunet_multimodal.networks.told import ToldNetwork

PREFERENCE = 0.7  # log-odds of a modality that was trained against one that was not: other evidence can outweigh it


class GatedOutput(NamedTuple):
    """What a learned mixture gives in training.

    Attributes:
        segmentation: logits [B, C, ...], or a list of them with deep supervision, finest first.
        gates: [B, 1 + E], the share of the identity and of each adapter; each row sums to 1.
    """

    segmentation: Tensor | list[Tensor]
    gates: Tensor


class ModalityMixture(ToldNetwork):
    """Top-1 by modality: each has an adapter of its own, or is answered by the base network (SegEVOLution: CT is).

    The base's encoder looks at the image first, without any adapter, and a small head tells the modality by what it
    sees. If that is one without an adapter, the decoder goes on from there; else the encoder runs once more, adapted.

    In eval mode ``forward`` gives logits [B, C, ...] within +-1000 (a list with deep supervision), in train mode a
    ``TextOutput``.

    Args:
        network: nnU-Net's U-Net with ``inject_adapters`` done; its keys are kept.
        gates: what that gave.
        modalities: their names.
        adapters: those of them that have an adapter, in the order of ``inject_adapters``.
        trained: the one modality that training sees, if there is only one. Nothing can then be learned about telling
            it from others: there is no head, an image is of this modality unless something else says it is not.
        unseen: those that training does not see, where it sees several. The head cannot know them: each is a little
            less likely than the likeliest of the others.
    """

    choice: Tensor

    def __init__(
        self,
        network: Any,
        gates: Gates,
        modalities: tuple[str, ...],
        adapters: Sequence[str],
        trained: str | None = None,
        unseen: Sequence[str] = (),
    ) -> None:
        super().__init__(modalities)
        self.unseen = [modalities.index(name) for name in unseen]
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.gates, self.trained = gates, trained
        self.modality_head = None
        if trained is None:
            self.modality_head = ModalityHead(list(network.encoder.output_channels), len(modalities))
        choice = torch.tensor([[float(name == adapter) for adapter in adapters] for name in modalities])
        self.register_buffer("choice", choice, persistent=False)  # [M, E]

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | TextOutput:
        """image: [B, C, (Z,) Y, X]."""
        skips = None
        if self.modality_head is not None:
            skips = look(self.encoder, image)
            modality_logits = unlikely(self.modality_head(skips), self.unseen)
        else:
            modality_logits = image.new_tensor([PREFERENCE * (name == self.trained) for name in self.modalities])
            modality_logits = modality_logits.expand(image.shape[0], -1)
        self.modality_logits = modality_logits.detach()
        told = self.told
        modality = self.modality_logits.argmax(1) if told is None else told.expand(image.shape[0])
        segmentation = segment(self, image, skips, self.choice[modality])
        if self.training:
            return TextOutput(segmentation, modality_logits, modality)
        return segmentation


def unlikely(logits: Tensor, unseen: Sequence[int]) -> Tensor:
    """[B, M] with those of ``unseen`` by the highest of the others, whatever they were."""
    if not unseen:
        return logits
    highest = logits[:, [index for index in range(logits.shape[1]) if index not in unseen]].amax(1)
    columns = [highest - PREFERENCE if index in unseen else column for index, column in enumerate(logits.unbind(1))]
    return torch.stack(columns, dim=1)


class LearnedMixture(nn.Module):
    """The shares of the identity and the adapters come from a gate on the base encoder's pooled features.

    Args:
        network, gates: as above.
        adapters: E.
        top_k: of the 1 + E shares only so many are not 0; 0 keeps all (softmax).
    """

    def __init__(self, network: Any, gates: Gates, adapters: int, top_k: int = 0) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.gates, self.top_k = gates, top_k
        self.gate = ModalityHead(list(network.encoder.output_channels), 1 + adapters)

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | GatedOutput:
        """image: [B, C, (Z,) Y, X]."""
        skips = look(self.encoder, image)
        shares = top_shares(self.gate(skips), self.top_k)
        segmentation = segment(self, image, skips, shares[:, 1:])
        return GatedOutput(segmentation, shares) if self.training else segmentation


def top_shares(logits: Tensor, top_k: int) -> Tensor:
    """Softmax over the ``top_k`` highest of each row, 0 for the others; over all for 0. [B, N] -> [B, N]."""
    if 0 < top_k < logits.shape[1]:
        lowest = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return logits.softmax(dim=1)


@torch.no_grad()
def look(encoder: nn.Module, image: Tensor) -> list[Tensor]:
    """The base encoder's features of an image; the gates are closed."""
    skips: list[Tensor] = encoder(image)
    return skips


def segment(network: Any, image: Tensor, skips: list[Tensor] | None, weights: Tensor) -> Tensor | list[Tensor]:
    """Logits by the adapters' weights [B, E]; without any, by what the base's encoder has seen already."""
    network.gates.open(weights, ask_all=network.training)
    try:
        if skips is None or network.gates.active:
            skips = network.encoder(image)
        logits: Tensor | list[Tensor] = network.decoder(skips)
    finally:
        network.gates.close()
    if network.training:
        return logits
    if isinstance(logits, Tensor):
        return logits.clamp(-LIMIT, LIMIT)
    return [each.clamp(-LIMIT, LIMIT) for each in logits]


def start_heads(network: nn.Module, new: Sequence[int]) -> None:
    """To be called when the base's weights are there; ``new`` are the classes that the base does not know."""
    for module in network.modules():
        if isinstance(module, MixtureHead):
            module.start(new)
