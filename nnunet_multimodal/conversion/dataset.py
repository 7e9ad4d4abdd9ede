"""A raw data set of nnU-Net, made whole or not at all.

Everything is written into ``.DatasetXXX_Name.partial-<pid>`` beside the final folder and renamed when it is complete. A
run that is interrupted removes its folder; one that is killed leaves it to the next run on the same data set.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from nnunet_multimodal.conversion.images import SUFFIXES, Volume, split_suffix, write_like, written_whole
from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.errors import DataProblem, UsageError

FILE_ENDING = ".nii.gz"
LISTED = 10  # problems or names shown; the rest are counted

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CaseFiles:
    """One training case before conversion."""

    case: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Repairs:
    """What the user allows to be put right in the input files."""

    nan_to: float | None = None
    fix_header: bool = False
    allow_affine_mismatch: bool = False
    reorthonormalize: bool = False


# --- finding the cases -----------------------------------------------------------------------------------------------


def find_cases(images: Path, labels: Path) -> list[CaseFiles]:
    """Pair the images and labels of two folders (and folders in them) by file name.

    Raises:
        UsageError: a folder is missing.
        DataProblem: a folder holds no NIfTI, a case is there twice (row 10), or an image or label is alone (row 9).
    """
    image_of, label_of = find_files(images, "image"), find_files(labels, "label")
    unlabelled = sorted(image_of.keys() - label_of.keys())
    orphans = sorted(label_of.keys() - image_of.keys())
    if unlabelled or orphans:
        lines = [f"Images in {images} and labels in {labels} do not pair up; a label has its image's name."]
        if unlabelled:
            lines.append(f"  {len(unlabelled)} without a label: {first_names(unlabelled)}")
        if orphans:
            lines.append(f"  {len(orphans)} labels without an image: {first_names(orphans)}")
        raise DataProblem("\n".join([*lines, "Add, rename or take away files until both folders agree."]))
    return [CaseFiles(case, image_of[case], label_of[case]) for case in sorted(image_of)]


def find_files(folder: Path, what: str) -> dict[str, Path]:
    """The NIfTI files of a folder and the folders in it, by case id.

    Raises:
        UsageError: it is no folder.
        DataProblem: it holds no NIfTI, or two files of one case id.
    """
    if not folder.is_dir():
        raise UsageError(f"No such folder of {what}s: {folder}")
    sources: dict[str, list[Path]] = {}
    others: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if split_suffix(path)[1]:
                sources.setdefault(case_id(path), []).append(path)
            else:
                others.append(name)
    if not sources:
        there = f"It holds {len(others)} other files, such as {others[0]}." if others else "It is empty."
        raise DataProblem(f"No {' or '.join(SUFFIXES)} file in {folder}. {there}")
    twice = [
        f"Case id '{case}' comes from {' and '.join(str(path.relative_to(folder)) for path in paths)} in {folder}."
        for case, paths in sources.items()
        if len(paths) > 1
    ]
    if twice:
        raise DataProblem(numbered("Every file needs a case id of its own; rename them:", twice))
    return {case: paths[0] for case, paths in sources.items()}


def case_id(path: Path) -> str:
    """The file name without suffix and without nnU-Net's ``_0000``.

    >>> case_id(Path("images/liver_01_0000.nii.gz")), case_id(Path("labels/liver_01.nii"))
    ('liver_01', 'liver_01')
    """
    return split_suffix(path)[0].removesuffix("_0000")


def first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def numbered(head: str, problems: Sequence[str]) -> str:
    """One message out of many: the problem itself if it is alone, else the first ten under a heading."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} problems. {head}", *(f"  - {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"  ... and {len(problems) - LISTED} more")
    return "\n".join(lines)


def check_all(items: Iterable[Item], check: Callable[[Item], Result], what: str) -> list[Result]:
    """Run a check on every item under a progress bar, and raise one error that lists the problems of all of them."""
    results, problems = [], []
    for item in tqdm([*items], desc=f"checking {what}", unit="case", disable=None):
        try:
            results.append(check(item))
        except DataProblem as problem:
            problems.append(str(problem))
    if problems:
        raise DataProblem(numbered("Nothing was written.", problems))
    return results


# --- the labels ------------------------------------------------------------------------------------------------------


def declared_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """Labels for dataset.json, background first and in order of their ids.

    Raises:
        DataProblem: ids have gaps (row 24), are used twice, or the ignore label is not the highest (row 25).
    """
    found = {"background": 0, **labels}
    ids = sorted(found.values())
    if found["background"] != 0:
        raise DataProblem(f"background must be 0, found {found['background']}.")
    twice = sorted({value for value in ids if ids.count(value) > 1})
    if twice:
        names = ", ".join(name for name, value in found.items() if value in twice)
        raise DataProblem(f"Label ids must differ, found {twice[0]} for {names}.")
    if "ignore" in found and found["ignore"] != ids[-1]:
        raise DataProblem(f"ignore must be {ids[-1] + 1} (max label {ids[-1]} + 1); found {found['ignore']}.")
    if ids != [*range(len(ids))]:
        wanted = first_names([f"{old} to {new}" for new, old in enumerate(ids) if new != old])
        raise DataProblem(
            f"Label ids have gaps: found {first_names([*map(str, ids)])}, nnU-Net needs 0..{len(ids) - 1}. "
            f"Map {wanted} in the label files, and name them so."
        )
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def organs_of(labels: Mapping[str, int]) -> dict[str, int]:
    """The labels that can be scribbled on: all but background and ignore, in order of their ids."""
    return {name: value for name, value in labels.items() if value != 0 and name != "ignore"}


def labels_from_json(path: Path) -> dict[str, int]:
    """Label names from a dataset.json or from a file like ``{"liver": 1, "spleen": 2}``.

    Raises:
        UsageError: the file is missing or is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    labels = content.get("labels", content) if isinstance(content, dict) else content
    if not isinstance(labels, dict) or not all(type(value) is int for value in labels.values()):
        raise UsageError(f'{path} holds no label names; expected a dataset.json or {{"liver": 1, "spleen": 2}}.')
    return labels


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_dataset(raw: Path, dataset_id: int, name: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``raw/DatasetXXX_Name`` when the block ends without an error.

    Raises:
        UsageError: the id or name is none that nnU-Net takes, or the id is in use and ``overwrite`` is not set.
    """
    remove_stale(raw, dataset_id)
    final = require_free(raw, dataset_id, name, overwrite)
    old = existing_datasets(raw, dataset_id)
    partial = raw / f".{final.name}.partial-{os.getpid()}"
    try:
        (partial / "imagesTr").mkdir(parents=True)
        (partial / "labelsTr").mkdir()
        yield partial
        _swap(partial, final, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(raw: Path, dataset_id: int, name: str, overwrite: bool = False) -> Path:
    """The folder that the data set will be; asked before hours of checking, and again when it is made."""
    final = raw / dataset_folder_name(dataset_id, name)
    old = existing_datasets(raw, dataset_id)
    if old and not overwrite:
        raise UsageError(f"Data set {dataset_id} exists: {', '.join(map(str, old))}. Take another id or --overwrite.")
    return final


def require_outside(raw: Path, dataset_id: int, files: Iterable[Path]) -> None:
    """Input that lies in the data set that is to be replaced would be deleted, and the new one's links lead nowhere.

    Raises:
        UsageError: a file lies in a data set of this id; nothing was deleted.
    """
    old = [folder.resolve() for folder in existing_datasets(raw, dataset_id)]
    for path in files if old else ():
        target = path.resolve()  # a link that leads elsewhere does no harm
        for folder in old:
            if target.is_relative_to(folder):
                raise UsageError(
                    f"{path} lies in {folder}, which --overwrite would delete. Take another id, or move the files out "
                    "of it first."
                )


def dataset_folder_name(dataset_id: int, name: str) -> str:
    if not 1 <= dataset_id <= 999:
        raise UsageError(f"A data set id is a number from 1 to 999, found {dataset_id}.")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"Data set name {name!r} must consist of letters, digits, '_', '-' and '.'.")
    return f"Dataset{dataset_id:03d}_{name}"


def existing_datasets(raw: Path, dataset_id: int) -> list[Path]:
    return sorted(raw.glob(f"Dataset{dataset_id:03d}_*"))


def remove_stale(raw: Path, dataset_id: int) -> None:
    """Clear up after runs on this data set that were killed: half-made folders go, a set-aside data set comes back."""
    for leftover in sorted(raw.glob(f".Dataset{dataset_id:03d}_*.*-*")):
        match = re.fullmatch(r"\.(Dataset\d{3}_.+)\.(partial|replaced)-(\d+)", leftover.name)
        if match is None or is_running(int(match[3])):
            continue
        if match[2] == "replaced" and not existing_datasets(raw, dataset_id):
            os.replace(leftover, raw / match[1])
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether another process of this number lives on this machine, so that what it began is not a leftover."""
    if pid == os.getpid():
        return False  # a process converts one data set at a time, so this is from an earlier one with our number
    if os.name == "nt":
        return True  # os.kill would end the process there; a leftover folder does less harm
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(partial: Path, final: Path, old: Sequence[Path]) -> None:
    """Put the finished folder in place of the old ones, which come back if that fails."""
    aside = {path: path.with_name(f".{path.name}.replaced-{os.getpid()}") for path in old}
    try:
        for path, place in aside.items():
            os.replace(path, place)
        os.replace(partial, final)
    except BaseException:
        for path, place in aside.items():
            if place.exists() and not path.exists():
                os.replace(place, path)
        raise
    for place in aside.values():
        shutil.rmtree(place, ignore_errors=True)


def place_file(source: Path, destination: Path, volume: Volume | None) -> None:
    """Link the source as ``destination``, or write ``volume`` there if it is not what the source holds.

    Args:
        source: the user's file.
        destination: ends in ``.nii.gz``.
        volume: the source as read, with its repairs; None if it was read and needs none.
    """
    if volume is not None and (volume.changes or split_suffix(source)[1] != FILE_ENDING):
        write_like(destination, volume.data, volume)
    else:
        link_or_copy(source.resolve(), destination)


def link_or_copy(source: Path, destination: Path) -> None:
    """A link takes no space; where links are not allowed (some network drives, Windows) the file is copied."""
    try:
        os.symlink(source, destination)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        with written_whole(destination) as temporary:
            shutil.copyfile(destination.parent / source, temporary)


def write_dataset_json(
    folder: Path,
    layout: str,
    channels: Sequence[str],
    labels: Mapping[str, int],
    cases: int,
    source: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> None:
    """dataset.json with what nnU-Net needs, and under ``nnunet_multimodal`` what our trainers need (``own`` too).

    There is no key ``modality``: nnU-Net would take it for the channels.
    """
    content = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": cases,
        "file_ending": FILE_ENDING,
        # The readers of nnU-Net that do not reorient would mix left and right between storage orders.
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        SECTION: {"layout": layout, **(own or {}), "source": dict(source)},
    }
    write_json(folder / "dataset.json", content)


def write_json(path: Path, content: Any) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_repairs(repairs: Repairs) -> dict[str, Any]:
    """The repairs that were asked for, for the record in dataset.json."""
    return {name: value for name, value in asdict(repairs).items() if value not in (None, False)}
