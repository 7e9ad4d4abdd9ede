"""Masks under the name of their content: written once, never changed, so that no step can damage an earlier one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np

from nnunet_multimodal.conversion.images import Volume, read_labels, write_like
from nnunet_multimodal.errors import DataProblem


def content_hash(labels: np.ndarray, grid: Volume) -> str:
    """SHA-256 of a label map [Z, Y, X] and of the grid that it lies on, whatever the file's type and compression.

    The grid counts, because two empty masks of one shape are files with different headers; it counts in the image's own
    storage order, in which the file is written.
    """
    header = grid.header
    affine = grid.affine if header is None else header.get_best_affine()
    digest = hashlib.sha256()
    digest.update(repr(labels.shape).encode())
    digest.update((np.round(np.asarray(affine, dtype=np.float64), 3) + 0.0).tobytes())  # + 0.0: no negative zero
    digest.update(np.ascontiguousarray(labels, dtype="<u2").tobytes())
    return digest.hexdigest()


class MaskStore:
    """The masks of a project in ``folder/ab/abcd....nii.gz``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.nii.gz"

    def put(self, labels: np.ndarray, image: Volume) -> str:
        """Writes a label map [Z, Y, X] on its image's grid, unless it is there; on disk when this returns.

        Returns:
            the name of its content.
        """
        name = content_hash(labels, image)
        path = self.path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_like(path, labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16), image)
            path.chmod(0o444)  # a tool that follows nnU-Net's links must not write into it
            sync_folder(path.parent)
        return name

    def read(self, name: str) -> Volume:
        """A mask, checked against its name.

        Raises:
            DataProblem: it is gone or was changed.
        """
        path = self.path(name)
        if not path.is_file():
            raise DataProblem(f"the mask {path} is gone. Restore it from a backup, or undo its acceptance.")
        volume = read_labels(path, reorthonormalize=True)
        labels = volume.data.astype(np.uint16)
        if content_hash(labels, volume) != name:
            raise DataProblem(
                f"the mask {path} was changed since it was accepted: its content is not what its name says. "
                "Restore it from a backup, or undo its acceptance and accept it again."
            )
        return replace(volume, data=labels)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to disk; a renamed file is only then there after a power cut."""
    with contextlib.suppress(OSError):  # Windows, some network drives
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def own_affine(volume: Volume) -> np.ndarray:
    """[4, 4], of the file's own storage order."""
    return volume.affine if volume.header is None else np.asarray(volume.header.get_best_affine())


def axis_codes(volume: Volume) -> str:
    """``LAS``: the file's storage order."""
    return "".join(nibabel.aff2axcodes(own_affine(volume)))
