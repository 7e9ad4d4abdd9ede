"""Preprocessed scribbles: background that was drawn stays drawn, also where the image is black."""

from __future__ import annotations

from typing import Any

import numpy as np


class DrawnBackground:
    """Labels of a case in which nnU-Net's -1 is 0 again; read piece by piece, as nnU-Net's loader does.

    nnU-Net's preprocessing turns background outside the non-zero part of an image into -1. In a scribble data set
    only drawn voxels are background, so this -1 is a scribble, and must not be taken for the -1 that padding adds
    later and that was never drawn.

    Args:
        stored: array of labels [C, Z, Y, X] that can be sliced; -1 to K, and the ignore label.
    """

    def __init__(self, stored: Any) -> None:
        self.stored = stored
        self.shape: tuple[int, ...] = tuple(stored.shape)
        self.dtype = stored.dtype

    def __getitem__(self, where: Any) -> np.ndarray:
        piece = np.array(self.stored[where])
        piece[piece == -1] = 0
        return piece


class DrawnCases:
    """An nnU-Net dataset whose cases keep their drawn background; what nnU-Net's loader asks of a dataset.

    Args:
        dataset: one of nnU-Net's (``nnUNetBaseDataset``).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.identifiers: list[str] = dataset.identifiers

    def load_case(self, identifier: str) -> tuple[Any, DrawnBackground, Any, dict]:
        """Image, labels, segmentation of the previous stage or None, properties."""
        image, labels, previous, properties = self.dataset.load_case(identifier)
        return image, DrawnBackground(labels), previous, properties
