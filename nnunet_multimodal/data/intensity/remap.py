"""Another tissue contrast: grey values go through a random piecewise-linear curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

SAMPLED_VOXELS = 4096  # quantiles from a regular sample: sorting a 3D patch would cost more than the rest of the chain
SATURATION = 0.005  # share of the voxels beyond either end of the curve; one bright vessel must not set the range
SMALLEST_STEP = 0.06  # between two knots, as a share of the intensity range; steeper curves show noise as structure
LEAST_RISE = 0.1  # of a monotone curve between two knots, as a share of the largest: no two tissues quite merge
AIR = (0.02, 0.10)  # where in the intensity range air ends, as a share of it: noise and ghosts, but no tissue yet
RISING, FALLING, ARBITRARY = range(3)


class Remap(ImageOnlyTransform):
    """Random piecewise-linear intensity curve: one third rising, one third falling, one third arbitrary.

    The knots lie at random quantiles or at random shares of the intensity range, half the samples each: quantiles
    resolve the tissues that fill the image, shares of the range those that are rare and bright. With probability
    ``p_dark_air`` the lowest intensities stay the darkest, whatever becomes of the tissues, as in every real contrast.

    Image [C, ...] of any range; output in [0, 1].

    Args:
        knots: least and most inner knots (inclusive); fewer keep tissues together, more take them apart.
        p_dark_air: share of the samples whose air stays dark; not all, or the outline of the body would give it away.
    """

    def __init__(self, knots: tuple[int, int] = (2, 6), p_dark_air: float = 0.75) -> None:
        super().__init__()
        self.knots = knots
        self.p_dark_air = p_dark_air

    def get_parameters(self, **data_dict: Any) -> dict:
        inner = np.random.randint(self.knots[0], self.knots[1] + 1)
        knots = np.concatenate([[0.0], np.sort(np.random.uniform(size=inner)), [1.0]])
        kind = np.random.randint(3)
        if kind == ARBITRARY:
            levels = np.random.uniform(size=inner + 2)
        else:
            levels = np.cumsum(np.random.uniform(LEAST_RISE, 1, size=inner + 2))
        if kind == FALLING:
            levels = levels[::-1]
        air = np.random.uniform(*AIR) if np.random.uniform() < self.p_dark_air else None
        return {"knots": knots, "levels": levels, "by_quantile": np.random.uniform() < 0.5, "air": air}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return torch.stack([self._remap(channel, **params) for channel in img])

    @staticmethod
    def _remap(
        image: torch.Tensor, knots: np.ndarray, levels: np.ndarray, by_quantile: bool, air: float | None
    ) -> torch.Tensor:
        sample = np.sort(image.flatten()[:: max(1, image.numel() // SAMPLED_VOXELS)].numpy())

        def quantile(share: float | np.ndarray) -> np.ndarray:
            return sample[np.rint(np.multiply(share, len(sample) - 1)).astype(int)].astype(float)

        low, high = quantile(SATURATION), quantile(1 - SATURATION)
        if not high > low:
            return torch.zeros_like(image)
        if by_quantile:
            positions = quantile(SATURATION + (1 - 2 * SATURATION) * knots)
        else:
            positions = low + (high - low) * knots
        levels = (levels - levels.min()) / (np.ptp(levels) or 1.0)
        if air is not None:
            end = low + air * (high - low)
            levels = np.concatenate([[0.0], [np.interp(end, positions, levels)], levels[positions > end]])
            positions = np.concatenate([[low], [end], positions[positions > end]])
        return piecewise_linear(image, *_spread(positions, levels))


def piecewise_linear(image: torch.Tensor, positions: np.ndarray, levels: np.ndarray) -> torch.Tensor:
    """The curve through (positions, levels), constant beyond its ends, at every voxel.

    f(x) = level_0 + sum_i bend_i * (max(x, position_i) - position_i), where bend_i is by how much the slope changes at
    knot i: a few passes of plain arithmetic, and no search for each voxel's interval. Positions must rise.
    """
    slopes = np.diff(levels) / np.diff(positions)
    bends = np.diff(slopes, prepend=0.0)
    image = image.clamp(float(positions[0]), float(positions[-1]))
    result = image.mul(float(bends[0])).add_(float(levels[0] - bends @ positions[:-1]))
    above = torch.empty_like(image)
    for position, bend in zip(positions[1:-1], bends[1:]):
        result.add_(torch.clamp(image, min=float(position), out=above), alpha=float(bend))
    return result


def _spread(positions: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The knots that are ``SMALLEST_STEP`` apart; in between, the curve would be so steep that it shows only noise."""
    gap = SMALLEST_STEP * (positions[-1] - positions[0])
    kept = [0]
    for i in range(1, len(positions) - 1):
        if positions[i] - positions[kept[-1]] >= gap and positions[-1] - positions[i] >= gap:
            kept.append(i)
    kept.append(len(positions) - 1)
    return positions[kept], levels[kept]
