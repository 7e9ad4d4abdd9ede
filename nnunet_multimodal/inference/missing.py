"""Prediction of a registered pair of which one modality was not acquired."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.inference.told import match_modality
from nnunet_multimodal.networks import CmFNet

AIR = -1024.0  # in Hounsfield units


@dataclass(frozen=True)
class Missing:
    """The modality that is missing, and what is left.

    Attributes:
        channel: of the missing one.
        name: of the missing one, as dataset.json has it.
        branch: of the network, that of the other one.
        answers: name of the other one.
    """

    channel: int
    name: str
    branch: str
    answers: str


def branched(predictor: nnUNetPredictor) -> CmFNet | None:
    """The predictor's network, if it has a branch for each of two channels."""
    network = getattr(predictor.network, "_orig_mod", predictor.network)
    return network if isinstance(network, CmFNet) and network.channels[0] != network.channels[1] else None


def find_missing(predictor: nnUNetPredictor, names: Sequence[str], words: Sequence[str]) -> Missing:
    """What the user says is missing, in the model's terms.

    Args:
        predictor: with a model loaded.
        names: of the model's channels, in order.
        words: what was written behind ``--missing``.

    Raises:
        UsageError: the model needs all channels, does not have this one or has two of its name, or none would be left.
    """
    network = branched(predictor)
    if network is None:
        raise UsageError(
            f"--missing {' '.join(words)}: a model of {predictor.trainer_name} needs each of its channels "
            f"({', '.join(names)}). One of nnUNetTrainerCmFNet that was trained on two of them can do with one."
        )
    found = {match_modality(word, names, "--missing") for word in words}
    if len(found) > 1:
        raise UsageError(f"--missing {' '.join(words)}: then nothing is left to predict from. Name one of them.")
    name = found.pop()
    if list(names).count(name) > 1:
        raise UsageError(f"--missing {name}: all channels of the model are called so. Give them names in dataset.json.")
    channel = list(names).index(name)
    left = 1 - network.channels.index(channel)
    return Missing(channel, names[channel], ("ct", "mr")[left], names[network.channels[left]])


@contextlib.contextmanager
def answering(predictor: nnUNetPredictor, missing: Missing | None) -> Iterator[None]:
    """Within it, the branch of what is left answers; the fused one where nothing is missing."""
    network = branched(predictor)
    if network is None or missing is None:
        yield
        return
    network.output_branch = missing.branch
    try:
        yield
    finally:
        network.output_branch = "mm"


def with_stand_in(image: np.ndarray, channel: int, normalisation: str) -> np.ndarray:
    """An image without its missing channel -> with something in its place that changes nothing for the other one.

    nnU-Net crops to where any channel is not 0, and normalises what it has cropped. A CT in air is nowhere 0, so
    nothing was cropped in training. Any other image is taken to be 0 where the one that is there is 0.

    Args:
        image: [channels - 1, Z, Y, X].
        channel: the missing one.
        normalisation: the plans' scheme of it.
    """
    return np.insert(image, channel, AIR if normalisation == "CTNormalization" else 0.0, axis=0)


def entry_of_branch(predictor: nnUNetPredictor, missing: Missing | None) -> dict[str, Any]:
    """What predictions.json says of a case: which branch answered, and without what."""
    if branched(predictor) is None:
        return {}
    return {
        "branch": "mm" if missing is None else missing.answers,
        "missing": None if missing is None else missing.name,
    }
