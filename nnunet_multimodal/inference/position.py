"""Where an array that nnU-Net's readers give lies in the patient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def affine_of(properties: Mapping[str, Any]) -> np.ndarray | None:
    """[4, 4], voxel index (x, y, z) of an array [Z, Y, X] to mm in RAS; None for a picture without a place in space.

    Args:
        properties: of the image, as NibabelIO, SimpleITKIO or the reorienting one of either gives them.
    """
    nibabel = properties.get("nibabel_stuff")
    if nibabel is not None:
        return np.asarray(nibabel.get("reoriented_affine", nibabel["original_affine"]), dtype=float)
    itk = properties.get("sitk_stuff")
    if itk is None or len(itk["spacing"]) != 3:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(itk["direction"], (3, 3)) * itk["spacing"]
    affine[:3, 3] = itk["origin"]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's axes grow towards left and back
