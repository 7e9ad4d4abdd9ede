"""Another tissue contrast: grey values go through a random piecewise-linear curve."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

SAMPLED_VOXELS = 1024  # quantiles from a regular sample: sorting a 3D patch would cost more than the rest of the chain
SATURATION = 0.005  # share of the voxels beyond either end of the curve; one bright vessel must not set the range
SMALLEST_STEP = 0.06  # between two knots, as a share of the intensity range; steeper curves show noise as structure
LEAST_RISE = 0.1  # of a monotone curve between two knots, as a share of the largest: no two tissues quite merge
IN_CACHE = 65536  # voxels worked on at a time; passes over a whole 3D patch would wait for memory
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
        kind = np.random.randint(3)
        if kind == ARBITRARY:
            levels = np.random.uniform(size=inner + 2).tolist()
        else:
            levels = np.random.uniform(LEAST_RISE, 1, size=inner + 2).cumsum().tolist()
        if kind == FALLING:
            levels.reverse()
        return {
            "knots": [0.0, *sorted(np.random.uniform(size=inner).tolist()), 1.0],
            "levels": levels,
            "by_quantile": np.random.uniform() < 0.5,
            "air": np.random.uniform(*AIR) if np.random.uniform() < self.p_dark_air else None,
        }

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return torch.stack([self._remap(channel, **params) for channel in img])

    @staticmethod
    def _remap(
        image: torch.Tensor, knots: list[float], levels: list[float], by_quantile: bool, air: float | None
    ) -> torch.Tensor:
        sample = np.sort(image.flatten()[:: max(1, image.numel() // SAMPLED_VOXELS)].numpy())

        def quantile(share: float) -> float:
            return float(sample[round((SATURATION + (1 - 2 * SATURATION) * share) * (len(sample) - 1))])

        low, high = quantile(0), quantile(1)
        if not high > low:
            return torch.zeros_like(image)
        positions = [quantile(knot) if by_quantile else low + (high - low) * knot for knot in knots]
        darkest, brightest = min(levels), max(levels)
        levels = [(level - darkest) / (brightest - darkest) for level in levels]
        if air is not None:
            end = low + air * (high - low)
            tissue = sum(position <= end for position in positions)  # the first knot above the air
            positions, levels = (
                [low, end, *positions[tissue:]],
                [0.0, float(np.interp(end, positions, levels)), *levels[tissue:]],
            )
        return piecewise_linear(image, *_spread(positions, levels))


def piecewise_linear(image: torch.Tensor, positions: Sequence[float], levels: Sequence[float]) -> torch.Tensor:
    """The curve through (positions, levels), constant beyond its ends, at every voxel.

    f(x) = level_0 + sum_i bend_i * (max(x, position_i) - position_i), where bend_i is by how much the slope changes at
    knot i: a few passes of plain arithmetic, and no search for each voxel's interval. Positions must rise.
    """
    knots = list(zip(positions, levels))
    slopes = [(f1 - f0) / (x1 - x0) for (x0, f0), (x1, f1) in pairwise(knots)]
    bends = [slope - before for before, slope in pairwise([0.0, *slopes])]
    constant = levels[0] - sum(bend * position for bend, position in zip(bends, positions))
    result = torch.empty(image.shape, dtype=image.dtype)  # contiguous, whatever view the image is
    for part, out in zip(image.reshape(-1).split(IN_CACHE), result.view(-1).split(IN_CACHE)):
        part = part.clamp(positions[0], positions[-1])
        torch.mul(part, bends[0], out=out).add_(constant)
        for position, bend in zip(positions[1:], bends[1:]):
            out.add_(part.clamp_min(position), alpha=bend)
    return result


def _spread(positions: Sequence[float], levels: Sequence[float]) -> tuple[list[float], list[float]]:
    """The knots that are ``SMALLEST_STEP`` apart; in between, the curve would be so steep that it shows only noise."""
    gap = SMALLEST_STEP * (positions[-1] - positions[0])
    kept = [0]
    for i in range(1, len(positions) - 1):
        if positions[i] - positions[kept[-1]] >= gap and positions[-1] - positions[i] >= gap:
            kept.append(i)
    kept.append(len(positions) - 1)
    return [positions[i] for i in kept], [levels[i] for i in kept]
