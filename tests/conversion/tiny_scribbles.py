"""Scribbled cases on disk: 4 is what nobody drew on, 0 background that was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_data import SHAPE, make_image, make_label, save


def make_scribbles(unlabelled: int = 4, background: int = 0) -> np.ndarray:
    """A line of each of the two classes of ``make_label`` and of background in slice 2; uint8 [X, Y, Z]."""
    scribbles = np.full(SHAPE, unlabelled, dtype=np.uint8)
    scribbles[4:7, 5, 2] = 1  # 3 voxels of the 120 of class 1
    scribbles[10:12, 6, 2] = 2  # 2 of the 48 of class 2
    scribbles[2:14, 11, 2] = background  # 12
    return scribbles


@dataclass
class Scribbled:
    """Folders of images, scribbles and dense labels: cases a and b."""

    root: Path
    raw: Path

    def image(self, case: str = "a") -> Path:
        return self.root / "images" / f"{case}.nii.gz"

    def scribbles(self, case: str = "a") -> Path:
        return self.root / "scribbles" / f"{case}.nii.gz"

    def dense(self, case: str = "a") -> Path:
        return self.root / "dense" / f"{case}.nii.gz"

    def arguments(self, *more: str, unlabelled: str = "4") -> list[str]:
        """``scribbles import`` on the folders; options given twice count as given last."""
        folders = ["--images", str(self.root / "images"), "--scribbles", str(self.root / "scribbles")]
        return ["scribbles", "import", *folders, "-d", "7", "--name", "Tiny", "--unlabelled", unlabelled, *more]

    @property
    def dataset(self) -> Path:
        return self.raw / "Dataset007_Tiny"


def make_scribbled(root: Path, raw: Path) -> Scribbled:
    data = Scribbled(root, raw)
    for seed, case in enumerate("ab"):
        save(data.image(case), make_image(seed))
        save(data.scribbles(case), make_scribbles())
        save(data.dense(case), make_label())
    return data
