"""The skeleton style of scribbles: one stroke through the middle of the organ.

After the generator of WSL4MIS (Luo et al., MICCAI 2022), with which the scribbles of WORD were made: erode a large
region, take Lee's skeleton, leave one way through it, thicken it, move it a little, cut it at the border of the organ.
Written anew on the bounding box of the mask, with three differences. Erosion stops half way to the middle, because a
slender organ such as the myocardium is eroded away otherwise. A branch is cut by taking the longest way through the
skeleton, not a random one. A stroke turns about its own middle, not that of the image, by which an organ far from the
middle loses its stroke altogether.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_cdt, label
from skimage.morphology import skeletonize

EROSION = (4, 10)  # pixels of a 256x256 image, as all lengths here; `scale` carries them over
ERODED_FROM = 900  # pixels of area; smaller regions are not eroded
MOVED_FROM = 1000  # pixels of area
MAX_SHIFT = 6
MAX_TURN = np.radians(15)
SMALLEST_PIECE = 15  # pixels; what a skeleton has beside its largest piece is drawn if it is longer

_Pixel = tuple[int, int]
_AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
_ALL_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def skeleton(mask: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """One stroke along the middle of each large piece of a mask [Y, X] with foreground; stays inside the mask."""
    thin = thin_out(mask, rng, scale)
    pieces, count = label(thin, _ALL_NEIGHBOURS)
    sizes = np.bincount(pieces.ravel())[1:]
    kept = [piece for piece in range(1, count + 1) if sizes[piece - 1] > SMALLEST_PIECE * scale]
    pixels = np.concatenate(
        [_longest_way(np.argwhere(pieces == piece), rng) for piece in kept or [int(sizes.argmax()) + 1]]
    )
    moved = _move(pixels, rng, scale) if mask.sum() > MOVED_FROM * scale**2 else pixels
    thickness = round(scale)  # 3 pixels wide at 256x256, 1 on less than half of that
    drawn = _thicken(moved, mask.shape, thickness) & mask
    return drawn if drawn.any() else _thicken(pixels, mask.shape, thickness) & mask


def thin_out(mask: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Lee's skeleton of a mask [Y, X] with foreground, eroded before if it is large; bool, never empty."""
    if mask.sum() > ERODED_FROM * scale**2:
        depth = distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
        steps = int(np.ceil(rng.uniform(*EROSION) * scale))  # each takes off a pixel, also across corners
        mask = depth > min(steps, int(depth.max()) // 2)
    thin: np.ndarray = skeletonize(mask, method="lee") > 0
    return thin if thin.any() else mask


def _longest_way(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of the connected pixels [n, 2] of a skeleton those on its longest way without a detour; a ring is cut open.

    In plain Python: a skeleton has some fifty pixels, and a sparse matrix of them takes longer to make than to walk on.
    """
    near = _neighbours({(y, x) for y, x in pixels.tolist()})
    if len(near) > 9 and min(map(len, near.values())) > 1:  # no loose end, and more than the nine that are cut out
        y, x = pixels[rng.integers(len(pixels))].tolist()
        near = _neighbours(near.keys() - {(y + dy, x + dx) for dy, dx in _AROUND} - {(y, x)})
        longest: Set[_Pixel] = set()
        while near:  # cut in two places at once, it may have come apart
            reached = _walk(next(iter(near)), near).keys()
            longest = max(longest, reached, key=len)
            near = {pixel: others for pixel, others in near.items() if pixel not in reached}
        near = _neighbours(longest)
    *_, end = _walk(next(iter(near)), near)
    before = _walk(end, near)
    *_, pixel = before
    way = [pixel]
    while (previous := before[way[-1]]) is not None:
        way.append(previous)
    return np.array(way)


def _neighbours(pixels: Set[_Pixel]) -> dict[_Pixel, list[_Pixel]]:
    """The pixels that each pixel touches, across corners too."""
    return {(y, x): [(y + dy, x + dx) for dy, dx in _AROUND if (y + dy, x + dx) in pixels] for y, x in sorted(pixels)}


def _walk(start: _Pixel, near: Mapping[_Pixel, Sequence[_Pixel]]) -> dict[_Pixel, _Pixel | None]:
    """Breadth first from a pixel: every pixel that can be reached, the farthest last, and the one before it."""
    before: dict[_Pixel, _Pixel | None] = {start: None}
    waiting = deque([start])
    while waiting:
        pixel = waiting.popleft()
        for other in near[pixel]:
            if other not in before:
                before[other] = pixel
                waiting.append(other)
    return before


def _move(pixels: np.ndarray, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Shift and turn a stroke as a whole; int [n, 2], may lie outside the image."""
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * scale
    turn = rng.uniform(-MAX_TURN, MAX_TURN)
    middle = pixels.mean(axis=0)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.rint((pixels - middle) @ rotation.T + middle + shift).astype(np.intp)


def _thicken(pixels: np.ndarray, shape: tuple[int, ...], thickness: int) -> np.ndarray:
    """bool of the shape: the pixels and those up to ``thickness`` away; that closes the holes turning has left, too."""
    canvas = np.zeros(shape, dtype=bool)
    inside = ((pixels >= 0) & (pixels < shape)).all(axis=1)
    canvas[tuple(pixels[inside].T)] = True
    return binary_dilation(canvas, _ALL_NEIGHBOURS, iterations=thickness) if thickness else canvas
