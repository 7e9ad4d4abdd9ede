"""Scribbles in a file per class become one label map per case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dataset import FILE_ENDING, check_all, find_files
from nnunet_multimodal.conversion.images import Volume, compare_geometry, describe_voxel, read_labels, write_like
from nnunet_multimodal.conversion.scribble_dataset import Legend
from nnunet_multimodal.errors import DataProblem

UNLABELLED = 0


def combine_class_masks(folders: Mapping[str, Path], output: Path) -> Legend:
    """Write a label map per case out of a folder of masks per class.

    Args:
        folders: class -> folder of masks, 0 where it is not drawn and one other value where it is; ``background`` is
            the drawn background. A case without a file has nothing of that class.
        output: an existing folder for CASE.nii.gz.

    Returns:
        What the values in the written files mean.

    Raises:
        DataProblem: a file is no mask, the masks of a case are not on one grid, or a voxel is drawn as two classes
            (faults.md 27).
    """
    names = [name for name in folders if name != "background"]
    value_of = {name: value for value, name in enumerate(names, start=1)}
    background = len(names) + 1 if "background" in folders else None
    if background is not None:
        value_of["background"] = background
    files: dict[str, dict[str, Path]] = {}
    for name, folder in folders.items():
        for case, path in find_files(folder, f"scribble of {name}").items():
            files.setdefault(case, {})[name] = path

    def combine(case: str) -> None:
        volume = _combined(files[case], value_of)
        write_like(output / f"{case}{FILE_ENDING}", volume.data, volume)

    check_all(sorted(files), combine, "scribbles")
    return Legend(UNLABELLED, background, {name: (value,) for name, value in value_of.items() if name in names})


def _combined(files: Mapping[str, Path], value_of: Mapping[str, int]) -> Volume:
    """The label map of one case, on the grid of its first mask."""
    first: Volume | None = None
    combined = np.zeros(0)
    for name, path in files.items():
        mask = read_labels(path)
        values = np.unique(mask.data)
        if len(values) > 2 or (values[0] != 0 and len(values) > 1) or values[0] < 0:
            found = ", ".join(f"{value:.7g}" for value in values[:5])
            raise DataProblem(f"{path} is no mask: it has the values {found}, expected 0 and one other.")
        if first is None:
            first, combined = mask, np.full(mask.data.shape, UNLABELLED, dtype=np.uint8)
        else:
            compare_geometry(first, mask, "scribble")
        drawn = mask.data != 0
        twice = drawn & (combined != UNLABELLED)
        if twice.any():
            others = [other for other, value in value_of.items() if value in np.unique(combined[twice])]
            raise DataProblem(
                f"{path} has {int(twice.sum())} voxels that are drawn as {' and '.join([*others, name])}, the first at "
                f"{describe_voxel(mask, twice)}. A voxel can be of one class only; erase one of them."
            )
        combined[drawn] = value_of[name]
    assert first is not None  # a case is only known by a file
    return Volume(first.path, combined, first.affine, first.spacing, first.header)
