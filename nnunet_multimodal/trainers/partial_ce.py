"""Training from scribbles: partial cross-entropy, alone or with one regulariser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.losses import EntropyLoss, MumfordShahLoss, TotalVariationLoss
from nnunet_multimodal.losses.weak import Regulariser
from nnunet_multimodal.trainers.weak import CRF_SETTINGS, WeakTrainer


class nnUNetTrainerPartialCE(WeakTrainer):
    """The plans' network, taught by what is drawn alone.

    paper: CmFNet's baseline pCE; the words of its name add one regulariser each, as in WSL4MIS.
    dataset: scribbles, with nnU-Net's ignore label for what nobody drew (``scribbles import``).
    differs: partial cross-entropy in place of Dice and cross-entropy, no deep supervision; padding is unlabelled.
    """

    term: ClassVar[str | None] = None  # the setting that weighs the regulariser
    settings_defaults: ClassVar[dict[str, Any]] = {
        **WeakTrainer.settings_defaults,
        "crf_weight": 0.1,
        "entropy_weight": 0.1,
        "tv_weight": 0.01,
        "mumford_shah_weight": 0.01,
        **CRF_SETTINGS,
    }

    def check_dataset(self) -> None:
        """A weight is no less than 0, and the CRF's kernels are kernels."""
        super().check_dataset()
        if self.term is None:
            return
        if self.settings[self.term] < 0:
            raise UsageError(f"{self.term}: expected at least 0, found {self.settings[self.term]!r}.")
        self.loss_of_term()

    def loss_of_term(self) -> Regulariser | None:
        """The regulariser of this trainer, not weighted."""
        return None

    def regulariser(self) -> Regulariser | None:
        """The trainer's term times its weight."""
        loss = self.loss_of_term()
        if loss is None or self.term is None:
            return None
        weight = self.settings[self.term]
        return lambda probabilities, image: weight * loss(probabilities, image)


def of_probabilities(loss: Callable[[Tensor], Tensor]) -> Regulariser:
    """A loss that does not look at the image."""
    return lambda probabilities, image: loss(probabilities)


class nnUNetTrainerPartialCE_CRF(nnUNetTrainerPartialCE):
    """Neighbours that look alike are of one class (gated CRF)."""

    term: ClassVar[str | None] = "crf_weight"

    def loss_of_term(self) -> Regulariser | None:
        """In the slice for 2d, from three sides for 3d."""
        return self.crf()


class nnUNetTrainerPartialCE_EM(nnUNetTrainerPartialCE):
    """The network is to be sure of itself (entropy minimisation)."""

    term: ClassVar[str | None] = "entropy_weight"

    def loss_of_term(self) -> Regulariser | None:
        """The voxels' mean entropy."""
        return of_probabilities(EntropyLoss())


class nnUNetTrainerPartialCE_TV(nnUNetTrainerPartialCE):
    """Borders are to be short (total variation)."""

    term: ClassVar[str | None] = "tv_weight"

    def loss_of_term(self) -> Regulariser | None:
        """Differences of neighbouring voxels."""
        return of_probabilities(TotalVariationLoss())


class nnUNetTrainerPartialCE_MS(nnUNetTrainerPartialCE):
    """A class is to be of one intensity, and its borders short (Mumford-Shah)."""

    term: ClassVar[str | None] = "mumford_shah_weight"

    def loss_of_term(self) -> Regulariser | None:
        """Deviation from the class's mean intensity, and the length of its border."""
        return MumfordShahLoss()
