"""CrossMR's network on nnU-Net's own encoder-decoder.

Source: All You Need Is a Reference: cross-modality referring segmentation for abdominal MRI, 3.1 and 3.2, with the gaps
filled from SEEM (v1.0). Three things are ours. The answer is a weighted mean of the organ's masks, weighted by how well
each query fits the scribble, and is itself trained, so nothing has to be chosen at prediction. Masks for matching are
made at a coarse stage, only the answer at full resolution. And while training, some samples are answered with another
sample's prompt.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.networks.position import sine_position
from nnunet_multimodal.networks.query_decoder import QueryLayer
from nnunet_multimodal.networks.unet import binary_prompts, decoder_features
from nnunet_multimodal.networks.visual_sampler import VisualSampler, mean_feature, pick_points

ABSENT = -100.0  # logit of an organ without a scribble: sure to lose, harmless to fp16 sums over tiles
ABSENT_IN_TILE = -1.0  # the stock predictor shows one tile: its neighbour, which overlaps, may hold the scribble
LOGIT_LIMIT = 500.0  # contract 9 allows 1000, but nnU-Net adds up to eight tiles with a weight of 10 in fp16


class Prompt(NamedTuple):
    """What a scribbled reference says, independent of any target: kept and used for many targets or tiles.

    Attributes:
        tokens: per feature level [B, K, T, d].
        visible: bool [B, K, T], which tokens exist.
        signature: [B, K, d], mean mask feature under the scribble (SEEM's s_k), zeros where the organ has none.
        present: bool [B, K], whether the organ has a scribble.
    """

    tokens: list[Tensor]
    visible: Tensor
    signature: Tensor
    present: Tensor

    def take(self, index: Tensor) -> Prompt:
        """The prompts of the given batch entries, long [B']."""
        return Prompt([t[index] for t in self.tokens], self.visible[index], self.signature[index], self.present[index])


class ReferringOutput(NamedTuple):
    """What the loss needs.

    Attributes:
        masks: per layer [B, K, N, ...coarse], mask logits of every query (in eval mode without the last layer's).
        scores: [B, K, N], how well each query of the organ fits the scribble; [B, K, K N] where queries belong to
            no organ.
        answer: [B, K, ...full], mask logits.
        present: bool [B, K], organs with a scribble: the others have no loss.
    """

    masks: list[Tensor]
    scores: Tensor
    answer: Tensor
    present: Tensor


class CrossMRNetwork(nn.Module):
    """Refer across contrasts: scribbles on a reference image, masks on a target image.

    Input channels are target, reference, then one scribble channel per organ (contract 4). In eval mode ``forward``
    gives nnU-Net logits [B, 1 + K, ...]; in train mode a ``ReferringOutput``.

    Args:
        network: nnU-Net's U-Net from the plans, built for one image channel (``encoder``, ``decoder``).
        channels: its features per stage, full resolution first.
        organs: K.
        queries: N, queries per organ.
        width, heads, hidden, layers: of the decoder.
        levels: feature levels that the layers go through in turn, coarse to fine: the stages next to mask_stage.
        mask_stage: stage at which masks are made for matching and masked attention (0 is full resolution); 2 is
            SEEM's stride 4.
        max_tokens: scribbled points used in all, an equal share per organ.
        tokens_first: self-attention before cross-attention, see ``QueryLayer``.
        visual_tokens: False hides the tokens from the queries (ablation noVisualTokens).
        organ_queries: False lets any query answer for any organ (ablation noOrganMatch).
        pool_batch_tokens: True draws an organ's tokens from the whole batch (ablation visualAcrossBatch).
        cross_sample: share of training samples that get another sample's prompt. The organ may be absent from their
            target, so this also teaches to answer with nothing.
    """

    def __init__(
        self,
        network: Any,
        channels: list[int],
        organs: int,
        queries: int = 11,
        width: int = 128,
        heads: int = 4,
        hidden: int = 512,
        layers: int = 6,
        levels: int = 3,
        mask_stage: int = 2,
        max_tokens: int = 512,
        tokens_first: bool = True,
        visual_tokens: bool = True,
        organ_queries: bool = True,
        pool_batch_tokens: bool = False,
        cross_sample: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.strides: list[list[int]] = [list(stride) for stride in network.encoder.strides]
        # The stock heads would be parameters without a gradient, on which distributed training stops.
        self.decoder.seg_layers = nn.ModuleList()
        self.organs = organs
        self.mask_stage = min(mask_stage, len(channels) - 1)
        # As in SEEM coarser than the masks, where there are such stages; coarse to fine. A level that no layer comes to
        # would be parameters without a gradient.
        coarser = list(range(self.mask_stage + 1, len(channels))) or [self.mask_stage]
        self.level_stages = coarser[: min(levels, layers)][::-1]
        self.tokens_per_organ = max(1, max_tokens // organs)
        self.visual_tokens = visual_tokens
        self.organ_queries = organ_queries
        self.pool_batch_tokens = pool_batch_tokens
        self.cross_sample = cross_sample

        convolution = self.encoder.conv_op
        self.level_projections = nn.ModuleList(convolution(channels[s], width, 1) for s in self.level_stages)
        self.level_code = nn.Parameter(torch.randn(len(self.level_stages), width) * 0.02)
        self.mask_projection = convolution(channels[self.mask_stage], width, 1)
        self.query_feature = nn.Parameter(torch.randn(queries, width))
        self.query_position = nn.Parameter(torch.randn(queries, width))
        self.sampler = VisualSampler(width, len(self.level_stages))
        self.layers = nn.ModuleList(QueryLayer(width, heads, hidden, tokens_first) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.mask_embedding = perceptron(width, width, width + 1)  # + 1: a bias for each mask
        self.answer_embedding = perceptron(width, width, channels[0] + 1)
        self.query_key = nn.Linear(width, width)
        self.signature_key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor | ReferringOutput:
        """x: [B, 2 + K, (Z,) Y, X] = target, reference, scribbles."""
        prompt = self.prompt(x[:, 1:2], binary_prompts(x[:, 2:]))
        if self.training:
            if self.cross_sample > 0:
                prompt = self._swap_prompts(prompt)
            return self.refer(x[:, :1], prompt)
        return self.segment(x[:, :1], prompt, ABSENT_IN_TILE)

    def prompt(self, reference: Tensor, scribbles: Tensor) -> Prompt:
        """Encodes the reference once. reference [B, 1, ...], scribbles bool [B, K, ...] on the same grid."""
        levels, mask_features, _ = self._features(reference, finest_stage=self.mask_stage)
        coordinates, visible = pick_points(scribbles, self.tokens_per_organ, random=self.training)
        tokens = self.sampler(levels, coordinates, visible)
        signature = mean_feature(mask_features, coordinates, visible)
        present = visible.any(-1)
        if self.pool_batch_tokens and self.training:
            tokens, visible = pool_over_batch(tokens, visible)
        return Prompt(tokens, visible, signature, present)

    def segment(self, target: Tensor, prompt: Prompt, absent_logit: float = ABSENT) -> Tensor:
        """Logits [B, 1 + K, ...] of targets [B, 1, ...]; a prompt of one entry serves the whole batch.

        An organ without a scribble gets ``absent_logit``, background 0: it comes out empty.
        """
        if prompt.present.shape[0] != target.shape[0]:
            prompt = prompt.take(torch.zeros(target.shape[0], dtype=torch.long, device=target.device))
        output = self.refer(target, prompt)
        answer = output.answer.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        absent = ~output.present.view(*output.present.shape, *[1] * (target.ndim - 2))
        answer = answer.masked_fill(absent, absent_logit)
        return torch.cat((torch.zeros_like(answer[:, :1]), answer), dim=1)

    def refer(self, target: Tensor, prompt: Prompt) -> ReferringOutput:
        """All masks of all queries for a target [B, 1, ...]."""
        levels, mask_features, full_features = self._features(target, finest_stage=0)
        batch, width = target.shape[0], self.query_feature.shape[1]
        queries = self.query_feature.expand(batch, self.organs, -1, width)
        visible = prompt.visible if self.visual_tokens else torch.zeros_like(prompt.visible)
        keys = [level.flatten(2).transpose(1, 2) for level in levels]
        positions = [sine_position(tuple(level.shape[2:]), width, level.device) for level in levels]
        masks: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            at = number % len(levels)
            # The first layer looks everywhere: before it all organs' queries are the same and so would be their masks.
            seen = attended_area(masks[-1], levels[at].shape[2:]) if masks else None
            queries = layer(queries, self.query_position, prompt.tokens[at], visible, keys[at], positions[at], seen)
            if self.training or number + 1 < len(self.layers):  # the last ones only serve the loss
                masks.append(mask_logits(self.mask_embedding(self.norm(queries)), mask_features))
        final = self.norm(queries)
        scores = self._scores(final, prompt.signature)
        answer = mask_logits(self._mixed_answer(final, scores), full_features)
        return ReferringOutput(masks, scores, answer, prompt.present)

    def _features(self, image: Tensor, finest_stage: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Levels coarse to fine [B, d, ...], mask features [B, d, ...], and the finest features asked for."""
        stages = decoder_features(self.encoder, self.decoder, image, finest_stage)
        levels = [
            project(stages[stage - finest_stage]) + code.view(1, -1, *[1] * (image.ndim - 2))
            for project, stage, code in zip(self.level_projections, self.level_stages, self.level_code)
        ]
        return levels, self.mask_projection(stages[self.mask_stage - finest_stage]), stages[0]

    def _scores(self, queries: Tensor, signature: Tensor) -> Tensor:
        """How well query i fits the scribble of organ k: v_i . s_k / sqrt(d), SEEM's similarity with learned keys."""
        keys = self.query_key(queries)
        if not self.organ_queries:
            keys = keys.flatten(1, 2).unsqueeze(1)  # every organ may choose among all: [B, 1, K N, d]
        return (keys * self.signature_key(signature).unsqueeze(2)).sum(-1) / math.sqrt(queries.shape[-1])

    def _mixed_answer(self, queries: Tensor, scores: Tensor) -> Tensor:
        """sum_i softmax(scores)_i e_i: masks are linear in e, so this is the weighted mean of the queries' masks."""
        embedding = self.answer_embedding(queries)
        if not self.organ_queries:
            embedding = embedding.flatten(1, 2).unsqueeze(1)
        return (scores.softmax(-1).unsqueeze(-1) * embedding).sum(2)

    def _swap_prompts(self, prompt: Prompt) -> Prompt:
        batch = prompt.present.shape[0]
        device = prompt.present.device
        own = torch.arange(batch, device=device)
        other = (own + torch.randint(1, max(2, batch), (batch,), device=device)) % batch  # never the own, if B > 1
        return prompt.take(torch.where(torch.rand(batch, device=device) < self.cross_sample, other, own))


def perceptron(width: int, hidden: int, output: int) -> nn.Sequential:
    """SEEM's three-layer mask perceptron."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, output)
    )


def mask_logits(embedding: Tensor, features: Tensor) -> Tensor:
    """B_{i,h,w} = sum_c M_{i,c} F_{c,h,w} (CrossMR, 3.1) plus the mask's bias, in fp32.

    No 1/sqrt(d): with it learning all but stops (methods.md 1.4).

    Args:
        embedding: [B, ..., C + 1], the last entry is the bias.
        features: [B, C, (Z,) Y, X].

    Returns:
        [B, ..., (Z,) Y, X].
    """
    with torch.autocast(features.device.type, enabled=False):
        embedding, features = embedding.float(), features.float()
        flat = embedding.flatten(1, -2)
        masks = torch.baddbmm(flat[..., -1:], flat[..., :-1], features.flatten(2))
    return masks.view(*embedding.shape[:-1], *features.shape[2:])


def attended_area(masks: Tensor, size: torch.Size) -> Tensor:
    """Where each query may look next: inside its own mask (Mask2Former), everywhere if the mask is empty there.

    Args:
        masks: logits [B, K, N, ...].

    Returns:
        bool [B, K, N, prod(size)].
    """
    shape = masks.shape[:3]
    with torch.no_grad():
        pool: Any = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
        area = pool(masks.flatten(0, 2).unsqueeze(1), tuple(size)).flatten(1) >= 0
        area = area | ~area.any(-1, keepdim=True)
    return area.view(*shape, -1)


def pool_over_batch(tokens: list[Tensor], visible: Tensor) -> tuple[list[Tensor], Tensor]:
    """An organ's tokens drawn at random from those of the whole batch (ablation visualAcrossBatch)."""
    batch, _, count = visible.shape
    pooled = visible.transpose(0, 1).flatten(1)  # [K, B T]
    order = torch.rand(pooled.shape, device=pooled.device).masked_fill(~pooled, -1.0).topk(count, dim=-1).indices
    organ = torch.arange(pooled.shape[0], device=pooled.device)[:, None]

    def draw(x: Tensor) -> Tensor:
        together = x.transpose(0, 1).flatten(1, 2)  # [K, B T, ...]
        return together[organ, order].unsqueeze(0).expand(batch, *[-1] * (x.ndim - 1))

    return [draw(level) for level in tokens], draw(visible)
