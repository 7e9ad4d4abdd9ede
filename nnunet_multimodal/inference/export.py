"""Segmentations on the grid and in the storage order of the image they belong to."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np


def write_segmentation(path: Path, segmentation: np.ndarray, image: Path) -> None:
    """Writes a label map beside nothing but itself: whole or not at all.

    Args:
        path: .nii.gz to write.
        segmentation: [Z, Y, X] in closest canonical (RAS) order, as nnU-Net's reorienting reader gives images.
        image: the file whose affine, header geometry and storage order the result gets.
    """
    original = nib.Nifti1Image.from_filename(image)
    canonical = nib.as_closest_canonical(original)
    turn = nib.orientations.ornt_transform(nib.io_orientation(canonical.affine), nib.io_orientation(original.affine))
    voxels = nib.orientations.apply_orientation(segmentation.transpose(2, 1, 0).astype(np.uint8), turn)
    header = original.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nib.save(nib.Nifti1Image(voxels, original.affine, header), temporary)
        with open(temporary, "rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
