"""Left and right put right in a label map, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunet_multimodal.data.side_checks import CLEARLY, Pieces, find_pairs, midline_of


@dataclass
class FixedSides:
    """A label map whose pieces have the name of the side that they lie on.

    Attributes:
        labels: [Z, Y, X], a new array.
        changed: ``{"from", "to", "pieces", "voxels"}`` for each organ of which pieces got the other name.
        ambiguous: ``{"organ", "pieces", "voxels", "why"}`` for each organ of which pieces were left as they are because
            their side is not clear.
    """

    labels: np.ndarray
    changed: list[dict[str, Any]] = field(default_factory=list)
    ambiguous: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For predictions.json."""
        return {"changed": self.changed, "ambiguous": self.ambiguous}


def fix_sides(labels: np.ndarray, label_names: Mapping[str, int], affine: np.ndarray) -> FixedSides:
    """Each connected piece of a left or a right organ gets the name of the side of the midline on which it lies.

    MRSegmentator 1.0 did this by the majority of the labels in the largest piece and in all the rest, so that both
    could become the same side; we ask where a piece lies.

    Args:
        labels: whole numbers [Z, Y, X].
        label_names: name -> id.
        affine: [4, 4], voxel index (x, y, z) to mm, RAS.

    Example:
        >>> labels = np.zeros((4, 4, 12), int)
        >>> labels[1:3, 1:3, 1:4], labels[1:3, 1:3, 8:11] = 2, 1
        >>> fix_sides(labels, {"left_kidney": 1, "right_kidney": 2}, np.eye(4)).labels[1, 1].tolist()
        [0, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 0]
    """
    fixed = FixedSides(labels.copy())
    pairs = find_pairs(labels, label_names, affine)
    middle = midline_of(labels, label_names, affine, pairs)
    for pair in pairs:
        midline = middle if pair.midline is None else pair.midline
        for side, (name, pieces) in enumerate(zip(pair.names, pair.pieces)):
            if not len(pieces):
                continue
            if midline is None:
                whole = np.ones(len(pieces), dtype=bool)
                fixed.ambiguous.append(_entry(name, pieces, whole, "no organ tells where the midline is"))
                continue
            share = pieces.shares_left_of(midline, affine)
            unclear = (share > 1 - CLEARLY) & (share < CLEARLY)
            if unclear.any():
                fixed.ambiguous.append(_entry(name, pieces, unclear, "on both sides of the midline"))
            moved = ~unclear & ((share >= CLEARLY) != (side == 0))
            if moved.any():
                fixed.labels[pieces.box][np.insert(moved, 0, False)[pieces.components]] = pair.ids[1 - side][0]
                counts = {"pieces": int(moved.sum()), "voxels": int(pieces.voxels[moved].sum())}
                fixed.changed.append({"from": name, "to": pair.names[1 - side], **counts})
    return fixed


def _entry(name: str, pieces: Pieces, chosen: np.ndarray, why: str) -> dict[str, Any]:
    counts = {"pieces": int(chosen.sum()), "voxels": int(pieces.voxels[chosen].sum())}
    return {"organ": name, **counts, "why": why}
