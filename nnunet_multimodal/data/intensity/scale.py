"""Slightly different contrast and brightness: what rescanning the same patient gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class Scale(ImageOnlyTransform):
    """x -> factor * x + shift, for a z-scored image [C, ...].

    Args:
        contrast: interval of the factor.
        brightness: interval of the shift, in standard deviations.
    """

    def __init__(
        self, contrast: tuple[float, float] = (0.85, 1.15), brightness: tuple[float, float] = (-0.15, 0.15)
    ) -> None:
        super().__init__()
        self.contrast = contrast
        self.brightness = brightness

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"factor": np.random.uniform(*self.contrast), "shift": np.random.uniform(*self.brightness)}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return img.mul(params["factor"]).add_(params["shift"])
