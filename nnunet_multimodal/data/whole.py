"""Training cases that sometimes are the whole volume, made as small as a window: what zooming out looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def resize_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """image [C, z, y, x] -> [C, *size]; each new voxel is the mean of the old ones that it covers."""
    return F.interpolate(image[None].float(), size=tuple(size), mode="area")[0]


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """labels [C, z, y, x] -> [C, *size]; each new voxel is the old one at its centre."""
    return F.interpolate(labels[None].float(), size=tuple(size), mode="nearest-exact")[0].to(labels.dtype)


class SometimesWhole:
    """nnU-Net's data set of preprocessed cases, of which some are loaded whole and resized to a window.

    Source: SegVol draws crops and resized volumes, half of each; its later training three crops to one volume.

    Args:
        dataset: nnU-Net's.
        window: the network's patch size.
        share: of the cases that are loaded whole.
    """

    def __init__(self, dataset: Any, window: Sequence[int], share: float) -> None:
        self.dataset, self.window, self.share = dataset, tuple(window), share

    @property
    def identifiers(self) -> list[str]:
        """The cases."""
        return self.dataset.identifiers

    def load_case(self, identifier: str) -> tuple:
        """As nnU-Net's: data, segmentation, previous segmentation, properties."""
        data, segmentation, previous, properties = self.dataset.load_case(identifier)
        if not np.random.uniform() < self.share:  # numpy's global generator: seeded in each worker
            return data, segmentation, previous, properties
        image = resize_image(torch.from_numpy(np.asarray(data[:])), self.window).numpy()
        labels = resize_labels(torch.from_numpy(np.asarray(segmentation[:])), self.window).numpy()
        # The loader crops around a voxel of the class it wants: in the middle, all of it stays in the patch.
        middle = np.array([[0, *(size // 2 for size in self.window)]])
        return (
            image,
            labels,
            previous,
            {**properties, "class_locations": dict.fromkeys(properties["class_locations"], middle)},
        )
