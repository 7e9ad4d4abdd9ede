"""The trained model that is adapted: an nnU-Net result folder, read as data only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.trainers.checkpoints import load_plain, readable_checkpoint, starting_file
from nnunet_multimodal.trainers.transfer import HEADS, StartingModel, names_of


@dataclass(frozen=True)
class BaseModel:
    """What a result folder says.

    Attributes:
        path: the folder as the user named it: of the model, or of one of its folds.
        plans, dataset_json: of the folder.
        configuration: that it was trained in.
        model: the weights of one fold.
    """

    path: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    model: StartingModel

    @property
    def name(self) -> str:
        """Of the data set."""
        return str(self.plans["dataset_name"])


def read_base(path: Path, fold: int | str | None = None) -> BaseModel:
    """A model by its result folder, or by the folder of one fold.

    Raises:
        UsageError: it is something else, or its checkpoint belongs to other plans (faults.md row 36).
        DataProblem: there is no checkpoint, or none that can be read as data (rows 35 and 37).
    """
    folder = model_folder(path)
    plans, dataset_json = (read_object(folder / name) for name in ("plans.json", "dataset.json"))
    file, message = readable_checkpoint(starting_file(path, fold))
    checkpoint = load_plain(file)
    for key in ("network_weights", "init_args", "trainer_name"):
        if key not in checkpoint:
            raise DataProblem(f"{file} is no checkpoint of nnUNetv2_train: it has no {key!r}.")
    arguments = checkpoint["init_args"]
    found, expected = arguments["plans"]["plans_name"], plans["plans_name"]
    dataset = (arguments["plans"]["dataset_name"], plans["dataset_name"])
    if found != expected or dataset[0] != dataset[1] or arguments["configuration"] not in plans["configurations"]:
        raise UsageError(
            f"{file} was trained with -d {dataset[0]} -tr {checkpoint['trainer_name']} -p {found} -c "
            f"{arguments['configuration']}, but {folder / 'plans.json'} are the plans {expected} of {dataset[1]}. Put "
            "the right checkpoint back, or name the folder that this one belongs to."
        )
    names = names_of(arguments.get("dataset_json") or dataset_json)
    model = StartingModel(checkpoint["network_weights"], names, file, message, checkpoint["trainer_name"])
    return BaseModel(path, plans, dataset_json, arguments["configuration"], model)


def model_folder(path: Path) -> Path:
    """The folder with plans.json and dataset.json; says what to give instead where it is none."""
    if path.suffix == ".zip":
        raise UsageError(
            f"{path} is an archive. Unpack it with nnUNetv2_install_pretrained_model_from_zip {path}, then give the "
            "result folder (nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION)."
        )
    if path.is_file():
        near = next((f for f in path.resolve().parents if (f / "plans.json").is_file()), None)
        raise UsageError(
            f"{path} is a file. A checkpoint alone does not say how images are prepared for it: give the result folder "
            f"with its plans.json{f', here {near}' if near else ''}."
        )
    for folder in (path, path.parent):
        if (folder / "plans.json").is_file() and (folder / "dataset.json").is_file():
            return folder
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; expected a result folder of nnUNetv2_train.")
    inside = sorted(str(found.parent) for found in path.glob("**/plans.json"))
    hint = f" Did you mean {inside[0]}?" if inside else ""
    raise UsageError(f"{path} is no result folder: it holds no plans.json and dataset.json.{hint}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataProblem(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataProblem(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def stock_network(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> nn.Module:
    """nnUNetTrainer's network for these plans, with random weights."""
    manager = PlansManager(dict(plans))
    chosen = manager.get_configuration(configuration)
    return nnUNetTrainer.build_network_architecture(
        manager,
        chosen,
        determine_num_input_channels(manager, chosen, dict(dataset_json)),
        manager.get_label_manager(dict(dataset_json)).num_segmentation_heads,
        enable_deep_supervision=False,
    )


def require_stock(base: BaseModel) -> None:
    """Its network is that of its plans: else what a trainer has added to it would be lost.

    Raises:
        UsageError: it is not.
    """
    own = stock_network(base.plans, base.configuration, base.dataset_json).state_dict()
    weights = base.model.weights
    wrong = [key for key in own.keys() | weights.keys() if HEADS not in key and not _same(key, own, weights)]
    if wrong:
        raise UsageError(
            f"{base.model.file} was trained with {base.model.trainer}, whose network is not the plans' own: "
            f"{len(wrong)} tensors differ, such as {min(wrong)}. Stock networks can be adapted: those of "
            "nnUNetTrainer, nnUNetTrainerMRSegmentator, nnUNetTrainerContrastAug, or a merged model (adapt --merge)."
        )


def _same(key: str, own: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    return key in own and key in weights and own[key].shape == weights[key].shape
