"""Which slice of the reference belongs to which slice of the target, and which scribbled slice serves it.

The CrossMR paper matches slices by their relative order. Where both volumes state where they lie in space, position is
the better rule, because two series of one patient rarely start and end at the same height; order is left for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_TILT_DEGREES = 20.0  # slices tilted further against each other show different anatomy
MIN_OVERLAP = 0.5  # of the shorter extent along the normal; less means another body part or another frame


@dataclass(frozen=True)
class SliceMatch:
    """The reference slice of every target slice.

    Attributes:
        index: int [n_target], the matched reference slice; -1 where the target slice lies outside the reference.
        method: how they were matched: by ``position`` in space or by relative ``order``.
        position: float [n_target], where the target slice lies in units of reference slices, also outside of them.
    """

    index: np.ndarray
    method: Literal["position", "order"]
    position: np.ndarray


def match_slices(
    target_affine: np.ndarray,
    target_shape_zyx: tuple[int, ...],
    reference_affine: np.ndarray,
    reference_shape_zyx: tuple[int, ...],
    slice_axis: int = 0,
    method: Literal["auto", "position", "order"] = "auto",
) -> SliceMatch:
    """Match every target slice with the nearest reference slice.

    By position in space if the slice normals are parallel within 20 degrees, the extents along the normal overlap by at
    least half of the shorter one, and the in-plane bounding boxes overlap. Otherwise by relative order, slice i with
    slice round(i (n_reference - 1) / (n_target - 1)); a single target slice goes with the middle of the reference.

    Args:
        target_affine: [4, 4], voxel index (x, y, z) to mm.
        target_shape_zyx: (Z, Y, X) of the target.
        reference_affine: [4, 4], voxel index (x, y, z) to mm.
        reference_shape_zyx: (Z, Y, X) of the reference.
        slice_axis: the axis along which slices are stacked in both volumes, as an index into (z, y, x).
        method: ``position`` or ``order`` where the caller knows better; ``auto`` decides as above.

    Example:
        Reference slices 8 mm apart from z = 0; target slices 4 mm apart from z = -8:

        >>> reference, target = np.diag([1.0, 1.0, 8.0, 1.0]), np.diag([1.0, 1.0, 4.0, 1.0])
        >>> target[2, 3] = -8.0
        >>> match = match_slices(target, (7, 32, 32), reference, (3, 32, 32))
        >>> match.method, match.index.tolist()
        ('position', [-1, 0, 0, 0, 1, 2, 2])
    """
    n_target, n_reference = target_shape_zyx[slice_axis], reference_shape_zyx[slice_axis]
    if method == "auto":
        agree = _frames_agree(target_affine, target_shape_zyx, reference_affine, reference_shape_zyx, slice_axis)
        method = "position" if agree else "order"
    if method == "position":
        position = _positions(target_affine, target_shape_zyx, reference_affine, slice_axis)
        nearest = np.clip(np.rint(position), 0, n_reference - 1)
        outside = np.abs(position - nearest) > 0.5 + 1e-6  # the nearest of all is still more than half a slice away
        return SliceMatch(np.where(outside, -1, nearest).astype(int), "position", position)
    if n_target == 1:
        position = np.array([(n_reference - 1) // 2], dtype=float)
    else:
        position = np.arange(n_target) * (n_reference - 1) / (n_target - 1)
    return SliceMatch(np.rint(position).astype(int), "order", position)


def nearest_scribbled(
    match: SliceMatch, scribbled: np.ndarray, reach: float = 0.0, spacing_mm: float = 1.0
) -> np.ndarray:
    """The scribbled reference slice that serves each target slice, for one organ.

    Between the first and the last scribbled slice, and ``reach`` beyond them, a target slice is served by the scribbled
    slice nearest to the one it was matched with (the lower of two equally near); elsewhere the organ is not asked for.

    Args:
        match: from :func:`match_slices`.
        scribbled: bool [n_reference], whether the organ has a scribble on that slice.
        reach: how far beyond the first and last scribbled slice, in mm; ``math.inf`` is everywhere.
        spacing_mm: distance of neighbouring reference slices, in mm.

    Returns:
        int [n_target], the serving slice or -1.

    Example:
        >>> match = SliceMatch(np.arange(6), "order", np.arange(6.0))
        >>> nearest_scribbled(match, np.array([0, 1, 0, 1, 0, 0], bool)).tolist()
        [-1, 1, 1, 3, -1, -1]
        >>> nearest_scribbled(match, np.array([0, 1, 0, 1, 0, 0], bool), reach=5.0, spacing_mm=5.0).tolist()
        [1, 1, 1, 3, 3, -1]
    """
    slices = np.flatnonzero(scribbled)
    if slices.size == 0:
        return np.full(match.index.shape, -1)
    # A slice without a match lies outside the reference, so only a reach can get it a scribble: by its true position.
    place = np.where(match.index >= 0, match.index, match.position)
    served = slices[np.argmin(np.abs(place[:, None] - slices), axis=1)]
    margin = reach / spacing_mm + 1e-6
    return np.where((place >= slices[0] - margin) & (place <= slices[-1] + margin), served, -1)


def _frames_agree(
    target_affine: np.ndarray,
    target_shape: tuple[int, ...],
    reference_affine: np.ndarray,
    reference_shape: tuple[int, ...],
    slice_axis: int,
) -> bool:
    """Whether the two volumes show the same place in the same orientation, so that positions can be compared."""
    normal = _normal(reference_affine, slice_axis)
    if abs(normal @ _normal(target_affine, slice_axis)) < np.cos(np.radians(MAX_TILT_DEGREES)):
        return False
    along_target = _extent(target_affine, target_shape, normal, slice_axis)
    along_reference = _extent(reference_affine, reference_shape, normal, slice_axis)
    shorter = min(np.ptp(along_target), np.ptp(along_reference))
    if _overlap(along_target, along_reference) < MIN_OVERLAP * shorter:
        return False
    in_plane = [axis for axis in range(3) if axis != 2 - slice_axis]
    boxes = [
        (_box(target_affine, target_shape, direction), _box(reference_affine, reference_shape, direction))
        for direction in (_unit(reference_affine[:3, axis]) for axis in in_plane)
    ]
    return all(_overlap(target, reference) > 0 for target, reference in boxes)


def _positions(
    target_affine: np.ndarray, target_shape: tuple[int, ...], reference_affine: np.ndarray, slice_axis: int
) -> np.ndarray:
    """float [n_target]: the centre of each target slice along the reference's normal, in reference slices."""
    normal, axis = _normal(reference_affine, slice_axis), 2 - slice_axis
    voxels = np.tile((np.array(target_shape[::-1]) - 1) / 2, (target_shape[slice_axis], 1))
    voxels[:, axis] = np.arange(target_shape[slice_axis])
    centres = voxels @ target_affine[:3, :3].T + target_affine[:3, 3]
    return (centres - reference_affine[:3, 3]) @ normal / (reference_affine[:3, axis] @ normal)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _normal(affine: np.ndarray, slice_axis: int) -> np.ndarray:
    """Unit normal of the slices [3], whether or not they are stacked along it."""
    first, second = (affine[:3, axis] for axis in range(3) if axis != 2 - slice_axis)
    return _unit(np.cross(first, second))


def _extent(affine: np.ndarray, shape: tuple[int, ...], normal: np.ndarray, slice_axis: int) -> np.ndarray:
    """Where the stack begins and ends along the normal [2], in mm: half a slice before and after the outer centres.

    Taken through the middle of the slices: a tilted, wide slice does not make its stack longer.
    """
    centre = (np.array(shape[::-1]) - 1) / 2
    axis = 2 - slice_axis
    ends = np.stack([centre, centre])
    ends[:, axis] = -0.5, shape[slice_axis] - 0.5
    return np.sort((ends @ affine[:3, :3].T + affine[:3, 3]) @ normal)


def _box(affine: np.ndarray, shape: tuple[int, ...], direction: np.ndarray) -> np.ndarray:
    """Smallest and largest coordinate of the volume's corners along a direction [2], in mm."""
    corners = np.array(np.meshgrid(*((-0.5, size - 0.5) for size in shape[::-1]))).reshape(3, -1).T
    along = (corners @ affine[:3, :3].T + affine[:3, 3]) @ direction
    return np.array([along.min(), along.max()])


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(min(first[1], second[1]) - max(first[0], second[0]))
