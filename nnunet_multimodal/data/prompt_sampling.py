"""Prompts drawn from a label, as a user would give them; numpy's random numbers.

Coordinates are voxel indices (z, y, x) of the window, 0 for the centre of the first voxel.
"""

from __future__ import annotations

import numpy as np

from nnunet_multimodal.networks.segvol import NEGATIVE, PADDING, POSITIVE

# SegEVOLution's six; a question is of one of them.
COMBINATIONS = (
    ("text",),
    ("points",),
    ("box",),
    ("text", "points"),
    ("text", "box"),
    ("points", "box"),
)


def sample_points(
    mask: np.ndarray, rng: np.random.Generator, positive: int, negative: int, labelled: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Points on a mask and beside it: one to ``1 + positive`` on it, up to ``negative`` off it (SegVol: 10 and 10).

    Args:
        mask: bool [z, y, x], not empty.
        rng: of random numbers.
        positive: at most so many more than one on the mask.
        negative: at most so many off the mask; none where the mask is everything.
        labelled: bool [z, y, x], where it is known what is off the mask; None for everywhere.

    Returns:
        float32 [1 + positive + negative, 3] and int64 of the same length: labels, padded with PADDING.
    """
    flat = mask.reshape(-1)
    inside = np.flatnonzero(flat)
    if not len(inside):
        raise ValueError("the mask is empty: no point lies on it.")
    count = 1 + positive + negative
    points, labels = np.zeros((count, 3), np.float32), np.full(count, PADDING, np.int64)
    chosen = rng.choice(inside, 1 + int(rng.integers(positive + 1)))
    wanted = int(rng.integers(negative + 1))
    if labelled is None:
        # Rejection: a mask is hardly ever most of the window, and a list of all that it is not is long.
        tried = rng.integers(flat.size, size=4 * wanted)
        outside = tried[~flat[tried]][:wanted]
    else:
        known = np.flatnonzero(labelled.reshape(-1) & ~flat)
        outside = rng.choice(known, wanted) if len(known) else known
    for at, (voxels, label) in enumerate(((chosen, POSITIVE), (outside, NEGATIVE))):
        begin = at * len(chosen)
        points[begin : begin + len(voxels)] = np.stack(np.unravel_index(voxels, mask.shape), axis=-1)
        labels[begin : begin + len(voxels)] = label
    return points, labels


def box_of(mask: np.ndarray) -> np.ndarray | None:
    """int64 [2, 3], the first and last voxel of a mask along each axis; None for an empty one."""
    ends = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(there):
            return None
        ends.append((there[0], there[-1]))
    return np.array(ends).T


def grow_box(box: np.ndarray, rng: np.random.Generator, share: float, shape: tuple[int, ...]) -> np.ndarray:
    """A box that nobody drew to the voxel: each side moves outwards by up to ``share`` of the edge's length.

    Args:
        box: [2, 3], first and last voxel.
        rng: of random numbers.
        share: of the length of the edge; the result always holds the box.
        shape: of the window, which the result does not leave.
    """
    reach = share * (box[1] - box[0] + 1)
    moved = np.stack([box[0] - np.floor(rng.uniform(0, reach + 1)), box[1] + np.floor(rng.uniform(0, reach + 1))])
    return moved.clip(0, np.array(shape) - 1).astype(np.int64)


def shift_box(box: np.ndarray, rng: np.random.Generator, most: int, shape: tuple[int, ...]) -> np.ndarray:
    """A box drawn badly: each of its six numbers is off by up to ``most`` voxels, in either direction.

    Args:
        box: [2, 3], first and last voxel.
        rng: of random numbers.
        most: voxels; 0 leaves the box.
        shape: of the image, which the result does not leave. A box turned inside out is turned back.
    """
    moved = (box + rng.integers(-most, most + 1, size=box.shape)).clip(0, np.array(shape) - 1)
    return np.sort(moved, axis=0)
