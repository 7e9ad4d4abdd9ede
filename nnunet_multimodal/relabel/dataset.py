"""A cycle's data set for nnU-Net: links to images and masks, splits that only grow, cases preprocessed once each.

A preprocessed case is stored under the hash of all that it depends on: image, mask, and the part of the plans that
preprocessing reads. A mask that was corrected again is therefore preprocessed again, and nothing else is (faults.md
row 40: nnU-Net's own preprocessed folder is a cache that does not notice).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import link_or_copy, new_dataset, write_dataset_json, write_json
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.inference.workers import Workers
from nnunet_multimodal.relabel.folds import splits_of
from nnunet_multimodal.relabel.pool import checked_hash, nifti_of
from nnunet_multimodal.relabel.project import FOLDS, Project
from nnunet_multimodal.relabel.start import CHANNEL
from nnunet_multimodal.relabel.store import sync_folder

PLANS = "nnUNetPlans"
_PARTS = (".b2nd", "_seg.b2nd", ".pkl")
# What preprocessing reads of a configuration; the network, the patch and the batch do not matter for it.
_READ = (
    "data_identifier",
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


@dataclass(frozen=True)
class TrainingCase:
    """A case of a cycle."""

    name: str
    image: Path  # .nii.gz
    image_hash: str
    mask: str
    fold: int
    modality: str | None
    patient: str | None


def cases_of_cycle(project: Project, cycle: int) -> list[TrainingCase]:
    """What a cycle trains on, as it was chosen when it began.

    Raises:
        DataProblem: an image is gone or was changed.
    """
    rows = project.ledger.all(
        "SELECT c.*, t.mask AS trained_mask, t.image_hash AS trained_image, t.fold AS trained_fold "
        "FROM cycle_cases t JOIN cases c ON c.id = t.case_id WHERE t.cycle = ? ORDER BY c.name",
        cycle,
    )
    cases = []
    for row in rows:
        image_hash, _ = checked_hash(row)
        image = nifti_of(row, image_hash, project.images)
        cases.append(
            TrainingCase(
                row["name"],
                image,
                image_hash,
                row["trained_mask"],
                row["trained_fold"],
                row["modality"],
                row["patient"],
            )
        )
    return cases


def write_raw(project: Project, cycle: int, cases: Sequence[TrainingCase]) -> Path:
    """The raw data set, whole or not at all; one that is there is kept."""
    final = project.nnunet("raw") / project.dataset_name(cycle)
    if (final / "dataset.json").is_file():
        return final
    project.nnunet("raw").mkdir(parents=True, exist_ok=True)
    name = str(project.ledger.setting("name"))
    with new_dataset(project.nnunet("raw"), cycle, name, overwrite=True) as folder:
        for case in cases:
            link_or_copy(
                _link(case.image, project.folder, final / "imagesTr"), folder / "imagesTr" / f"{case.name}_0000.nii.gz"
            )
            mask = project.masks.path(case.mask)
            link_or_copy(_link(mask, project.folder, final / "labelsTr"), folder / "labelsTr" / f"{case.name}.nii.gz")
        source = {"project": project.folder.name, "cycle": cycle}
        write_dataset_json(folder, "relabel", [CHANNEL], project.labels, len(cases), source, modality_table(cases))
        sync_folder(folder)
    return final


def _link(target: Path, inside: Path, folder: Path) -> Path:
    """Relative for what lies in the project, which may be moved; absolute for the images."""
    return Path(os.path.relpath(target, folder)) if target.is_relative_to(inside) else target


def modality_table(cases: Sequence[TrainingCase]) -> dict[str, Any]:
    """The table of dataset.json (design.md, contract 1), if each case's modality is known."""
    modalities = {case.name: case.modality for case in cases if case.modality is not None}
    if len(modalities) < len(cases):
        return {}
    patients = {case.name: case.patient for case in cases if case.patient is not None}
    table = {"modalities": sorted(set(modalities.values())), "case_modality": modalities}
    return table | ({"case_patient": patients} if patients else {})


def write_preprocessed(
    project: Project,
    cycle: int,
    cases: Sequence[TrainingCase],
    plans: dict[str, Any],
    configuration: str,
    processes: int,
) -> int:
    """Fills nnU-Net's preprocessed folder; how many cases had to be preprocessed.

    Args:
        project: open.
        cycle: its number.
        cases: of it.
        plans: the project's.
        configuration: ``2d``, ``3d_fullres``, ...
        processes: that preprocess.

    Raises:
        DataProblem: a case cannot be preprocessed; the others are done.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = project.nnunet("preprocessed") / project.dataset_name(cycle)
    raw = project.nnunet("raw") / project.dataset_name(cycle)
    folder.mkdir(parents=True, exist_ok=True)
    dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    write_json(folder / "dataset.json", dataset_json)
    write_json(folder / "splits_final.json", splits_of({case.name: case.fold for case in cases}, FOLDS))
    manager = PlansManager({**plans, "dataset_name": project.dataset_name(cycle)})
    configured = manager.get_configuration(configuration)
    data = folder / configured.data_identifier
    truth = folder / "gt_segmentations"
    for each in (data, truth):
        each.mkdir(exist_ok=True)
    keys = {case.name: preprocessing_key(case, plans, configured.configuration, project.labels) for case in cases}
    missing = [case for case in cases if not _stored(project, keys[case.name]).is_dir()]
    pool = Workers(processes if len(missing) > 1 else 0)
    problems = {}
    try:
        for case in missing:  # what a mask's name says is checked before it is trained on
            project.masks.read(case.mask)
        jobs = [
            (case, pool.submit(
                preprocess, str(case.image), str(project.masks.path(case.mask)), _stored(project, keys[case.name]),
                manager, configured, dataset_json,
            ))
            for case in missing
        ]  # fmt: skip
        for case, future in tqdm(jobs, desc="preprocessing", unit="case", disable=None):
            try:
                future.result()
            except Exception as error:  # the others are kept, and need not be done again
                problems[case.name] = f"{case.name}: {type(error).__name__}: {error}"
    finally:
        pool.close()
    if problems:
        from nnunet_multimodal.conversion.dataset import numbered

        raise DataProblem(numbered("Not preprocessed; the rest is done. Repair or reject:", [*problems.values()]))
    for case in cases:
        for part in _PARTS:
            _hard_link(_stored(project, keys[case.name]) / f"case{part}", data / f"{case.name}{part}")
        if not (truth / f"{case.name}.nii.gz").exists():
            link_or_copy(_link(project.masks.path(case.mask), project.folder, truth), truth / f"{case.name}.nii.gz")
    return len(missing)


def preprocessing_key(
    case: TrainingCase, plans: Mapping[str, Any], configuration: Mapping[str, Any], labels: Mapping[str, int]
) -> str:
    """The hash of all that a preprocessed case depends on."""
    parts = {
        "image": case.image_hash,
        "mask": case.mask,
        "labels": dict(labels),
        "reader": plans["image_reader_writer"],
        "transpose": plans["transpose_forward"],
        "intensities": plans["foreground_intensity_properties_per_channel"],
        "configuration": {key: configuration.get(key) for key in _READ},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def preprocess(image: str, mask: str, output: Path, plans: Any, configuration: Any, dataset_json: dict) -> None:
    """nnU-Net's preprocessing of a case into a folder that appears when it is complete."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            preprocessor = configuration.preprocessor_class(verbose=False)
            preprocessor.run_case_save(str(partial / "case"), [image], mask, plans, configuration, dataset_json)
        for path in partial.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stored(project: Project, key: str) -> Path:
    return project.folder / "cache" / "preprocessed" / key[:2] / key


def _hard_link(source: Path, destination: Path) -> None:
    """Takes no space, and stays when the cache is cleared; a copy where there are no hard links."""
    if destination.exists() and destination.samefile(source):
        return
    temporary = destination.with_name(f".{os.getpid()}.partial.{destination.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, destination)
