"""The contour style of scribbles: a broken line that follows the border of the organ a little inside of it.

As the contour scribbles of ScribblePrompt (Wong et al., ECCV 2024): a line at a random depth, warped by smooth noise
and broken where another smooth noise is low. Here the line is a level of the distance to the border, so that its
distance from the border is known, and the warp is that of the level.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, zoom

DEPTH = (2.0, 6.0)  # pixels of a 256x256 image between border and line, as all lengths here
DEEPEST = 0.6  # of the organ's own depth: a slender organ gets its line nearer to the border
WAVER = 1.0  # standard deviation of the line's depth along its way
HALF_WIDTH = 1.0
WARP_GRAIN = 12  # pixels from one bend of the line to the next
GAP_GRAIN = 16  # pixels from one gap to the next, about half of them gap


def contour(mask: np.ndarray, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """A broken line inside the border of a mask [Y, X] with foreground; bool, may be empty where the mask is tiny."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    level = min(rng.uniform(*DEPTH) * scale, DEEPEST * depth.max())
    wavering = depth + WAVER * scale * smooth_noise(mask.shape, WARP_GRAIN * scale, rng)
    line = mask & (np.abs(wavering - level) <= HALF_WIDTH * scale)
    broken = line & (smooth_noise(mask.shape, GAP_GRAIN * scale, rng) > 0)
    return broken if broken.any() else line


def smooth_noise(shape: tuple[int, ...], grain: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise on a grid of one point per ``grain`` pixels, linear in between; float [Y, X]."""
    points = tuple(int(np.ceil(size / grain)) + 1 for size in shape)
    coarse = rng.standard_normal(points)
    wide = zoom(coarse, [(size + grain) / count for size, count in zip(shape, points)], order=1, grid_mode=False)
    return wide[: shape[0], : shape[1]]
