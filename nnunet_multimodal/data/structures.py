"""Things to refer to that nobody labelled: coherent pieces of an image, and blobs.

A referring network that only ever saw four organs answers a scribble on a fifth with nothing. What teaches it to follow
any scribble are targets of any kind (methods.md 1.5): half of them organs, half of them pieces of the reference image
that an algorithm without labels finds.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from skimage.segmentation import felzenszwalb

SHARE = (0.002, 0.15)  # of the image that a piece may take: from a gland to a liver
LEAST = 12  # voxels; less cannot be scribbled on
SMALL_ENOUGH = 160 * 160  # voxels; what is larger is looked at on every second voxel of each axis
TRIES = 6


def find_structure(image: np.ndarray, rng: np.random.Generator, cells: np.ndarray | None = None) -> np.ndarray:
    """One piece of the image; a blob if none is found.

    Args:
        image: [Y, X] or [Z, Y, X], any scale.
        rng: the same state finds the same piece.
        cells: from ``find_cells``; None leaves these out.

    Returns:
        bool of the image's shape, neither empty nor all of it.
    """
    step = coarse_steps(image.shape)
    coarse = image[tuple(slice(None, None, s) for s in step)]
    smooth: dict[float, np.ndarray] = {}
    for _ in range(TRIES):
        kind = rng.random()
        if kind < 0.15:
            break
        if kind < 0.5 and cells is not None:
            piece = _cell(cells, rng)
        else:
            sigma = float(rng.choice((0.6, 1.0, 1.6)))
            if sigma not in smooth:
                smooth[sigma] = ndimage.gaussian_filter(coarse, sigma)
            piece = enlarged(_band(smooth[sigma], rng), step, image.shape)
        if _fits(piece):
            return piece
    for _ in range(TRIES):
        piece = blob(image.shape, rng)
        if _fits(piece):
            return piece
    return _box(image.shape)


def find_cells(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image cut into pieces of similar intensity at a random scale: int [Y, X], numbered from 0.

    Felzenszwalb and Huttenlocher, Efficient graph-based image segmentation (IJCV 2004), from scikit-image.
    """
    step = coarse_steps(image.shape)
    coarse = image[tuple(slice(None, None, s) for s in step)]
    low, high = np.percentile(coarse, (1, 99))
    scaled = np.clip((coarse - low) / max(high - low, 1e-6), 0, 1)
    scale = float(np.exp(rng.uniform(np.log(5), np.log(80))))
    sigma = float(rng.uniform(0.5, 1.2))
    cells = felzenszwalb(scaled, scale=scale, sigma=sigma, min_size=int(rng.integers(15, 60)))
    return enlarged(cells, step, image.shape)


def blob(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """An ellipse at a random place whose outline waves."""
    size = np.array(shape, dtype=float)
    centre = rng.uniform(0.15, 0.85, len(shape)) * size
    radius = rng.uniform(0.04, 0.16, len(shape)) * size.min()
    radius = np.maximum(np.minimum(radius, size / 2), 1.5)
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    along = [(axis - c) / r for axis, c, r in zip(axes, centre, radius)]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = along[-2], along[-1]
    along[-2], along[-1] = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
    distance = np.sqrt(sum(a**2 for a in along))
    heading = np.arctan2(along[-2], along[-1])
    wave = sum(rng.uniform(0, 0.35 / n) * np.cos(n * heading + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 5))
    return np.asarray(distance < 1 + wave)


def _cell(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random piece of all, at times with a neighbour."""
    centre = tuple(rng.integers(0, n) for n in cells.shape)
    piece = cells == cells[centre]
    if rng.random() < 0.3:
        around = np.unique(cells[ndimage.binary_dilation(piece) & ~piece])
        if len(around):
            piece |= cells == rng.choice(around)
    return piece


def _band(smooth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The connected piece around a random voxel whose intensity is close to that voxel's.

    Not around the darkest voxels, most of which are air.
    """
    bright = np.flatnonzero(smooth >= np.quantile(smooth, rng.uniform(0.1, 0.6)))
    seed = tuple(int(i) for i in np.unravel_index(int(rng.choice(bright)), smooth.shape))
    width = float(np.exp(rng.uniform(np.log(0.1), np.log(0.6)))) * float(smooth.std())
    near = np.abs(smooth - smooth[seed]) <= width
    opened = ndimage.binary_opening(near, iterations=int(rng.integers(1, 3)))
    parts, count = ndimage.label(opened)
    if not count:
        return opened
    number = parts[seed] or 1 + int(rng.integers(count))  # the voxel itself may be lost to the opening
    return ndimage.binary_fill_holes(parts == number)


def coarse_steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Every how many voxels of each axis are looked at: 1 in small images, 2 in large ones."""
    return tuple(2 if math.prod(shape) > SMALL_ENOUGH and size >= 32 else 1 for size in shape)


def enlarged(piece: np.ndarray, step: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """What was found on every ``step``-th voxel, on all of them."""
    for axis, (factor, size) in enumerate(zip(step, shape)):
        if factor > 1:
            piece = np.repeat(piece, factor, axis).take(range(size), axis)
    return piece


def _fits(piece: np.ndarray) -> bool:
    count = int(np.count_nonzero(piece))
    return max(LEAST, SHARE[0] * piece.size) <= count <= SHARE[1] * piece.size


def _box(shape: tuple[int, ...]) -> np.ndarray:
    """The middle third of each axis: what is left where an image is too small for anything else."""
    piece = np.zeros(shape, dtype=bool)
    piece[tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in shape)] = True
    return piece
