"""Predict a folder of images case by case: what is bad costs its case, what is finished stays."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)

from nnunet_multimodal.conversion.dataset import is_running, write_json
from nnunet_multimodal.conversion.images import SUFFIXES, check_not_constant, read_volume
from nnunet_multimodal.data.shifts import Change
from nnunet_multimodal.data.side_fix import fix_sides
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, MultimodalError, UsageError
from nnunet_multimodal.inference.hounsfield import likelihood, share_of_air
from nnunet_multimodal.inference.images import Case
from nnunet_multimodal.inference.missing import Missing, answering, entry_of_branch, with_stand_in
from nnunet_multimodal.inference.modality import ModalityPredictor
from nnunet_multimodal.inference.position import affine_of
from nnunet_multimodal.inference.workers import Workers

FILE_NAME = "predictions.json"
_HOPELESS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)  # no other case could be written either


@dataclass(frozen=True)
class Preparation:
    """What happens to an image before nnU-Net's own preprocessing.

    Attributes:
        harmonise_as: bring the intensities of this modality to [0, 1], as the converter did; None leaves them.
        nan_to: value for voxels that are no numbers; None refuses them.
        missing: the channel that there is no image of; it is 0 everywhere in the result.
        change: what is done to the images as read (data/shifts.py).
    """

    harmonise_as: str | None = None
    nan_to: float | None = None
    missing: int | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Finishing:
    """What happens to a prediction after the network.

    Attributes:
        save_probabilities: write ``CASE.npz`` and ``CASE.pkl`` too, as nnU-Net does.
        slabs: predict in so many, to need less memory; None predicts the whole at once.
        fix_sides: each piece of a left or a right organ gets the name of the side that it lies on (data/side_fix.py).
    """

    save_probabilities: bool = False
    slabs: int | None = None
    fix_sides: bool = False


@dataclass
class Report:
    """predictions.json: how it was predicted, and for each case as what.

    Attributes:
        path: where it is written.
        how: the model and what else makes two predictions differ.
        cases: case -> modality, how it is known, confidence, file, ...
        failed: case -> what is wrong.
    """

    path: Path
    how: dict[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take_over(self, told: Mapping[str, str]) -> list[str]:
        """Keeps the cases of an earlier run that are finished and are what would be predicted now; their names.

        A file without an entry is not taken over: another program may have left it half written.

        Raises:
            UsageError: the earlier run used another model or other settings, or its report cannot be read.
        """
        if not self.path.exists():
            return []
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            how = {key: value for key, value in earlier.items() if key not in ("cases", "failed")}
            cases = dict(earlier["cases"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.path} cannot be read, so that nothing can be continued. Leave out --continue_prediction."
            ) from error
        for key in {**self.how, **how}:
            if how.get(key) != self.how.get(key):
                raise UsageError(
                    f"{self.path.parent} was predicted with {key} {how.get(key)}, now it is {self.how.get(key)}. "
                    "Choose another -o, or leave out --continue_prediction to predict everything again."
                )
        for case, entry in cases.items():
            if (self.path.parent / entry["file"]).is_file() and told.get(case, entry["modality"]) == entry["modality"]:
                self.cases[case] = entry
        return sorted(self.cases)

    def write(self) -> None:
        """The file is the old or the new one, never half of it."""
        ordered = {"cases": dict(sorted(self.cases.items())), "failed": dict(sorted(self.failed.items()))}
        write_json(self.path, {**self.how, **ordered})


def predict_cases(
    predictor: ModalityPredictor,
    cases: Sequence[Case],
    report: Report,
    told: Mapping[str, str],
    harmonise: bool = False,
    nan_to: float | None = None,
    finishing: Finishing = Finishing(),
    processes: tuple[int, int] = (0, 0),
    on_progress: Callable[[float], Any] = lambda done: None,
    on_failure: Callable[[str, BaseException], Any] = lambda case, error: None,
    missing: Missing | None = None,
    change: Change | None = None,
) -> None:
    """Predicts the cases into the report's folder, and writes the report after each.

    Args:
        predictor: with a model loaded.
        cases: what to predict.
        report: each case is entered under ``cases`` or ``failed``.
        told: case -> modality; the network infers the others'.
        harmonise: the model's data set was harmonised, so every case must be told.
        nan_to: see ``Preparation``.
        finishing: what happens after the network.
        processes: how many prepare images and how many write results; 0 does it in this process.
        on_progress: called with the number of cases that are done, fractions included.
        on_failure: called for each case that failed.
        missing: the modality that no case has; the other one's branch of the network answers.
        change: what is done to the images first.

    Raises:
        EnvironmentProblem: a process was killed.
    """
    output = report.path.parent
    preparing, writing = Workers(processes[0]), Workers(processes[1])
    waiting = deque(cases)
    prepared: deque[tuple[Case, Future]] = deque()
    written: deque[tuple[str, dict[str, Any], Future]] = deque()
    plan = (predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)
    ending: str = predictor.dataset_json["file_ending"]

    def fail(case: str, error: Exception) -> None:
        if isinstance(error, BrokenProcessPool) or getattr(error, "errno", None) in _HOPELESS:
            raise error
        report.cases.pop(case, None)
        code = error.exit_code if isinstance(error, MultimodalError) else 1
        report.failed[case] = {"error": _describe(case, error), "exit_code": code}
        on_failure(case, error)

    def collect(until: int) -> None:
        """Enter what is written, in order, until so many are on their way."""
        while written and (len(written) > until or written[0][2].done()):
            case, entry, future = written.popleft()
            try:
                found = future.result()
            except Exception as error:
                fail(case, error)
            else:
                report.cases[case] = entry | found
            report.write()

    with _partial_folder(output) as partial, answering(predictor, missing):
        try:
            for name, content in (("dataset", predictor.dataset_json), ("plans", predictor.plans_manager.plans)):
                write_json(output / f"{name}.json", content)  # nnU-Net's postprocessing and ensembling read them
            for index in range(len(cases)):
                while waiting and len(prepared) <= preparing.processes:
                    case = waiting.popleft()
                    as_what = told[case.name] if harmonise else None
                    how = Preparation(as_what, nan_to, None if missing is None else missing.channel, change)
                    prepared.append((case, preparing.submit(prepare, case, how, *plan)))
                case, future = prepared.popleft()
                predictor.on_progress = functools.partial(_advance, on_progress, index)
                predictor.told = told.get(case.name) if predictor.conditioned else None
                try:
                    image, properties, air = future.result()
                    predictor.likelihood = likelihood(predictor.modalities, air)
                    data = torch.from_numpy(image)
                    if finishing.slabs is None:
                        predicted = predictor.predict_logits_from_preprocessed_data(data).cpu().numpy()
                    else:
                        predicted = predictor.segment_in_slabs(data, properties, finishing.slabs)
                except Exception as error:  # out of memory on one big image must not cost the other cases
                    fail(case.name, error)
                    report.write()
                else:
                    entry = _entry(predictor, told.get(case.name), harmonise) | entry_of_branch(predictor, missing)
                    entry["file"] = f"{case.name}{ending}"
                    job = (predicted, properties, *plan, case.name, partial, output, finishing)
                    written.append((case.name, entry, writing.submit(write, *job)))
                on_progress(index + 1.0)
                collect(writing.processes + 1 if writing.processes else 0)
            collect(0)
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "A process that reads or writes images was killed, most likely because memory ran out. "
                "Use fewer: -npp 0 -nps 0. What is finished is kept: --continue_prediction goes on."
            ) from error
        finally:  # also what an interrupted run has finished
            predictor.on_progress = None
            preparing.close()
            writing.close()
            for case_name, entry, future in written:
                if future.done() and not future.cancelled() and future.exception() is None:
                    report.cases[case_name] = entry | future.result()
            report.write()


def _advance(on_progress: Callable[[float], Any], index: int, done: float) -> None:
    on_progress(index + done)


def prepare(
    case: Case, how: Preparation, plans: Any, configuration: Any, dataset_json: dict
) -> tuple[np.ndarray, dict, float]:
    """nnU-Net's preprocessing of a case: float32 [channels, Z, Y, X], its properties, and the share of air as read.

    Raises:
        DataProblem: an image cannot be read, is constant, or has voxels that are no numbers.
    """
    preprocessor = configuration.preprocessor_class(verbose=False)
    files = [str(path) for path in case.files]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            image, properties = plans.image_reader_writer_class().read_images(files)
            air = share_of_air(image[0])
            if how.nan_to is not None:
                image = np.where(np.isfinite(image), image, np.float32(how.nan_to))
            if how.change is not None:
                image = how.change(image, properties["spacing"], case.name)
                air = share_of_air(image[0])
            if how.harmonise_as is not None:
                from nnunet_multimodal.conversion.harmonise import harmonise

                channels = [harmonise(channel, how.harmonise_as, file) for channel, file in zip(image, files)]
                image = np.stack(channels)
            if how.missing is not None:
                image = with_stand_in(image, how.missing, configuration.normalization_schemes[how.missing])
            image, _, properties = preprocessor.run_case_npy(
                image, None, properties, plans, configuration, dataset_json
            )
    except MultimodalError:
        raise
    except Exception:
        _diagnose(case, how)
        raise
    seen = image
    if how.missing is not None:
        image[how.missing] = 0
        seen = np.delete(image, how.missing, axis=0)
    finite = np.isfinite(image).all()
    if not finite or seen.min() == seen.max():
        _diagnose(case, how)
    if not finite:
        raise DataProblem(f"case {case.name} has voxels that are no numbers once it is preprocessed.")
    return np.ascontiguousarray(image, dtype=np.float32), properties, air


def _diagnose(case: Case, how: Preparation) -> None:
    """Find the image that nnU-Net stumbled over; it says of none what is wrong."""
    for path in case.files:
        if path.name.lower().endswith(SUFFIXES):
            check_not_constant(read_volume(path, how.nan_to))


def write(
    predicted: np.ndarray,
    properties: dict,
    plans: Any,
    configuration: Any,
    dataset_json: dict,
    case: str,
    partial: Path,
    output: Path,
    finishing: Finishing,
) -> dict[str, Any]:
    """nnU-Net's export into ``partial``; then each file appears whole in ``output``, the segmentation last.

    Args:
        predicted: logits [C, Z, Y, X]; with slabs the segmentation [Z, Y, X] on the image's grid.

    Returns:
        What predictions.json says of it.
    """
    found: dict[str, Any] = {}
    save_probabilities = finishing.save_probabilities
    with contextlib.redirect_stdout(io.StringIO()):
        if finishing.slabs is None and not finishing.fix_sides:
            export_prediction_from_logits(
                predicted, properties, configuration, plans, dataset_json, str(partial / case), save_probabilities
            )
        else:
            segmentation = predicted
            if finishing.slabs is None:
                segmentation = _export_probabilities(
                    predicted, properties, plans, configuration, dataset_json, partial / case, save_probabilities
                )
            if finishing.fix_sides:
                segmentation, found["sides"] = _fixed(segmentation, properties, dataset_json["labels"], case)
            plans.image_reader_writer_class().write_seg(
                segmentation, str(partial / f"{case}{dataset_json['file_ending']}"), properties
            )
    beside = [".npz", ".pkl"] if save_probabilities else []
    if (partial / f"{case}.json").is_file():  # the spacing, which nnU-Net writes beside a TIFF
        beside = [*beside, ".json"]
    for ending in [*beside, dataset_json["file_ending"]]:
        with (partial / f"{case}{ending}").open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial / f"{case}{ending}", output / f"{case}{ending}")
    return found


def _export_probabilities(
    logits: np.ndarray, properties: dict, plans: Any, configuration: Any, dataset_json: dict, path: Path, save: bool
) -> np.ndarray:
    """The segmentation [Z, Y, X] on the image's grid; probabilities are written as nnU-Net does if ``save`` is set."""
    result = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, plans.get_label_manager(dataset_json), properties, save
    )
    if not save:
        return np.asarray(result)
    segmentation, probabilities = result
    np.savez_compressed(f"{path}.npz", probabilities=probabilities)
    save_pickle(properties, f"{path}.pkl")
    return np.asarray(segmentation)


def _fixed(
    segmentation: np.ndarray, properties: dict, labels: Mapping[str, int], case: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Left and right put right, and what predictions.json says of it."""
    affine = affine_of(properties)
    if affine is None:
        raise DataProblem(f"case {case} does not say where it lies in the patient: leave --fix-sides out.")
    names = {name: value for name, value in labels.items() if value and name != "ignore"}
    fixed = fix_sides(segmentation, names, affine)
    return fixed.labels, fixed.as_json()


def _entry(predictor: ModalityPredictor, told: str | None, harmonise: bool) -> dict[str, Any]:
    if predictor.verdict is not None:
        return asdict(predictor.verdict) | {"used": True}
    return {"modality": told, "how": "none" if told is None else "told", "used": harmonise}


def _describe(case: str, error: Exception) -> str:
    return str(error) if isinstance(error, MultimodalError) else f"case {case}: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A hidden folder inside the output, so that a finished file is only renamed; killed runs' are cleared away."""
    output.mkdir(parents=True, exist_ok=True)
    head = f".partial-{platform.node()}-"
    for left in output.glob(f"{head}*"):
        if left.name.removeprefix(head).isdigit() and not is_running(int(left.name.removeprefix(head))):
            shutil.rmtree(left, ignore_errors=True)
    partial = output / f"{head}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
