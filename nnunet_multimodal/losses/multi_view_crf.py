"""The CRF loss of a volume, seen from three sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnunet_multimodal.losses.gated_crf import KERNELS, check_radius, check_shapes, mean_energy
from nnunet_multimodal.losses.kernels import read_kernels
from nnunet_multimodal.losses.pairwise import half_window, make_plane

AXIAL, CORONAL, SAGITTAL = (1, 2), (0, 2), (0, 1)  # axes of Z, Y, X that a window spans


class MultiViewCRFLoss(nn.Module):
    """The mean of ``GatedCRFLoss`` over the axial, sagittal and coronal slices of a volume.

    L = (L^A + L^S + L^C) / 3, each the mean of the two-dimensional loss over the slices of that view.

    Source: CmFNet, Eq. 6; PA-Seg. As there, a window is 2 radius + 1 voxels wide in every view. Neighbours on an axis
    belong to two views and are computed once: 165 offsets instead of 180 at radius 5.

    Args:
        kernels, radius: as for ``GatedCRFLoss``.
        spacing: size of a voxel along Z, Y, X, in the unit of sigma_xy. By default distances are in voxels, whatever
            the voxels' shape (as in PA-Seg); with (2.5, 1, 1), slices 2.5 pixels apart are that far apart.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an option out of range; shapes that do not fit.

    Example:
        >>> import torch
        >>> volume = torch.zeros(1, 1, 4, 4, 4)
        >>> half = torch.full((1, 2, 4, 4, 4), 0.5)
        >>> round(MultiViewCRFLoss(radius=1)(half, volume).item(), 4)  # 5.25 neighbours in a slice, nearly 0.5 each
        2.5735
    """

    def __init__(
        self,
        kernels: Sequence[Mapping[str, Any]] = KERNELS,
        radius: int = 5,
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.kernels, self.radius = read_kernels(kernels), check_radius(radius)
        sizes = (1.0, 1.0, 1.0) if spacing is None else _check_spacing(spacing)
        window = half_window(self.radius)
        along_a = [offset for offset in window if offset[1] == 0]
        along_b = [offset for offset in window if offset[0] == 0]
        apart = [offset for offset in window if offset not in along_a + along_b]
        self.planes = [
            make_plane(AXIAL, window, self.kernels, sizes, twice=along_a + along_b),
            make_plane(CORONAL, along_a + apart, self.kernels, sizes, twice=along_a),
            make_plane(SAGITTAL, apart, self.kernels, sizes),
        ]

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """The loss, a scalar, computed in fp32.

        Args:
            probabilities: [B, C, Z, Y, X].
            image: [B, I, Z, Y, X], one channel or several.
        """
        check_shapes(probabilities, image, (5,))
        return mean_energy(probabilities, image, self.planes) / 3


def _check_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    if isinstance(spacing, str) or not isinstance(spacing, Sequence) or len(spacing) != 3:
        raise ValueError(f"spacing must be three numbers, along Z, Y, X: found {spacing!r}")
    for value in spacing:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"spacing must be positive and finite: found {spacing!r}")
    return tuple(float(value) for value in spacing)
