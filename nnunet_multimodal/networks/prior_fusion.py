"""Tokens of prior knowledge and the features of an image look at each other (Hermes' bidirectional block)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32  # channels of an attention head
EXPANSION = 4  # hidden channels of a feed-forward layer for each of its channels


def heads_of(channels: int) -> int:
    """C / 32 attention heads, at least one; the next smaller number where that does not divide C.

    >>> heads_of(320), heads_of(512), heads_of(8), heads_of(100)
    (10, 16, 1, 2)
    """
    most = max(1, channels // HEAD_WIDTH)
    return next(heads for heads in range(most, 0, -1) if channels % heads == 0)


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of each head, then a linear layer; q, k and v without bias, as in Hermes.

    The scores are never kept: torch's ``scaled_dot_product_attention`` does it in pieces where it can.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = heads_of(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        """asking [B, Q, C], asked [B, K, C] -> [B, Q, C]."""
        q = self._split(self.query(asking))
        k, v = map(self._split, self.key_value(asked).chunk(2, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """C -> 4C -> C with GELU."""

    def __init__(self, channels: int) -> None:
        hidden = EXPANSION * channels
        super().__init__(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


class PriorFusion(nn.Module):
    """One bidirectional block, normalised before each step, with a residual around each.

        p' = p + CA(LN p, LN f);   p'' = p' + FF(LN p')
        f' = f + CA(LN f, LN p'');  f'' = f' + FF(LN f')

    The priors look first; the features then look at what the priors have become.

    Source: Hermes (methods.md 5.4), with one change: the last layer of both steps of the features begins at zero, so
    that a new block changes nothing in a network that was trained without it.

    Args:
        channels: C, of features and priors alike.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(6))
        self.prior_attention = CrossAttention(channels)
        self.prior_feed = FeedForward(channels)
        self.feature_attention = CrossAttention(channels)
        self.feature_feed = FeedForward(channels)
        start_at_zero(self.feature_attention.out, self.feature_feed[2])

    def forward(self, features: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, N, C], priors [B, P, C] -> the same, updated; memory grows with N, not with N^2."""
        norms = self.norms
        priors = priors + self.prior_attention(norms[0](priors), norms[1](features))
        priors = priors + self.prior_feed(norms[2](priors))
        features = features + self.feature_attention(norms[3](features), norms[4](priors))
        features = features + self.feature_feed(norms[5](features))
        return features, priors


def start_at_zero(*layers: Any) -> None:
    """Linear layers that give 0 until they have learned something."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class StageFusion(nn.Module):
    """Blocks of one stage of a U-Net.

    Args:
        channels: C of the stage.
        blocks: how many, one after another.
    """

    def __init__(self, channels: int, blocks: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PriorFusion(channels) for _ in range(blocks))

    def forward(self, features: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, C, ...], priors [B, P, C] -> the same, updated."""
        tokens = features.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens, priors = block(tokens, priors)
        # Contiguous: convolutions round differently for another order in memory.
        return tokens.transpose(1, 2).contiguous().view_as(features), priors
