"""One image after the other: prompts to their places, the network's answers to a label map."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_multimodal.conversion.images import SUFFIXES, read_labels
from nnunet_multimodal.data.prompt_sampling import box_of, shift_box
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.evaluation.output import all_or_none
from nnunet_multimodal.inference.box_study import dice_of, filled
from nnunet_multimodal.inference.folder import Preparation, prepare
from nnunet_multimodal.inference.images import Case
from nnunet_multimodal.inference.position import affine_of
from nnunet_multimodal.inference.prompted import Asker, Question, on_image, to_labels
from nnunet_multimodal.inference.prompts import Asked, Located, locate, preprocessed
from nnunet_multimodal.inference.zoom import zoom


@dataclass(frozen=True)
class Job:
    """What all cases share.

    Attributes:
        predictor: nnU-Net's, with a SegVol model.
        asker: of its network.
        zoom: out, then in; otherwise window by window.
        nan_to: see ``Preparation``.
        output: folder of the results.
        labels: folder of the labels whose boxes are given; None: boxes are the user's.
        free: label of each thing that the data set has no name for.
    """

    predictor: nnUNetPredictor
    asker: Asker
    zoom: bool
    nan_to: float | None
    output: Path
    labels: Path | None
    free: Mapping[str, int] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The organs, in the order of the network's texts."""
        organs: list[str] = self.predictor.configuration_manager.configuration["nnunet_multimodal"]["organs"]
        return organs

    def value(self, organ: str) -> int:
        """The organ's label."""
        return self.free[organ] if organ in self.free else int(self.predictor.dataset_json["labels"][organ])


@dataclass(frozen=True)
class Opened:
    """An image, preprocessed.

    Attributes:
        case: its files.
        data: [C, Z, Y, X].
        properties: nnU-Net's.
        shape: [Z, Y, X] of the array as read.
    """

    case: Case
    data: Tensor
    properties: dict[str, Any]
    shape: tuple[int, ...]


def open_case(job: Job, case: Case) -> Opened:
    """Reads and preprocesses an image as nnU-Net does."""
    plans, configuration = job.predictor.plans_manager, job.predictor.configuration_manager
    how = Preparation(nan_to=job.nan_to)
    image, properties, _ = prepare(case, how, plans, configuration, job.predictor.dataset_json)
    transposed = properties["shape_before_cropping"]
    shape = tuple(int(transposed[axis]) for axis in plans.transpose_backward)
    return Opened(case, torch.from_numpy(image), properties, shape)


def predict_case(job: Job, case: Case, asked: Sequence[Asked]) -> dict[str, Any]:
    """Predicts an image and writes its label map.

    Returns:
        What predictions.json says of it.

    Raises:
        DataProblem: an image, label or prompt is not what it has to be.
    """
    begin = time.perf_counter()
    opened = open_case(job, case)
    reference = None if job.labels is None else read_reference(job, opened)
    located = [_place(job, opened, each, reference) for each in asked]
    if not any(place is not None for place in located):
        raise DataProblem(f"case {case.name}: the labels in {job.labels} have none of the organs asked for.")
    pairs = [(each, place) for each, place in zip(asked, located) if place is not None]
    questions = [_question(job, opened, each, place) for each, place in pairs]
    windows = job.asker.windows
    logits, regions = answer(job, opened.data, questions)
    names = [each.organ for each, _ in pairs]
    values = [job.value(name) for name in names]
    plans, configuration = job.predictor.plans_manager, job.predictor.configuration_manager
    labels = to_labels(logits, values, opened.properties, plans, configuration)
    ending: str = job.predictor.dataset_json["file_ending"]
    path = job.output / f"{case.name}{ending}"
    _write(job, labels, path, opened.properties)
    voxel = float(np.prod(opened.properties["spacing"])) / 1000
    organs: dict[str, Any] = {}
    for (each, place), value, region in zip(pairs, values, regions):
        organs[each.organ] = {
            "label": value,
            "prompts": _kinds(each, place),
            "millilitres": round(int((labels == value).sum()) * voxel, 3),
            **({"found_from_afar": region is not None} if job.zoom else {}),
        }
    skipped = [each.organ for each, place in zip(asked, located) if place is None]
    return {
        "modality": None,
        "how": "none",
        "file": path.name,
        "organs": organs,
        **({"not_in_labels": skipped} if skipped else {}),
        "windows": job.asker.windows - windows,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def answer(job: Job, data: Tensor, questions: Sequence[Question]) -> tuple[Tensor, list[Any]]:
    """Logits [questions, Z, Y, X], and for each question the region that was looked at closely (None: no zoom)."""
    if not job.zoom:
        return job.asker.sliding(data, questions)[0], [None] * len(questions)
    zoomed = [zoom(job.asker, data, question) for question in questions]
    return torch.stack([each.logits for each in zoomed]), [each.region for each in zoomed]


def study_case(
    job: Job, case: Case, asked: Sequence[Asked], shifts: Sequence[int], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Dice of an image's organs for boxes that are off by so much.

    A box that is not moved is drawn once. The same seed, case, organ and shift give the same boxes. Voxels with the
    ignore label do not count.

    Returns:
        A row for each box: see ``box_study.COLUMNS``.
    """
    opened = open_case(job, case)
    reference = read_reference(job, opened)
    known = reference != job.predictor.dataset_json["labels"].get("ignore", -1)
    rows, questions = [], []
    for each in asked:
        value = job.value(each.organ)
        mask = reference == value
        box = box_of(mask)
        if box is None:
            continue
        for shift in shifts:
            for draw in range(draws if shift else 1):
                rng = np.random.default_rng([seed, shift, draw, value, *case.name.encode()])
                moved = shift_box(box, rng, shift, mask.shape)
                located = Located(box=moved)
                questions.append(_question(job, opened, each, located))
                alone = dice_of(filled(moved, mask.shape) & known, mask)
                row = {"case": case.name, "organ": each.organ, "shift": shift, "draw": draw, "box_alone": alone}
                rows.append((row, value))
    if not rows:
        raise DataProblem(f"case {case.name}: the labels in {job.labels} have none of the organs asked for.")
    logits, _ = answer(job, opened.data, questions)
    plans, configuration = job.predictor.plans_manager, job.predictor.configuration_manager
    for index, (row, value) in enumerate(rows):  # one after the other: on the image's grid they are large
        found = on_image(logits[index : index + 1], opened.properties, plans, configuration)[0] > 0
        row["dice"] = dice_of(found & known, reference == value)
    return [row for row, _ in rows]


def read_reference(job: Job, opened: Opened) -> np.ndarray:
    """The labels of a case [Z, Y, X], as nnU-Net's reader gives them.

    Raises:
        DataProblem: there are none, they cannot be read, are no whole numbers, or are of another grid than the image.
    """
    assert job.labels is not None
    path = job.labels / f"{opened.case.name}{job.predictor.dataset_json['file_ending']}"
    if not path.is_file():
        raise DataProblem(f"case {opened.case.name}: {path} (--box-from-labels) does not exist.")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            labels, properties = job.predictor.plans_manager.image_reader_writer_class().read_seg(str(path))
    except Exception as error:  # nnU-Net's readers raise anything, and often do not name the file
        if path.name.lower().endswith(SUFFIXES):
            read_labels(path)  # says what is wrong with it
        raise DataProblem(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    array: np.ndarray = labels[0]
    broken = array != np.round(array)
    if broken.any():
        raise DataProblem(f"{path} is no label map: {int(broken.sum())} voxels such as {array[broken][0]:g}.")
    own, image = affine_of(properties), affine_of(opened.properties)
    if array.shape != opened.shape:
        raise DataProblem(f"{path} has {array.shape} voxels (z, y, x), its image {opened.shape}: they must agree.")
    if own is not None and image is not None and not np.allclose(own, image, atol=1e-2):
        raise DataProblem(f"{path} lies elsewhere in space than its image: their affines differ. Correct the header.")
    return array


def _place(job: Job, opened: Opened, asked: Asked, reference: np.ndarray | None) -> Located | None:
    """Points and box in the array as read; None for an organ that the labels do not have."""
    located = locate(asked, opened.case.name, opened.case.files[0], opened.properties, opened.shape)
    if reference is None:
        return located
    box = box_of(reference == job.value(asked.organ))
    return None if box is None else replace(located, box=box)


def _question(job: Job, opened: Opened, asked: Asked, located: Located) -> Question:
    name = f"case {opened.case.name}, {asked.organ}"
    transpose = job.predictor.plans_manager.transpose_forward
    place = preprocessed(located, opened.properties, transpose, opened.data.shape[1:], name)
    return Question(job.texts.index(asked.organ) if asked.text else None, place)


def _kinds(asked: Asked, located: Located) -> list[str]:
    points = bool(len(located.points))
    return [kind for kind, used in (("text", asked.text), ("points", points), ("box", located.box is not None)) if used]


def _write(job: Job, labels: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    """The label map, whole or not at all, and what nnU-Net writes beside it: a TIFF's spacing."""
    try:
        with all_or_none(path.parent) as folder, contextlib.redirect_stdout(io.StringIO()):
            whole = folder / path.name
            job.predictor.plans_manager.image_reader_writer_class().write_seg(labels, os.fspath(whole), properties)
            with whole.open("rb+") as file:
                os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, or one that is gone by now
        raise
