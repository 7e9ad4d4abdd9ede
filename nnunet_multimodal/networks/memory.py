"""What a scribbled reference leaves behind for open-set referring, and how a target reads it.

After space-time memory networks (Oh et al., ICCV 2019): keys say what a place of the reference looks like, values what
the scribble made of it. Two things are ours. Keys and queries also carry where they lie, in mm, so that a place is
sought near where it was, on whatever grid. And the value's last entry is the probability that the place belongs to the
organ; what is read of it is a first mask of the target, which can be trained by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REACH_MM = 50.0  # unit of the positions inside the attention: keeps their squares near 1
AT_ONCE = 2**24  # weights of one head at a time; a volume of many windows would take gigabytes


class Memory(NamedTuple):
    """A scribbled reference, independent of any target: kept and used for many targets or tiles.

    Organs that were scribbled on the same image share its keys: then S = 1, and all places may be read. Where each
    organ has an image or windows of its own, S = K.

    Attributes:
        keys: per level [B, S, M, H, d], of unit length.
        places: per level [B, S, M, ndim], in mm, axes in the order of the array.
        valid: per level bool [B, S, M], places that may be read.
        values: per level [B, K, M, H, c + 1], the last entry a probability.
        present: bool [B, K], whether the organ has a scribble.
    """

    keys: list[Tensor]
    places: list[Tensor]
    valid: list[Tensor]
    values: list[Tensor]
    present: Tensor

    def take(self, index: Tensor) -> Memory:
        """The memories of the given batch entries, long [B']."""
        return self._each(lambda x: x[index])

    def organ(self, k: int) -> Memory:
        """The memory of one organ, K = 1."""
        return self._each(lambda x: x[:, k : k + 1] if x.shape[1] > 1 else x)

    def unshared(self) -> Memory:
        """The same with keys for each organ, S = K."""
        organs = self.present.shape[1]
        return self._each(lambda x: x.expand(-1, organs, *[-1] * (x.ndim - 2)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Memory:
        keys, places, valid, values = ([change(x) for x in part] for part in self[:4])
        return Memory(keys, places, valid, values, change(self.present))


def mix_memories(memories: list[Memory | None]) -> Memory:
    """One memory of which organ k comes from memories[k]; None leaves the organ out."""
    some = next(m for m in memories if m is not None)
    known = torch.tensor([[m is not None for m in memories]], device=some.present.device)
    if all(m is None or m is some for m in memories):
        return some._replace(present=some.present & known)
    parts = [(some if m is None else m).organ(k) for k, m in enumerate(memories)]
    return _together(parts, 1)._replace(present=torch.cat([part.present for part in parts], dim=1) & known)


def join_memories(memories: list[Memory]) -> Memory:
    """Several windows of one reference as one. Where an organ has a scribble, windows without one are not read.

    They may hold a part of the organ, and would say that it is none.
    """
    if len(memories) == 1:
        return memories[0]
    present = torch.stack([m.present for m in memories]).any(0)
    parts = []
    for memory in memories:
        own = memory.unshared()
        readable = (memory.present | ~present).unsqueeze(-1)
        parts.append(own._replace(valid=[valid & readable for valid in own.valid]))
    return _together(parts, 2)._replace(present=present)


def _together(memories: list[Memory], axis: int) -> Memory:
    """Level by level along an axis; ``present`` is the first one's."""
    fields = ([torch.cat(levels, dim=axis) for levels in zip(*(m[field] for m in memories))] for field in range(4))
    keys, places, valid, values = fields
    return Memory(keys, places, valid, values, memories[0].present)


class MemoryReader(nn.Module):
    """Attention of a target's places to a reference's: softmax(tau cos(q, k) - |x_q - x_k|^2 / (2 sigma^2)) v.

    Written as one product of lengthened vectors, as |x_q|^2 cancels in the softmax:
    [tau q, x_q / sigma^2, 1] . [k, x_k, -|x_k|^2 / (2 sigma^2)].

    Args:
        heads: H, each with its own tau and sigma.
        ndim: spatial axes.
        temperature: tau at the start.
        sigma_mm: sigma of the first and the last head at the start; the others lie between.
    """

    def __init__(self, heads: int, ndim: int, temperature: float = 8.0, sigma_mm: tuple[float, float] = (15, 40)):
        super().__init__()
        self.ndim = ndim
        self.log_temperature = nn.Parameter(torch.full((heads,), temperature).log())
        self.log_sigma = nn.Parameter((torch.linspace(*sigma_mm, heads) / REACH_MM).log())

    def forward(
        self, queries: Tensor, places: Tensor, keys: Tensor, at: Tensor, valid: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reads one level.

        Args:
            queries: [B, N, H, d], of unit length.
            places: [B, N, ndim], in mm.
            keys, at, valid, values: [B, S, M, H, d], [B, S, M, ndim], bool [B, S, M], [B, K, M, H, c + 1].

        Returns:
            [B K, N, H c] what was read, and [B K, N, 1] the probability, mean of the heads.
        """
        with torch.autocast(queries.device.type, enabled=False):
            batch, sets, count, heads, _ = keys.shape
            organs = values.shape[1]
            centre = at.float().mean(2, keepdim=True)  # near 0 the squares lose nothing
            here = ((places.float().unsqueeze(1) - centre) / REACH_MM).unsqueeze(3)  # [B, S, N, 1, ndim]
            there = ((at.float() - centre) / REACH_MM).unsqueeze(3)
            precision = (-2 * self.log_sigma).exp().view(heads, 1)
            asked = (queries.float() * self.log_temperature.exp().view(heads, 1)).unsqueeze(1)
            one = asked.new_ones(batch, sets, asked.shape[2], heads, 1)
            q = torch.cat((asked.expand(-1, sets, -1, -1, -1), here * precision, one), dim=-1)
            distance = -0.5 * there.square().sum(-1, keepdim=True) * precision
            k = torch.cat((
                keys.float(), there.expand(-1, -1, -1, heads, -1), distance.expand(batch, sets, count, heads, 1)
            ), dim=-1)  # fmt: skip
            # [B S, K / S, M, H, c + 1] -> [B S, H, M, K / S (c + 1)]: one attention for all organs that share keys
            v = values.float().view(batch * sets, organs // sets, count, heads, -1).permute(0, 3, 2, 1, 4).flatten(3)
            q, k = (x.flatten(0, 1).transpose(1, 2).contiguous() for x in (q, k))
            mask = None
            if sets > 1 or organs == 1:
                mask = (valid | ~valid.any(-1, keepdim=True)).view(batch * sets, 1, 1, count)
            v = v.contiguous()
            parts = q.split(max(1, AT_ONCE // count), dim=2)
            read = torch.cat([F.scaled_dot_product_attention(p, k, v, attn_mask=mask, scale=1.0) for p in parts], dim=2)
            read = read.unflatten(-1, (organs // sets, -1)).permute(0, 3, 2, 1, 4).flatten(0, 1)  # [B K, N, H, c + 1]
        return read[..., :-1].flatten(2), read[..., -1].mean(2).unsqueeze(-1)
