"""Small pieces that wire our transforms into nnU-Net's chain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class KeepChannels(ImageOnlyTransform):
    """Keeps some image channels and forgets the rest, before any work is spent on them."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def _apply_to_image(self, img: torch.Tensor, **params) -> torch.Tensor:
        return img[self.channels]


def scribble_scale(patch_size: Sequence[int]) -> float:
    """Brush and stroke size relative to the 256 x 256 images that the generator's numbers are made for."""
    return float(np.clip(np.sqrt(np.prod(patch_size[-2:])) / 256, 0.25, 2.0))
