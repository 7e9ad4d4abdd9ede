"""What is looked at before a corrected mask is accepted.

An error cannot be accepted: geometry, values. A doubt can, if the person says that it is meant: an empty mask, an organ
that the proposal had and the correction has not, an organ on the wrong side of the patient. What is only odd about a
pair of organs (one in pieces, one far larger) is a remark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from nnunet_multimodal.conversion.images import Volume, check_label_values, compare_geometry
from nnunet_multimodal.data.side_checks import ASTRAY, EXCHANGED, check_sides
from nnunet_multimodal.errors import DataProblem


@dataclass
class Checked:
    """A mask on its image's grid, uint16 [Z, Y, X] in RAS order, and what is doubtful or odd about it."""

    labels: np.ndarray
    doubts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_mask(mask: Volume, image: Volume, labels: Mapping[str, int], proposal: np.ndarray | None) -> Checked:
    """Checks a corrected mask against its image and its proposal.

    Args:
        mask: as read.
        image: the case's.
        labels: of the project, background and ignore too.
        proposal: [Z, Y, X] on the image's grid; None if there was none.

    Raises:
        DataProblem: it is not on the image's grid, or holds values that are no labels.
    """
    if mask.data.dtype.kind == "f" and np.isnan(mask.data).any():
        raise DataProblem(f"{mask.path} holds NaN, expected whole numbers. Export it again as a label map.")
    on_grid = compare_geometry(image, mask, "mask")
    check_label_values(on_grid, set(labels.values()))
    found = replace(on_grid, data=on_grid.data.astype(np.uint16)).data
    organs = {name: value for name, value in labels.items() if value and name != "ignore"}
    present = set(np.unique(found).tolist())
    doubts = []
    if not present & set(organs.values()):
        doubts.append("the mask is empty")
    elif proposal is not None:
        proposed = set(np.unique(proposal).tolist())
        missing = [name for name, value in organs.items() if value in proposed - present]
        if missing:
            doubts.append(f"in the proposal but not in the mask: {', '.join(missing)}")
    sides = check_sides(found, organs, image.affine)
    doubts += [finding.text for finding in sides if finding.kind in (EXCHANGED, ASTRAY)]
    return Checked(found, doubts, [finding.text for finding in sides if finding.kind not in (EXCHANGED, ASTRAY)])
