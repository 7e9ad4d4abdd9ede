"""A memory network for organs that were never labelled: one organ per answer, nothing in it knows which organ it is.

CrossMR's queries are made for the organs of the training and answer with nothing for any other (methods.md 1.5). Here
the plans' encoder sees target and reference, a prompt encoder turns reference features and a scribble into what is
worth remembering, the target reads that by attention, and the plans' decoder draws the mask. Organs are entries of the
batch, so there may be any number of them at prediction.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.networks.crossmr import ABSENT, ABSENT_IN_TILE, LOGIT_LIMIT
from nnunet_multimodal.networks.memory import Memory, MemoryReader
from nnunet_multimodal.networks.unet import binary_prompts


class OpenSetOutput(NamedTuple):
    """What the loss needs; D organs of each sample were answered.

    Attributes:
        answer: [B, D, ...full], mask logits on the target.
        reference: [B, D, ...coarse], mask logits on the reference.
        carried: per level [B, D, ...coarse], probabilities of the reference's mask carried to the target.
        organ: long [B, D], which prompt each is the answer to.
        present: bool [B, D], False where there was nothing to answer.
    """

    answer: Tensor
    reference: Tensor
    carried: list[Tensor]
    organ: Tensor
    present: Tensor


class OpenSetNetwork(nn.Module):
    """Refer to anything that was scribbled.

    Input channels are target, reference, then any number of scribble channels (contract 4). In eval mode ``forward``
    gives nnU-Net logits [B, 1 + K, ...]; in train mode an ``OpenSetOutput``.

    Args:
        network: nnU-Net's U-Net from the plans, built for one image channel (``encoder``, ``decoder``).
        channels: its features per stage, full resolution first.
        spacing: of the network's grid, mm, in the order of the axes.
        patch_size: where the memory is read depends on how many places there are.
        width: channels of the prompt encoder and of what is read.
        key_width: d times heads.
        heads: of the attention.
        max_places: a stage with more places than this in a patch is not read.
        negative_prompts: the scribbles of the other organs tell an organ where it is not.
        answers: D, organs of each training sample that are answered, at random; they are what a step costs.
    """

    def __init__(
        self,
        network: Any,
        channels: list[int],
        spacing: list[float],
        patch_size: list[int],
        width: int = 64,
        key_width: int = 64,
        heads: int = 2,
        max_places: int = 4096,
        negative_prompts: bool = True,
        answers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.decoder.seg_layers = nn.ModuleList()  # parameters without a gradient stop distributed training
        self.strides: list[list[int]] = [list(stride) for stride in network.encoder.strides]
        self.spacing = [float(s) for s in spacing]
        self.heads = heads
        self.negative_prompts = negative_prompts
        self.answers = answers
        self.read_stages = read_stages(patch_size, self.strides, max_places)
        finest = self.read_stages[-1]

        convolution = self.encoder.conv_op
        self.key_projections = nn.ModuleList(
            convolution(channels[stage], key_width, 1) for stage in range(finest, len(channels))
        )
        kernels = [list(k) if isinstance(k, (list, tuple)) else [k] * len(spacing) for k in self.encoder.kernel_sizes]
        self.keys = nn.ModuleList(
            convolution(key_width, key_width, kernels[stage], padding=[k // 2 for k in kernels[stage]])
            for stage in self.read_stages
        )
        self.prompt_encoder = PromptEncoder(convolution, channels, self.strides, kernels, width, self.read_stages)
        self.values = nn.ModuleList(convolution(width, width, 1) for _ in self.read_stages)
        self.readers = nn.ModuleList(MemoryReader(heads, len(spacing)) for _ in self.read_stages)
        self.inject = nn.ModuleList(convolution(width + 1, channels[stage], 1) for stage in self.read_stages)
        self.head = convolution(channels[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor | OpenSetOutput:
        """x: [B, 2 + K, (Z,) Y, X] = target, reference, scribbles."""
        scribbles = binary_prompts(x[:, 2:])
        places = self.grid_places(x)
        if not self.training:
            return self.segment(x[:, :1], self.prompt(x[:, 1:2], scribbles, places), ABSENT_IN_TILE, places)
        present = scribbles.flatten(2).any(-1)
        organ = torch.rand(present.shape, device=x.device).masked_fill(~present, -1.0)
        organ = organ.topk(min(self.answers, present.shape[1]), dim=1).indices
        memory, reference = self._remember(x[:, 1:2], scribbles, places, organ)
        skips = self.encoder(x[:, :1])
        answer, carried = self._answer(skips, self._keys(skips), memory, places)
        return OpenSetOutput(answer, reference, carried, organ, memory.present)

    def grid_places(self, x: Tensor) -> Tensor:
        """Where each voxel of [B, C, ...] lies, [B, ndim, ...] in mm from the centre."""
        axes = [
            (torch.arange(size, device=x.device, dtype=torch.float32) - (size - 1) / 2) * spacing
            for size, spacing in zip(x.shape[2:], self.spacing)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], *[-1] * (x.ndim - 1))

    def prompt(self, reference: Tensor, scribbles: Tensor, places: Tensor | None = None) -> Memory:
        """Encodes the reference once.

        Args:
            reference: [B, 1, ...].
            scribbles: bool [B, K, ...] on the same grid.
            places: [B, ndim, ...] in mm, in a frame that the targets share; default: from the centre.
        """
        return self._remember(reference, scribbles, self.grid_places(reference) if places is None else places)[0]

    def segment(
        self, target: Tensor, memory: Memory, absent_logit: float = ABSENT, places: Tensor | None = None
    ) -> Tensor:
        """Logits [B, 1 + K, ...] of targets [B, 1, ...]; a memory of one entry serves the whole batch.

        An organ without a scribble gets ``absent_logit``, background 0: it comes out empty.
        """
        if memory.present.shape[0] != target.shape[0]:
            memory = memory.take(torch.zeros(target.shape[0], dtype=torch.long, device=target.device))
        places = self.grid_places(target) if places is None else places
        organs = memory.present.shape[1]
        logits = target.new_full((target.shape[0], organs, *target.shape[2:]), absent_logit, dtype=torch.float32)
        asked = memory.present.any(0).nonzero().flatten().tolist()
        skips = self.encoder(target) if asked else []
        queries = self._keys(skips) if asked else []
        for k in asked:  # one by one: any number of organs in the memory of one
            answer = self._answer(skips, queries, memory.organ(k), places)[0][:, 0].float()
            answer = answer.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            absent = ~memory.present[:, k].view(-1, *[1] * (target.ndim - 2))
            logits[:, k] = answer.masked_fill(absent, absent_logit)
        return torch.cat((torch.zeros_like(logits[:, :1]), logits), dim=1)

    def _remember(
        self, reference: Tensor, scribbles: Tensor, places: Tensor, organ: Tensor | None = None
    ) -> tuple[Memory, Tensor]:
        """The memory of the organs asked for (long [B, D]; default all), and their mask logits on the reference."""
        drawn = scribbles.to(reference.dtype)
        others = (drawn.sum(1, keepdim=True) - drawn).clamp(max=1) * float(self.negative_prompts)
        present = scribbles.flatten(2).any(-1)
        if organ is not None:
            index = organ.view(*organ.shape, *[1] * (reference.ndim - 2)).expand(-1, -1, *reference.shape[2:])
            drawn, others, present = drawn.gather(1, index), others.gather(1, index), present.gather(1, organ)
        batch, organs = present.shape
        skips = self.encoder(reference)
        features, mask = self.prompt_encoder(skips, torch.stack((drawn, others), dim=2).flatten(0, 1))
        keys, at, values, valid = self._keys(skips), [], [], []
        for level, (feature, project) in enumerate(zip(features, self.values)):
            size = feature.shape[2:]
            probability = F.adaptive_avg_pool3d if len(size) == 3 else F.adaptive_avg_pool2d
            share = probability(mask.float().sigmoid(), tuple(size)).to(feature.dtype)
            value = project(feature).flatten(2).transpose(1, 2).unflatten(-1, (self.heads, -1))
            share = share.flatten(2).transpose(1, 2).unsqueeze(2).expand(-1, -1, self.heads, -1)
            values.append(torch.cat((value, share), dim=-1).unflatten(0, (batch, organs)))
            at.append(self._places_of(places, size).unsqueeze(1))
            valid.append(torch.ones(batch, 1, size.numel(), dtype=torch.bool, device=mask.device))
            keys[level] = keys[level].unsqueeze(1)
        return Memory(keys, at, valid, values, present), mask.unflatten(0, (batch, organs)).squeeze(2)

    def _answer(
        self, skips: list[Tensor], queries: list[Tensor], memory: Memory, places: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Mask logits [B, K, ...full] of the target with these encoder features, and the masks carried to it."""
        batch, organs = memory.present.shape
        injected: dict[int, Tensor] = {}
        carried = []
        for level, stage in enumerate(self.read_stages):
            size = skips[stage].shape[2:]
            read, mask = self.readers[level](
                queries[level], self._places_of(places, size),
                memory.keys[level], memory.places[level], memory.valid[level], memory.values[level],
            )  # fmt: skip
            both = torch.cat((read, mask), dim=-1).transpose(1, 2).unflatten(2, tuple(size))
            injected[stage] = self.inject[level](both.to(skips[stage].dtype))
            carried.append(mask.reshape(batch, organs, *size))
        x = skips[-1]
        for step, (upsample, block) in enumerate(zip(self.decoder.transpconvs, self.decoder.stages)):
            stage = len(skips) - 2 - step
            x, skip = upsample(x), skips[stage]
            if x.shape[0] != batch * organs and stage in injected:  # from here on each organ has its own features
                x = x.repeat_interleave(organs, 0)
            if x.shape[0] != skip.shape[0]:
                skip = skip.repeat_interleave(organs, 0)
            x = block(torch.cat((x, skip + injected[stage] if stage in injected else skip), dim=1))
        return self.head(x).unflatten(0, (batch, organs)).squeeze(2), carried

    def _keys(self, skips: list[Tensor]) -> list[Tensor]:
        """What each place looks like, from its own stage and all coarser ones; per level [B, M, H, d], unit length."""
        finest = self.read_stages[-1]
        x = self.key_projections[-1](skips[-1])
        keys = {}
        for stage in range(len(skips) - 1, finest - 1, -1):
            if stage < len(skips) - 1:
                x = self.key_projections[stage - finest](skips[stage]) + resized(x, skips[stage].shape[2:])
            if stage in self.read_stages:
                x = x + self.keys[self.read_stages.index(stage)](F.leaky_relu(x))
                heads = x.flatten(2).transpose(1, 2).unflatten(-1, (self.heads, -1))
                keys[stage] = F.normalize(heads.float(), dim=-1)
        return [keys[stage] for stage in self.read_stages]

    @staticmethod
    def _places_of(places: Tensor, size: torch.Size) -> Tensor:
        """The places of a coarser grid of this size: centres of its cells, [B, M, ndim]."""
        pool: Any = F.adaptive_avg_pool3d if len(size) == 3 else F.adaptive_avg_pool2d
        return pool(places.float(), tuple(size)).flatten(2).transpose(1, 2)


class PromptEncoder(nn.Module):
    """A small U-Net from the reference's encoder features and a scribble to what is worth remembering.

    Args:
        convolution: nn.Conv2d or nn.Conv3d.
        channels, strides, kernels: of the plans' encoder, stage by stage.
        width: channels, half of it at the finest stage.
        read_stages: stages whose features are remembered, coarse to fine.
    """

    def __init__(
        self,
        convolution: type[nn.Module],
        channels: list[int],
        strides: list[list[int]],
        kernels: list[list[int]],
        width: int,
        read_stages: list[int],
    ) -> None:
        super().__init__()
        finest = read_stages[-1]
        self.first = max(0, finest - 1)
        self.last = min(read_stages[0] + 1, len(channels) - 1)
        self.read_stages = read_stages
        widths = {s: max(1, width // 2) if s < finest else width for s in range(self.first, self.last + 1)}
        self.down = nn.ModuleList()
        before = 0
        for stage in range(self.first, self.last + 1):
            incoming = channels[stage] + (4 if stage == self.first else before)
            self.down.append(block(convolution, incoming, widths[stage], kernels[stage]))
            before = widths[stage]
        self.strides = [tuple(strides[stage]) for stage in range(self.first, self.last + 1)]
        self.up = nn.ModuleList(
            block(convolution, widths[stage] + before, widths[stage], kernels[stage])
            for stage in range(self.last - 1, finest - 1, -1)
        )
        self.mask = convolution(width, 1, 1)

    def forward(self, skips: list[Tensor], prompts: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encodes.

        Args:
            skips: reference features per stage [B, C, ...], full resolution first.
            prompts: [B K, 2, ...full]: the organ's scribble and those of the others.

        Returns:
            features per read stage [B K, width, ...], and mask logits at the finest of them [B K, 1, ...].
        """
        two = prompts.ndim == 4
        size = tuple(skips[self.first].shape[2:])
        widest: Any = F.adaptive_max_pool2d if two else F.adaptive_max_pool3d  # a thin stroke must not fade
        share: Any = F.adaptive_avg_pool2d if two else F.adaptive_avg_pool3d
        x = torch.cat((widest(prompts, size), share(prompts, size)), dim=1)
        organs = prompts.shape[0] // skips[0].shape[0]
        kept = []
        for number, down in enumerate(self.down):
            if number:
                pool: Any = F.max_pool2d if two else F.max_pool3d
                x = pool(x, self.strides[number], self.strides[number], ceil_mode=True)
            x = down(torch.cat((skips[self.first + number].repeat_interleave(organs, 0), x.to(skips[0].dtype)), dim=1))
            kept.append(x)
        found = {self.last: x}
        for number, up in enumerate(self.up):
            stage = self.last - 1 - number
            x = up(torch.cat((kept[stage - self.first], resized(x, kept[stage - self.first].shape[2:])), dim=1))
            found[stage] = x
        return [found[stage] for stage in self.read_stages], self.mask(x)


def block(convolution: Any, incoming: int, outgoing: int, kernel: list[int]) -> nn.Sequential:
    """Twice convolution, instance norm, leaky ReLU, as in nnU-Net's stages."""
    norm: Any = nn.InstanceNorm2d if convolution is nn.Conv2d else nn.InstanceNorm3d
    padding = [k // 2 for k in kernel]
    layers: list[nn.Module] = []
    for number in (incoming, outgoing):
        layers += [convolution(number, outgoing, kernel, padding=padding), norm(outgoing, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers)


def resized(x: Tensor, size: torch.Size) -> Tensor:
    """Linear interpolation to another size."""
    return F.interpolate(x, size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)


def read_stages(patch_size: list[int], strides: list[list[int]], max_places: int) -> list[int]:
    """The two neighbouring stages at which the memory is read, coarse to fine; one in a very shallow network.

    Strides 8 and 4 as in memory networks of the plane, unless a patch has more than max_places places there: attention
    costs the square of them. Never the bottleneck, whose features have no stage of the decoder to enter.

    Example:
        >>> read_stages([96, 96], [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]], 4096)
        [3, 2]
        >>> read_stages([64, 128, 128], [[1, 1, 1], *[[2, 2, 2]] * 5], 4096)
        [4, 3]
    """
    deepest = len(strides) - 2
    places = []
    size = list(patch_size)
    for stride in strides:
        size = [math.ceil(n / s) for n, s in zip(size, stride)]
        places.append(math.prod(size))
    finest = min(2, deepest)
    while finest < deepest and places[finest] > max_places:
        finest += 1
    return [stage for stage in (finest + 1, finest) if stage <= deepest]
