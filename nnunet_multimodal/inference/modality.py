"""nnU-Net's predictor for a network that is told an image's modality, or finds it out (design.md, contract 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_multimodal.networks import TextConditionedNetwork


@dataclass(frozen=True)
class Verdict:
    """Which modality a case was predicted as, and what the network took it for.

    Attributes:
        modality: with which the case was predicted.
        how: ``told`` or ``inferred``.
        confidence: probability of ``modality``: the network's, mean over all tiles, and what the intensities say.
        inferred: the modality with the highest such probability.
        inferred_confidence: that probability.
        network: the modality that the network alone takes it for.
        tiles: how many times the network looked: tiles x mirrorings x folds.
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
    """Stock prediction of any model; of a text-conditioned one with one modality a case.

    Left alone, the network decides tile by tile. Where all tiles agree, the logits are exactly the stock predictor's;
    where one does not, the case is predicted again with the modality that is likeliest on average told.

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
        self._heard: list[Tensor] = []  # modality logits of each forward
        self._done = self._tile_share = 0.0

    @property
    def conditioned(self) -> TextConditionedNetwork | None:
        """The network, if it is one that can be told a modality."""
        network = getattr(self.network, "_orig_mod", self.network)
        return network if isinstance(network, TextConditionedNetwork) else None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the network knows; empty for one that has none."""
        return () if self.conditioned is None else tuple(self.conditioned.modalities)

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """As nnU-Net's; a conditioned network is not compiled, because telling it would compile it again."""
        super().initialize_from_trained_model_folder(*args, **kwargs)
        if self.conditioned is not None:
            self.network = self.conditioned

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """data [channels, Z, Y, X], preprocessed -> logits [C, Z, Y, X]; leaves a ``verdict``."""
        network = self.conditioned
        self.verdict = None
        self._done = 0.0
        if network is None:
            logits: Tensor = super().predict_logits_from_preprocessed_data(data)
            return logits
        told = None if self.told is None else network.modalities.index(self.told)
        network.to(self.device)  # what is told goes where the network is
        self._heard.clear()
        listener = network.register_forward_hook(
            lambda module, image, output: self._heard.append(module.modality_logits)
        )
        try:
            network.tell(told)
            logits = super().predict_logits_from_preprocessed_data(data)
            probabilities = torch.softmax(torch.cat(self._heard).float().cpu(), dim=1)  # [tiles, M]
            seen = mean = probabilities.mean(0)
            if self.likelihood is not None:
                mean = seen * torch.tensor(self.likelihood)
                mean = mean / mean.sum()
            inferred = int(mean.argmax())
            agreeing = int((probabilities.argmax(1) == inferred).sum())
            again = told is None and agreeing < len(probabilities)
            if again:
                network.tell(inferred)
                logits = super().predict_logits_from_preprocessed_data(data)
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
        return logits

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
