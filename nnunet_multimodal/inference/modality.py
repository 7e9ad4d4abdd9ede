"""nnU-Net's predictor for a network that is told an image's modality, or finds it out (design.md, contract 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.inference.slabs import plan_work, segment, tiles_to_predict
from nnunet_multimodal.networks import ToldNetwork

Result = TypeVar("Result")

FLAT = 0.05  # share of the most varied tile's spread; below it a tile shows air or padding, which is of no modality


@dataclass(frozen=True)
class Verdict:
    """Which modality a case was predicted as, and what the network took it for.

    Attributes:
        modality: with which the case was predicted.
        how: ``told`` or ``inferred``.
        confidence: probability of ``modality``: the network's, mean over the tiles weighted by their spread of
            intensities, and what the intensities say.
        inferred: the modality with the highest such probability.
        inferred_confidence: that probability.
        network: the modality that the network alone takes it for.
        tiles: how many times the network looked at a tile that is not flat: tiles x mirrorings x folds.
        tiles_agreeing: in how many of them ``inferred`` was also the single tile's modality.
        predicted_twice: tiles disagreed, so that the case was predicted again as one modality.
    """

    modality: str
    how: str
    confidence: float
    inferred: str
    inferred_confidence: float
    network: str
    tiles: int
    tiles_agreeing: int
    predicted_twice: bool


class ModalityPredictor(nnUNetPredictor):
    """Stock prediction of any model; of one that can be told a modality with one modality a case.

    Left alone, the network decides tile by tile. Where all tiles agree, the logits are exactly the stock predictor's;
    where one does not, the case is predicted again with the modality that is likeliest on average told. Flat tiles
    (air, padding) have no say, and are worth no second prediction.

    Attributes:
        told: modality of the next images; None lets the network infer it. A network without modalities ignores it.
        likelihood: what the next image's intensities say of each modality; None for nothing.
        verdict: of the last image; None for a network without modalities.
        on_progress: called after each tile with the share of the image that is done.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: str | None = None
        self.likelihood: Sequence[float] | None = None
        self.verdict: Verdict | None = None
        self.on_progress: Callable[[float], Any] | None = None
        self._heard: list[tuple[Tensor, Tensor]] = []  # of each forward: modality logits [B, M], spread of a tile [B]
        self._listening = True
        self._done = self._tile_share = 0.0

    @property
    def conditioned(self) -> ToldNetwork | None:
        """The network, if it is one that can be told a modality."""
        network = getattr(self.network, "_orig_mod", self.network)
        return network if isinstance(network, ToldNetwork) and network.modalities else None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the network knows; empty for one that has none."""
        return () if self.conditioned is None else tuple(self.conditioned.modalities)

    @property
    def trained_on(self) -> str | None:
        """The one modality of a data set of several that the model was trained on; None for all of them."""
        settings = self.configuration_manager.configuration.get(SECTION)
        only = settings.get("only_modality") if isinstance(settings, dict) else None
        return None if only is None else str(only)

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """As nnU-Net's; a conditioned network is not compiled, because telling it would compile it again."""
        super().initialize_from_trained_model_folder(*args, **kwargs)
        if self.conditioned is not None:
            self.network = self.conditioned

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """data [channels, Z, Y, X], preprocessed -> logits [C, Z, Y, X]; leaves a ``verdict``."""
        return self._as_one_modality(lambda: super(ModalityPredictor, self).predict_logits_from_preprocessed_data(data))

    def segment_in_slabs(self, data: Tensor, properties: dict[str, Any], slabs: int) -> np.ndarray:
        """data [channels, Z, Y, X], preprocessed -> labels of the image as read (slabs.py); leaves a ``verdict``."""
        work, cuts = plan_work(self, data, slabs)
        work.on_tile = self._count
        self._tile_share = 1.0 / (tiles_to_predict(work, cuts) * len(self.list_of_parameters))
        return self._as_one_modality(lambda: segment(work, cuts, properties))

    def _count(self, first: bool) -> None:
        """A tile that reaches into two slabs has one vote."""
        self._listening = first

    def _as_one_modality(self, predict: Callable[[], Result]) -> Result:
        """Runs a prediction, and once more with the likeliest modality told if tiles disagree; leaves a ``verdict``."""
        network = self.conditioned
        self.verdict = None
        self._done = 0.0
        if network is None:
            return predict()
        told = None if self.told is None else network.modalities.index(self.told)
        network.to(self.device)  # what is told goes where the network is
        self._heard.clear()
        self._listening = True

        def hear(module: Any, images: Any, output: Any) -> None:
            if self._listening:
                self._heard.append((module.modality_logits, _spread(images[0])))

        listener = network.register_forward_hook(hear)
        try:
            network.tell(told)
            result = predict()
            logits_heard, spreads = (torch.cat(each).float().cpu() for each in zip(*self._heard))
            votes = _votes(spreads)
            probabilities = torch.softmax(logits_heard, dim=1)[votes > 0]  # [tiles, M]
            seen = mean = votes[votes > 0] @ probabilities
            if self.likelihood is not None:
                mean = seen * torch.tensor(self.likelihood)
                mean = mean / mean.sum()
            inferred = int(mean.argmax())
            agreeing = int((probabilities.argmax(1) == inferred).sum())
            again = told is None and agreeing < len(probabilities)
            if again:
                network.tell(inferred)
                result = predict()
        finally:
            network.tell(None)
            listener.remove()
        used = inferred if told is None else told
        self.verdict = Verdict(
            network.modalities[used],
            "inferred" if told is None else "told",
            round(float(mean[used]), 4),
            network.modalities[inferred],
            round(float(mean[inferred]), 4),
            network.modalities[int(seen.argmax())],
            len(probabilities),
            agreeing,
            again,
        )
        return result

    def _internal_predict_sliding_window_return_logits(self, data: Tensor, slicers: Any, do_on_device: bool = True):
        before = len(self._heard)
        self._tile_share = 1.0 / (len(slicers) * len(self.list_of_parameters))
        try:
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        except Exception:
            del self._heard[before:]  # out of memory: nnU-Net tries again, and each tile counts once
            raise

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        prediction: Tensor = super()._internal_maybe_mirror_and_predict(x)
        self._done = min(1.0, self._done + self._tile_share)  # a second prediction of the same image is not counted
        if self.on_progress is not None:
            self.on_progress(self._done)
        return prediction


def _spread(images: Tensor) -> Tensor:
    """images [B, 1, ...] -> [B], the standard deviation of each."""
    return images.float().flatten(1).std(1, correction=0)


def _votes(spreads: Tensor) -> Tensor:
    """The weight of each tile [tiles], 1 in all: none for a flat one, the same for each where all are flat."""
    weights = torch.where(spreads >= FLAT * spreads.max(), spreads, 0.0)
    if not weights.sum() > 0:
        weights = torch.ones_like(spreads)
    return weights / weights.sum()
