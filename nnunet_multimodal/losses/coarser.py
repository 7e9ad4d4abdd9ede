"""A regulariser of pairs of voxels, on a coarser grid: fewer pairs, and a window that reaches further."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.losses.weak import Regulariser


class Coarser(nn.Module):
    """The regulariser of probabilities and image averaged over blocks of voxels; an incomplete block counts as one.

    Averaged probabilities still sum to 1, and every voxel of a block gets its share of the gradient.

    Args:
        regulariser: (probabilities [B, C, ...], image [B, I, ...]) -> number.
        factors: size of a block along each spatial axis, at most that of the image; 1 leaves an axis as it is.
    """

    def __init__(self, regulariser: Regulariser, factors: Sequence[int]) -> None:
        super().__init__()
        self.regulariser, self.factors = regulariser, tuple(factors)

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """[B, C, (Z,) Y, X] and [B, I, (Z,) Y, X] -> number."""
        factors = [min(factor, size) for factor, size in zip(self.factors, image.shape[2:])]
        if all(factor == 1 for factor in factors):
            return self.regulariser(probabilities, image)
        pool = F.avg_pool2d if len(factors) == 2 else F.avg_pool3d
        return self.regulariser(*(pool(each, factors, ceil_mode=True) for each in (probabilities, image)))
