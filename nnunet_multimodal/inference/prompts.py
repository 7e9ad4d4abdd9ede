"""What a user asks for: points and boxes of a file or the command line, and where they lie in an image.

Coordinates are (x, y, z): mm in the patient, RAS, as NIfTI and most viewers give them, or voxel indices of the file as
it is stored (0 is the first voxel). Inside, they become indices (z, y, x) of nnU-Net's arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.inference.position import affine_of

UNITS = ("mm", "voxels")
KINDS = ("text", "points", "box")
FREE = "object"  # the beginning of a name that no text stands for
_ENTRIES = ("points", "negative_points", "box")
_FORMAT = (
    '{"units": "mm", "cases": {"case_001": {"liver": {"points": [[x, y, z]], "negative_points": [[x, y, z]], '
    '"box": [[x, y, z], [x, y, z]]}}}}'
)


@dataclass(frozen=True)
class Asked:
    """One thing that is asked for in one image.

    Attributes:
        organ: its name.
        text: whether the name itself is a prompt.
        positive, negative: points on it and beside it, (x, y, z).
        box: two opposite corners; None for no box.
        units: of the coordinates.
        where: the file or option they come from, for messages.
    """

    organ: str
    text: bool = False
    positive: tuple[tuple[float, ...], ...] = ()
    negative: tuple[tuple[float, ...], ...] = ()
    box: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    units: str = "mm"
    where: str = ""


@dataclass(frozen=True)
class Located:
    """The same in an array [Z, Y, X] of a known shape.

    Attributes:
        points: float [N, 3], index (z, y, x); 0 is the centre of the first voxel.
        labels: [N], 1 for on it and 0 for beside it.
        box: int [2, 3], first and last voxel; None for no box.
    """

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    box: np.ndarray | None = None

    @property
    def shows(self) -> bool:
        """Whether it says where something is, not only where it is not."""
        return self.box is not None or bool((self.labels == 1).any())


# --- what the user writes --------------------------------------------------------------------------------------------


def read_prompts(content: Mapping[str, Any], where: str, units: str = "mm") -> dict[str, dict[str, Asked]]:
    """Points and boxes of a JSON file, by case and organ.

    Args:
        content: ``{"units": "mm", "cases": {case: {organ: {"points": ..., "negative_points": ..., "box": ...}}}}``.
        where: its path, for messages.
        units: of the coordinates, where the file does not say it.

    Raises:
        UsageError: it is of another form.
    """
    units = content.get("units", units)
    if units not in UNITS:
        raise UsageError(f'{where}: "units" is {units!r}, expected "mm" or "voxels".')
    cases = content.get("cases")
    unknown = sorted(set(content) - {"units", "cases"})
    if not isinstance(cases, Mapping) or not cases or unknown:
        found = f"found {', '.join(map(repr, unknown)) or 'no cases'}"
        raise UsageError(f"{where}: expected {_FORMAT}; {found}.")
    prompts: dict[str, dict[str, Asked]] = {}
    for case, organs in cases.items():
        if not isinstance(organs, Mapping) or not organs:
            raise UsageError(f"{where}: {case} has no organs; expected {_FORMAT}.")
        prompts[case] = {
            organ: _read_entry(entry, organ, units, where, f"{where}, {case}, {organ}")
            for organ, entry in organs.items()
        }
    return prompts


def _read_entry(entry: Any, organ: str, units: str, where: str, at: str) -> Asked:
    if not isinstance(entry, Mapping) or not entry or set(entry) - set(_ENTRIES):
        found = sorted(set(entry) - set(_ENTRIES)) if isinstance(entry, Mapping) else entry
        raise UsageError(f"{at}: expected one or more of {', '.join(_ENTRIES)}; found {found!r}.")
    points = {key: _coordinates(entry.get(key, []), f"{at}, {key}") for key in _ENTRIES[:2]}
    box = None
    if "box" in entry:
        corners = _coordinates(entry["box"], f"{at}, box")
        if len(corners) != 2:
            raise UsageError(f"{at}, box: expected two corners, found {len(corners)}.")
        box = (corners[0], corners[1])
    if not points["points"] and box is None:
        raise UsageError(
            f"{at}: nothing says where it is, only where it is not. Give points or a box, or leave it out."
        )
    return Asked(organ, False, points["points"], points["negative_points"], box, units, where)


def _coordinates(value: Any, at: str) -> tuple[tuple[float, ...], ...]:
    """[[x, y, z], ...]"""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UsageError(f"{at}: expected a list of [x, y, z], found {value!r}.")
    for point in value:
        numbers = isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 3
        if not numbers or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in point):
            raise UsageError(f"{at}: expected three numbers [x, y, z], found {point!r}.")
        if not all(math.isfinite(number) for number in point):
            raise UsageError(f"{at}: {list(point)} holds a number that is not finite.")
    return tuple(tuple(float(number) for number in point) for point in value)


def parse_coordinates(text: str, option: str) -> tuple[tuple[float, ...], ...]:
    """``"1,2,3; 4,5,6"`` -> ((1, 2, 3), (4, 5, 6)); blanks do not matter.

    Raises:
        UsageError: it is of another form.
    """
    points = []
    for part in (each for each in text.split(";") if each.strip()):
        try:
            point = [float(number) for number in part.split(",")]
        except ValueError:
            point = []
        if len(point) != 3:
            raise UsageError(
                f"{option} '{text}': expected x,y,z and a semicolon between points, or the name of a JSON file. With a "
                f"minus in front: {option}=-12,3,40"
            )
        points.append(point)
    if not points:
        raise UsageError(f"{option} '{text}' holds no point: expected x,y,z, or the name of a JSON file.")
    return _coordinates(points, option)


def parse_box(text: str, option: str = "--box") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``"1,2,3; 4,5,6"`` -> two corners."""
    corners = parse_coordinates(text, option)
    if len(corners) != 2:
        raise UsageError(f"{option} '{text}': expected two corners x,y,z;x,y,z, found {len(corners)}.")
    return corners[0], corners[1]


# --- where it is -----------------------------------------------------------------------------------------------------


def file_affine(path: Path, properties: Mapping[str, Any]) -> np.ndarray | None:
    """[4, 4], voxel index (x, y, z) of the file as it is stored to mm in RAS; None for a picture without a place.

    Args:
        path: the image.
        properties: of nnU-Net's reader, which may have turned the array.
    """
    nibabel = properties.get("nibabel_stuff")
    if nibabel is not None:
        return np.asarray(nibabel["original_affine"], dtype=float)
    if properties.get("sitk_stuff") is None:
        return None
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetDimension() != 3:
        return None
    header = {
        "spacing": reader.GetSpacing(),
        "origin": reader.GetOrigin(),
        "direction": reader.GetDirection(),
    }
    return affine_of({"sitk_stuff": header})


def locate(asked: Asked, case: str, path: Path, properties: Mapping[str, Any], shape: Sequence[int]) -> Located:
    """Where it is in the array that nnU-Net's reader gives.

    Args:
        asked: points and box.
        case: for messages.
        path: the image's file.
        properties: of the reader.
        shape: [Z, Y, X] of the array.

    Raises:
        DataProblem: a point or the whole box lies outside of the image, or the box has no volume.
    """
    place = _Place(asked, case, path, properties, shape)
    positive, negative = place.points(asked.positive, "point"), place.points(asked.negative, "negative point")
    labels = np.array([1] * len(positive) + [0] * len(negative), dtype=np.int64)
    box = None if asked.box is None else place.box(asked.box)
    return Located(np.array([*positive, *negative], dtype=float).reshape(-1, 3), labels, box)


class _Place:
    """From the user's coordinates to an array's."""

    def __init__(
        self, asked: Asked, case: str, path: Path, properties: Mapping[str, Any], shape: Sequence[int]
    ) -> None:
        self.asked, self.case, self.shape = asked, case, np.array(shape)
        own = affine_of(properties)
        stored = file_affine(path, properties)
        if own is None or stored is None:
            if asked.units == "mm" and (asked.positive or asked.negative or asked.box is not None):
                raise DataProblem(f"case {case} does not say where it lies in space: give voxel indices (--voxels).")
            own = stored = np.eye(4)
        self.to_user = own if asked.units == "mm" else np.linalg.inv(stored) @ own  # of the array's (x, y, z)

    def array_index(self, xyz: Sequence[float]) -> np.ndarray:
        """(x, y, z) of the user -> index (z, y, x)."""
        return (np.linalg.inv(self.to_user) @ [*xyz, 1.0])[:3][::-1]

    def points(self, given: Sequence[Sequence[float]], what: str) -> list[np.ndarray]:
        found = [self.array_index(point) for point in given]
        for point, index in zip(given, found):
            if (index < -0.5 - 1e-4).any() or (index > self.shape - 0.5 + 1e-4).any():
                raise DataProblem(f"{self._name(what)} {_numbers(point)} lies outside of the image, {self._extent()}.")
        return [index.clip(0, self.shape - 1) for index in found]

    def box(self, corners: Sequence[Sequence[float]]) -> np.ndarray:
        """First and last voxel that the box touches; of a turned image, those around its corners."""
        listed = f"{_numbers(corners[0])} to {_numbers(corners[1])}"
        if self.asked.units == "mm" and any(abs(a - b) < 1e-6 for a, b in zip(*corners)):
            raise DataProblem(f"{self._name('box')} {listed} has no volume: its corners agree along an axis.")
        all_eight = np.array([self.array_index(corner) for corner in itertools.product(*zip(*corners))])
        low, high = all_eight.min(0), all_eight.max(0)
        if (high < -0.5).any() or (low > self.shape - 0.5).any():
            raise DataProblem(f"{self._name('box')} {listed} lies outside of the image, {self._extent()}.")
        return np.stack([low, high]).round(6).round().clip(0, self.shape - 1).astype(np.int64)

    def _name(self, what: str) -> str:
        return f"case {self.case}: {what} of {self.asked.organ} ({self.asked.where})"

    def _extent(self) -> str:
        """From where to where the image reaches, in the user's units."""
        ends = itertools.product(*((-0.5, size - 0.5) for size in self.shape[::-1]))
        corners = np.array([(self.to_user @ [*end, 1.0])[:3] for end in ends])
        what = "mm (RAS; --voxels for voxel indices)" if self.asked.units == "mm" else "voxels as stored"
        reach = [f"{axis} {low:g} to {high:g}" for axis, low, high in zip("xyz", corners.min(0), corners.max(0))]
        return f"which reaches from {', '.join(reach)} {what}"


def _numbers(point: Sequence[float]) -> str:
    return "(" + ", ".join(f"{number:g}" for number in point) + ")"


# --- through nnU-Net's preprocessing ---------------------------------------------------------------------------------


def preprocessed(
    located: Located, properties: Mapping[str, Any], transpose: Sequence[int], shape: Sequence[int], name: str
) -> Located:
    """The same in the preprocessed array: transposed, cropped to what is not 0, resampled.

    Args:
        located: in the array as read.
        properties: nnU-Net's, of the preprocessed case.
        transpose: ``transpose_forward`` of the plans.
        shape: of the preprocessed array, without channels.
        name: of case and organ, for messages.

    Raises:
        DataProblem: a positive point or the whole box lies in what was cropped away.
    """
    crop = np.array(properties["bbox_used_for_cropping"], dtype=float)  # [3, 2], first and behind the last
    before = crop[:, 1] - crop[:, 0]
    points = located.points[:, transpose] - crop[:, 0]
    inside = ((points > -0.5 - 1e-4) & (points < before - 0.5 + 1e-4)).all(1)
    cut = "lies where the image is 0 everywhere, which nnU-Net cuts off"
    if (~inside & (located.labels == 1)).any():
        raise DataProblem(f"{name}: a point {cut}.")
    box = None
    if located.box is not None:
        box = located.box[:, transpose] - crop[:, 0]
        if (box[1] < 0).any() or (box[0] > before - 1).any():
            raise DataProblem(f"{name}: the box {cut}.")
        box = box.clip(0, before - 1)
    kept = Located(points[inside], located.labels[inside], None if box is None else box.astype(np.int64))
    return resized(kept, before, shape)


def resized(located: Located, before: Sequence[int] | np.ndarray, after: Sequence[int]) -> Located:
    """The same after an array was resized, border on border; a box keeps every voxel that it touches."""
    old, new = np.array(before, dtype=float), np.array(after, dtype=float)
    points = ((located.points + 0.5) * new / old - 0.5).clip(0, new - 1)
    if located.box is None:
        return replace(located, points=points)
    first = np.floor(located.box[0] * new / old + 1e-6)
    last = np.ceil((located.box[1] + 1) * new / old - 1e-6) - 1
    box = np.stack([first, np.maximum(first, last)]).clip(0, new - 1).astype(np.int64)
    return Located(points, located.labels, box)


def within(located: Located, begin: Sequence[int], size: Sequence[int]) -> Located:
    """What of it lies in a window, counted from the window's first voxel."""
    low, length = np.array(begin), np.array(size)
    points = located.points - low
    inside = ((points > -0.5) & (points < length - 0.5)).all(1)
    box = None
    if located.box is not None:
        box = np.stack([np.maximum(located.box[0] - low, 0), np.minimum(located.box[1] - low, length - 1)])
        if (box[1] < box[0]).any():
            box = None
    return Located(points[inside], located.labels[inside], box)
