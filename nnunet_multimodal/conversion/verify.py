"""What in a raw data set would stop or mislead nnU-Net, in words.

Faults of the data never raise here: each becomes a message, so that one run finds them all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_multimodal.conversion.crossmr import SCRIBBLE_CHANNEL
from nnunet_multimodal.conversion.dataset import first_names
from nnunet_multimodal.conversion.images import (
    SUFFIXES,
    Volume,
    check_label_values,
    check_not_constant,
    compare_geometry,
    read_labels,
    read_volume,
)
from nnunet_multimodal.conversion.mixed import doubt_modality
from nnunet_multimodal.conversion.verify_scribbles import check_dense, check_drawn, check_fingerprint
from nnunet_multimodal.data.case_labels import KEY as CASE_LABELS
from nnunet_multimodal.data.case_labels import CaseLabels, has_case_labels
from nnunet_multimodal.data.modality import SECTION, ModalityTable, has_table
from nnunet_multimodal.data.splits import FILE_NAME, advise, folds_without, read_splits, stale_cases
from nnunet_multimodal.errors import DataProblem

REQUIRED = ("channel_names", "labels", "numTraining", "file_ending")
CT_NAMES = {"ct"}  # nnU-Net compares without case
NOT_CHECKED = "the images were not checked"


@dataclass
class RawFiles:
    """The files of one case by channel, and its label."""

    channels: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None


@dataclass(frozen=True)
class Findings:
    """What is to be said of a data set.

    Attributes:
        problems: what would stop or mislead nnU-Net.
        warnings: what may be as it should, but rarely is.
    """

    problems: list[str]
    warnings: list[str] = field(default_factory=list)


def verify_raw_dataset(folder: Path) -> list[str]:
    """The problems of an nnU-Net raw data set; an empty list if there are none.

    Args:
        folder: the folder with dataset.json, imagesTr and labelsTr.
    """
    return check_raw_dataset(folder).problems


def check_raw_dataset(folder: Path) -> Findings:
    """The same with the warnings."""
    content, problems = load_json(folder)
    if content is None:
        return Findings(problems)
    problems += _check_keys(content)
    if any(key not in content for key in REQUIRED):
        return Findings(problems)
    ids, label_problems = _label_ids(content["labels"])
    problems += label_problems + _check_channel_names(content)
    ending = content["file_ending"]
    if ending not in SUFFIXES:
        return Findings([*problems, f"file_ending is {ending!r}, expected {' or '.join(SUFFIXES)}; {NOT_CHECKED}."])
    cases, file_problems = collect_cases(folder, content, ending)
    problems += file_problems
    whole, more = _check_completeness(folder, cases, len(content["channel_names"]), content["numTraining"])
    problems += more
    with_images = [case for case, files in cases.items() if files.channels]
    table, more = _check_table(content, with_images)
    problems += more + _check_splits(folder, with_images, table)
    case_labels, more = _check_case_labels(content, with_images)
    problems += more or _check_copy(folder, content)
    of_case = {} if table is None or is_harmonised(content) else table.case_modality
    # nibabel reads sheared directions, ITK does not
    sheared_is_read = str(content.get("overwrite_image_reader_writer", "")).startswith("NibabelIO")
    scribbles = {int(index) for index, name in content["channel_names"].items() if name == SCRIBBLE_CHANNEL}
    warnings = []
    found: dict[str, frozenset[int]] = {}
    for case, files in tqdm(whole.items(), desc=f"checking {folder.name}", unit="case", disable=None):
        more, image, values = _check_case(files, ids, scribbles, sheared_is_read)
        problems += more
        if values is not None:
            found[case] = values
            problems += _check_unannotated(case, values, content["labels"], case_labels)
        if image is not None and image.path == files.channels[0] and case in of_case:
            doubt = doubt_modality(of_case[case], image)
            warnings += [f"case {case}: {doubt}"] if doubt else []
    if ids is not None:
        problems_drawn, warnings_drawn = check_drawn(content["labels"], found)
        dense = check_dense(folder, content["labels"], {case: of.label for case, of in whole.items() if of.label})
        problems, warnings = problems + problems_drawn + dense, warnings + warnings_drawn
    warnings += check_fingerprint(folder, content, _preprocessed())
    return Findings(problems, warnings)


# --- dataset.json ----------------------------------------------------------------------------------------------------


def load_json(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """dataset.json of a folder; None and one problem if it cannot be had."""
    path = folder / "dataset.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None, [f"{path} is missing. nnU-Net needs it; `nnunet_multimodal convert` writes it."]
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"Cannot read {path}: {error}"]
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        before = text[: error.pos].rstrip()
        hint = " There is a comma too many before it." if before.endswith(",") else ""
        return None, [f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}.{hint}"]
    if not isinstance(content, dict):
        return None, [f"{path} holds a {type(content).__name__}, expected an object with {', '.join(REQUIRED)}."]
    return content, []


def _check_keys(content: Mapping[str, Any]) -> list[str]:
    problems = []
    if "modality" in content:
        problems.append(
            'dataset.json has the key "modality" of nnU-Net v1, and nnU-Net counts its entries as channels. '
            'Rename it to "channel_names", or delete it if that is there.'
        )
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        problems.append(f"dataset.json lacks {', '.join(missing)}; expected {', '.join(REQUIRED)}.")
    for key, kind in (("channel_names", dict), ("labels", dict), ("numTraining", int), ("file_ending", str)):
        if key in content and not isinstance(content[key], kind):
            problems.append(f"dataset.json: {key} is a {type(content[key]).__name__}, expected {kind.__name__}.")
    return problems


def _label_ids(labels: Any) -> tuple[set[int] | None, list[str]]:
    """The ids that may occur in label files (None if they cannot be known), and what is wrong with them."""
    if not isinstance(labels, dict):
        return None, []  # said by _check_keys
    if labels and all(str(name).isdecimal() and isinstance(value, str) for name, value in labels.items()):
        return None, ['labels are inverted as in nnU-Net v1 ({"1": "liver"}); write {"liver": 1}.']
    ids: set[int] = set()
    for name, value in labels.items():
        members = value if isinstance(value, list) else [value]  # a region is a list of ids
        if not all(type(member) is int for member in members):
            return None, [f"label {name!r} is {value!r}, expected a whole number, or a list of them for a region."]
        ids.update(members)
    problems = []
    if labels.get("background") != 0:
        problems.append(f"background must be 0, found {labels.get('background', 'no label of that name')}.")
    problems += _check_ignore(labels, ids)
    if ids != set(range(len(ids))):
        problems.append(
            f"Label ids have gaps: found {first_names([*map(str, sorted(ids))])}, nnU-Net needs 0..{len(ids) - 1}."
        )
    return ids, problems


def _check_ignore(labels: Mapping[str, Any], ids: set[int]) -> list[str]:
    """Row 25: nnU-Net knows the ignore label by its name alone, and wants it to be the highest."""
    alike = [name for name in labels if "ignore" in name.lower() and name != "ignore"]
    problems = [f"label {name!r} is not taken for the ignore label; it must be named 'ignore'." for name in alike]
    if "ignore" in labels:
        others = ids - {labels["ignore"]} if isinstance(labels["ignore"], int) else ids
        highest = max(others, default=0)
        if labels["ignore"] != highest + 1:
            problems.append(f"ignore must be {highest + 1} (max label {highest} + 1); found {labels['ignore']}.")
    return problems


def _check_channel_names(content: Mapping[str, Any]) -> list[str]:
    names = content["channel_names"]
    if not isinstance(names, dict):
        return []
    problems = []
    if [*names] != [str(index) for index in range(len(names))]:
        problems.append(f"channel_names are numbered {', '.join(names)}; expected 0..{len(names) - 1} in order.")
    problem = ct_channel(content, _modalities(content))
    return [*problems, problem] if problem else problems


def ct_channel(content: Mapping[str, Any], modalities: Iterable[str]) -> str | None:
    """Row 22: the complaint about a channel called CT in a data set with other images than CT."""
    others = sorted(name for name in modalities if str(name).lower() not in CT_NAMES)
    for index, name in content["channel_names"].items():
        if others and str(name).lower() in CT_NAMES:
            return (
                f"channel name 'CT' turns on CT clipping for {', '.join(others)}; use 'either_CT_or_MR': write "
                f'"channel_names": {{"{index}": "either_CT_or_MR"}}, and plan and preprocess again if that was done.'
            )
    return None


def _modalities(content: Mapping[str, Any]) -> set[str]:
    """All that the data set's own section names, well-formed or not."""
    own = content.get(SECTION)
    if not isinstance(own, dict):
        return set()
    listed, of_case = own.get("modalities"), own.get("case_modality")
    names = [*(listed if isinstance(listed, list) else []), *(of_case.values() if isinstance(of_case, dict) else [])]
    return {*map(str, names), *(["MR"] if own.get("layout") == "crossmr" else [])}


def is_harmonised(content: Mapping[str, Any]) -> bool:
    """Whether the images were brought to one scale, on which CT and MR look alike (``--harmonise``)."""
    own = content.get(SECTION)
    return isinstance(own, dict) and bool(own.get("harmonise"))


def _check_table(content: Mapping[str, Any], cases: Iterable[str]) -> tuple[ModalityTable | None, list[str]]:
    """The modality table, and what is wrong with it (row 32)."""
    table: ModalityTable | None = None
    if isinstance(content.get(SECTION), dict) and has_table(content):
        try:
            table = ModalityTable.from_dataset_json(content)
            table.require(cases)
        except DataProblem as problem:
            return table, [str(problem)]
    return table, []


def _check_case_labels(content: Mapping[str, Any], cases: list[str]) -> tuple[CaseLabels | None, list[str]]:
    """Which classes are annotated in which case, and what is wrong with that."""
    if not isinstance(content.get(SECTION), dict) or not has_case_labels(content):
        return None, []
    try:
        case_labels = CaseLabels.from_dataset_json(content)
        case_labels.require_known(cases)
    except DataProblem as problem:
        return None, [str(problem)]
    never = [name for name, count in case_labels.count(cases).items() if cases and not count]
    return case_labels, [f'"{CASE_LABELS}": {", ".join(never)} is annotated in no case.'] if never else []


def _check_unannotated(
    case: str, values: frozenset[int], labels: Mapping[str, Any], case_labels: CaseLabels | None
) -> list[str]:
    """A class that is not annotated in a case has no voxel there; a region may share ids with one that is."""
    if case_labels is None:
        return []
    lacking = case_labels.unannotated(case)
    of_class = {name: {*value} if isinstance(value, list) else {value} for name, value in labels.items()}
    known = {value for name in case_labels.outputs if name not in lacking for value in of_class[name]}
    drawn = [name for name in lacking if (of_class[name] & values) - known]
    if not drawn:
        return []
    return [
        f'case {case}: its label has {", ".join(drawn)}, which "{CASE_LABELS}" says is not annotated there. Add it to '
        "the case's list if it is, or set these voxels to 0."
    ]


def _check_copy(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Training reads the dataset.json that planning has copied; it does not see what was written here later."""
    preprocessed = _preprocessed()
    path = preprocessed / folder.name / "dataset.json" if preprocessed else None
    if path is None or not path.is_file():
        return []
    try:
        copied = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        return [f"{path} is not valid JSON: {error}. Copy {folder / 'dataset.json'} there."]
    sections = (each.get(SECTION) if isinstance(each, Mapping) else None for each in (content, copied))
    here, there = (each.get(CASE_LABELS, {}) if isinstance(each, Mapping) else {} for each in sections)
    if here == there:
        return []
    return [f'{path}, which training reads, has another "{CASE_LABELS}". Copy {folder / "dataset.json"} there.']


def _check_splits(folder: Path, cases: Iterable[str], table: ModalityTable | None) -> list[str]:
    """Whether an existing splits_final.json fits cases and table (rows 31 and 40)."""
    path = splits_file(folder.name)
    if path is None:
        return []
    problems = []
    try:
        splits = read_splits(path)
    except DataProblem as problem:
        return [str(problem)]
    gone, new = stale_cases(splits, cases)
    remedy = "Run nnUNetv2_preprocess and delete the file: new splits are then made."
    if gone:
        problems.append(f"{path} names {len(gone)} cases that are not in the data set: {first_names(gone)}. {remedy}")
    if new:
        problems.append(f"{len(new)} cases are in no split of {path}: {first_names(new)}. {remedy}")
    if table is not None:
        without = folds_without(splits, table)
        if without:
            problems.append(f"{path}: {'; '.join(without)}. {advise(splits, table)}")
    return problems


def splits_file(name: str) -> Path | None:
    """The folds of a data set of this full name, where nnU-Net has made or the user has put them."""
    preprocessed = _preprocessed()
    path = preprocessed / name / FILE_NAME if preprocessed else None
    return path if path and path.is_file() else None


def _preprocessed() -> Path | None:
    value = os.environ.get("nnUNet_preprocessed", "").strip()
    return Path(value) if value else None


# --- files -----------------------------------------------------------------------------------------------------------


def collect_cases(folder: Path, content: Mapping[str, Any], ending: str) -> tuple[dict[str, RawFiles], list[str]]:
    """The files of every case, from the folders or from the list in dataset.json."""
    if isinstance(content.get("dataset"), dict):
        return {
            case: RawFiles(
                {index: folder / name for index, name in enumerate(entry["images"])}, folder / entry["label"]
            )
            for case, entry in content["dataset"].items()
        }, []
    problems = [f"{folder / name} is missing." for name in ("imagesTr", "labelsTr") if not (folder / name).is_dir()]
    if problems:
        return {}, problems
    cases: dict[str, RawFiles] = {}
    for name in _files(folder / "imagesTr", ending):
        stem = name.removesuffix(ending)
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None:
            problems.append(f"{name} has no channel suffix; rename to {stem}_0000{ending}.")
        else:
            cases.setdefault(match[1], RawFiles()).channels[int(match[2])] = folder / "imagesTr" / name
    for name in _files(folder / "labelsTr", ending):
        cases.setdefault(name.removesuffix(ending), RawFiles()).label = folder / "labelsTr" / name
    foreign = [
        path.name
        for part in ("imagesTr", "labelsTr")
        for path in sorted((folder / part).iterdir())
        if path.name.endswith(SUFFIXES) and not path.name.endswith(ending) and not path.name.startswith(".")
    ]
    if foreign:
        problems.append(f"file_ending is {ending}, so nnU-Net does not see {first_names(foreign)}.")
    return cases, problems


def _files(folder: Path, ending: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(ending) and not name.startswith("."))


def _check_completeness(
    folder: Path, cases: Mapping[str, RawFiles], channels: int, expected_cases: int
) -> tuple[dict[str, RawFiles], list[str]]:
    """The cases that have all their files, and what the others lack (rows 7 and 9)."""
    problems: list[str] = []
    whole: dict[str, RawFiles] = {}
    for case, files in sorted(cases.items()):
        if files.channels and sorted(files.channels) != [*range(channels)]:
            problems.append(
                f"case {case}: expected channels {_channels(range(channels))}; "
                f"found {_channels(files.channels)} in imagesTr."
            )
        elif files.channels and files.label is not None:
            whole[case] = files
    unlabelled = [case for case, files in sorted(cases.items()) if files.label is None]
    orphans = [case for case, files in sorted(cases.items()) if not files.channels]
    if unlabelled:
        problems.append(f"{len(unlabelled)} cases in imagesTr without a label in labelsTr: {first_names(unlabelled)}")
    if orphans:
        problems.append(f"{len(orphans)} labels in labelsTr without an image in imagesTr: {first_names(orphans)}")
    images = len(cases) - len(orphans)
    if images != expected_cases:
        problems.append(f"dataset.json says numTraining {expected_cases}, found {images} cases in {folder}.")
    return whole, problems


def _channels(indices: Any) -> str:
    return ",".join(f"{index:04d}" for index in sorted(indices))


# --- voxels ----------------------------------------------------------------------------------------------------------


def _check_case(
    files: RawFiles, ids: set[int] | None, scribbles: set[int], sheared_is_read: bool
) -> tuple[list[str], Volume | None, frozenset[int] | None]:
    """Every file of a case by itself, and all of them against the first channel (rows 11 to 19, 23, 24, 27, 28).

    Returns:
        the problems, the first channel that can be used, and the values in the label if those are right.
    """
    problems: list[str] = []
    first: Volume | None = None
    values: frozenset[int] | None = None
    seen: set[Path] = set()
    for index, path in sorted(files.channels.items()):
        if path.exists() and path.resolve() in seen:
            continue  # target and reference of a CrossMR data set are one file
        seen.add(path.resolve())
        try:
            volume = read_volume(path, reorthonormalize=sheared_is_read)
            if index in scribbles:
                _check_scribble_channel(volume)
            else:
                check_not_constant(volume)
            if first is not None:
                compare_geometry(first, volume, "scribble" if index in scribbles else "channel")
        except DataProblem as problem:
            problems.append(_without_options(problem))
            continue
        first = first or volume
    if files.label is None:
        return problems, first, values
    try:
        label = read_labels(files.label, reorthonormalize=sheared_is_read)
        if ids is not None:
            check_label_values(label, ids)
            values = frozenset(map(int, np.unique(label.data)))
        if first is not None:
            compare_geometry(first, label, "label")
    except DataProblem as problem:
        problems.append(_without_options(problem))
    return problems, first, values


def _check_scribble_channel(volume: Volume) -> None:
    values = np.unique(volume.data)
    if not np.isin(values, (0, 1)).all():
        found = ", ".join(f"{value:.7g}" for value in values[:5])
        raise DataProblem(f"scribble channel {volume.path} holds {found}, expected 0 and 1.")


def _without_options(problem: DataProblem) -> str:
    """Options such as --nan-to belong to ``convert``, which makes the data set; here they have to be named in full."""
    message = str(problem)
    return f"{message} (options of `nnunet_multimodal convert`)" if " --" in message else message
