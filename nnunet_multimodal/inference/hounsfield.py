"""What the raw intensities say about an image's modality; after z-scoring nothing of it is left for the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AIR = -200  # HU; air, lung and bowel gas lie below it, and hardly any voxel of another modality does
ENOUGH = 0.01  # share of such voxels
# P(what is seen | modality): a CT may be cut to the inside of the body; an MR with such values is a strange export.
SEEN_IN_CT, SEEN_ELSEWHERE = 0.95, 0.001


def likelihood(modalities: Sequence[str], air: float) -> list[float]:
    """How well a share of air fits each modality.

    Args:
        modalities: their names; the one called CT is in Hounsfield units.
        air: share of voxels below -200 in the image as read.

    Returns:
        P(air seen or not | modality) for each; all 1 where none is called CT.
    """
    of = {True: SEEN_IN_CT, False: SEEN_ELSEWHERE}
    computed = [name.casefold() == "ct" for name in modalities]
    if not any(computed):
        return [1.0] * len(computed)
    return [of[is_ct] if air > ENOUGH else 1 - of[is_ct] for is_ct in computed]


def share_of_air(image: np.ndarray) -> float:
    """Share of voxels below -200."""
    return float((image < AIR).mean())
