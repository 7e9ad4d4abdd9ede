"""Smooth random fields and soft solids: what the phantom's anatomy is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np

Vector: TypeAlias = "Sequence[float] | np.ndarray"


def spline_field(rng: np.random.Generator, shape: Sequence[int], cells: Sequence[int]) -> np.ndarray:
    """A smooth random field: uniform cubic B-splines over normally distributed control points.

    Args:
        rng: where the control points come from.
        shape: of the field.
        cells: intervals of the spline along each axis; more are rougher.

    Returns:
        float32 of ``shape``, mean about 0, standard deviation about 1.
    """
    field = rng.standard_normal([n + 3 for n in cells]).astype(np.float32)
    for axis, (size, count) in enumerate(zip(shape, cells)):
        field = np.moveaxis(np.tensordot(_basis(size, count), field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field) * np.float32((315 / 151) ** (len(shape) / 2))  # variance of B-spline weights


@lru_cache(maxsize=64)
def _basis(size: int, cells: int) -> np.ndarray:
    """Cubic B-spline weights [size, cells + 3] of points spread evenly over the intervals."""
    position = np.linspace(0, cells, size, endpoint=False) + 0.5 * cells / size
    cell = np.minimum(position.astype(int), cells - 1)
    t = position - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = np.zeros((size, cells + 3), np.float32)
    for k in range(4):
        basis[np.arange(size), cell + k] = weights[:, k]
    return basis


def texture(rng: np.random.Generator, shape: Sequence[int], spacing: Vector, scale: float) -> np.ndarray:
    """``spline_field`` whose structures are about ``scale`` mm wide on a grid of ``spacing`` mm."""
    return spline_field(rng, shape, [max(1, round(n * s / scale)) for n, s in zip(shape, spacing)])


def ellipsoid(
    points: Sequence[np.ndarray], centre: Vector, radii: Vector, turn: np.ndarray | None = None
) -> np.ndarray:
    """Distance-like value of an ellipsoid: below 0 inside, about mm from its surface near to it.

    Args:
        points: x, y, z in mm, of shapes that broadcast.
        centre, radii: mm.
        turn: rotation matrix [3, 3] from the body's axes to the ellipsoid's, or none.
    """
    offsets = [p - c for p, c in zip(points, centre)]
    if turn is not None:
        offsets = [sum(turn[i, j] * offsets[j] for j in range(3)) for i in range(3)]
    ratio = np.sqrt(np.asarray(sum((o / r) ** 2 for o, r in zip(offsets, radii))))
    return (ratio - 1) * np.float32(min(radii))


def union(first: np.ndarray, second: np.ndarray, blend: float) -> np.ndarray:
    """Both solids as one, the crease between them filled over ``blend`` mm (polynomial smooth minimum)."""
    h = np.clip(0.5 + 0.5 * (second - first) / blend, 0, 1)
    return second + (first - second) * h - blend * h * (1 - h)


def without(first: np.ndarray, second: np.ndarray, blend: float) -> np.ndarray:
    """The first solid less the second."""
    return -union(-first, second, blend)


def rotation(angles: Vector) -> np.ndarray:
    """Rotation matrix of angles (degrees) about x, then y, then z; each turns the first other axis to the second."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles)):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
        matrix = step @ matrix
    return matrix
