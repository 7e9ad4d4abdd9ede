"""Folders of tiny references and predictions."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.5, 0, -10], [0, 0, 6, 5], [0, 0, 0, 1.0]])  # stored L, A, S
SHAPE = (16, 14, 6)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def organs() -> np.ndarray:
    """Liver (1) of 5 x 6 x 4 voxels, spleen (2) of 4 x 6 x 2; uint8 [X, Y, Z]."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:8, 3:9, 1:5] = 1
    label[9:13, 4:10, 2:4] = 2
    return label


def shifted(by: int) -> np.ndarray:
    """The organs moved along y: their Dice is 1 - by / 6."""
    return np.roll(organs(), by, axis=1)
