"""Measurement noise: Gaussian, or Rician as in a magnitude image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class Noise(ImageOnlyTransform):
    """Adds noise of a random strength; with probability ``p_rician`` the magnitude of a complex signal is taken.

    Rician: sqrt((x - min + n1)^2 + n2^2) + min, so that noise brightens what was dark (Gudbjartsson & Patz, 1995).
    Image [C, ...] of any range.

    Args:
        strength: interval of the standard deviation, as a share of the image's own.
        p_rician: share of the samples with Rician noise.
    """

    def __init__(self, strength: tuple[float, float] = (0.0, 0.25), p_rician: float = 0.5) -> None:
        super().__init__()
        self.strength = strength
        self.p_rician = p_rician

    def get_parameters(self, **data_dict: Any) -> dict:
        return {
            "strength": np.random.uniform(*self.strength),
            "rician": np.random.uniform() < self.p_rician,
            "seed": int(np.random.randint(2**32, dtype=np.uint32)),  # the field itself is too large to be a parameter
        }

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        # a generator of our own: torch's global one runs the same in every worker of nnU-Net, and numpy takes thrice
        generator = torch.Generator().manual_seed(params["seed"])
        axes = tuple(range(1, img.ndim))
        sigma = params["strength"] * img.std(dim=axes, keepdim=True, unbiased=False)
        noise = torch.randn(img.shape, generator=generator).mul_(sigma)
        if not params["rician"]:
            return noise.add_(img)
        floor = img.amin(dim=axes, keepdim=True)
        real = noise.add_(img).sub_(floor)
        imaginary = torch.randn(img.shape, generator=generator).mul_(sigma)
        return real.square_().add_(imaginary.square_()).sqrt_().add_(floor)
