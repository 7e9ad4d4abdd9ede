"""Layers of the referring decoder: each organ's queries, the scribble's tokens, and the target image."""

from __future__ import annotations

from torch import Tensor, cat, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(d_head)) v, with a mask that says what may be seen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.to_output = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        """query [B, Q, d], key and value [B, S, d], visible bool broadcastable to [B, Q, S] -> [B, Q, d]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.to_query, query), (self.to_key, key), (self.to_value, value))
        )
        mask = None if visible is None else visible.unsqueeze(1)
        return self.to_output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """One decoder layer (CrossMR, 3.1), pre-norm.

    Cross-attention of all queries to the target's features, self-attention of an organ's queries to themselves and to
    the organ's tokens, and a feed-forward network. Organs never see one another: they are batch entries of the
    self-attention, and rows of the cross-attention. The tokens are fresh in each layer, so only the queries move.

    Args:
        width, heads, hidden: d, attention heads, width of the feed-forward network.
        tokens_first: self-attention before cross-attention. The paper's order is the other one, but there the first
            cross-attention is the same for every organ; a prototype learned faster this way (methods.md 1.4).
    """

    def __init__(self, width: int, heads: int, hidden: int, tokens_first: bool) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        self.self_norm, self.cross_norm, self.feed_norm = (nn.LayerNorm(width) for _ in range(3))
        self.token_norm, self.target_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        tokens: Tensor,
        tokens_visible: Tensor,
        target: Tensor,
        target_position: Tensor,
        target_visible: Tensor | None,
    ) -> Tensor:
        """One layer.

        Args:
            queries: [B, K, N, d]; query_position: [N, d], the learned code of each query.
            tokens: [B, K, T, d]; tokens_visible: bool [B, K, T].
            target: [B, S, d]; target_position: [S, d]; target_visible: bool [B, K, N, S] or None (all).

        Returns:
            queries [B, K, N, d].
        """
        if self.tokens_first:
            queries = self._attend_organ(queries, query_position, tokens, tokens_visible)
        queries = self._attend_target(queries, query_position, target, target_position, target_visible)
        if not self.tokens_first:
            queries = self._attend_organ(queries, query_position, tokens, tokens_visible)
        return queries + self.feed_forward(self.feed_norm(queries))

    def _attend_organ(self, queries: Tensor, position: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
        own = self.self_norm(queries).flatten(0, 1)  # [B K, N, d]: an organ is a batch entry
        tokens = self.token_norm(tokens).flatten(0, 1)
        visible = visible.flatten(0, 1)
        visible = cat((visible.new_ones(visible.shape[0], own.shape[1]), visible), dim=1)[:, None]
        moved = self.self_attention(own + position, cat((own + position, tokens), 1), cat((own, tokens), 1), visible)
        return queries + moved.view_as(queries)

    def _attend_target(
        self, queries: Tensor, position: Tensor, target: Tensor, target_position: Tensor, visible: Tensor | None
    ) -> Tensor:
        target = self.target_norm(target)
        own = (self.cross_norm(queries) + position).flatten(1, 2)  # [B, K N, d]
        if visible is not None:
            visible = visible.flatten(1, 2)
        moved = self.cross_attention(own, target + target_position, target, visible)
        return queries + moved.view_as(queries)
