"""Stack single DICOM slices into a volume, and the masks drawn on them with it.

Slices are ordered by their position in space. Series ids and file names are not trusted: anonymised public data sets
give every slice a series of its own, and number files in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.errors import DataProblem

SPACING_TOLERANCE = 0.02  # share of the slice distance by which a gap may differ before a slice is missing


@dataclass(frozen=True)
class Series:
    """A volume and the files of its slices.

    Attributes:
        image: the volume, with its place in space.
        files: one per slice [Z], in the order of the volume.
        positions: of the slices [Z, 3] in mm, LPS.
    """

    image: sitk.Image
    files: list[Path]
    positions: np.ndarray


def list_files(folder: Path, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files of a folder in natural order (2 before 10); DICOM files often have no suffix.

    Raises:
        DataProblem: the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise DataProblem(f"{folder} is missing.")
    files = [
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != "DICOMDIR"
        and (not suffixes or path.suffix.lower() in suffixes)
    ]
    if not files:
        raise DataProblem(f"{folder} holds no {' or '.join(suffixes) or 'file'}.")
    return sorted(files, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorting key that reads digits as numbers.

    >>> sorted(["IMG-10", "IMG-2"], key=natural_key)
    ['IMG-2', 'IMG-10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def read_series(folder: Path) -> Series:
    """Read all DICOM slices of a folder as one volume.

    Raises:
        DataProblem: a file cannot be read, the folder holds two series, or a slice is missing.
    """
    files = list_files(folder)
    slices = [_read_slice(path) for path in files]
    first = slices[0]
    for path, one in zip(files, slices):
        same = np.allclose(one.GetDirection(), first.GetDirection(), atol=1e-3) and one.GetSize() == first.GetSize()
        if not same or not np.allclose(one.GetSpacing()[:2], first.GetSpacing()[:2], rtol=1e-3):
            raise DataProblem(
                f"{folder} holds two series: {path.name} and {files[0].name} differ in size, spacing or direction. "
                "Put each series into a folder of its own."
            )
    positions = np.array([one.GetOrigin() for one in slices])
    normal = np.array(first.GetDirection()).reshape(3, 3)[:, 2]
    along = positions @ normal
    order = np.argsort(along)
    distance = _slice_distance(folder, along[order], first.GetSpacing()[2])
    volume = sitk.GetImageFromArray(np.concatenate([sitk.GetArrayFromImage(slices[index]) for index in order]))
    volume.SetSpacing((*first.GetSpacing()[:2], distance))
    volume.SetOrigin(positions[order[0]].tolist())
    volume.SetDirection(first.GetDirection())
    return Series(volume, [files[index] for index in order], positions[order])


def _read_slice(path: Path) -> sitk.Image:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataProblem(f"Cannot read {path} as DICOM. Copy it again or take it out of the folder.") from error
    if image.GetDimension() != 3 or image.GetSize()[2] != 1:
        raise DataProblem(f"{path} has size {image.GetSize()}, expected one slice.")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataProblem(f"{path} is a colour image, expected one number per pixel.")
    return image


def _slice_distance(folder: Path, along: np.ndarray, single: float) -> float:
    """The common distance of sorted slice positions, in mm."""
    gaps = np.diff(along)
    if gaps.size == 0:
        return float(single)
    distance = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise DataProblem(
            f"{folder} holds two series: two slices lie at {along[int(gaps.argmin())]:.2f} mm. "
            "Put each series into a folder of its own."
        )
    worst = int(np.argmax(np.abs(gaps - distance)))
    if abs(gaps[worst] - distance) > max(SPACING_TOLERANCE * distance, 1e-2):
        raise DataProblem(
            f"{folder} lacks slices: a gap of {gaps[worst]:.2f} mm after {along[worst]:.2f} mm, "
            f"expected {distance:.2f} mm. Copy the missing ones, or leave this series out."
        )
    return distance


def stack_masks(series: Series, folder: Path, suffixes: tuple[str, ...] = ()) -> np.ndarray:
    """Masks drawn slice by slice, in the order of the series: [Z, Y, X].

    Masks and slices are paired in the natural order of their file names, which also pairs equal names. Masks that state
    a position must state that of their slice.

    Raises:
        DataProblem: masks are missing, cannot be read, or belong to other slices.
    """
    masks = list_files(folder, suffixes)
    if len(masks) != len(series.files):
        there = series.files[0].parent
        raise DataProblem(f"{folder} holds {len(masks)} masks, {there} has {len(series.files)} slices.")
    paired = _pair(series.files, masks)
    planes, places = [], []
    for path in paired:
        plane = _read_plane(path)
        array = sitk.GetArrayFromImage(plane).squeeze()
        expected = series.image.GetSize()[1::-1]
        if array.shape != expected:
            raise DataProblem(f"{path} has {array.shape[::-1]} pixels, its slice has {expected[::-1]}.")
        planes.append(array)
        places.append(plane.GetOrigin())
    _check_places(folder, series, places)
    return np.stack(planes)


def _pair(slices: Sequence[Path], masks: Sequence[Path]) -> list[Path]:
    def by_name(path: Path) -> list[tuple[int, str]]:
        return natural_key(path.stem)

    mask_of = dict(zip(sorted(slices, key=by_name), sorted(masks, key=by_name)))
    return [mask_of[path] for path in slices]


def _read_plane(path: Path) -> sitk.Image:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataProblem(f"Cannot read the mask {path}. Copy it again.") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataProblem(f"{path} is a colour image, expected one number per pixel.")
    return image


def _check_places(folder: Path, series: Series, places: Sequence[tuple[float, ...]]) -> None:
    """Slice order: only masks that are DICOM with a position each (not all the same, as in a PNG) can tell."""
    if len(series.files) < 2 or any(len(place) != 3 for place in places) or len(set(places)) < len(places):
        return
    gap = float(np.abs(np.array(places) - series.positions).max())
    if gap > 0.1:
        raise DataProblem(
            f"Masks in {folder} are not in the order of their slices: positions differ by up to {gap:.1f} mm. "
            "Name each mask like its slice."
        )


def write_pair(series: Series, labels: np.ndarray, image_path: Path, label_path: Path) -> None:
    """Write image and labels [Z, Y, X] as NIfTI on one grid; the label comes last, so a case that has one is whole."""
    mask = sitk.GetImageFromArray(labels.astype(np.uint8))
    mask.CopyInformation(series.image)
    for image, path in ((series.image, image_path), (mask, label_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            sitk.WriteImage(image, str(temporary), useCompression=True)
