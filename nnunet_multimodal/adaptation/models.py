"""Adapted models as stock models, and as small files of what was learned."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_multimodal import trainers
from nnunet_multimodal.adaptation.base_model import model_folder, read_object, stock_network
from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.inference.told import match_modality
from nnunet_multimodal.networks.adapters import merge_adapter
from nnunet_multimodal.networks.lora import base_fingerprint, load_lora_state_dict, lora_state_dict, merge_lora
from nnunet_multimodal.networks.mixture import LearnedMixture, ModalityMixture
from nnunet_multimodal.registry import parse_trainer_name
from nnunet_multimodal.trainers.adapting import AdaptingTrainer, start_adapted
from nnunet_multimodal.trainers.checkpoints import PREFERENCE, load_plain, readable_checkpoint, write_whole
from nnunet_multimodal.trainers.settings import SECTION
from nnunet_multimodal.trainers.transfer import names_of, starting_model

FORMAT = "nnunet_multimodal adapter 1"
STOCK = "nnUNetTrainer"
AGAIN = "run the same command again"


@dataclass(frozen=True)
class Adapted:
    """One fold of an adapted model.

    Attributes:
        network: with factors; in its weights.
        plans, dataset_json, configuration: that it was trained with.
        fold: of nnU-Net, a number or ``all``.
        trainer: its name.
        about: what else goes into a checkpoint of the merged model.
    """

    network: nn.Module
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    fold: int | str
    trainer: str
    about: dict[str, Any]


# --- reading ----------------------------------------------------------------------------------------------------------


def folds_of(folder: Path) -> list[str]:
    """The folds of a result folder that have a checkpoint."""
    found = {path.parent.name.removeprefix("fold_") for n in PREFERENCE for path in folder.glob(f"fold_*/{n}")}
    if not found:
        raise DataProblem(f"no fold in {folder} has a checkpoint: the training has not saved one yet.")
    return sorted(found)


def read_adapted(folder: Path, fold: str, checkpoint_name: str, messages: list[str]) -> Adapted:
    """One fold of a result folder of nnUNetTrainerLoRA or nnUNetTrainerMoA.

    Raises:
        UsageError: it is another trainer's, or its checkpoint does not fit the plans (faults.md row 36).
        DataProblem: the checkpoint cannot be read as data (rows 35 and 37).
    """
    root = model_folder(folder)
    plans, dataset_json = read_object(root / "plans.json"), read_object(root / "dataset.json")
    if not (root / f"fold_{fold}").is_dir():
        raise UsageError(f"fold {fold} was not trained in {root}. There are: {', '.join(folds_of(root))}.")
    path, message = readable_checkpoint(root / f"fold_{fold}" / checkpoint_name)
    messages += [f"fold {fold}: {message}"] if message else []
    checkpoint = load_plain(path)
    try:
        arguments, weights = checkpoint["init_args"], checkpoint["network_weights"]
        trainer, configuration = checkpoint["trainer_name"], arguments["configuration"]
        found = (trainer, arguments["plans"]["plans_name"], configuration)
    except (KeyError, TypeError) as error:
        raise DataProblem(f"{path} is no checkpoint of nnUNetv2_train: it lacks {error}.") from error
    expected = root.name.split("__")
    if len(expected) == 3 and list(found) != expected:
        raise UsageError(
            f"{path} was trained with -tr {found[0]} -p {found[1]} -c {found[2]}, but its folder is for -tr "
            f"{expected[0]} -p {expected[1]} -c {expected[2]}. Put the right checkpoint back."
        )
    network = build(trainer, plans, configuration, dataset_json, str(path))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{path} does not fit the network of {root / 'plans.json'}: {str(error).splitlines()[1].strip()} It was "
            f"trained with -tr {found[0]} -p {found[1]} -c {found[2]}."
        ) from error
    about = {key: checkpoint.get(key) for key in ("inference_allowed_mirroring_axes", "current_epoch", "_best_ema")}
    return Adapted(network, plans, dataset_json, configuration, _fold(fold), trainer, about)


def adapting_class(trainer: str, where: str) -> type[AdaptingTrainer]:
    """nnUNetTrainerLoRA, nnUNetTrainerMoA or one made from them, by name; UsageError for another one."""
    cls = getattr(trainers, trainer) if parse_trainer_name(trainer) is not None else None
    if cls is None or not issubclass(cls, AdaptingTrainer):
        raise UsageError(
            f"{where}: {trainer} has no adapters; expected a model of nnUNetTrainerLoRA or nnUNetTrainerMoA."
        )
    return cls


def build(
    trainer: str, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], where: str
) -> nn.Module:
    """The network of an adapting trainer for these plans, with random weights."""
    cls = adapting_class(trainer, where)
    manager = PlansManager(copy.deepcopy(dict(plans)))
    if configuration not in plans["configurations"]:
        raise UsageError(
            f"{where} was trained in {configuration}; the plans have {', '.join(plans['configurations'])}."
        )
    chosen = manager.get_configuration(configuration)
    network: nn.Module = cls.build_network_architecture(
        manager,
        chosen,
        determine_num_input_channels(manager, chosen, dict(dataset_json)),
        manager.get_label_manager(dict(dataset_json)).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    return network


# --- merged -----------------------------------------------------------------------------------------------------------


def merged_checkpoint(adapted: Adapted, modality: str | None) -> dict[str, Any]:
    """A checkpoint of nnUNetTrainer with the adapter in its weights, for prediction.

    Args:
        adapted: changed: its factors are merged.
        modality: of a mixture, whose adapter; may be None if there is one.

    Raises:
        UsageError: there is no such adapter, or shares are learned image by image.
    """
    network = adapted.network
    _require_mergeable(network)
    if isinstance(network, ModalityMixture):
        merge_adapter(network, adapter_of(network, modality))
    elif modality is not None:
        raise UsageError(f"--modality: {adapted.trainer} has one adapter, for all images. Leave it out.")
    else:
        merge_lora(network)
    plain = stock_network(adapted.plans, adapted.configuration, adapted.dataset_json)
    own = plain.state_dict()
    weights = {key: value for key, value in network.state_dict().items() if key in own}
    plain.load_state_dict(weights)
    return {
        "network_weights": plain.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": None,
        "init_args": {
            "plans": without_section(adapted.plans),
            "configuration": adapted.configuration,
            "fold": adapted.fold,
            "dataset_json": adapted.dataset_json,
            "device": torch.device("cpu"),
        },
        "trainer_name": STOCK,
        **adapted.about,
    }


def _require_mergeable(network: nn.Module) -> None:
    if isinstance(network, LearnedMixture):
        raise UsageError(
            "the shares of a learned mixture differ from image to image: no plain network answers like it, so that it "
            "is neither merged nor exported. Predict with nnunet_multimodal predict or nnUNetv2_predict."
        )


def adapter_of(network: ModalityMixture, modality: str | None) -> str | None:
    """The name of a modality's adapter; None for one that the base answers."""
    having = [name for name, row in zip(network.modalities, network.choice) if row.any()]
    if modality is None:
        if len(having) > 1:
            raise UsageError(f"whose adapter? Say it with --modality: {', '.join(network.modalities)}.")
        return having[0]
    name = match_modality(modality, network.modalities, "--modality")
    return name if name in having else None


def without_section(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Plans that the plugin has not touched."""
    plain = copy.deepcopy(dict(plans))
    for configuration in plain["configurations"].values():
        configuration.pop(SECTION, None)
    return plain


def write_model(checkpoints: Sequence[dict[str, Any]], output: Path, overwrite: bool) -> None:
    """A result folder that nnUNetv2_predict_from_modelfolder takes, whole or not at all.

    Raises:
        DataProblem: something is there already; with ``overwrite``, if that is no model (faults.md row 37).
    """
    require_free(output, overwrite)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        for checkpoint in checkpoints:
            fold = partial / f"fold_{checkpoint['init_args']['fold']}"
            fold.mkdir(parents=True)
            write_whole(fold / "checkpoint_final.pth", functools.partial(torch.save, checkpoint), AGAIN)
        arguments = checkpoints[0]["init_args"]
        write_json(partial / "plans.json", arguments["plans"])
        write_json(partial / "dataset.json", arguments["dataset_json"])
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(output: Path, overwrite: bool) -> None:
    """Nothing is lost by writing a model there."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise DataProblem(f"-o {output} is {'a link' if output.is_symlink() else 'a file'}; expected a new folder.")
    if not output.exists() or not any(output.iterdir()):
        output.parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise DataProblem(f"{output} exists and is not empty. Choose another -o, or replace it: --overwrite.")
    allowed = {"plans.json", "dataset.json", "dataset_fingerprint.json"}
    strange = [p.name for p in output.iterdir() if p.name not in allowed and not p.name.startswith("fold_")]
    if strange or not (output / "plans.json").is_file():
        raise DataProblem(
            f"{output} is no model that could be replaced: it holds {', '.join(sorted(strange)[:3]) or 'no plans.json'}"
            ". Choose another -o."
        )


# --- adapter files ----------------------------------------------------------------------------------------------------


def write_adapter(adapted: Adapted, path: Path, overwrite: bool) -> tuple[int, int]:
    """What was learned, without the model that it was learned for.

    Returns:
        Bytes of the file, and of the model's weights.

    Raises:
        DataProblem: there is such a file.
        UsageError: of a learned mixture, which ``apply_adapter`` could not be merged for.
    """
    _require_mergeable(adapted.network)
    if path.is_dir() or path.is_symlink() or (path.exists() and not overwrite):
        raise DataProblem(f"-o {path} exists. Choose another file{'' if path.is_dir() else ', or --overwrite'}.")
    content = {
        "format": FORMAT,
        "trainer": adapted.trainer,
        "plans": adapted.plans,
        "dataset_json": adapted.dataset_json,
        "configuration": adapted.configuration,
        "fold": adapted.fold,
        "about": adapted.about,
        "settings": adapted.plans["configurations"][adapted.configuration][SECTION],
        "base_fingerprint": base_fingerprint(adapted.network),
        "tensors": lora_state_dict(adapted.network),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda name: torch.save(content, name), AGAIN)
    plain = stock_network(adapted.plans, adapted.configuration, adapted.dataset_json)
    return path.stat().st_size, sum(p.numel() * p.element_size() for p in plain.parameters())


def apply_adapter(path: Path, base: Path, messages: list[str]) -> Adapted:
    """An adapter file on the model that it was learned for.

    Raises:
        UsageError: no checkpoint of ``base`` is that model.
        DataProblem: the file is no adapter, or is incomplete, or holds more than data.
    """
    content = load_plain(path)
    if content.get("format") != FORMAT:
        raise DataProblem(
            f"{path} is no adapter file of this version: its format is {content.get('format')!r}, expected {FORMAT!r}."
        )
    arguments = (content["plans"], content["configuration"], content["dataset_json"])
    folder = model_folder(base)
    files = [file for name in PREFERENCE for file in sorted(folder.glob(f"fold_*/{name}"))]
    if base != folder:
        files = [file for file in files if file.parent.name == base.name]
    if not files:
        raise DataProblem(f"no checkpoint in {base}: expected fold_*/checkpoint_final.pth.")
    found: list[str] = []
    for file in files:
        network = build(content["trainer"], *arguments, str(path))
        lines = start_adapted(network, starting_model(file), names_of(content["dataset_json"]), str(path))
        load_lora_state_dict(network, content["tensors"])
        found.append(base_fingerprint(network))
        if found[-1] == content["base_fingerprint"]:
            messages.append(next(line for line in lines if line.startswith("starting model")))
            plans, configuration, dataset_json = arguments
            fold, about = _fold(content["fold"]), dict(content["about"])
            return Adapted(network, plans, dataset_json, configuration, fold, content["trainer"], about)
    raise UsageError(
        f"{path} was learned for another model: its base has the fingerprint {content['base_fingerprint'][:12]}, the "
        f"{len(files)} checkpoints in {base} have {', '.join(sorted({each[:12] for each in found}))}. Give the model "
        f"that it was adapted from{_named(content)}."
    )


def _named(content: Mapping[str, Any]) -> str:
    name = content["settings"].get("starting_model")
    return f", which was {name} where it was trained" if name else ""


def _fold(name: str | int) -> int | str:
    return int(name) if str(name).isdecimal() else str(name)
