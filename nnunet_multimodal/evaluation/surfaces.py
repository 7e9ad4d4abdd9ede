"""Surfaces of two masks and the distances between them, in mm, by one of two published definitions.

``border`` (MONAI): the surface is the mask's voxels with a face neighbour outside it; each counts the same.
``area`` (Nikolov et al. 2018, arXiv 1809.04430; Google's surface-distance): the surface runs between voxel centres;
each piece counts by its area in mm².

In both, what lies outside the image is background: a mask at the image's edge has a surface there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFINITIONS = {
    "border": "voxels of the mask with a face neighbour outside it, each counted once (MONAI)",
    "area": "surface pieces between voxel centres, weighted by their area in mm² (Google's surface-distance)",
}
PERCENTILE = 95


@dataclass(frozen=True)
class Distances:
    """From each piece of one surface to the nearest piece of the other.

    Attributes:
        mm: float32 [n]. Rounded to float32, as MONAI does, so that a distance of exactly the tolerance is within it.
        weight: float64 [n], 1 (border) or mm² (area).
    """

    mm: np.ndarray
    weight: np.ndarray


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], surface: str
) -> tuple[Distances, Distances]:
    """Distances from the prediction's surface to the reference's, and the other way round.

    Args:
        prediction, reference: bool, the same shape, 2D or 3D, neither of them empty.
        spacing: mm along each axis of the arrays, in their order.
        surface: a key of :data:`DEFINITIONS`.
    """
    prediction, reference = np.pad(prediction, 1), np.pad(reference, 1)  # outside is background
    find = _border if surface == "border" else _surfels
    on_prediction, prediction_weight = find(prediction, spacing)
    on_reference, reference_weight = find(reference, spacing)
    return (
        Distances(_nearest(on_prediction, on_reference, spacing), prediction_weight),
        Distances(_nearest(on_reference, on_prediction, spacing), reference_weight),
    )


def normalized_surface_dice(there: Distances, back: Distances, tolerance: float) -> float:
    """NSD: the share of both surfaces that is at most ``tolerance`` mm from the other (arXiv 1809.04430, eq. 2)."""
    within = sum(float(d.weight[d.mm <= np.float32(tolerance)].sum()) for d in (there, back))
    return within / float(there.weight.sum() + back.weight.sum())


def hausdorff_95(there: Distances, back: Distances, surface: str) -> float:
    """HD95: the larger of the two directed 95th percentiles.

    ``border`` interpolates between the two nearest distances (as torch.quantile, so MONAI); ``area`` takes the first
    distance at which 95 % of the area is reached (as surface-distance).
    """
    return max(_percentile(there, surface), _percentile(back, surface))


def average_distance(there: Distances, back: Distances) -> float:
    """ASD: the mean over both surfaces taken together, by weight (MONAI's with ``symmetric=True``)."""
    total = sum(float((d.mm * d.weight).sum()) for d in (there, back))
    return total / float(there.weight.sum() + back.weight.sum())


def _percentile(distances: Distances, surface: str) -> float:
    if surface == "border":
        return float(np.percentile(distances.mm.astype(np.float64), PERCENTILE))
    order = np.argsort(distances.mm, kind="stable")
    reached = np.cumsum(distances.weight[order])
    place = int(np.searchsorted(reached / reached[-1], PERCENTILE / 100))
    return float(distances.mm[order][min(place, len(order) - 1)])


def _border(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface is (bool, as the padded mask), and a weight of 1 for each of its voxels."""
    interior = mask.copy()
    for axis in range(mask.ndim):
        # The padding is background, so np.roll's wrap-around brings in what lies outside.
        interior &= np.roll(mask, 1, axis)
        interior &= np.roll(mask, -1, axis)
    edge = mask & ~interior
    return edge, np.ones(int(edge.sum()))


def _surfels(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where 2x2(x2) neighbourhoods hold both inside and outside (bool, one shorter per axis), and their areas."""
    areas, kernel = _area_table(spacing)
    code = np.zeros([length - 1 for length in mask.shape], dtype=np.uint8)
    for corner in itertools.product((0, 1), repeat=mask.ndim):
        part = mask[tuple(slice(step, length - 1 + step) for step, length in zip(corner, mask.shape))]
        code += part.astype(np.uint8) * np.uint8(kernel[corner])
    edge = (code != 0) & (code != len(areas) - 1)
    return edge, areas[code[edge]]


@lru_cache(maxsize=64)
def _area_table(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Area in mm² (length in mm in 2D) of every neighbourhood code, and the kernel that makes the code (MONAI's)."""
    from monai.metrics.utils import get_code_to_measure_table

    table, kernel = get_code_to_measure_table(spacing, device="cpu")
    return np.asarray(table, dtype=np.float64), np.asarray(kernel).reshape((2,) * len(spacing))


def _nearest(start: np.ndarray, goal: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """float32 [n]: mm from each true voxel of ``start`` to the nearest of ``goal``."""
    from scipy.spatial import cKDTree

    distances = np.zeros(int(np.count_nonzero(start)), dtype=np.float32)
    apart = ~goal[start]  # where the surfaces coincide there is nothing to search
    if apart.any():
        scale = np.asarray(spacing, dtype=np.float64)
        # On a grid an unbalanced tree is searched as fast and built faster.
        tree = cKDTree(np.argwhere(goal) * scale, leafsize=32, balanced_tree=False)
        distances[apart] = tree.query(np.argwhere(start)[apart] * scale)[0]
    return distances
