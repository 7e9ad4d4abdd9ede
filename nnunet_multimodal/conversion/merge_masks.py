"""One mask per organ, as TotalSegmentator's data has them, becomes one label map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dataset import Repairs
from nnunet_multimodal.conversion.images import Volume, compare_geometry, read_labels
from nnunet_multimodal.errors import DataProblem


def merge_masks(
    image: Volume,
    masks: Mapping[int, Path],
    repairs: Repairs = Repairs(),  # noqa: B008 (frozen)
) -> tuple[np.ndarray, int]:
    """Label map of masks that may overlap: a voxel of several goes to the organ with the fewest voxels in this case.

    So a small organ is not painted over by the large one around it, and the order of the masks does not matter; only
    of two organs of the same size the later one wins.

    Args:
        image: what the masks were drawn on.
        masks: label -> file. A mask is 0 and one other value, on the grid of the image; it may be empty.
        repairs: what may be put right in the files.

    Returns:
        The labels [Z, Y, X], uint8 (uint16 for labels above 255), and the number of voxels that lie in several masks.

    Raises:
        DataProblem: a mask cannot be read, holds other values, or is not on the grid of the image.
    """
    labels = np.zeros(image.data.shape, dtype=np.uint8 if max(masks, default=0) <= 255 else np.uint16)
    shared = np.zeros(image.data.shape, dtype=bool)
    sizes = np.zeros(max(masks, default=0) + 1, dtype=np.int64)
    for label, path in masks.items():
        volume = read_labels(path, repairs.reorthonormalize)
        volume = compare_geometry(image, volume, "mask", repairs.allow_affine_mismatch, repairs.fix_header)
        mask = _as_bool(volume)
        sizes[label] = np.count_nonzero(mask)
        taken = mask & (labels > 0)
        shared |= taken
        # The owner so far is the smallest of the masks before, so comparing with it compares with all of them.
        mask[taken] = sizes[label] <= sizes[labels[taken]]
        labels[mask] = label
    return labels, int(np.count_nonzero(shared))


def _as_bool(volume: Volume) -> np.ndarray:
    """bool [Z, Y, X]; compared instead of sorted, because there may be a hundred masks of 10 million voxels."""
    data = volume.data
    inside = data != 0
    is_mask = data.min() >= 0 and (not inside.any() or np.array_equal(inside, data == data.max()))
    if not is_mask:
        found = ", ".join(f"{value:.7g}" for value in np.unique(data)[:5])
        raise DataProblem(f"{volume.path} is no mask: it has the values {found}, expected 0 and one other.")
    return inside
