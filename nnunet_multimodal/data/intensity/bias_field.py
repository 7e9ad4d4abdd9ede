"""Uneven coil sensitivity: a smooth field multiplies the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


class BiasField(ImageOnlyTransform):
    """Multiplies the image, counted from its minimum, with exp of a random cubic polynomial of the position.

    The polynomial is a product basis of cosines of order 0..3 along each axis without the constant, so that it has no
    edges and is evaluated as small matrix products. Image [C, ...], 2D or 3D.

    Args:
        strength: interval of the largest |log| of the field; 0.5 means between 0.6 and 1.6 times.
    """

    ORDER = 3  # coil profiles are that smooth; N4 corrects with about as many control points

    def __init__(self, strength: tuple[float, float] = (0.1, 0.6)) -> None:
        super().__init__()
        self.strength = strength

    def get_parameters(self, **data_dict: Any) -> dict:
        axes = data_dict["image"].ndim - 1
        weights = np.random.normal(size=(self.ORDER + 1,) * axes)
        order = np.indices(weights.shape).sum(axis=0)
        weights /= np.maximum(order, 1)  # low orders dominate
        weights[(order == 0) | (order > self.ORDER)] = 0
        return {"weights": weights, "strength": np.random.uniform(*self.strength)}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        field = torch.from_numpy(params["weights"]).float()
        for size in img.shape[1:]:  # each product turns the first axis of weights into the last axis of positions
            places = (torch.arange(size) + 0.5) * (np.pi / size)
            cosines = torch.cos(torch.arange(self.ORDER + 1)[:, None] * places)
            field = torch.tensordot(field, cosines, dims=([0], [0]))
        largest = float(field.abs().max())
        if largest == 0:
            return img
        field.mul_(params["strength"] / largest).exp_()
        floor = img.amin(dim=tuple(range(1, img.ndim)), keepdim=True)
        return (img - floor).mul_(field).add_(floor)
