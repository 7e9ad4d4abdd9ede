"""Two tiny labelled cases, and how to put them on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (16, 14, 6)  # x, y, z
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.5, 0, -10], [0, 0, 6, 5], [0, 0, 0, 1.0]])  # stored left to right: L, A, S


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def make_image(seed: int = 0) -> np.ndarray:
    """A bright body with noise, air around it; int16 [X, Y, Z]."""
    image = np.zeros(SHAPE)
    image[2:14, 2:12] = 100 + 10 * np.random.default_rng(seed).standard_normal((12, 10, 6))
    return image.astype(np.int16)


def make_label() -> np.ndarray:
    """Organ 1 in slices 1 to 4, organ 2 in slices 2 and 3; uint8 [X, Y, Z]."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:8, 3:9, 1:5] = 1
    label[9:13, 4:10, 2:4] = 2
    return label


@dataclass
class Inputs:
    """Folders of images and labels: cases a and b."""

    images: Path
    labels: Path
    raw: Path

    def image(self, case: str = "a") -> Path:
        return self.images / f"{case}_0000.nii.gz"

    def label(self, case: str = "a") -> Path:
        return self.labels / f"{case}.nii.gz"

    def arguments(self, *more: str) -> list[str]:
        """``convert crossmr`` on the two folders."""
        return [
            "convert",
            "crossmr",
            "--reference-images",
            str(self.images),
            "--labels",
            str(self.labels),
            "-d",
            "7",
            *more,
        ]
