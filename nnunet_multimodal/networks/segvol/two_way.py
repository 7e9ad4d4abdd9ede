"""Tokens of the prompt and places of the image, each attending to the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose heads share ``width / reduction`` channels.

    Args:
        width: C.
        heads: must divide ``width / reduction``.
        reduction: channels in for one channel inside.
    """

    def __init__(self, width: int, heads: int, reduction: int = 1) -> None:
        super().__init__()
        inner = width // reduction
        if width % reduction or inner % heads:
            raise ValueError(f"{heads} heads must divide width {width} / {reduction}.")
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, C], k and v [B, S, C] -> [B, T, C]."""
        q, k, v = self._split(self.q_proj(q)), self._split(self.k_proj(k)), self._split(self.v_proj(v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, inner] -> [B, heads, T, inner / heads]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens among themselves, tokens to image, an MLP on tokens, image to tokens; each with residual, then LayerNorm.

    The tokens as they came in stand for their own places and are added to queries and keys, but for the first block's
    self-attention, which has no residual either (SAM's).
    """

    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, heads, reduction=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, heads, reduction=2)
        self.norm4 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, token_places: Tensor, image_places: Tensor) -> tuple:
        """tokens and token_places [P, T, C], image and image_places [P or 1, S, C] -> tokens, image."""
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            placed = tokens + token_places
            tokens = self.norm1(tokens + self.self_attn(placed, placed, tokens))
        placed_image = image + image_places
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_places, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + token_places, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Blocks of two-way attention, then the tokens look at the image once more.

    Source: SAM (Kirillov et al. 2023), as SegVol has it: 2 blocks, 8 heads, hidden 2048.

    Args:
        depth: blocks.
        width: C.
        heads: of each attention; must divide C / 2.
        hidden: of the MLP.
    """

    def __init__(self, depth: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, hidden, first=number == 0) for number in range(depth))
        self.final_attn_token_to_image = Attention(width, heads, reduction=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, image: Tensor, image_places: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image [P, S, C], image_places [1, S, C], tokens [P, T, C] -> tokens [P, T, C], image [P, S, C]."""
        places = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, places, image_places)
        attended = self.final_attn_token_to_image(tokens + places, image + image_places, image)
        return self.norm_final_attn(tokens + attended), image
