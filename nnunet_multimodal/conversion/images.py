"""Read and write NIfTI volumes in one orientation, and say precisely what is wrong with the ones that cannot be used.

Arrays are [Z, Y, X] after reorientation to the closest canonical axes (RAS), as nnU-Net's ``NibabelIOWithReorient``
yields them; affines are 4x4 and act on (x, y, z) voxel indices of that orientation.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from nnunet_multimodal.errors import DataProblem

SUFFIXES = (".nii.gz", ".nii")
SPACING_TOLERANCE_MM = 1e-3
ANGLE_TOLERANCE_DEGREES = 0.05  # a direction stored as float32 is off by up to 0.03 degrees
SHIFT_TOLERANCE_MM = 0.01  # origins are often written with two or three decimals
SHEAR_TOLERANCE = 2e-4  # ITK 5 reads a shear of 1e-4 and refuses one of 3e-4 (tried)

_SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"PK\x03\x04": "ZIP",
    b"%PDF": "PDF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"NRRD": "NRRD",
    b"\x89HDF": "HDF5",
    b"\x1f\x8b": "gzip",
    b"version https://git-lfs": "Git LFS pointer",
}


@dataclass(frozen=True)
class Volume:
    """A volume in canonical orientation.

    Attributes:
        path: where it was read from.
        data: [Z, Y, X].
        affine: [4, 4], canonical voxel index (x, y, z) to mm, RAS.
        spacing: mm along (z, y, x).
        header: the file's own header, in its own orientation; None where the geometry is no longer the file's.
        changes: what makes ``data`` or ``affine`` differ from the file; empty if the file can be used as it is.
    """

    path: Path
    data: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    header: nibabel.Nifti1Header | None = None
    changes: tuple[str, ...] = ()


def split_suffix(path: Path) -> tuple[str, str]:
    """``("case_0000", ".nii.gz")``; the suffix is empty for a file that is not NIfTI by name."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)], path.name[-len(suffix) :]
    return path.name, ""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_volume(path: Path, nan_to: float | None = None, reorthonormalize: bool = False) -> Volume:
    """Read an image.

    Args:
        path: a .nii or .nii.gz file with one 3D volume.
        nan_to: value for voxels that are NaN or infinite; None refuses them.
        reorthonormalize: replace sheared direction cosines, which ITK cannot read, by the nearest orthonormal ones.

    Raises:
        DataProblem: the file is missing, truncated, no NIfTI, not 3D, or has a spacing, direction or voxels that
            nothing can be computed with.
    """
    return _fill_nonfinite(_read(Path(path), reorthonormalize), nan_to)


def read_labels(path: Path, reorthonormalize: bool = False) -> Volume:
    """Read a label map; NaN stays in it for :func:`check_label_values` to report, because no default label is right."""
    return _read(Path(path), reorthonormalize)


def _read(path: Path, reorthonormalize: bool) -> Volume:
    _check_file(path)
    header = _read_header(path)
    _check_header(path, header)
    try:
        image: Any = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise DataProblem(_unreadable(path, header, error)) from error
    _check_affine(path, image.affine)
    orientation = io_orientation(image.affine)
    canonical = nibabel.Nifti1Image(array, image.affine, image.header).as_reoriented(orientation)
    affine: np.ndarray = canonical.affine
    own_header: nibabel.Nifti1Header | None = image.header
    changes: tuple[str, ...] = ()
    shear = _shear(affine)
    if shear > SHEAR_TOLERANCE:
        if not reorthonormalize:
            raise DataProblem(
                f"ITK cannot read {path} (shear {shear:.2g}): its direction cosines are not orthonormal. "
                "Use the reader NibabelIOWithReorient, or --reorthonormalize, which takes the nearest orthonormal ones."
            )
        affine, own_header = _orthonormal(affine), None
        changes = (f"direction made orthonormal (shear {shear:.2g})",)
    zooms = canonical.header.get_zooms()[:3]
    spacing = (float(zooms[2]), float(zooms[1]), float(zooms[0]))
    data = np.asanyarray(canonical.dataobj).transpose(2, 1, 0)
    return Volume(path, data, affine, spacing, own_header, changes)


def _check_file(path: Path) -> None:
    """The file is there, is not empty, and begins as its suffix says (rows 11 and 12 of the faults)."""
    stem, suffix = split_suffix(path)
    if not suffix:
        raise DataProblem(f"{path} is not NIfTI by its name; expected .nii or .nii.gz. Convert it first.")
    if path.is_symlink() and not path.exists():
        raise DataProblem(f"{path} is a link to {os.readlink(path)}, which does not exist.")
    if not path.exists():
        raise DataProblem(f"{path} does not exist.")
    if not path.is_file():
        raise DataProblem(f"{path} is a folder, expected a .nii or .nii.gz file.")
    if path.stat().st_size == 0:
        raise DataProblem(f"Cannot read {path}: file ends early (got 0 bytes). Copy or export it again.")
    with path.open("rb") as file:
        start = file.read(64)
    is_gzip = start[:2] == b"\x1f\x8b"
    if suffix.lower() == ".nii.gz" and not is_gzip:
        if _looks_like_nifti(start):
            raise DataProblem(f"{path} is NIfTI but not gzip-compressed. Rename it to {stem}.nii, or compress it.")
        raise DataProblem(f"{path} is not NIfTI (starts with {_signature(start)}), expected a gzip file.")
    if suffix.lower() == ".nii" and not _looks_like_nifti(start):
        hint = f" Rename it to {stem}.nii.gz." if is_gzip else ""
        raise DataProblem(f"{path} is not NIfTI (starts with {_signature(start)}).{hint}")


def _looks_like_nifti(start: bytes) -> bool:
    """A NIfTI-1 or NIfTI-2 header begins with its own length, 348 or 540, in either byte order."""
    return any(int.from_bytes(start[:4], order) in (348, 540) for order in ("little", "big"))


def _signature(start: bytes) -> str:
    for magic, name in _SIGNATURES.items():
        if start.startswith(magic):
            return f"{name} signature"
    return f"bytes {start[:4].hex(' ')}"


def _read_header(path: Path) -> nibabel.Nifti1Header:
    """The header as stored: ``nibabel.load`` quietly turns a zero spacing into 1 mm."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if not _looks_like_nifti(start) and len(start) == 4:
                raise DataProblem(f"{path} is not NIfTI (its content starts with {_signature(start)}).")
            is_second = any(int.from_bytes(start, order) == 540 for order in ("little", "big"))
            kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
            return kind.from_fileobj(file, check=False)
    except (OSError, EOFError, zlib.error, ValueError, nibabel.wrapstruct.WrapStructError) as error:
        raise DataProblem(_unreadable(path, None, error)) from error


def _check_header(path: Path, header: nibabel.Nifti1Header) -> None:
    """One 3D volume of plain numbers (extra faults), with a usable spacing (row 17)."""
    try:
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        raise DataProblem(f"Cannot read {path}: its header is damaged ({error}).") from error
    if dtype.fields is not None:
        raise DataProblem(f"{path} is a colour image ({'/'.join(dtype.fields)}), expected one number per voxel.")
    if dtype.kind not in "biuf":
        raise DataProblem(f"{path} holds {dtype} voxels, expected integers or floats.")
    if len(shape) != 3:
        size = "x".join(map(str, shape))
        hint = "Split it into one file per volume." if len(shape) > 3 else "Save it as a volume with one slice."
        raise DataProblem(f"{path} has {len(shape)} axes ({size}), expected 3. {hint}")
    if 0 in shape:
        raise DataProblem(f"{path} is empty: its shape is {'x'.join(map(str, shape))}.")
    spacing = tuple(float(value) for value in header["pixdim"][1:4])
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise DataProblem(f"spacing {_numbers(spacing)} is invalid in {path}. Export it again or correct its header.")


def _check_affine(path: Path, affine: np.ndarray) -> None:
    directions = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(directions)) < 1e-12:
        raise DataProblem(f"The affine of {path} is invalid (NaN or singular). Export it again or correct its header.")


def _unreadable(path: Path, header: nibabel.Nifti1Header | None, error: BaseException) -> str:
    """What a failed read means: a file that ends early says how much of it is there."""
    got, intact = _readable_bytes(path)
    if not intact:
        return f"Cannot read {path}: its compressed data is corrupt after {_size(got)}. Copy or export it again."
    if header is None:
        return f"Cannot read {path}: file ends early (got {_size(got)}, less than a header). Copy or export it again."
    voxels = int(np.prod(header.get_data_shape(), dtype=np.int64)) * header.get_data_dtype().itemsize
    expected = int(header["vox_offset"]) + voxels
    if got < expected:
        return f"Cannot read {path}: file ends early (got {_size(got)} of {_size(expected)}). Copy or export it again."
    return f"Cannot read {path}: {' '.join(str(error).split())}"


def _readable_bytes(path: Path) -> tuple[int, bool]:
    """How many bytes can be had from the file, decompressed, and whether it ended there without corruption."""
    if not path.name.lower().endswith(".gz"):
        return path.stat().st_size, True
    got = 0
    decompressor = zlib.decompressobj(wbits=31)  # 31: gzip framing
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            try:
                got += len(decompressor.decompress(chunk))
            except zlib.error:
                return got, False
    return got, True


def _fill_nonfinite(volume: Volume, value: float | None) -> Volume:
    """Row 18: NaN and infinite voxels are counted, and replaced only if the user named a value."""
    if volume.data.dtype.kind != "f":
        return volume
    bad = ~np.isfinite(volume.data)
    count = int(bad.sum())
    if count == 0:
        return volume
    if value is None:
        nans = int(np.isnan(volume.data).sum())
        raise DataProblem(
            f"{volume.path} has {count} voxels that are not numbers ({nans} NaN, {count - nans} infinite), "
            f"the first at {describe_voxel(volume, bad)}. Pass --nan-to VALUE to replace them."
        )
    return replace(
        volume, data=np.where(bad, value, volume.data), changes=(*volume.changes, f"{count} voxels set to {value:g}")
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_like(path: Path, array_zyx: np.ndarray, volume: Volume) -> None:
    """Write a canonical array [Z, Y, X] on the grid of a volume; the file appears whole or not at all.

    It is stored in the orientation and with the header geometry of the file that ``volume`` came from, so that nnU-Net,
    which compares the files of a case, finds the very same numbers.
    """
    if array_zyx.shape != volume.data.shape:
        raise ValueError(f"array {array_zyx.shape} does not fit the grid {volume.data.shape} of {volume.path}")
    image = nibabel.Nifti1Image(_storable(array_zyx).transpose(2, 1, 0), volume.affine)
    if volume.header is not None:
        own_affine = volume.header.get_best_affine()
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(own_affine))
        geometry = volume.header.copy()
        geometry.set_data_dtype(image.get_data_dtype())
        geometry["cal_min"] = geometry["cal_max"] = 0  # a viewer's window for the image, not for what we write
        image = nibabel.Nifti1Image(np.asanyarray(image.as_reoriented(back).dataobj), own_affine, geometry)
    image.header.set_xyzt_units("mm")
    with written_whole(path) as temporary:
        nibabel.save(image, temporary)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which becomes ``path`` only when everything was written to disk."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _storable(array: np.ndarray) -> np.ndarray:
    """NIfTI readers do not all know bool, float16, float64 or 64 bit integers."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        return array.astype(np.int32)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


# --- checks of one volume --------------------------------------------------------------------------------------------


def check_not_constant(volume: Volume) -> None:
    """Row 19."""
    lowest = volume.data.min()
    if lowest == volume.data.max():
        raise DataProblem(
            f"{volume.path} is constant ({lowest:g}); normalisation would divide by zero. "
            "Leave it out or export it again."
        )


def check_label_values(volume: Volume, allowed: set[int]) -> None:
    """Rows 23 and 24: whole numbers, none negative, all declared; nothing is ever rounded."""
    values, counts = np.unique(volume.data, return_counts=True)
    wrong = ~np.isin(values, list(allowed))
    if not wrong.any():
        return
    fractions = wrong & (values != np.rint(values)) if values.dtype.kind == "f" else np.zeros_like(wrong)
    declared = _id_range(allowed)
    if fractions.any():
        what = f"values that are no whole numbers, found {_tally(values, counts, fractions)}, expected {declared}"
        hint = "Export it again with nearest-neighbour interpolation; values are never rounded here."
    elif (values[wrong] < 0).any():
        what = f"negative labels, found {_tally(values, counts, wrong)}, expected {declared}"
        hint = "Map them to 0 (background) or to the ignore label first."
    elif set(values.tolist()) <= {0, 255}:
        what = f"a 0/255 mask, found {_tally(values, counts, wrong)}, declared {declared}"
        hint = "Map 255 to 1 first (divide the mask by 255)."
    else:
        what = f"undeclared labels, found {_tally(values, counts, wrong)}, declared {declared}"
        hint = "Name them with --label-names or --labels-json, or map them to declared ones."
    raise DataProblem(f"{volume.path} holds {what}. {hint}")


def _tally(values: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> str:
    """``5 (12 voxels), 7 (1 voxel)``, at most five of them."""
    pairs = [*zip(values[chosen].tolist(), counts[chosen].tolist())]
    shown = ", ".join(f"{value:.7g} ({count} voxel{'s' * (count != 1)})" for value, count in pairs[:5])
    return shown if len(pairs) <= 5 else f"{shown} and {len(pairs) - 5} more"


def _id_range(ids: set[int]) -> str:
    ordered = sorted(ids)
    if len(ordered) > 2 and ordered == [*range(ordered[0], ordered[-1] + 1)]:
        return f"{ordered[0]}..{ordered[-1]}"
    return ", ".join(map(str, ordered))


# --- checks of two volumes -------------------------------------------------------------------------------------------


def compare_geometry(
    a: Volume, b: Volume, what: str, allow_affine_mismatch: bool = False, fix_header: bool = False
) -> Volume:
    """Check that ``b`` (called ``what``: "label", "scribble") lies on the grid of the image ``a`` (rows 13 to 15).

    Returns:
        ``b``, with the geometry of ``a`` where ``fix_header`` replaced it.

    Raises:
        DataProblem: the shapes differ; or spacing or affine do, and neither option covers it.
    """
    if a.data.shape != b.data.shape:
        raise DataProblem(
            f"{what} {b.path} has shape {_shape(b)}, its image {a.path} has {_shape(a)} (x, y, z in RAS). "
            f"Resample or re-export the {what}."
        )
    gap = max(abs(first - second) for first, second in zip(a.spacing, b.spacing))
    angle, shift = _angle(a.affine, b.affine), float(np.linalg.norm(a.affine[:3, 3] - b.affine[:3, 3]))
    mismatch = angle > ANGLE_TOLERANCE_DEGREES or shift > SHIFT_TOLERANCE_MM
    if gap <= SPACING_TOLERANCE_MM and not mismatch:
        return b
    if fix_header:
        change = f"header taken from {a.path.name}"
        return replace(b, affine=a.affine, spacing=a.spacing, header=a.header, changes=(*b.changes, change))
    if gap > SPACING_TOLERANCE_MM:
        raise DataProblem(
            f"{what} {b.path} has spacing {_numbers(b.spacing[::-1])} mm, its image {a.path} has "
            f"{_numbers(a.spacing[::-1])} mm (x, y, z). The shapes are equal: if the voxels belong together, "
            f"--fix-header uses the image's header; otherwise re-export the {what}."
        )
    if not allow_affine_mismatch:
        raise DataProblem(
            f"{what} {b.path} does not lie where its image {a.path} does: direction off by {angle:.2f} degrees, "
            f"origin by {shift:.2f} mm. Look at both in one viewer; --fix-header uses the image's header, "
            "--allow-affine-mismatch keeps both as they are."
        )
    return b


def check_scribbles(
    scribbles: Volume,
    image: Volume,
    labels: dict[str, int],
    label_map: Volume | None = None,
    allow_affine_mismatch: bool = False,
    fix_header: bool = False,
) -> Volume:
    """Check a scribble file (0 none, k organ k) against its image (rows 27 and 28).

    Args:
        scribbles: whole numbers on the grid of the image.
        image: the image they were drawn on.
        labels: organ name to id; an entry ``ignore`` is the unlabelled class and cannot be scribbled on.
        label_map: dense labels of the image, to find scribbles on the ignore label.
        allow_affine_mismatch: as in :func:`compare_geometry`.
        fix_header: as in :func:`compare_geometry`.

    Returns:
        ``scribbles`` on the image's grid.
    """
    scribbles = compare_geometry(image, scribbles, "scribble", allow_affine_mismatch, fix_header)
    organs = {value: name for name, value in labels.items() if value > 0 and name != "ignore"}
    _check_scribble_classes(scribbles, organs)
    drawn = scribbles.data > 0
    _refuse_scribbles_at(scribbles, drawn & ~body_mask(image.data), organs, "outside the body", "Erase them there.")
    if label_map is not None and "ignore" in labels:
        ignored = drawn & (label_map.data == labels["ignore"])
        _refuse_scribbles_at(scribbles, ignored, organs, "on the ignore label", "Label or erase them.")
    return scribbles


def refuse_outside_body(scribbles: Volume, drawn: np.ndarray, images: Sequence[Volume], names: dict[int, str]) -> None:
    """Row 27: what is drawn in the air of all images of the case is a slip, or belongs to another image.

    Args:
        scribbles: the file, for the message.
        drawn: bool [Z, Y, X], what has to be inside.
        images: all channels; the body is where any of them shows one.
        names: of the values, as far as they have one.
    """
    if not drawn.any():
        return
    outside = drawn.copy()
    for image in images:
        outside &= ~body_mask(image.data)
    known = {int(value): names.get(int(value), f"label {int(value)}") for value in np.unique(scribbles.data[drawn])}
    _refuse_scribbles_at(scribbles, outside, known, "outside the body", "Erase them there, or --allow-outside-body.")


def _check_scribble_classes(scribbles: Volume, organs: dict[int, str]) -> None:
    undeclared = ~np.isin(scribbles.data, [0, *organs])
    if undeclared.any():
        found = ", ".join(f"{value:.7g}" for value in np.unique(scribbles.data[undeclared])[:5])
        declared = ", ".join(f"{value} {name}" for value, name in sorted(organs.items()))
        raise DataProblem(
            f"{scribbles.path} has scribbles of undeclared class {found}, the first at "
            f"{describe_voxel(scribbles, undeclared)}; declared: 0 none, {declared}."
        )


def _refuse_scribbles_at(
    scribbles: Volume, where: np.ndarray, organs: dict[int, str], place: str, next_step: str
) -> None:
    if where.any():
        names = ", ".join(organs[int(value)] for value in np.unique(scribbles.data[where]))
        raise DataProblem(
            f"{scribbles.path} has {int(where.sum())} scribbled voxels {place} ({names}), the first at "
            f"{describe_voxel(scribbles, where)}. {next_step}"
        )


def body_mask(data: np.ndarray) -> np.ndarray:
    """bool [Z, Y, X]: everything but the air around the patient, a little too large rather than too small."""
    from scipy import ndimage

    low, high = np.percentile(data, (0.5, 99.5))
    inside = data > low + 0.02 * (high - low)  # just above air: also fat-suppressed tissue counts
    inside = ndimage.binary_dilation(inside, iterations=2)
    # Slice by slice, in all three directions: lungs and bowel are open at the ends of the volume.
    filled = inside.copy()
    for axis in range(3):
        for index in range(data.shape[axis]):
            plane = tuple(index if other == axis else slice(None) for other in range(3))
            filled[plane] |= ndimage.binary_fill_holes(inside[plane])
    return filled


def describe_voxel(volume: Volume, where: np.ndarray) -> str:
    """The first true voxel of a mask [Z, Y, X], by its index and by its place, which every viewer shows."""
    z, y, x = (int(index) for index in np.unravel_index(int(np.argmax(where)), where.shape))
    place = volume.affine[:3] @ (x, y, z, 1)
    return f"voxel ({x}, {y}, {z}) (x, y, z in RAS; {place[0]:.1f}, {place[1]:.1f}, {place[2]:.1f} mm)"


# --- small helpers ---------------------------------------------------------------------------------------------------


def _directions(affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def _shear(affine: np.ndarray) -> float:
    """Largest entry of |D'D - I| for the direction cosines D: 0 if they are orthonormal."""
    directions = _directions(affine)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def _orthonormal(affine: np.ndarray) -> np.ndarray:
    """The affine with the nearest orthonormal direction cosines (polar decomposition); spacing and origin stay."""
    left, _, right = np.linalg.svd(_directions(affine))
    result = affine.copy()
    result[:3, :3] = left @ right * np.linalg.norm(affine[:3, :3], axis=0)
    return result


def _angle(first: np.ndarray, second: np.ndarray) -> float:
    """Rotation between two affines in degrees, from the Frobenius distance, which is exact for small angles too."""
    distance = np.linalg.norm(_directions(first) - _directions(second))
    return float(np.degrees(2 * np.arcsin(min(1.0, distance / np.sqrt(8)))))


def _shape(volume: Volume) -> str:
    return "x".join(map(str, volume.data.shape[::-1]))


def _numbers(values: tuple[float, ...]) -> str:
    """``(1.25, 1.25, 7.7)``; spacings are stored as float32, so further digits are noise."""
    return "(" + ", ".join(str(round(float(value), 4)) for value in values) + ")"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1000:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
