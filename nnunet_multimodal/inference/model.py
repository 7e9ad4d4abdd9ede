"""A trained model, found the way nnU-Net finds its own."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_multimodal.environment import use_own_trainers
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.networks import CrossMRNetwork, OpenSetNetwork
from nnunet_multimodal.trainers.checkpoints import readable_checkpoint

READER = "NibabelIOWithReorient"


def result_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """nnU-Net's result folder of a training.

    Raises:
        EnvironmentProblem: it does not exist; names the trainings of this data set that do.
    """
    try:
        folder = Path(get_output_folder(dataset, trainer, plans, configuration))
    except RuntimeError as error:  # no such data set
        raise UsageError(str(error)) from error
    if not folder.is_dir():
        there = sorted(f.name for f in folder.parent.glob("*__*__*")) if folder.parent.is_dir() else []
        raise EnvironmentProblem(
            f"no trained model in {folder}. "
            + (f"There are: {', '.join(there)}. " if there else "")
            + f"Train it: nnUNetv2_train {dataset} {configuration} 0 -tr {trainer} -p {plans}"
        )
    return folder


def load_model(
    predictor: nnUNetPredictor, folder: Path, folds: list[str] | None, checkpoint: str, messages: list[str]
) -> tuple[list[str], str]:
    """Lets nnU-Net's predictor load the network and the weights of one or several folds.

    Args:
        predictor: filled in place.
        folder: result folder, as ``result_folder`` gives it.
        folds: None takes every fold that has the checkpoint.
        checkpoint: file name, ``checkpoint_final.pth``; where it cannot be read, the next best is used.
        messages: what the user should be told is appended here.

    Returns:
        the folds and the file name of their checkpoints.

    Raises:
        EnvironmentProblem: there is no such model, or its trainer is not found.
        UsageError: the folds have different checkpoints, or one belongs to another model (row 36 of the faults).
    """
    use_own_trainers()
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise EnvironmentProblem(f"{folder} holds no {name}: this is no result folder of nnUNetv2_train.")
    trained = sorted(folder.glob("fold_*/checkpoint_*.pth"))
    there = sorted({path.parent.name.removeprefix("fold_") for path in trained})
    if folds is None:
        wanted = [path for path in trained if path.name == checkpoint] or trained
        folds = sorted({path.parent.name.removeprefix("fold_") for path in wanted})
        folds = [fold for fold in folds if fold != "all"] or folds  # as nnUNetv2_predict: the five, not all with them
    if not folds:
        raise EnvironmentProblem(f"no fold in {folder} has a checkpoint: the training has not saved one yet.")
    for fold in folds:
        if not (folder / f"fold_{fold}").is_dir():
            raise EnvironmentProblem(
                f"fold {fold} was not trained in {folder}. There are: {', '.join(there) or 'none'}."
            )
    files = []
    for fold in folds:
        path, message = readable_checkpoint(folder / f"fold_{fold}" / checkpoint)
        messages += [f"fold {fold}: {message}"] if message else []
        files.append(path)
    names = {path.name for path in files}
    if len(names) > 1:
        raise UsageError(f"the folds {folds} have different checkpoints: {sorted(names)}; choose folds with -f.")
    options = [_check_origin(path, folder) for path in files]
    name, at = names.pop(), 0
    try:
        # The predictor greets and lists what it finds; our command prints its own lines.
        with contextlib.redirect_stdout(io.StringIO()):
            predictor.initialize_from_trained_model_folder(str(folder), folds, name)
        network = getattr(predictor.network, "_orig_mod", predictor.network)
        for at in range(len(files) - 1, -1, -1):  # nnU-Net tries the first only; it stays the one that is loaded
            network.load_state_dict(predictor.list_of_parameters[at])
    except RuntimeError as error:
        if "Could not find requested nnunet trainer" in str(error):
            raise EnvironmentProblem(f"{files[0]}: {str(error).splitlines()[0]}") from error
        if "Error(s) in loading state_dict" in str(error):
            raise UsageError(_misfit(files[at], options[at], str(error))) from error
        raise
    return folds, name


def _check_origin(path: Path, folder: Path) -> str:
    """A checkpoint that was copied into the folder of another trainer, plans or configuration does not predict as it.

    Returns:
        nnU-Net's options of the training that wrote the checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        init = checkpoint["init_args"]
        found = (checkpoint["trainer_name"], init["plans"]["plans_name"], init["configuration"])
        options = f"-d {init['plans']['dataset_name']} -tr {found[0]} -p {found[1]} -c {found[2]}"
    except (KeyError, TypeError) as error:
        raise DataProblem(f"{path} is no checkpoint of nnUNetv2_train: it lacks {error}.") from error
    expected = folder.name.split("__")
    if len(expected) == 3 and list(found) != expected:
        raise UsageError(
            f"{path} was trained with {options}, but its folder is for -tr {expected[0]} -p {expected[1]} "
            f"-c {expected[2]}. Ask for the former, or put the right checkpoint back."
        )
    return options


def _misfit(path: Path, options: str, error: str) -> str:
    """What does not fit, out of torch's list of everything that does not."""
    what = error.splitlines()[1].strip().rstrip(". ")
    size = re.search(r"size mismatch for (\S+): .*?torch.Size\(\[([\d, ]+)\]\).*?torch.Size\(\[([\d, ]+)\]\)", error)
    if size is not None:
        found, expected = ([int(n) for n in size[group].split(", ")] for group in (2, 3))
        what = f"{size[1]} has {found}, expected {expected}"
        if len(found) > 3 and found[1] != expected[1]:
            what += f" (input channels: found {found[1]}, expected {expected[1]})"
    return (
        f"{path} does not fit the network of plans.json and dataset.json in {path.parent.parent}: {what}. "
        f"It was trained with {options}."
    )


def load_referring_model(
    folder: Path, folds: list[str] | None, checkpoint: str, device: torch.device, messages: list[str]
) -> nnUNetPredictor:
    """nnU-Net's predictor with a referring network and the weights of one or several folds.

    Args:
        folder: result folder, as ``result_folder`` gives it.
        folds: None takes every fold that has the checkpoint.
        checkpoint: file name, ``checkpoint_final.pth``; where it cannot be read, the next best is used.
        device: where to predict.
        messages: what the user should be told is appended here.
    """
    # The predictor greets; our command prints its own lines.
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
    load_model(predictor, folder, folds, checkpoint, messages)
    network = getattr(predictor.network, "_orig_mod", predictor.network)
    if not isinstance(network, (CrossMRNetwork, OpenSetNetwork)):
        raise UsageError(
            f"{folder.name} was trained with {predictor.trainer_name}, which cannot be referred to. "
            "Use -tr nnUNetTrainerCrossMR, or nnUNetv2_predict for this model."
        )
    reader = predictor.plans_manager.image_reader_writer_class.__name__
    if reader != READER:
        raise UsageError(
            f"{folder.name} was planned with {reader}; refer needs {READER}, which makes left the same side in every "
            'file. Set "overwrite_image_reader_writer" in dataset.json (convert crossmr does) and plan again.'
        )
    predictor.network = network
    return predictor
