"""Where something lies in a window, as sines and cosines of random frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RandomPositions(nn.Module):
    """Random Fourier features of a place: [sin 2π uG, cos 2π uG], u in [-1, 1]³ and G fixed, drawn from N(0, 1).

    Source: Tancik et al. 2020, as in SAM and SegVol; G is a buffer, so that it is saved.

    u has the axes (second, first, third) of a volume, which is SAM's (x, y) with one axis more. SegVol, however, gives
    the places of points and corners as (first, second, third) and divides the first by the second's size and the
    second by the first's: in a window of 32 x 256 x 256 a point's u reaches from -1 to 15 where the image's is in
    [-1, 1], so that points and image have no common frame. Its weights were learned like this and need it again
    (``as_segvol``); otherwise a point in the middle of a patch has that patch's code.

    Args:
        width: C, of the codes; even.
        as_segvol: SegVol's frame for points.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int, as_segvol: bool = False) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, width // 2))
        self.as_segvol = as_segvol

    def encode(self, places: Tensor) -> Tensor:
        """places [..., 3], 0 to 1 from one border of the window to the other -> [..., C]."""
        # No matrix product: under autocast it would be in half precision, which knows an angle of 20 to 1/60 only.
        matrix = self.positional_encoding_gaussian_matrix
        angles = 2 * math.pi * ((2 * places - 1)[..., None] * matrix).sum(-2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, size: Sequence[int]) -> Tensor:
        """[C, *size]: the codes of the centres of so many cells."""
        device = self.positional_encoding_gaussian_matrix.device
        first, second, third = (
            (torch.arange(number, device=device, dtype=torch.float32) + 0.5) / number for number in size
        )
        cells = torch.stack(torch.meshgrid(first, second, third, indexing="ij"), dim=-1)
        return self.encode(cells[..., [1, 0, 2]]).permute(3, 0, 1, 2)

    def points(self, voxels: Tensor, window: Sequence[int]) -> Tensor:
        """Codes of voxels.

        Args:
            voxels: [..., 3], index along the window's axes; 0 is the centre of the first voxel.
            window: its size.

        Returns:
            [..., C].
        """
        size = torch.tensor([*window], dtype=torch.float32, device=voxels.device)
        centres = voxels.float() + 0.5
        places = centres / size[[1, 0, 2]] if self.as_segvol else (centres / size)[..., [1, 0, 2]]
        return self.encode(places)
