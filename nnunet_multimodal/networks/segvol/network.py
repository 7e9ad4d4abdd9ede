"""SegVol: an image is encoded once, then asked as often as one likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.networks.segvol.decoder import MaskDecoder
from nnunet_multimodal.networks.segvol.prompts import PromptEncoder, Prompts
from nnunet_multimodal.networks.told import LIMIT


class TextProjection(nn.Module):
    """Text embedding -> token. SegVol has it beside CLIP and runs it without gradient: there it stays random."""

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        self.dim_align = nn.Linear(text, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., C]."""
        return self.dim_align(x)


class SegVolNetwork(nn.Module):
    """Image encoder (ViT), prompt encoder, mask decoder.

    Source: SegVol (Du et al. 2023) as SegEVOLution uses it; methods.md 5.1 to 5.3. Names of parameters are SegVol's,
    so that its public weights can be loaded by name. Defaults are its sizes.

    Args:
        window: size of the images, (D, H, W).
        patch: of the vision transformer; divides the window. SegVol: (4, 16, 16) of (32, 256, 256).
        organs: how many texts there are.
        text: E, length of a text embedding.
        channels: of the images.
        width, layers, heads, hidden: of the vision transformer.
        decoder_depth, decoder_heads, decoder_hidden: of the two-way transformer.
        as_segvol: what SegVol's weights need and nothing else does, see ``RandomPositions`` and ``MaskDecoder``.

    Attributes:
        text_embeddings: [organs, E], persistent.
    """

    text_embeddings: Tensor

    def __init__(
        self,
        window: Sequence[int],
        patch: Sequence[int],
        organs: int,
        text: int,
        channels: int = 1,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        decoder_depth: int = 2,
        decoder_heads: int = 8,
        decoder_hidden: int = 2048,
        as_segvol: bool = False,
    ) -> None:
        from monai.networks.nets import ViT  # a second of import that other networks do not need

        super().__init__()
        self.window, self.patch = tuple(window), tuple(patch)
        self.grid = tuple(size // cell for size, cell in zip(window, patch))
        if any(size % cell for size, cell in zip(window, patch)):
            raise ValueError(f"patch {self.patch} must divide window {self.window}.")
        encoder: Any = ViT(
            channels, self.window, self.patch, width, hidden, layers, heads, proj_type="perceptron", spatial_dims=3
        )
        for block in encoder.blocks:
            del block.norm_cross_attn  # MONAI makes it, and uses it only for attention to something else
            block.attn.use_flash_attention = True  # the same numbers without a matrix of tokens x tokens
        self.image_encoder = encoder
        self.prompt_encoder = PromptEncoder(width, self.window, as_segvol)
        self.mask_decoder = MaskDecoder(width, self.grid, decoder_depth, decoder_heads, decoder_hidden, as_segvol)
        self.text_encoder = TextProjection(text, width)
        self.register_buffer("text_embeddings", torch.zeros(organs, text))

    def embed(self, images: Tensor) -> Tensor:
        """images [B, channels, *window] -> features [B, C, d, h, w], to be asked with ``answer``."""
        tokens, _ = self.image_encoder(images)
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def answer(self, features: Tensor, prompts: Prompts) -> Tensor:
        """features of ``embed`` [B, C, d, h, w], P questions -> logits [P, 1, *window]."""
        text = None if prompts.text is None else self.text_encoder(self.text_embeddings[prompts.text])
        tokens = self.prompt_encoder(prompts, text)
        asked = features[prompts.image] + self.prompt_encoder.no_mask_embed.weight[0, :, None, None, None]
        places = self.prompt_encoder.pe_layer.grid(self.grid)
        low = self.mask_decoder(asked, places, tokens, text)
        return F.interpolate(low.float(), size=self.window, mode="trilinear", align_corners=False)

    def forward(self, images: Tensor, questions: Sequence[Prompts] | None = None) -> Any:
        """All organs at once, or answers to questions.

        Args:
            images: [B, channels, *window].
            questions: one or more; the images are encoded once for all of them.

        Returns:
            Without questions [B, 1 + organs, *window]: each organ's logit when asked for by its text, and 0 for the
            background, so that a voxel is of the organ that is surest, if any is (p > 0.5). With questions a list of
            logits [P, 1, *window], one a question.
        """
        features = self.embed(images)
        if questions is not None:
            return [self.answer(features, prompts) for prompts in questions]
        index = torch.arange(len(images), device=images.device)
        logits = [torch.zeros((len(images), 1, *self.window), device=images.device)]
        for organ in range(len(self.text_embeddings)):  # one after the other: 100 organs at once need much memory
            logits.append(self.answer(features, Prompts(index, text=torch.full_like(index, organ))))
        answers = torch.cat(logits, dim=1)
        return answers if self.training else answers.clamp(-LIMIT, LIMIT)


def patch_for(window: Sequence[int], spacing: Sequence[float], most: int = 2048, least: int = 4) -> tuple[int, ...]:
    """A patch that divides the window into at most so many tokens, as isotropic in mm as that can be.

    Each axis starts at the smallest divisor that is at least ``least``: the mask is made at four times the tokens'
    resolution. Then the axis whose patch is shortest in mm goes on to its next divisor. For SegVol's window and voxels
    of 5 x 0.8 x 0.8 mm that is SegVol's patch:

    >>> patch_for((32, 256, 256), (5.0, 0.8, 0.8))
    (4, 16, 16)
    """
    choices = [[d for d in range(1, size + 1) if size % d == 0 and d >= min(least, size)] for size in window]
    at = [0] * len(choices)

    def patch() -> list[int]:
        return [options[index] for options, index in zip(choices, at)]

    while math.prod(size // cell for size, cell in zip(window, patch())) > most:
        growing = [axis for axis in range(len(at)) if at[axis] + 1 < len(choices[axis])]
        at[min(growing, key=lambda axis: patch()[axis] * spacing[axis])] += 1
    return tuple(patch())
