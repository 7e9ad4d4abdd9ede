"""Scribbles on the background, without which a network that learns from scribbles finds organs everywhere.

drawn   strokes of the same style near the organs, as the scribbles of ACDC lie around the heart, and on slices without
        an organ anywhere
erode   no hand at all, CmFNet's "AutoBG": erode what is outside all organs, and take the skeleton of what remains, as
        WSL4MIS's generator does
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt

from nnunet_multimodal.data.scribbles import simulate_scribble
from nnunet_multimodal.data.skeleton import thin_out
from nnunet_multimodal.errors import UsageError

NEAR = (3.0, 24.0)  # pixels of a 256x256 image from an organ: a stroke is neither on its border nor far away

# (outside of the organs [Y, X], distance to them or None if there is none, generator, style, scale) -> bool [Y, X]
_Draw = Callable[[np.ndarray, "np.ndarray | None", np.random.Generator, str, float], np.ndarray]


def background_scribbles(
    labels: np.ndarray,
    rng: np.random.Generator,
    how: str = "drawn",
    style: str = "freeform",
    scale: float = 1.0,
    every: int = 1,
    axis: int = 0,
    slices: np.ndarray | None = None,
    body: np.ndarray | None = None,
) -> np.ndarray:
    """Scribble outside of all organs, slice by slice.

    Args:
        labels: volume [Z, Y, X], 0 outside of the organs.
        rng: of the strokes.
        how: one of ``BACKGROUNDS``.
        style: of the strokes where they are drawn.
        scale: of the strokes, see ``scribble_scale``.
        every: of the slices without an organ, every n-th is drawn on.
        axis: across which the slices are taken.
        slices: bool, which slices with an organ are drawn on; None is all.
        body: bool of the shape of ``labels``, to stay inside of; None is everywhere.

    Returns:
        bool of the shape of ``labels``, nowhere on an organ.

    Raises:
        UsageError: ``how`` is not known.
    """
    if how not in BACKGROUNDS:
        raise UsageError(f"Unknown kind of background scribbles '{how}'. There is: {', '.join(BACKGROUNDS)}.")
    organs = np.moveaxis(labels != 0, axis, 0)
    free = ~organs if body is None else ~organs & np.moveaxis(body, axis, 0)
    holding = organs.any(axis=(1, 2))
    chosen = holding if slices is None else holding & slices
    without = np.flatnonzero(~holding)
    scribbles = np.zeros(labels.shape, dtype=bool)
    drawn = np.moveaxis(scribbles, axis, 0)
    for z in sorted([*np.flatnonzero(chosen), *without[len(without) // 2 % every :: every]]):
        if free[z].any():
            distance = distance_transform_edt(~organs[z]) if holding[z] else None
            drawn[z] = BACKGROUNDS[how](free[z], distance, rng, style, scale) & free[z]
    return scribbles


def _drawn(
    free: np.ndarray, distance: np.ndarray | None, rng: np.random.Generator, style: str, scale: float
) -> np.ndarray:
    near = free if distance is None else free & (distance >= NEAR[0] * scale) & (distance <= NEAR[1] * scale)
    return simulate_scribble(near if near.any() else free, rng, style, scale)


def _erode(
    free: np.ndarray, distance: np.ndarray | None, rng: np.random.Generator, style: str, scale: float
) -> np.ndarray:
    return thin_out(free, rng, scale)


BACKGROUNDS: dict[str, _Draw] = {"drawn": _drawn, "erode": _erode}
