"""A trained referring model, found the way nnU-Net finds its own."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_multimodal.environment import use_own_trainers
from nnunet_multimodal.errors import EnvironmentProblem, UsageError
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
    use_own_trainers()
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise EnvironmentProblem(f"{folder} holds no {name}: this is no result folder of nnUNetv2_train.")
    if folds is None:
        trained = sorted(folder.glob("fold_*/checkpoint_*.pth"))
        wanted = [path for path in trained if path.name == checkpoint] or trained
        folds = sorted({path.parent.name.removeprefix("fold_") for path in wanted})
        folds = [fold for fold in folds if fold != "all"] or folds  # as nnUNetv2_predict: the five, not all with them
    if not folds:
        raise EnvironmentProblem(f"no fold in {folder} has a checkpoint: the training has not saved one yet.")
    names = set()
    for fold in folds:
        path, message = readable_checkpoint(folder / f"fold_{fold}" / checkpoint)
        messages += [f"fold {fold}: {message}"] if message else []
        names.add(path.name)
    if len(names) > 1:
        raise UsageError(f"the folds {folds} have different checkpoints: {sorted(names)}; choose folds with -f.")
    # The predictor greets and lists what it finds; our command prints its own lines.
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds, names.pop())
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
