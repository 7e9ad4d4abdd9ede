"""A U-Net that knows its tasks and the modality by learned tokens (Hermes' context priors in nnU-Net)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.modality_head import ModalityHead
from nnunet_multimodal.networks.prior_fusion import StageFusion
from nnunet_multimodal.networks.prototypes import AdditivePrototypes, MultiplicativePrototypes
from nnunet_multimodal.networks.told import LIMIT, ToldNetwork

UNKNOWN = -1  # told of an image whose modality nobody knows
FINEST, LEVELS = 4, 3  # Hermes fuses at 1/4, 1/8 and 1/16


class ContextOutput(NamedTuple):
    """What the network gives in training.

    Attributes:
        segmentation: logits [B, T, ...], or a list of them with deep supervision, finest first.
        modality_logits: [B, M].
        modality: [B] long, the modality that was told, -1 where it is unknown.
    """

    segmentation: Tensor | list[Tensor]
    modality_logits: Tensor
    modality: Tensor


def fused_stages(patch: Sequence[int], strides: Sequence[Any], most_tokens: int) -> list[int]:
    """At which stages of a U-Net priors and features are fused: Hermes' three, where they are not too large.

    The priors look at every voxel of a stage, so time and memory grow with their number. Chosen are the first three
    stages that are four times or more coarser than the image along some axis and have at most ``most_tokens`` voxels;
    the bottleneck where there is none.

    Args:
        patch: voxels along each axis.
        strides: of each stage of the encoder, a number or one for each axis.

    >>> fused_stages([128, 128, 128], [1, 2, 2, 2, 2, 2], 32768)
    [2, 3, 4]
    >>> fused_stages([64, 192, 160], [1, 2, 2, 2, 2, [1, 2, 2]], 16384)
    [3, 4, 5]
    """
    size, coarser = list(patch), [1] * len(patch)
    fitting = []
    for stage, stride in enumerate(strides):
        steps = [stride] * len(patch) if isinstance(stride, int) else list(stride)
        coarser = [before * step for before, step in zip(coarser, steps)]
        voxels = 1
        for length, factor in zip(size, coarser):
            voxels *= -(-length // factor)
        if stage and max(coarser) >= FINEST and voxels <= most_tokens:
            fitting.append(stage)
    return fitting[:LEVELS] or [len(strides) - 1]


class PriorTokens(nn.Module):
    """The learned tokens of one stage: one of each task, some of each modality, and null tokens for both.

    The last row of a pool is the null one: of a task that is not asked for, of a modality that is not known.

    Args:
        channels: C of the stage.
        tasks: T.
        modalities: M; 0 for a network without modalities.
        of_modality: tokens of a modality.
        pool: a pool that all stages share, of which this one sees a linear image; None for an own one.
    """

    def __init__(
        self, channels: int, tasks: int, modalities: int, of_modality: int, pool: TokenPool | None = None
    ) -> None:
        super().__init__()
        self.shared = pool is not None
        self.pool = TokenPool(channels, tasks, modalities, of_modality) if pool is None else None
        self.project = nn.Linear(pool.channels, channels) if pool is not None else None

    def forward(self, shared: TokenPool | None, asked: Tensor | None, modality: Tensor | None, batch: int) -> Tensor:
        """asked [B, T] bool, modality [B] with -1 for unknown -> [B, T + of_modality, C]."""
        pool = self.pool if self.pool is not None else shared
        assert pool is not None
        tokens: Tensor = pool(asked, modality, batch)
        return tokens if self.project is None else self.project(tokens)


class TokenPool(nn.Module):
    """Tokens as they are learned; see ``PriorTokens``."""

    def __init__(self, channels: int, tasks: int, modalities: int, of_modality: int) -> None:
        super().__init__()
        self.channels = channels
        self.task = nn.Parameter(torch.empty(tasks + 1, channels))
        nn.init.xavier_uniform_(self.task)
        self.modality: nn.Parameter | None = None
        if modalities:
            self.modality = nn.Parameter(torch.empty(modalities + 1, of_modality, channels))
            nn.init.xavier_uniform_(self.modality.view(-1, channels))

    def forward(self, asked: Tensor | None, modality: Tensor | None, batch: int) -> Tensor:
        """As ``PriorTokens``."""
        tasks = self.task[:-1].expand(batch, -1, -1)
        if asked is not None:
            tasks = torch.where(asked[:, :, None], tasks, self.task[-1])
        if self.modality is None or modality is None:
            return tasks
        rows = torch.where(modality < 0, self.modality.shape[0] - 1, modality)
        return torch.cat((tasks, self.modality[rows]), dim=1)


class ContextPriorUNet(ToldNetwork):
    """nnU-Net's U-Net, plain or residual, 2d or 3d, with context priors.

    At some stages the tokens of all tasks and of the image's modality and the features look at each other, on the way
    down and on the way up. What the task tokens have become at all these stages, the posterior, says how each class is
    found in the final features. ``encoder`` and ``decoder`` keep the stock state_dict keys, so any nnU-Net checkpoint
    can be a starting model; with additive prototypes a new network's logits then equal that model's exactly.

    In training ``tell`` must have said of which modality each image is (-1: nobody knows). At prediction nobody has to:
    a small head on the features before the first fusion tells, image by image.

    Args:
        network: nnU-Net's U-Net from the plans.
        modalities: their names; none for a network without tokens of modalities.
        tasks: T, as many as there are output channels.
        stages: at which tokens and features are fused, 1 (never the image's resolution) to the bottleneck; on the way
            up at all but the last of them.
        deep_supervision: whether logits of all scales are returned.
        multiplicative: prototypes as in Hermes, in place of the U-Net's own last layers.
        modality_tokens: tokens of a modality; Hermes has 10.
        blocks: of a stage; Hermes has 2, and 4 at its bottleneck.
        shared_tokens: one pool of tokens for all stages, projected to each; Hermes has one for each.
        subtract_background: logits less those of channel 0, which becomes 0: each other channel's sigmoid is then a
            task of its own, and argmax still gives the label.

    Raises:
        ValueError: the network is no U-Net of nnU-Net's, or has no such stage.
    """

    lowest: ClassVar[int] = UNKNOWN

    def __init__(
        self,
        network: Any,
        modalities: tuple[str, ...],
        tasks: int,
        stages: Sequence[int],
        deep_supervision: bool,
        multiplicative: bool = False,
        modality_tokens: int = 10,
        blocks: int = 1,
        shared_tokens: bool = False,
        subtract_background: bool = False,
    ) -> None:
        super().__init__(modalities)
        if not (hasattr(network, "encoder") and hasattr(network.decoder, "transpconvs")):
            raise ValueError(f"context priors need nnU-Net's U-Net (plain or residual); found {type(network).__name__}")
        channels = list(network.encoder.output_channels)
        stages = sorted(stages)
        if not stages or len({*stages}) < len(stages) or stages[0] < 1 or stages[-1] >= len(channels):
            raise ValueError(f"priors can be fused at stages 1 to {len(channels) - 1}, once each; found {stages}")
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.tasks, self.deep_supervision, self.subtract_background = tasks, deep_supervision, subtract_background
        self.first = stages[0]
        self.ways = [f"down_{stage}" for stage in stages] + [f"up_{stage}" for stage in stages[-2::-1]]
        of_way = {way: channels[int(way.partition("_")[2])] for way in self.ways}
        counts = (tasks, len(modalities), modality_tokens)
        self.pool = TokenPool(max(of_way.values()), *counts) if shared_tokens else None
        self.tokens = nn.ModuleDict({way: PriorTokens(of_way[way], *counts, self.pool) for way in self.ways})
        self.fusions = nn.ModuleDict({way: StageFusion(of_way[way], blocks) for way in self.ways})
        prototypes = MultiplicativePrototypes if multiplicative else AdditivePrototypes
        self.prototypes = prototypes(sum(of_way.values()), channels[:-1])
        if multiplicative:  # parameters without a gradient, on which distributed training stops
            self.decoder.seg_layers = nn.ModuleList()
        self.multiplicative = multiplicative
        self.modality_head = ModalityHead(channels[: self.first + 1], len(modalities)) if modalities else None
        self.asked: Tensor | None = None

    def ask(self, asked: Tensor | None) -> None:
        """Say which tasks the next images are asked for, [B, T] bool; the others' tokens are null. None: all."""
        self.asked = None if asked is None else asked.to(next(self.parameters()).device, non_blocking=True)

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | ContextOutput:
        """image: [B, channels, (Z,) Y, X]."""
        posterior: list[Tensor] = []
        modality: Tensor | None = None
        skips: list[Tensor] = []
        stem = getattr(self.encoder, "stem", None)
        feature = image if stem is None else stem(image)
        modality_logits = None
        for stage, layer in enumerate(self.encoder.stages):
            feature = layer(feature)
            if stage == self.first and self.modality_head is not None:
                modality_logits = self.modality_head([*skips, feature])
                modality = self._modality(modality_logits)
            feature = self._fuse(f"down_{stage}", feature, modality, posterior)
            skips.append(feature)
        scales: list[Tensor] = []
        steps = zip(self.decoder.transpconvs, self.decoder.stages)
        for stage, (upsample, layer) in zip(range(len(skips) - 2, -1, -1), steps):
            feature = layer(torch.cat((upsample(feature), skips[stage]), dim=1))
            feature = self._fuse(f"up_{stage}", feature, modality, posterior)
            scales.insert(0, feature)
        hidden = self.prototypes(torch.cat(posterior, dim=2))
        wanted = scales if self.deep_supervision else scales[:1]
        logits = [self._logits(hidden, feature, scale) for scale, feature in enumerate(wanted)]
        segmentation = logits if self.deep_supervision else logits[0]
        if self.training and modality_logits is not None and modality is not None:
            return ContextOutput(segmentation, modality_logits, modality)
        return segmentation

    def _modality(self, logits: Tensor) -> Tensor:
        """[B], as told or as the logits [B, M] say."""
        self.modality_logits = logits.detach()
        return self.modality_logits.argmax(1) if self.told is None else self.told.expand(logits.shape[0])

    def _fuse(self, way: str, feature: Tensor, modality: Tensor | None, posterior: list[Tensor]) -> Tensor:
        if way not in self.ways:
            return feature
        priors = self.tokens[way](self.pool, self.asked, modality, feature.shape[0])
        feature, priors = self.fusions[way](feature, priors)
        posterior.append(priors[:, : self.tasks])
        return feature

    def _logits(self, hidden: Tensor, feature: Tensor, scale: int) -> Tensor:
        plain = None if self.multiplicative else self.decoder.seg_layers[-1 - scale](feature)
        logits: Tensor = self.prototypes.logits(hidden, feature, scale, plain)
        if self.subtract_background:
            logits = logits - logits[:, :1]
        return logits if self.training else logits.clamp(-LIMIT, LIMIT)
