"""Predictions and references, paired by name, read, checked against each other and measured, one case at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.conversion.dataset import first_names
from nnunet_multimodal.conversion.images import SUFFIXES, Volume, compare_geometry, read_labels, split_suffix
from nnunet_multimodal.data.side_checks import check_sides
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.evaluation.labels import Labels
from nnunet_multimodal.evaluation.measures import MISSED, NOT_ANNOTATED, Measures, measure

DIAGONAL = "diagonal"
LARGEST = 2**31 - 1  # of label values
_UNUSABLE = (MultimodalError, OSError, MemoryError)


@dataclass(frozen=True)
class Case:
    """A reference and its prediction; None where the file is missing."""

    name: str
    reference: Path
    prediction: Path | None


@dataclass(frozen=True)
class Settings:
    """What a case is measured with.

    Attributes:
        labels: the organs.
        tolerances: of NSD in mm, by organ.
        surface: ``border`` or ``area``.
        distance_when_missed: HD95 and ASD of a missed organ: mm, ``diagonal`` of the reference image, or None
            (infinite, not in a mean).
        resample: bring a prediction on another grid onto the reference's, by nearest neighbour.
        unannotated: case -> organs that its reference does not annotate (annotated.py).
    """

    labels: Labels
    tolerances: dict[str, float]
    surface: str = "border"
    distance_when_missed: float | str | None = None
    resample: bool = False
    unannotated: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass
class CaseResult:
    """One case, measured; or why it was not.

    Attributes:
        organs: by name; as of an empty prediction if the prediction cannot be used; empty if the reference cannot, or
            if measuring itself failed: then the case is in no mean.
        unknown: ``prediction`` and ``reference`` -> undeclared value -> voxels; they were taken for background.
        resampled: what differed, if the prediction was resampled.
        failed: what is wrong with the files.
        sides: what is odd about left and right in the prediction (``SideFinding``), each with ``in_reference``: whether
            the reference is odd in the same way, as a horseshoe kidney is.
    """

    name: str
    reference: str
    prediction: str | None
    organs: dict[str, Measures] = field(default_factory=dict)
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)
    resampled: str | None = None
    failed: str | None = None
    sides: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self, modality: str) -> dict[str, Any]:
        content = asdict(self)
        name = content.pop("name")
        return {"case": name, "modality": modality, **content}


# --- pairing ---------------------------------------------------------------------------------------------------------


def pair_cases(prediction: Path, reference: Path) -> tuple[list[Case], list[str]]:
    """Cases in order of their names, and the predictions that have no reference.

    Args:
        prediction, reference: two folders, walked recursively (a case is the relative path without suffix), or two
            files of any name.

    Raises:
        UsageError: one of them does not exist, or one is a file and the other a folder.
        DataProblem: a folder holds no NIfTI file or two of one name, or the folders have no case in common.
    """
    for path in (prediction, reference):
        if not path.exists():
            raise UsageError(f"{path} does not exist.")
    if prediction.is_dir() != reference.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (prediction, reference)]
        raise UsageError(f"{prediction} is {kinds[0]} and {reference} {kinds[1]}: give two folders or two files.")
    if not reference.is_dir():
        return [Case(split_suffix(reference)[0], reference, prediction)], []
    predictions, references = find_volumes(prediction), find_volumes(reference)
    if not predictions.keys() & references.keys():
        raise DataProblem(
            f"{prediction} and {reference} have no case in common: found {first_names(sorted(predictions)[:3])}, "
            f"expected {first_names(sorted(references)[:3])}. A prediction has its reference's relative path and name."
        )
    cases = [Case(name, references[name], predictions.get(name)) for name in sorted(references)]
    return cases, sorted(predictions.keys() - references.keys())


def find_volumes(folder: Path) -> dict[str, Path]:
    """``sub/case_01`` -> path, for all NIfTI files in a folder and the folders in it; hidden ones are left out.

    Linked folders are followed, under the name of the link.

    Raises:
        DataProblem: there are none, or two of one name.
    """
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        inner = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(name for name in inner if not _is_around_itself(Path(parent, name), folder))
        for name in sorted(names):
            path = Path(parent, name)
            stem, suffix = split_suffix(path)
            if name.startswith(".") or not suffix:
                continue
            case = (path.parent.relative_to(folder) / stem).as_posix()
            if case in found:
                raise DataProblem(f"{path} and {found[case]} are the same case: rename or remove one.")
            found[case] = path
    if not found:
        raise DataProblem(f"No {' or '.join(SUFFIXES)} file in {folder}.")
    return found


def _is_around_itself(inner: Path, root: Path) -> bool:
    """Whether a folder below the root is, by a link, one of those above it: to follow it would never end."""
    depth = len(inner.relative_to(root).parts)
    return any(inner.samefile(above) for above in inner.parents[:depth])


# --- measuring -------------------------------------------------------------------------------------------------------


def evaluate_case(case: Case, settings: Settings) -> CaseResult:
    """Measure one case; what is wrong with its files is in the result, not raised.

    A prediction that cannot be used counts as an empty one, as a missing one does: else a broken file would score
    better than none.
    """
    result = CaseResult(case.name, str(case.reference), str(case.prediction) if case.prediction else None)
    try:
        reference = read_reference(case)
        prediction = replace(reference, data=np.zeros(reference.data.shape, np.uint8))
        if case.prediction is not None:
            try:
                prediction, result.resampled = read_prediction(case.prediction, reference, settings.resample)
                result.sides = _side_findings(prediction, reference, settings.labels)
            except _UNUSABLE as error:
                result.failed = _why(error)
        result.unknown = _unknown(prediction, reference, settings.labels)
        measures = measure(
            prediction.data,
            reference.data,
            reference.spacing,
            settings.labels.organs,
            settings.tolerances,
            settings.surface,
            settings.labels.ignore,
        )
    except _UNUSABLE as error:
        result.failed = _why(error)
        return result
    for organ in settings.unannotated.get(case.name, ()):
        measures[organ] = not_annotated(measures[organ])
    distance = settings.distance_when_missed
    if distance == DIAGONAL:
        distance = math.dist((0, 0, 0), [n * mm for n, mm in zip(reference.data.shape, reference.spacing)])
    if distance is not None:
        measures = {
            name: replace(m, hd95_mm=float(distance), asd_mm=float(distance)) if m.status == MISSED else m
            for name, m in measures.items()
        }
    result.organs = measures
    return result


def not_annotated(found: Measures) -> Measures:
    """Nothing but the volumes: what the reference does not annotate can be neither missed nor found by mistake."""
    return replace(found, dsc=math.nan, nsd=math.nan, hd95_mm=math.nan, asd_mm=math.nan, status=NOT_ANNOTATED)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def read_reference(case: Case) -> Volume:
    """The reference, whole numbers [Z, Y, X] in RAS order.

    A sheared header is straightened, as of predictions: only the grid and the spacing are needed, and nnU-Net's
    NibabelIOWithReorient takes such files too.

    Raises:
        DataProblem: it cannot be read or holds no whole numbers.
    """
    return _whole_numbers(read_labels(case.reference, reorthonormalize=True))


def read_prediction(path: Path, reference: Volume, resample: bool = False) -> tuple[Volume, str | None]:
    """A prediction on its reference's grid, whole numbers [Z, Y, X], and what differed if it was resampled.

    Raises:
        DataProblem: it cannot be read or holds no whole numbers, or the grids differ and ``resample`` is not set.
    """
    prediction = _whole_numbers(read_labels(path, reorthonormalize=True))
    try:
        compare_geometry(reference, prediction, "prediction")
    except DataProblem as problem:
        difference = describe_grids(prediction, reference)
        if not resample:
            raise DataProblem(
                f"prediction {prediction.path} is not on the grid of its reference {reference.path}: {difference}. "
                "Export it on the reference's grid, or pass --resample-to-reference."
            ) from problem
        return replace(prediction, data=resample_nearest(prediction, reference)), difference
    return prediction, None


def describe_grids(found: Volume, expected: Volume) -> str:
    """``found shape 10x10x5, spacing (1, 1, 2) mm; expected ...``, in x, y, z of RAS order: only what differs."""

    def numbers(values: Any) -> str:
        return "(" + ", ".join(f"{round(float(value), 4) + 0.0:g}" for value in values) + ")"

    differences = []
    for what, of in (
        ("shape", lambda v: "x".join(map(str, v.data.shape[::-1]))),
        ("spacing in mm", lambda v: numbers(v.spacing[::-1])),
        ("origin in mm", lambda v: numbers(v.affine[:3, 3])),
        ("x axis", lambda v: numbers(v.affine[:3, 0] / np.linalg.norm(v.affine[:3, 0]))),
        ("y axis", lambda v: numbers(v.affine[:3, 1] / np.linalg.norm(v.affine[:3, 1]))),
        ("z axis", lambda v: numbers(v.affine[:3, 2] / np.linalg.norm(v.affine[:3, 2]))),
    ):
        if of(found) != of(expected):
            differences.append(f"{what} found {of(found)}, expected {of(expected)}")
    return "; ".join(differences)


def resample_nearest(volume: Volume, grid: Volume) -> np.ndarray:
    """The label map [Z, Y, X] on another grid: the value of the voxel that each lies in, or 0 outside."""
    to_voxel = np.linalg.inv(volume.affine) @ grid.affine
    depth, height, width = grid.data.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    result = np.zeros(grid.data.shape, volume.data.dtype)
    last = np.array(volume.data.shape[::-1]) - 1
    for z in range(depth):  # slice by slice: the coordinates of a whole CT would need gigabytes
        places = np.stack([x.ravel(), y.ravel(), np.full(x.size, z), np.ones(x.size)])
        i = np.floor(to_voxel[:3] @ places + 0.5 - 1e-6).astype(int)  # a tie goes to the lower voxel, rounding or not
        inside = ((i >= 0) & (i <= last[:, None])).all(axis=0)
        i = i[:, inside]
        result[z].reshape(-1)[inside] = volume.data[i[2], i[1], i[0]]
    return result


def _whole_numbers(volume: Volume) -> Volume:
    """The map as integers; many tools store label maps as floats."""
    if np.can_cast(volume.data.dtype, np.int32):
        return volume
    _check_size(volume)
    if volume.data.dtype.kind != "f":
        return volume
    wrong = volume.data != np.rint(volume.data)  # NaN too
    if wrong.any():
        raise DataProblem(
            f"{volume.path} is no label map: {int(wrong.sum())} voxels are no whole numbers, the first "
            f"{volume.data[wrong][0]:.7g}. Export it again with nearest-neighbour interpolation."
        )
    return replace(volume, data=volume.data.astype(np.int32))


def _check_size(volume: Volume) -> None:
    """No value is infinite or too large for the label of anything."""
    wrong = (volume.data > LARGEST) | (volume.data < -LARGEST)
    if wrong.any():
        raise DataProblem(
            f"{volume.path} is no label map: {int(wrong.sum())} voxels are beyond {LARGEST}, the first "
            f"{volume.data[wrong][0]:.7g}. Export it again with the labels' ids."
        )


def _side_findings(prediction: Volume, reference: Volume, labels: Labels) -> list[dict[str, Any]]:
    found, true = (check_sides(volume.data, labels.organs, reference.affine) for volume in (prediction, reference))
    known = {(finding.kind, finding.left) for finding in true}
    return [finding.as_json() | {"in_reference": (finding.kind, finding.left) in known} for finding in found]


def _unknown(prediction: Volume, reference: Volume, labels: Labels) -> dict[str, dict[str, int]]:
    known = labels.known()
    counted = {}
    # The ignore label belongs into references only.
    for what, volume, allowed in (
        ("prediction", prediction, known - ({labels.ignore} - {None})),
        ("reference", reference, known),
    ):
        values, counts = count_values(volume.data)
        found = {str(value): count for value, count in zip(values, counts) if value not in allowed}
        if found:
            counted[what] = found
    return counted


def count_values(data: np.ndarray) -> tuple[list[int], list[int]]:
    """The values of a label map and how many voxels have them, in one pass where values are small."""
    if data.dtype == bool or (data.dtype.kind in "iu" and data.size and data.min() >= 0 and data.max() < 1 << 16):
        counts = np.bincount(data.ravel().astype(np.uint16))
        values = np.flatnonzero(counts)
        return values.tolist(), counts[values].tolist()
    found, tally = np.unique(data, return_counts=True)
    return found.tolist(), tally.tolist()
