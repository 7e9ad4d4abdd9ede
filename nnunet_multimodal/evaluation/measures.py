"""DSC, NSD, HD95 and ASD of every label of a pair of label maps.

All Dice coefficients come from one joint histogram. Surfaces are looked for in each label's own box, the union of
prediction and reference, which changes nothing (outside it there is no surface) and makes it fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.evaluation.surfaces import (
    DEFINITIONS,
    average_distance,
    hausdorff_95,
    normalized_surface_dice,
    surface_distances,
)

OK, MISSED, FALSE_POSITIVE, BOTH_EMPTY = "ok", "missed", "false_positive", "both_empty"
NOT_ANNOTATED = "not_annotated"
STATES = {
    OK: "in both prediction and reference: all values are defined",
    MISSED: "in the reference only: DSC and NSD are 0, distances infinite and not in a mean",
    FALSE_POSITIVE: "in the prediction only: DSC and NSD are 0, distances undefined and not in a mean",
    BOTH_EMPTY: "in neither: nothing is defined, nothing enters a mean",
    NOT_ANNOTATED: "nobody looked for it in this reference: nothing is defined, nothing enters a mean",
}

Ids = int | Sequence[int]


@dataclass(frozen=True)
class Measures:
    """One label of one case; NaN is undefined.

    Attributes:
        dsc, nsd: 0 to 1.
        hd95_mm, asd_mm: 95 % Hausdorff and average symmetric surface distance; infinite if missed.
        volume_ref_ml, volume_pred_ml: volumes (mm² / 1000 in 2D).
        status: a key of :data:`STATES`.
    """

    dsc: float
    nsd: float
    hd95_mm: float
    asd_mm: float
    volume_ref_ml: float
    volume_pred_ml: float
    status: str


def measure(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    labels: Mapping[str, Ids] | Sequence[int],
    tolerances: float | Mapping[str, float] = 2.0,
    surface: str = "border",
    ignore: int | None = None,
) -> dict:
    """Compare two label maps.

    Args:
        prediction, reference: whole numbers, the same shape, 2D or 3D. An axis of length 1 is left out: one slice is
            measured as a picture, not as a volume in which every voxel is surface.
        spacing: mm along each axis of the arrays, in their order.
        labels: name -> id, or name -> ids for a region, without background; or ids, which then are the names.
        tolerances: of NSD in mm, one for all or one for each name.
        surface: ``border`` or ``area`` (:mod:`nnunet_multimodal.evaluation.surfaces`).
        ignore: voxels of this value in the reference count in neither map.

    Returns:
        name -> :class:`Measures`, in the order of ``labels``.

    Raises:
        UsageError: shapes, spacing, tolerances or the definition do not fit.

    Example:
        >>> reference = np.zeros((8, 8, 8), int)
        >>> reference[2:6, 2:6, 2:6] = 1
        >>> shifted = np.roll(reference, 1, axis=2)
        >>> measure(shifted, reference, (1, 1, 3), {"liver": 1})["liver"].dsc
        0.75
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    named: dict[Any, Ids] = dict(labels) if isinstance(labels, Mapping) else {value: value for value in labels}
    members = {name: [ids] if isinstance(ids, (int, np.integer)) else [*ids] for name, ids in named.items()}
    tolerance: dict[Any, float] = {
        name: tolerances.get(name, math.nan) if isinstance(tolerances, Mapping) else tolerances for name in named
    }
    _check(prediction, reference, spacing, members, tolerance, surface)
    thickness = 1.0  # of what is left out
    flat = [axis for axis, length in enumerate(reference.shape) if length == 1][: reference.ndim - 2]
    for axis in reversed(flat):
        prediction, reference = prediction.squeeze(axis), reference.squeeze(axis)
        thickness *= float(spacing[axis])
        spacing = [*spacing[:axis], *spacing[axis + 1 :]]
    if reference.flags.f_contiguous:  # as nibabel reads it; the order of the axes changes no result, only the speed
        prediction, reference, spacing = prediction.T, reference.T, spacing[::-1]
    spacing = tuple(float(value) for value in spacing)

    filled = _filled_box((prediction != 0) | (reference != 0))
    prediction, reference = prediction[filled], reference[filled]
    codes = {value: code for code, value in enumerate(sorted({v for ids in members.values() for v in ids}), start=1)}
    coded_prediction, coded_reference = _encode(prediction, codes), _encode(reference, codes)
    if ignore is not None:
        ignored = reference == ignore
        coded_prediction[ignored] = coded_reference[ignored] = 0

    joint = _joint_histogram(coded_prediction, coded_reference, len(codes) + 1)
    boxes = _boxes(coded_prediction, coded_reference, len(codes))
    voxel_ml = math.prod(spacing) * thickness / 1000
    result = {}
    for name, ids in members.items():
        wanted = [codes[value] for value in ids]
        both = int(joint[np.ix_(wanted, wanted)].sum())
        in_prediction, in_reference = int(joint[wanted].sum()), int(joint[:, wanted].sum())
        volumes = (in_reference * voxel_ml, in_prediction * voxel_ml)
        if not in_prediction and not in_reference:
            result[name] = Measures(math.nan, math.nan, math.nan, math.nan, *volumes, BOTH_EMPTY)
        elif not in_prediction:
            result[name] = Measures(0.0, 0.0, math.inf, math.inf, *volumes, MISSED)
        elif not in_reference:
            result[name] = Measures(0.0, 0.0, math.nan, math.nan, *volumes, FALSE_POSITIVE)
        else:
            box = _union([boxes[code] for code in wanted if code in boxes])
            there, back = surface_distances(
                _mask(coded_prediction[box], wanted), _mask(coded_reference[box], wanted), spacing, surface
            )
            result[name] = Measures(
                2 * both / (in_prediction + in_reference),
                normalized_surface_dice(there, back, tolerance[name]),
                hausdorff_95(there, back, surface),
                average_distance(there, back),
                *volumes,
                OK,
            )
    return result


def _check(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    members: Mapping[Any, list[int]],
    tolerance: Mapping[Any, float],
    surface: str,
) -> None:
    if surface not in DEFINITIONS:
        raise UsageError(f"surface must be {' or '.join(DEFINITIONS)}, found {surface!r}.")
    if prediction.shape != reference.shape or prediction.ndim not in (2, 3):
        raise UsageError(
            "prediction and reference must be 2D or 3D and of one shape, "
            f"found {prediction.shape} and {reference.shape}."
        )
    if len(spacing) != prediction.ndim or not all(np.isfinite(value) and value > 0 for value in spacing):
        raise UsageError(f"spacing must be {prediction.ndim} positive numbers in mm, found {tuple(spacing)}.")
    for name, ids in members.items():
        if not ids or min(ids) < 1:
            raise UsageError(f"the ids of {name} must be 1 or more (0 is background), found {ids}.")
    for name, value in tolerance.items():
        if not np.isfinite(value) or value < 0:
            raise UsageError(f"the tolerance of {name} must be 0 mm or more, found {value}.")


def _filled_box(filled: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around all true voxels; empty if there are none."""
    box = []
    for axis in range(filled.ndim):
        used = np.flatnonzero(filled.any(axis=tuple(other for other in range(filled.ndim) if other != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0))
    return tuple(box)


def _encode(array: np.ndarray, codes: dict[int, int]) -> np.ndarray:
    """uint8/uint16 copy: 1..n for the values in ``codes``, 0 for all others."""
    kind = np.uint8 if len(codes) < 256 else np.uint16
    if array.dtype == bool:
        array = array.view(np.uint8)
    if array.dtype.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        if high - low < 1 << 20:  # nearly always: one look-up per voxel
            table = np.zeros(high - low + 1, dtype=kind)
            for value, code in codes.items():
                if low <= value <= high:
                    table[value - low] = code
            if low < 0 or low > 0:
                array = array.astype(np.int64) - low
            return table[array]
    coded = np.zeros(array.shape, dtype=kind)
    for value, code in codes.items():
        coded[array == value] = code
    return coded


def _joint_histogram(prediction: np.ndarray, reference: np.ndarray, size: int) -> np.ndarray:
    """int [size, size]: how many voxels have code i in the prediction and j in the reference."""
    kind = np.uint16 if size <= 256 else np.uint32  # one number per pair, no wider than needed
    pairs = np.multiply(prediction, size, dtype=kind, casting="unsafe").ravel() + reference.ravel()
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def _boxes(prediction: np.ndarray, reference: np.ndarray, count: int) -> dict[int, tuple[slice, ...]]:
    """The box of each code in either map; a code in neither has none."""
    from scipy.ndimage import find_objects

    found = zip(find_objects(prediction, count), find_objects(reference, count))
    return {code: _union([box for box in pair if box]) for code, pair in enumerate(found, start=1) if any(pair)}


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes))
        for axis in range(len(boxes[0]))
    )


def _mask(coded: np.ndarray, wanted: list[int]) -> np.ndarray:
    return coded == wanted[0] if len(wanted) == 1 else np.isin(coded, wanted)
