"""What a network has come to think of each training case, averaged over the training and kept on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.data.drawn import DrawnBackground, DrawnCases

LOOKED_AT = "looked_at.txt"  # the epoch after which all cases were predicted last


class PseudoLabels:
    """A moving average of predicted probabilities for each case, and the labels of which it is sure.

    Beside each case's average (half precision: 2 bytes x classes x voxels) lies its label map, which training reads.
    Files are replaced in one step, so that a worker reads an old one or a new one.

    Args:
        folder: made when the first case comes.
        share: of a new prediction in the average (alpha).
        confidence: a voxel whose highest average is not above it has no pseudo label.
        ignore_label: stands for none.
    """

    def __init__(self, folder: Path, share: float, confidence: float, ignore_label: int) -> None:
        self.folder, self.share, self.confidence, self.ignore_label = folder, share, confidence, ignore_label

    def clear(self) -> None:
        """Forgets all cases."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def add(self, case: str, probabilities: np.ndarray) -> float:
        """Takes a new prediction [C, Z, Y, X] into the average; the share of voxels that now have a pseudo label."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{case}.average.npy"
        average = probabilities.astype(np.float32)
        if path.exists():
            before = np.load(path)
            if before.shape == average.shape:  # not of other plans
                average = self.share * average + (1 - self.share) * before
        labels = average.argmax(0).astype(np.int16)
        labels[average.max(0) <= self.confidence] = self.ignore_label
        _write(path, average.astype(np.float16))
        _write(self.folder / f"{case}.labels.npy", labels)
        return float((labels != self.ignore_label).mean())

    def looked_at(self) -> int:
        """After how many epochs all cases were predicted last; 0 if never."""
        path = self.folder / LOOKED_AT
        return int(path.read_text(encoding="utf-8")) if path.exists() else 0

    def note_look(self, epoch: int) -> None:
        """All cases have been predicted after this many epochs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{LOOKED_AT}.{os.getpid()}.tmp"
        temporary.write_text(str(epoch), encoding="utf-8")
        os.replace(temporary, self.folder / LOOKED_AT)

    def labels(self, case: str, shape: tuple[int, ...]) -> np.ndarray:
        """Label map [Z, Y, X] of a case; the ignore label everywhere as long as nothing is known."""
        path = self.folder / f"{case}.labels.npy"
        if path.exists():
            # Windows does not replace a mapped file.
            found: np.ndarray = np.load(path, mmap_mode=None if os.name == "nt" else "r")
            if found.shape == shape:
                return found
        return np.broadcast_to(np.int16(self.ignore_label), shape)


def _write(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


class PseudoLabelledCases(DrawnCases):
    """Cases whose pseudo labels take the place of nnU-Net's "segmentation of the previous stage".

    nnU-Net's loader puts that behind the labels as a second channel, so both go through the same geometry.
    """

    def __init__(self, dataset: Any, pseudo: PseudoLabels) -> None:
        super().__init__(dataset)
        self.pseudo = pseudo

    def load_case(self, identifier: str) -> tuple[Any, DrawnBackground, Any, dict]:
        """Image, labels, pseudo labels, properties."""
        image, labels, _, properties = super().load_case(identifier)
        return image, labels, self.pseudo.labels(identifier, labels.shape[1:]), properties
