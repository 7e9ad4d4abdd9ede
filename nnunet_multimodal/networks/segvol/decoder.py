"""A mask from the image's features and the tokens of a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.networks.segvol.two_way import TwoWayTransformer

MASK_TOKENS = 4  # SAM's: one for the single mask, three for alternatives
LAYERS = 3  # of the hyper-network


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each voxel: [B, C, ...] of any size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)


class HyperNetwork(nn.Module):
    """A token -> the weights of a 1 x 1 x 1 convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        sizes = [width] * LAYERS + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] -> [P, out]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """m = u · h(t) + u · (W e + b), with u the upscaled features, t the mask token and e the text.

    The second term is the text's similarity map; it is there only where there is a text. Features are upscaled four
    times by two transposed convolutions, C -> C/4 -> C/8.

    Of SAM's four mask tokens and the token of the expected overlap (IoU), all take part in the attention, but only the
    first mask is read, as in SegVol. The three other hyper-networks and the head of the IoU are left out: SegVol never
    trains them, and a parameter without a gradient stops a training on several GPUs.

    Args:
        width: C; divisible by 8.
        grid: size of the image's features.
        depth, heads, hidden: of the two-way transformer.
        as_segvol: the LayerNorm after the first upscaling has a scale and shift of its own in every place and takes
            mean and variance over the whole window, as SegVol's weights need it; it ties them to one window. Otherwise
            it is over channels, as in SAM, from which SegVol is derived.
    """

    def __init__(
        self, width: int, grid: Sequence[int], depth: int, heads: int, hidden: int, as_segvol: bool = False
    ) -> None:
        super().__init__()
        if width % 8:
            raise ValueError(f"width must be divisible by 8, found {width}.")
        self.transformer = TwoWayTransformer(depth, width, heads, hidden)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, width)
        quarter, eighth = width // 4, width // 8
        fixed = (quarter, *(2 * size for size in grid))
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(width, quarter, kernel_size=2, stride=2),
            nn.LayerNorm(fixed) if as_segvol else ChannelNorm(quarter),
            nn.GELU(),
            nn.ConvTranspose3d(quarter, eighth, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList([HyperNetwork(width, eighth)])
        self.txt_align_upscaled_embedding = nn.Linear(width, eighth)

    def forward(self, features: Tensor, places: Tensor, tokens: Tensor, text: Tensor | None) -> Tensor:
        """Logits at four times the features' resolution.

        Args:
            features: [P, C, d, h, w], of each question's image.
            places: [C, d, h, w], the codes of their places.
            tokens: [P, T, C], of the prompts.
            text: [P, C]; None where no text was given.

        Returns:
            [P, 1, 4d, 4h, 4w].
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(tokens), -1, -1)
        flat, flat_places = features.flatten(2).transpose(1, 2), places.flatten(1).T[None]
        answered, flat = self.transformer(flat, flat_places, torch.cat([own.to(tokens.dtype), tokens], dim=1))
        upscaled = self.output_upscaling(flat.transpose(1, 2).unflatten(2, features.shape[2:]))
        weights = self.output_hypernetworks_mlps[0](answered[:, 1])  # 0 is the token of the IoU
        if text is not None:
            weights = weights + self.txt_align_upscaled_embedding(text)  # both terms are linear in the features
        return torch.einsum("pc,pcdhw->pdhw", weights, upscaled)[:, None]
