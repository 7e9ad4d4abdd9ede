"""The plans of a trained model moved to the data set that it is adapted to.

nnU-Net's nnUNetv2_move_plans_between_datasets does the half of it: it keeps the normalisation, and looks at nothing.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal.adaptation.base_model import BaseModel, read_object
from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.registry import is_stock, require_trainer
from nnunet_multimodal.trainers.settings import SECTION
from nnunet_multimodal.trainers.transfer import names_of

CT = "CTNormalization"
MOA = "nnUNetTrainerMoA"


@dataclass
class Moved:
    """Plans for the target data set, not yet written.

    Attributes:
        plans: their content.
        notes: what the user should know of how model and data set fit.
        warnings: what is likely to go wrong.
    """

    plans: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def move_plans(
    base: BaseModel,
    dataset_json: Mapping[str, Any],
    dataset_name: str,
    plans_name: str,
    trainer: str,
    settings: Mapping[str, Any],
    normalisation: str | None = None,
    fingerprint: Path | None = None,
) -> Moved:
    """The model's plans of its configuration for another data set.

    Args:
        base: the model.
        dataset_json, dataset_name: of the target.
        plans_name: of the new plans.
        trainer: that will train with them.
        settings: of the section nnunet_multimodal, beside the starting model; those that the trainer does not have
            are left out.
        normalisation: ``base`` or ``target``, where they differ; None takes the target's, with a note.
        fingerprint: of the target, by nnU-Net; read only if its intensities are needed.

    Raises:
        UsageError, DataProblem: model, data set and trainer do not fit together.
    """
    manager = PlansManager(copy.deepcopy(base.plans))
    chosen = manager.get_configuration(base.configuration)
    if chosen.previous_stage_name is not None:
        raise UsageError(f"{base.configuration} of {base.name} is the second stage of a cascade: adapt 3d_fullres.")
    configuration = copy.deepcopy(chosen.configuration)
    plans = {key: value for key, value in base.plans.items() if key not in ("configurations", "continue_training")}
    moved = Moved({**copy.deepcopy(plans), "dataset_name": dataset_name, "plans_name": plans_name})
    _check_channels(base, dataset_json, dataset_name, moved)
    _check_classes(base, dataset_json, dataset_name, trainer, moved)
    _check_harmonised(base, dataset_json, dataset_name, trainer, moved)
    moved.plans["image_reader_writer"] = _reader(base, dataset_json, dataset_name, moved)
    _normalise(base, dataset_json, dataset_name, configuration, trainer, normalisation, fingerprint, moved)
    configuration.pop("next_stage", None)  # of a cascade: these plans have no other configuration
    configuration["data_identifier"] = f"{plans_name}_{base.configuration}"
    known = settings_of_trainer(trainer)
    if SECTION in configuration:
        moved.notes.append(f"settings of {base.model.trainer} in the model's plans are left out")
    configuration[SECTION] = {"starting_model": str(base.path.resolve())}
    configuration[SECTION] |= {key: value for key, value in settings.items() if key in known}
    moved.plans["configurations"] = {base.configuration: configuration}
    return moved


def settings_of_trainer(trainer: str) -> set[str]:
    """The settings that a trainer reads; a stock trainer reads none."""
    if is_stock(trainer):
        return set()
    entry = require_trainer(trainer)
    return set(getattr(importlib.import_module(entry.module), entry.name).settings_defaults)


def write_plans(moved: Moved, raw: Path, preprocessed: Path, overwrite: bool) -> list[Path]:
    """Writes the plans and, as nnU-Net's planner does, the data set's dataset.json beside them.

    Raises:
        UsageError: other plans of this name, or another dataset.json, are there.
    """
    preprocessed.mkdir(parents=True, exist_ok=True)
    path, description = preprocessed / f"{moved.plans['plans_name']}.json", preprocessed / "dataset.json"
    if not overwrite:
        if path.exists() and read_object(path) != moved.plans:
            raise UsageError(
                f"{path} exists and is different. Take another name (-p), or replace it (--overwrite); what was "
                "preprocessed or trained with it then has to be made anew."
            )
        if description.exists() and read_object(description) != read_object(raw / "dataset.json"):
            raise UsageError(
                f"{description} differs from {raw / 'dataset.json'}: the data set was changed after it was planned. "
                "--overwrite takes over what is in nnUNet_raw; other plans of it then have to be preprocessed anew."
            )
    write_json(path, moved.plans)
    shutil.copyfile(raw / "dataset.json", description)
    return [path, description]


def _check_channels(base: BaseModel, dataset_json: Mapping[str, Any], name: str, moved: Moved) -> None:
    ours, theirs = names_of(base.dataset_json).inputs or (), names_of(dataset_json).inputs or ()
    if len(ours) != len(theirs):
        raise DataProblem(
            f"the model takes {len(ours)} channels ({first_names([*ours])}), {name} has {len(theirs)} "
            f"({first_names([*theirs])}): input channels found {len(theirs)}, expected {len(ours)}."
        )
    moved_away = [each for at, each in enumerate(ours) if each in theirs and theirs[at] != each]
    if moved_away:
        raise DataProblem(
            f"the model takes the channels {', '.join(ours)}, {name} has {first_names(moved_away)} at another place: "
            f"{', '.join(theirs)}. Rename the files and channel_names, so that they stand in the model's order."
        )
    if ours != theirs:
        moved.notes.append(f"channels: {', '.join(ours)} in the model, {', '.join(theirs)} here")


def _check_classes(base: BaseModel, dataset_json: Mapping[str, Any], name: str, trainer: str, moved: Moved) -> None:
    theirs, ours = names_of(base.dataset_json).outputs or (), names_of(dataset_json).outputs or ()
    if not ours:
        raise DataProblem(f"the labels of {name} cannot be read: {dataset_json.get('labels')!r}.")
    known = [each for each in ours if each in theirs and each != "background"]
    new = [each for each in ours if each not in theirs]
    gone = [each for each in theirs if each not in ours]
    line = f"classes: {len(known)} known to the model ({first_names(known) or 'none'})"
    line += f"; {len(new)} new ({first_names(new)})" if new else ""
    moved.notes.append(line + (f"; {len(gone)} not asked for here ({first_names(gone)})" if gone else ""))
    if not known:
        moved.warnings.append(
            f"no class of {name} is one of the model's: its output layers begin anew. Are names spelled differently?"
        )
    if not trainer.startswith(MOA):
        return
    kinds = ["regions, which overlap" if "background" not in each else "labels" for each in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"the model answers with {kinds[0]}, {name} has {kinds[1]}: {MOA} could not answer the model's own images "
            "as before. Take nnUNetTrainerLoRA, or describe both in the same way."
        )
    if gone:
        moved.warnings.append(
            f"{name} lacks {first_names(gone)}: the mixture does not answer with it, not on the model's own images "
            "either, where another class may take its place. Name it in dataset.json, even if no case has it."
        )


def _check_harmonised(base: BaseModel, dataset_json: Mapping[str, Any], name: str, trainer: str, moved: Moved) -> None:
    """Images were prepared alike before nnU-Net saw them."""
    model, data = ((each.get(SECTION) or {}).get("harmonise") for each in (base.dataset_json, dataset_json))
    if model == data:
        return
    message = (
        f"intensities: those of the model's images were {'harmonised' if model else 'left as they are'}, those of "
        f"{name} were {'harmonised' if data else 'not'} (convert mixed --harmonise)"
    )
    if trainer.startswith(MOA):
        raise DataProblem(f"{message}. A mixture prepares all its images alike: convert the data set as the model's.")
    moved.warnings.append(message)


def _reader(base: BaseModel, dataset_json: Mapping[str, Any], name: str, moved: Moved) -> str:
    """The model's reader, if it can read the files: then axes mean the same to the network."""
    wanted = str(base.plans["image_reader_writer"])
    ending = str(dataset_json["file_ending"])
    own = determine_reader_writer_from_dataset_json(dict(dataset_json), None, verbose=False).__name__
    if ending.lower() not in recursive_find_reader_writer_by_name(wanted).supported_file_endings:
        if ("Reorient" in wanted) != ("Reorient" in own):
            moved.warnings.append(
                f"the model's reader {wanted} cannot read {ending}; {own} does, which stores axes in another order. "
                "Left may be right for the network: convert the images to .nii.gz."
            )
        return own
    if own != wanted:
        moved.notes.append(f"reader: {wanted}, the model's ({name} says {own})")
    if "Reorient" not in wanted:
        moved.notes.append(
            f"reader: {wanted} does not turn images to the same axes: they have to be stored as those that the model "
            "was trained on"
        )
    return wanted


def _normalise(
    base: BaseModel,
    dataset_json: Mapping[str, Any],
    name: str,
    configuration: dict[str, Any],
    trainer: str,
    wanted: str | None,
    fingerprint: Path | None,
    moved: Moved,
) -> None:
    """Which normalisation the images get: one for all, the model's for a model of several modalities."""
    schemes: Sequence[str] = configuration["normalization_schemes"]
    target = [get_normalization_scheme(channel).__name__ for channel in names_of(dataset_json).inputs or ()]
    if trainer.startswith(MOA):
        if CT in schemes:
            raise DataProblem(
                f"the model of {base.name} was trained on images normalised as CT (clipped to a range in HU), which "
                "makes nothing of MR, and a mixture of adapters has one normalisation for all its images. Train the "
                "model with its channel called CT_or_MR (z-score); or adapt with -tr nnUNetTrainerLoRA, which makes a "
                "second model for the new modality."
            )
        if wanted == "target" and target != list(schemes):
            raise UsageError(f"{MOA} needs the model's normalisation, or its own images would be answered otherwise.")
        wanted = "base"
    if target == list(schemes):
        if CT in schemes:
            moved.notes.append(f"normalisation: CT, by the range in HU of {base.name}")
        return
    shown = f"{', '.join(schemes)} in the model, {', '.join(target)} by the channel names of {name}"
    if wanted == "base":
        moved.notes.append(f"normalisation: {shown}; the model's is kept")
        return
    clipped = [at for at, (new, old) in enumerate(zip(target, schemes)) if new == CT != old]
    if clipped:
        ranges = _ranges(fingerprint, name, shown)
        known = PlansManager(moved.plans).foreground_intensity_properties_per_channel
        own = {str(at): ranges[str(at)] for at in clipped}
        moved.plans["foreground_intensity_properties_per_channel"] = {**known, **own}
    configuration["normalization_schemes"] = target
    configuration["use_mask_for_norm"] = [
        used and new == old for used, new, old in zip(configuration["use_mask_for_norm"], target, schemes)
    ]
    moved.notes.append(
        f"normalisation: {shown}; the latter is taken, so that the adapted model is one for {name} alone"
        + (": it cannot predict the model's own images any more" if wanted is None else "")
    )


def _ranges(fingerprint: Path | None, name: str, shown: str) -> dict[str, Any]:
    """The intensities of each channel of the target, which a model that was not clipped to them knows nothing of."""
    if fingerprint is None or not fingerprint.is_file():
        raise UsageError(
            f"normalisation: {shown}; the range in HU of {name} has not been measured yet. First: "
            f"nnUNetv2_extract_fingerprint -d {name}; or keep the model's: --normalisation base"
        )
    ranges: dict[str, Any] = read_object(fingerprint)["foreground_intensity_properties_per_channel"]
    return ranges
