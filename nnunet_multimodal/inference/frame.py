"""Where the voxels of a target lie in the frame of its reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_multimodal.conversion.images import Volume


@dataclass(frozen=True)
class Frame:
    """An affine map from the voxels of a volume as read (z, y, x) to mm along the reference's axes (z, y, x).

    Attributes:
        matrix: [3, 3].
        offset: [3]; 0 mm is the centre of the reference.
    """

    matrix: np.ndarray
    offset: np.ndarray


def own_frame(volume: Volume) -> Frame:
    """Of the reference itself."""
    spacing = np.array(volume.spacing)
    return Frame(np.diag(spacing), -spacing * (np.array(volume.data.shape) - 1) / 2)


def shared_frame(target: Volume, reference: Volume, by_position: bool) -> Frame:
    """Of a target: by both volumes' positions in space, or laid over each other centre on centre."""
    if not by_position:
        return own_frame(target)
    own = own_frame(reference)
    flip = np.eye(4)[[2, 1, 0, 3]]  # affines act on (x, y, z)
    to_voxel = flip @ np.linalg.inv(reference.affine) @ target.affine @ flip
    return Frame(own.matrix @ to_voxel[:3, :3], own.matrix @ to_voxel[:3, 3] + own.offset)
