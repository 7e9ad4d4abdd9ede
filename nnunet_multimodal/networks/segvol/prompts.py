"""Prompts as tokens: what is asked for, where it is, and where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.segvol.positions import RandomPositions

POSITIVE, NEGATIVE, PADDING = 1, 0, -1  # labels of points
POINT_KINDS = 4  # negative, positive, the box's first corner, its last


@dataclass(frozen=True)
class Prompts:
    """P questions about the images of a batch; each asks for one thing, all in the same way.

    Attributes:
        image: [P] long, which image of the batch each is about.
        text: [P] long, row of the text that it asks for; None for no text.
        points: [P, N, 3], voxels of the window (0 is the centre of the first); None for no points.
        labels: [P, N], of each point: POSITIVE, NEGATIVE or PADDING (it is no point).
        boxes: [P, 2, 3], first and last voxel; None for no box.
    """

    image: Tensor
    text: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and their labels go together: give both or none.")
        if self.text is None and self.points is None and self.boxes is None:
            raise ValueError("a question needs a text, points or a box: all three are None.")

    def to(self, device: torch.device) -> Prompts:
        """The same on another device."""
        text, points, labels, boxes = (
            None if part is None else part.to(device, non_blocking=True)
            for part in (self.text, self.points, self.labels, self.boxes)
        )
        return Prompts(self.image.to(device, non_blocking=True), text, points, labels, boxes)


class PromptEncoder(nn.Module):
    """Points, boxes and text as tokens [P, T, C].

    A point is the code of its place plus what was learned for positive or negative ones; padding is one learned token
    without a place. A box is its two corners. Where there are points and no box, one padding token follows them, as in
    SAM. Text is a token as it is.

    SAM's encoder of masks is left out: SegVol never gives it one, and its layers are of 2D. The learned code for "no
    mask" is added to every place of the image.

    Args:
        width: C.
        window: size of the images.
        as_segvol: see ``RandomPositions``.
    """

    def __init__(self, width: int, window: Sequence[int], as_segvol: bool = False) -> None:
        super().__init__()
        self.width, self.window = width, tuple(window)
        self.pe_layer = RandomPositions(width, as_segvol)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(POINT_KINDS))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.no_mask_embed = nn.Embedding(1, width)

    def forward(self, prompts: Prompts, text: Tensor | None) -> Tensor:
        """Tokens of prompts; ``text`` [P, C] are the projected embeddings of ``prompts.text``."""
        parts = []
        if prompts.points is not None:
            assert prompts.labels is not None
            points, labels = prompts.points, prompts.labels
            if prompts.boxes is None:
                points = torch.cat([points, torch.zeros_like(points[:, :1])], dim=1)
                labels = torch.cat([labels, torch.full_like(labels[:, :1], PADDING)], dim=1)
            parts.append(self._points(points, labels))
        if prompts.boxes is not None:
            kinds = torch.cat([self._kind(2), self._kind(3)])  # [2, C]
            parts.append(self.pe_layer.points(prompts.boxes, self.window) + kinds)
        if text is not None:
            parts.append(text[:, None])
        return torch.cat(parts, dim=1)

    def _points(self, points: Tensor, labels: Tensor) -> Tensor:
        """[P, N, 3], [P, N] -> [P, N, C]."""
        places = self.pe_layer.points(points, self.window)
        labels = labels[..., None]
        kinds = torch.where(labels == POSITIVE, self._kind(1), self._kind(0))
        return torch.where(labels == PADDING, self.not_a_point_embed.weight, places + kinds)

    def _kind(self, number: int) -> Tensor:
        weight = self.point_embeddings[number].weight
        assert isinstance(weight, Tensor)
        return weight
