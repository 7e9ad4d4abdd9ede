"""Weights of a model of other classes or channels, fitted to this one by name (MRSegmentator: from CT to MR).

nnU-Net copies by position or not at all: with as many classes in another order a liver would start as a spleen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.text.names import output_names
from nnunet_multimodal.trainers.checkpoints import load_plain, readable_checkpoint, starting_file

HEADS = "seg_layers."  # in the names of nnU-Net's output layers, one row a class


@dataclass(frozen=True)
class Names:
    """What the channels of a network stand for; None where nobody says it.

    Attributes:
        outputs: the classes, background first.
        inputs: the images.
    """

    outputs: tuple[str, ...] | None = None
    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class StartingModel:
    """Weights to start from, and what their channels stand for.

    Attributes:
        weights: the network's state dict.
        names: of its channels.
        file: where they were read.
        message: what is to be said of that: another file than the preferred one; None for nothing.
        trainer: that trained it; None where nobody says it.
        mirroring: axes along which nnU-Net mirrors what it predicts with it; None for none.
    """

    weights: dict[str, Tensor]
    names: Names
    file: Path | None = None
    message: str | None = None
    trainer: str | None = None
    mirroring: tuple[int, ...] | None = None


def starting_model(path: Path, fold: int | str | None = None) -> StartingModel:
    """The model of a checkpoint file, or of a fold in an nnU-Net result folder (see ``starting_file``).

    Raises:
        DataProblem: there is no checkpoint, none that can be read, or one that holds more than data.
    """
    file, message = readable_checkpoint(starting_file(path, fold))
    checkpoint = load_plain(file)
    if "network_weights" not in checkpoint:
        raise DataProblem(f"{file} is no checkpoint of nnU-Net: it has no 'network_weights', but {[*checkpoint][:5]}.")
    names = names_of(checkpoint.get("init_args", {}).get("dataset_json"))
    trainer, mirroring = checkpoint.get("trainer_name"), checkpoint.get("inference_allowed_mirroring_axes")
    return StartingModel(checkpoint["network_weights"], names, file, message, trainer, mirroring)


def names_of(dataset_json: Mapping[str, Any] | None) -> Names:
    """What the channels of a network that nnU-Net trained on this data set stand for."""
    if not dataset_json:
        return Names()
    channels: Mapping[str, str] = dataset_json.get("modality") or dataset_json.get("channel_names") or {}
    inputs = tuple(str(channels[key]) for key in sorted(channels, key=int))
    try:
        return Names(output_names(dataset_json["labels"]), inputs)
    except (DataProblem, KeyError):  # of a data set that is none of ours to complain about
        return Names(None, inputs)


def fit_by_name(
    weights: Mapping[str, Tensor], source: Names, own: Mapping[str, Tensor], target: Names
) -> tuple[dict[str, Tensor], list[str]]:
    """Output layers and the first convolution in the shape of this network; everything else as it is.

    Args:
        weights, source: of the starting model.
        own, target: state dict and names of this network, whose fresh values stay where the model has none.

    Returns:
        The weights, and what was done, in words.
    """
    fitted, lines = dict(weights), []
    if source.outputs is not None and target.outputs is not None and source.outputs != target.outputs:
        heads = [key for key in own if _is_head(key, weights, source.outputs, own, target.outputs)]
        for key in heads:
            fitted[key] = _rows_by_name(weights[key], source.outputs, own[key], target.outputs)
        if heads:
            lines.append(_describe("outputs", source.outputs, target.outputs))
    first = next((key for key, value in own.items() if value.ndim > 2), None)
    if first is not None and first in weights and _differ_in_inputs(weights[first], own[first]):
        adapted, line = _inputs_by_name(weights[first], source.inputs, own[first], target.inputs)
        for key, value in own.items():  # nnU-Net's decoder holds the encoder too: one tensor of two names
            if value.data_ptr() == own[first].data_ptr():
                fitted[key] = adapted
        lines.append(line)
    return fitted, lines


def _is_head(
    key: str, weights: Mapping[str, Tensor], source: Sequence[str], own: Mapping[str, Tensor], target: Sequence[str]
) -> bool:
    """Whether it is an output layer of both networks, a row a class."""
    if HEADS not in key or key not in weights:
        return False
    rows = (weights[key].shape[0], own[key].shape[0]) == (len(source), len(target))
    return rows and weights[key].shape[1:] == own[key].shape[1:]


def _rows_by_name(weights: Tensor, source: Sequence[str], own: Tensor, target: Sequence[str]) -> Tensor:
    rows = own.clone()
    for row, name in enumerate(target):
        if name in source:
            rows[row] = weights[source.index(name)].to(rows)
    return rows


def _differ_in_inputs(weights: Tensor, own: Tensor) -> bool:
    """Whether two convolutions differ in the number of channels that they take, and in nothing else."""
    same = weights.ndim == own.ndim and weights.shape[0] == own.shape[0] and weights.shape[2:] == own.shape[2:]
    return same and weights.shape[1] != own.shape[1]


def _inputs_by_name(
    weights: Tensor, source: Sequence[str] | None, own: Tensor, target: Sequence[str] | None
) -> tuple[Tensor, str]:
    """The first convolution [features, channels, ...] for other channels.

    A channel of the same name keeps its weights, others are new. If no name fits, each channel gets the sum over the
    model's channels, divided by how many there are now: an image that is given to all of them is answered as before.
    """
    names = source is not None and target is not None
    if names and (len(source or ()), len(target or ())) == (weights.shape[1], own.shape[1]):
        assert source is not None and target is not None
        if {*source} & {*target}:
            adapted = own.clone()
            for channel, name in enumerate(target):
                if name in source:
                    adapted[:, channel] = weights[:, source.index(name)].to(adapted)
            return adapted, _describe("inputs", source, target)
    channels = own.shape[1]
    adapted = (weights.sum(1, keepdim=True) / channels).to(own).expand_as(own).clone()
    return adapted, f"  inputs: {weights.shape[1]} in the model, {channels} here: each gets an equal part of their sum"


def _describe(what: str, source: Sequence[str], target: Sequence[str]) -> str:
    kept = [name for name in target if name in source]
    line = f"  {what} by name: {len(kept)} from the model ({first_names(kept) or 'none'})"
    for title, names in (
        ("new", [name for name in target if name not in source]),
        ("not needed", [name for name in source if name not in target]),
    ):
        line += f", {len(names)} {title} ({first_names(names)})" if names else ""
    return line
