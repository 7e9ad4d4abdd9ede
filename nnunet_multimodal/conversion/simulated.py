"""Scribbles drawn on the label map of a case, background among them: what ``scribbles simulate`` writes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_multimodal.conversion.crossmr import draw_scribbles, drawing_plane
from nnunet_multimodal.conversion.images import Volume
from nnunet_multimodal.data.background import background_scribbles
from nnunet_multimodal.errors import DataProblem

UNLABELLED = 255  # where nobody drew, in a file with drawn background
BACKGROUND_STREAM = 1  # of random numbers: with or without background, the organs get the same scribbles


@dataclass(frozen=True)
class Drawing:
    """How scribbles are drawn.

    Attributes:
        style: of the strokes, see ``data.scribbles``.
        background: see ``data.background``; "none" leaves it out.
        every: on every n-th slice of an organ.
        seed: the same for the same scribbles.
    """

    style: str = "freeform"
    background: str = "none"
    every: int = 1
    seed: int = 0


def draw_weak_labels(
    label: Volume, classes: Sequence[int], case: str, drawing: Drawing, body: np.ndarray | None = None
) -> np.ndarray:
    """Scribbles of a label map.

    Args:
        label: [Z, Y, X]; what is not of ``classes`` is background.
        classes: the labels to draw.
        case: its name, of which the random numbers depend together with the seed.
        drawing: how to draw.
        body: bool [Z, Y, X], background is drawn inside of it only; None is everywhere.

    Returns:
        uint8 or uint16 [Z, Y, X]: k class k, and 0 elsewhere; with background that is 0, and 255 elsewhere.

    Raises:
        DataProblem: background is to be drawn, but the class numbers reach 255.
    """
    highest = max(classes)
    if drawing.background != "none" and highest >= UNLABELLED:
        raise DataProblem(f"{label.path} has class {highest}; with background, classes up to {UNLABELLED - 1} can be.")
    drawn = draw_scribbles(label, classes, drawing.seed, case, drawing.every, drawing.style)
    result = drawn.astype(np.uint8 if highest < 256 else np.uint16)
    if drawing.background == "none":
        return result
    axis, scale = drawing_plane(label)
    rng = np.random.default_rng([drawing.seed, zlib.crc32(case.encode()), BACKGROUND_STREAM])
    organs = np.where(np.isin(label.data, classes), label.data, 0)
    slices = np.asarray(np.moveaxis(drawn > 0, axis, 0).any(axis=(1, 2)))
    free = background_scribbles(
        organs, rng, drawing.background, drawing.style, scale, drawing.every, axis, slices, body
    )
    result[(drawn == 0) & ~free] = UNLABELLED
    return result
