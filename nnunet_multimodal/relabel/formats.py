"""Images and masks in the formats that people have: NIfTI, NRRD, MetaImage, and DICOM series."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_multimodal.conversion.dicom import list_files, read_series
from nnunet_multimodal.conversion.images import Volume, read_labels, split_suffix, written_whole
from nnunet_multimodal.errors import DataProblem

NIFTI, ITK, DICOM = "nifti", "itk", "dicom"
ITK_SUFFIXES = (".nrrd", ".mha")  # one file holds it all
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def split_format(path: Path) -> tuple[str, str | None]:
    """The name without its ending, and the kind of file; None for one that is no volume.

    >>> split_format(Path("a/liver.seg.nrrd"))
    ('liver', 'itk')
    """
    stem, suffix = split_suffix(path)
    if suffix:
        return stem, NIFTI
    for ending in ITK_SUFFIXES:
        if path.name.lower().endswith(ending):
            stem = path.name[: -len(ending)]
            return stem[:-4] if stem.lower().endswith(".seg") else stem, ITK
    return path.name, None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_mask(path: Path) -> Volume:
    """A label map [Z, Y, X] in RAS order from a NIfTI, NRRD or MetaImage file.

    Raises:
        DataProblem: it cannot be read, or is not one 3D volume of plain numbers.
    """
    if split_format(path)[1] != ITK:
        return read_labels(path, reorthonormalize=True)
    image = _read_itk(path)
    affine = _affine(image)
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(_plain(array), affine))
    zooms = canonical.header.get_zooms()[:3]
    data = np.asanyarray(canonical.dataobj).transpose(2, 1, 0)
    return Volume(path, data, canonical.affine, (float(zooms[2]), float(zooms[1]), float(zooms[0])))


def write_nifti(source: Path, kind: str, destination: Path) -> None:
    """An image as .nii.gz, with the voxels and geometry that it has; whole or not at all.

    Raises:
        DataProblem: it cannot be read.
    """
    image = None if kind == NIFTI else read_series(source).image if kind == DICOM else _read_itk(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(destination) as temporary:
        if image is not None:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        else:
            with source.open("rb") as plain, gzip.open(temporary, "wb", compresslevel=1) as packed:
                shutil.copyfileobj(plain, packed)


def files_of(image: Path, kind: str) -> list[Path]:
    """The files that an image consists of."""
    return sorted(list_files(image)) if kind == DICOM else [image]


def stamp(image: Path, kind: str) -> tuple[int, int]:
    """Size in bytes and newest time in ns: what changes when an image does.

    Raises:
        DataProblem: it is gone.
    """
    try:
        stats = [path.stat() for path in files_of(image, kind)]
    except OSError as error:
        raise DataProblem(f"the image {image} cannot be read: {error.strerror}. Put it back.") from error
    return sum(each.st_size for each in stats), max(each.st_mtime_ns for each in stats)


def file_hash(image: Path, kind: str) -> str:
    """SHA-256 of an image's files."""
    digest = hashlib.sha256()
    for path in files_of(image, kind):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_itk(path: Path) -> sitk.Image:
    if not path.is_file():
        raise DataProblem(f"{path} does not exist.")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataProblem(f"Cannot read {path}: it is damaged or not what its name says. Export it again.") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataProblem(
            f"{path} has {image.GetNumberOfComponentsPerPixel()} numbers per voxel, expected one (of a segmentation in "
            "layers, export the label map: overlapping segments cannot be labels)."
        )
    if image.GetDimension() != 3:
        raise DataProblem(f"{path} has {image.GetDimension()} axes, expected 3.")
    return image


def _affine(image: sitk.Image) -> np.ndarray:
    """[4, 4], voxel (x, y, z) to mm in RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _LPS_TO_RAS @ affine


def _plain(array: np.ndarray) -> np.ndarray:
    """NIfTI has no 64 bit integers that all readers know."""
    return array.astype(np.int32) if array.dtype.kind in "iu" and array.dtype.itemsize == 8 else array
