"""CT and MR on one scale of intensities (MulModSeg; methods.md, section 2)."""

from __future__ import annotations

import numpy as np

from nnunet_multimodal.errors import DataProblem

METHODS = ("paper",)
CT_WINDOW = (-275.0, 125.0)  # HU
PERCENTILES = (0.5, 99.5)  # of all voxels of the image, the air around the patient too


def harmonise(image: np.ndarray, modality: str, where: str = "the image") -> np.ndarray:
    """Clips and scales an image to [0, 1] as MulModSeg does (Li et al., https://arxiv.org/abs/2411.15576).

    CT is clipped to [-275, 125] HU, the same scale for every image; any other modality has no unit, so each image is
    clipped to its own 0.5 and 99.5 percentiles, taken over all of its voxels.

    Args:
        image: any shape, finite; CT in HU.
        modality: name as in the modality table; "CT" in any case is CT.
        where: the file, for the message.

    Returns:
        float32 of the same shape, in [0, 1].

    Raises:
        DataProblem: there is nothing to scale: all voxels, or all but a few, are equal within that range.
    """
    is_ct = modality.casefold() == "ct"
    low, high = CT_WINDOW if is_ct else (float(value) for value in np.percentile(image, PERCENTILES))
    clipped = np.clip(image.astype(np.float32), low, high)
    darkest, brightest = float(clipped.min()), float(clipped.max())
    if darkest == brightest:
        within = "between -275 and 125 HU" if is_ct else "between its 0.5 and 99.5 percentiles"
        raise DataProblem(
            f"{where} ({modality}) is constant {within} ({darkest:g}), so it cannot be scaled to [0, 1]. "
            + ("Is it in HU? " if is_ct else "")
            + "Leave it out or export it again."
        )
    return np.asarray((clipped - np.float32(low)) / np.float32(high - low), dtype=np.float32)
