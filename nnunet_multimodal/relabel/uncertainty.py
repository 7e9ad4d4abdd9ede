"""How sure a model is of a case: disagreement between its folds, or entropy where it has only one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_multimodal.inference.modality import ModalityPredictor

SURE = 0.99  # of background: such voxels say nothing about how hard a case is, only how large the image is


def disagreement(segmentations: Sequence[np.ndarray], labels: Sequence[int]) -> float:
    """1 - mean Dice over all pairs of folds and all labels that at least one of the two found; 0 if none found any.

    Args:
        segmentations: label maps of one shape, one for each fold, at least two.
        labels: ids of the foreground.

    Example:
        >>> disagreement([np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1])], [1, 2])
        0.5
    """
    dice = []
    for first, second in itertools.combinations(segmentations, 2):
        for label in labels:
            a, b = first == label, second == label
            size = int(a.sum()) + int(b.sum())
            if size:
                dice.append(2 * int((a & b).sum()) / size)
    return 1.0 - float(np.mean(dice)) if dice else 0.0


def entropy_score(probabilities: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean entropy where the network is not sure of background, and the entropy of each voxel.

    Args:
        probabilities: [C, ...], background first.

    Returns:
        0 to 1 (1: all classes alike), and [...] in the same unit.

    Example:
        >>> entropy_score(np.array([[1.0, 0.5], [0.0, 0.5]]))[0]
        1.0
    """
    terms = probabilities * np.log(np.clip(probabilities, 1e-12, None))
    entropy = -terms.sum(axis=0) / np.log(len(probabilities))
    doubtful = probabilities[0] < SURE
    return (float(entropy[doubtful].mean()) if doubtful.any() else 0.0), entropy


class FoldPredictor(ModalityPredictor):
    """Predicts as nnU-Net does, fold by fold, and remembers how far the folds are apart.

    Attributes:
        score: of the last image; 0 is sure.
        map: [Z, Y, X] of the last image on the network's grid, 0 to 1: share of folds that differ from the others'
            majority, or the entropy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score = 0.0
        self.map = np.zeros((0, 0, 0), dtype=np.float32)

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """data [channels, Z, Y, X], preprocessed -> logits [C, Z, Y, X], the mean over folds."""
        of_folds: list[dict] = self.list_of_parameters  # type: ignore[has-type]
        total: Tensor | None = None
        found = []
        try:
            for parameters in of_folds:
                self.list_of_parameters = [parameters]
                logits = super().predict_logits_from_preprocessed_data(data).cpu()
                found.append(logits.argmax(0).numpy().astype(np.uint16))
                total = logits if total is None else total + logits
        finally:
            self.list_of_parameters = of_folds
        assert total is not None
        mean = total / len(of_folds) if len(of_folds) > 1 else total
        if len(found) > 1:
            self.score = disagreement(found, range(1, len(mean)))
            agreed = mean.argmax(0).numpy()
            self.map = np.mean([each != agreed for each in found], axis=0, dtype=np.float32)
        else:
            self.score, entropy = entropy_score(torch.softmax(mean.float(), dim=0).numpy())
            self.map = entropy.astype(np.float32)
        return mean
