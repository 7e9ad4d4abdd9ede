"""Predict cases of the pool: a mask, a map of doubt and a score for each, in files that are there whole or not at all.

CASE.nii.gz          the mask, in the project's labels
CASE.doubt.nii.gz    where the folds disagree (of one: the entropy), in per cent
CASE.json            score and image; it comes last and says that the others are there

No process needs the ledger for this, so the shards of several machines write into one folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.errors import EnvironmentProblem, MultimodalError, UsageError
from nnunet_multimodal.inference.folder import Preparation, prepare
from nnunet_multimodal.inference.hounsfield import likelihood
from nnunet_multimodal.inference.images import Case
from nnunet_multimodal.inference.model import load_model
from nnunet_multimodal.inference.told import match_modality
from nnunet_multimodal.inference.workers import Workers
from nnunet_multimodal.relabel.uncertainty import FoldPredictor

HOPELESS = (EnvironmentProblem, BrokenProcessPool)


@dataclass(frozen=True)
class Job:
    """A case to predict."""

    name: str
    image: Path
    image_hash: str
    modality: str | None


@dataclass(frozen=True)
class How:
    """How to predict.

    Attributes:
        folder: result folder of nnU-Net.
        folds: of the model.
        checkpoint: file name.
        device: cpu, cuda or mps.
        mirroring: predict mirrored images too, where the model allows it.
        step_size: share of a tile.
        processes: that prepare images, and as many that write.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str
    device: str
    mirroring: bool = True
    step_size: float = 0.5
    processes: int = 0


def load(how: How, messages: list[str]) -> FoldPredictor:
    """The model.

    Raises:
        UsageError: it takes several images, predicts overlapping regions, or wants harmonised intensities.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net remarks on the device
        predictor = FoldPredictor(how.step_size, True, how.mirroring, True, torch.device(how.device), allow_tqdm=False)
    load_model(predictor, how.folder, list(how.folds), how.checkpoint, messages)
    dataset = predictor.dataset_json
    channels = dataset.get("modality", dataset.get("channel_names"))
    if len(channels) != 1:
        raise UsageError(f"{how.folder} takes {len(channels)} images of a case; relabel has one.")
    if predictor.label_manager.has_regions:
        raise UsageError(f"{how.folder} predicts regions, which overlap; relabel needs one label a voxel.")
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UsageError(f"{how.folder} is the second stage of a cascade; take its 3d_lowres or 3d_fullres.")
    section = dataset.get("nnunet_multimodal")
    if isinstance(section, Mapping) and section.get("harmonise"):
        raise UsageError(f"{how.folder} was trained on harmonised intensities; relabel takes images as they are.")
    return predictor


def label_table(model: Mapping[str, Any], project: Mapping[str, int]) -> tuple[np.ndarray, list[str], list[str]]:
    """What becomes of a model's labels in the project, matched by name (``Left Kidney`` is ``left_kidney``).

    Returns:
        the project's id for each id of the model (background for what the project has not), the project's organs that
        the model does not know, and the model's that the project does not.

    Example:
        >>> table, unknown, dropped = label_table({"background": 0, "Liver": 1, "lung": 2}, {"liver": 5, "spleen": 6})
        >>> table.tolist(), unknown, dropped
        ([0, 5, 0], ['spleen'], ['lung'])
    """
    wanted = {plain_name(name): value for name, value in project.items()}
    known = {plain_name(name): int(value) for name, value in model.items() if name != "ignore"}
    table = np.zeros(max(known.values()) + 1, dtype=np.uint16)
    for name, value in known.items():
        table[value] = wanted.get(name, 0) if value else 0
    unknown = [name for name, value in project.items() if value and name != "ignore" and plain_name(name) not in known]
    dropped = [name for name, value in model.items() if value and name != "ignore" and plain_name(name) not in wanted]
    return table, unknown, dropped


def plain_name(name: str) -> str:
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def predict(
    predictor: FoldPredictor,
    jobs: Sequence[Job],
    output: Path,
    labels: Mapping[str, int],
    processes: int = 0,
    on_done: Callable[[str, float], Any] = lambda name, score: None,
    on_failure: Callable[[str, Exception], Any] = lambda name, error: None,
) -> None:
    """Predicts cases one after the other; what is bad costs its case.

    Args:
        predictor: with a model loaded.
        jobs: the cases.
        output: folder of the predictions.
        labels: of the project.
        processes: see ``How``.
        on_done: called with each finished case and its score.
        on_failure: called with each that failed.

    Raises:
        EnvironmentProblem: a process was killed.
        OSError: the disk is full or cannot be written to.
    """
    output.mkdir(parents=True, exist_ok=True)
    table = label_table(predictor.dataset_json["labels"], labels)[0]
    plan = (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    preparing, writing = Workers(processes), Workers(processes)
    waiting = deque(jobs)
    prepared: deque[tuple[Job, Future]] = deque()
    written: deque[tuple[Job, float, Future]] = deque()

    def collect(until: int) -> None:
        while written and (len(written) > until or written[0][2].done()):
            job, score, future = written.popleft()
            try:
                future.result()
            except (MultimodalError, ValueError, RuntimeError) as error:
                _unless_hopeless(error)
                on_failure(job.name, error)
            else:
                on_done(job.name, score)

    try:
        while waiting or prepared:
            while waiting and len(prepared) <= preparing.processes:
                job = waiting.popleft()
                case = Case(job.name, (job.image,))
                prepared.append((job, preparing.submit(prepare, case, Preparation(), *plan)))
            job, future = prepared.popleft()
            try:
                image, properties, air = future.result()
                predictor.told = _told(predictor, job.modality)
                predictor.likelihood = likelihood(predictor.modalities, air)
                logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).cpu().numpy()
            except Exception as error:  # out of memory on one big image must not cost the other cases
                _unless_hopeless(error)
                on_failure(job.name, error)
                continue
            arguments = (logits, predictor.map, predictor.score, properties, *plan, table, job, output)
            written.append((job, predictor.score, writing.submit(write, *arguments)))
            collect(writing.processes + 1 if writing.processes else 0)
        collect(0)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "A process that reads or writes images was killed, most likely because memory ran out. Use fewer: "
            "--processes 0. What is finished is kept: the same command goes on."
        ) from error
    finally:
        preparing.close()
        writing.close()


def _unless_hopeless(error: Exception) -> None:
    """The next case would fail in the same way."""
    if isinstance(error, (BrokenProcessPool, OSError)) and not isinstance(error, FileNotFoundError):
        raise error


def _told(predictor: FoldPredictor, modality: str | None) -> str | None:
    """The case's modality in the model's spelling; None for a network that has none, or not this one."""
    if modality is None or not predictor.modalities:
        return None
    try:
        return match_modality(modality, predictor.modalities, "the pool")
    except UsageError:
        return None


def write(
    logits: np.ndarray,
    doubt: np.ndarray,
    score: float,
    properties: dict,
    plans: Any,
    configuration: Any,
    dataset_json: dict,
    table: np.ndarray,
    job: Job,
    output: Path,
) -> None:
    """Brings mask and doubt [Z, Y, X] back onto the image's grid, as nnU-Net's export does, and writes them."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, plans.get_label_manager(dataset_json), properties
        )
    percent = (100 * on_image_grid(doubt, plans, configuration, properties)).round().clip(0, 100).astype(np.uint8)
    writer = plans.image_reader_writer_class()
    mask = table[found]
    mask = mask.astype(np.uint8 if mask.max(initial=0) < 256 else np.uint16)
    for array, ending in ((mask, ".nii.gz"), (percent, ".doubt.nii.gz")):
        temporary = output / f".{os.getpid()}.partial.{job.name}{ending}"
        try:
            writer.write_seg(array, str(temporary), properties)
            os.replace(temporary, output / f"{job.name}{ending}")
        finally:
            temporary.unlink(missing_ok=True)
    write_json(output / f"{job.name}.json", {"score": round(score, 6), "image_hash": job.image_hash})


def on_image_grid(values: np.ndarray, plans: Any, configuration: Any, properties: dict) -> np.ndarray:
    """float [Z, Y, X] of the network's grid, resampled to the image's voxels; 0 where nnU-Net had cropped."""
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    current = (
        configuration.spacing if len(configuration.spacing) == len(shape) else [spacing[0], *configuration.spacing]
    )
    resampled = np.asarray(configuration.resampling_fn_probabilities(values[None], shape, current, spacing))[0]
    whole = np.zeros(properties["shape_before_cropping"], dtype=np.float32)
    whole = np.asarray(insert_crop_into_image(whole, resampled, properties["bbox_used_for_cropping"]))
    return whole.transpose(plans.transpose_backward)


def finished(output: Path, name: str) -> dict[str, Any] | None:
    """The record of a case's prediction; None if it is not finished."""
    try:
        record = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
        return {"score": float(record["score"]), "image_hash": str(record["image_hash"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
