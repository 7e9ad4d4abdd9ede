"""Ringing at edges, and the blur that comes with it: the outer part of k-space was never measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class Gibbs(ImageOnlyTransform):
    """Cuts the high frequencies off along one axis (the phase-encoding one), or along each of ``axes``.

    Image [C, ...]; the mean stays as it is, and so does a constant image.

    Args:
        kept: interval of the share of frequencies that are kept; at 0.5 the resolution is halved.
        axes: spatial axes (0 is the first after the channels) that may be cut; None: the last two.
        p_all: share of the samples that are cut along every one of these axes.
    """

    def __init__(
        self, kept: tuple[float, float] = (0.4, 0.8), axes: Sequence[int] | None = None, p_all: float = 0.3
    ) -> None:
        super().__init__()
        self.kept = kept
        self.axes = axes
        self.p_all = p_all

    def get_parameters(self, **data_dict: Any) -> dict:
        axes = self.axes if self.axes is not None else range(data_dict["image"].ndim - 3, data_dict["image"].ndim - 1)
        cut = list(axes) if np.random.uniform() < self.p_all else [int(np.random.choice(axes))]
        return {"kept": {axis: np.random.uniform(*self.kept) for axis in cut}}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for axis, kept in params["kept"].items():
            spectrum = torch.fft.rfft(img, dim=axis + 1)
            size = spectrum.shape[axis + 1]
            first_lost = max(1, round(kept * size))
            spectrum.narrow(axis + 1, first_lost, size - first_lost).zero_()
            img = torch.fft.irfft(spectrum, n=img.shape[axis + 1], dim=axis + 1)
        return img
