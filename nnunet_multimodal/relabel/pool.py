"""The images of a project: found, registered, and looked at again before each use. They stay where they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_multimodal.conversion.dataset import numbered
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.relabel.formats import DICOM, NIFTI, file_hash, is_dicom, split_format, stamp, write_nifti
from nnunet_multimodal.relabel.ledger import Ledger, Row

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Found:
    """An image that a folder holds."""

    name: str
    path: Path
    kind: str


def scan(folder: Path) -> list[Found]:
    """The images of a folder and the folders in it, in order of their names.

    A case is named by its file without ending and without nnU-Net's ``_0000``, a DICOM series by its folder.

    Raises:
        UsageError: there is no such folder.
        DataProblem: it holds no image, or two of one name, or an image of several channels.
    """
    if not folder.is_dir():
        raise UsageError(f"No such folder of images: {folder}")
    found: dict[str, Found] = {}
    problems = []
    for each in _walk(folder):
        if each.name in found:
            problems.append(f"Case '{each.name}' comes from {found[each.name].path} and {each.path}.")
        found.setdefault(each.name, each)
    for name in found:
        channel = _CHANNEL.fullmatch(name)
        if channel and channel[1] in found:
            problems.append(f"{found[name].path} looks like a second channel of {channel[1]}; relabel takes one image.")
    if problems:
        raise DataProblem(numbered("Each image needs a name of its own; rename or move them:", problems))
    if not found:
        raise DataProblem(f"No .nii.gz, .nii, .nrrd, .mha or DICOM series in {folder}.")
    return [found[name] for name in sorted(found)]


def _walk(folder: Path) -> Iterator[Found]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        others = []
        for name in sorted(name for name in names if not name.startswith(".") and name != "DICOMDIR"):
            path = Path(parent, name)
            stem, kind = split_format(path)
            if kind is None:
                others.append(path)
            else:
                yield Found(stem.removesuffix("_0000"), path.resolve(), kind)
        if others and any(is_dicom(path) for path in others[:3]):
            yield Found(Path(parent).resolve().name, Path(parent).resolve(), DICOM)


def register(ledger: Ledger, found: Sequence[Found], traits: Callable[[Found], tuple[str | None, str | None]]) -> int:
    """Enters the images that are not known yet; inside a transaction.

    Args:
        ledger: of the project.
        found: images.
        traits: image -> modality and patient, None where unknown.

    Returns:
        how many were new.

    Raises:
        DataProblem: a known case lies somewhere else now; images cannot change under their names.
    """
    known = {row["name"]: row["image"] for row in ledger.all("SELECT name, image FROM cases")}
    moved = [each for each in found if known.get(each.name, str(each.path)) != str(each.path)]
    if moved:
        problems = [
            f"The name of {each.path} is taken: case '{each.name}' is {known[each.name]}. Rename the new image."
            for each in moved
        ]
        raise DataProblem(numbered("Nothing was changed.", problems))
    new = [each for each in found if each.name not in known]
    ledger.run_many(
        "INSERT INTO cases (name, image, kind, size, mtime_ns, modality, patient) VALUES (?, ?, ?, ?, ?, ?, ?)",
        ((each.name, str(each.path), each.kind, *stamp(each.path, each.kind), *traits(each)) for each in new),
    )
    return len(new)


def pattern_traits(pattern: str | None, modality: str | None) -> Callable[[Found], tuple[str | None, str | None]]:
    """What ``--modality`` or ``--pattern`` says of an image.

    Raises:
        UsageError: the pattern is no regular expression, or has neither of the groups modality and patient.
    """
    if pattern is None:
        return lambda found: (modality, None)
    try:
        searched = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern {pattern!r} is no regular expression: {error}.") from error
    if not searched.groupindex.keys() & {"modality", "patient"}:
        raise UsageError("--pattern needs a group (?P<modality>...) or (?P<patient>...).")

    def traits(found: Found) -> tuple[str | None, str | None]:
        match = searched.search(str(found.path))
        if match is None:
            raise DataProblem(f"--pattern does not match {found.path}. It is searched in the whole path.")
        groups = match.groupdict()
        return groups.get("modality", modality), groups.get("patient")

    return traits


def checked_hash(row: Row) -> tuple[str, tuple[int, int]]:
    """The hash of a case's image and its stamp; read again only if the stamp is not the registered one.

    Raises:
        DataProblem: the image is gone, or is another one than was registered.
    """
    path = Path(row["image"])
    now = stamp(path, row["kind"])
    if row["image_hash"] is not None and now == (row["size"], row["mtime_ns"]):
        return row["image_hash"], now
    found = file_hash(path, row["kind"])
    if row["image_hash"] is not None and found != row["image_hash"]:
        raise DataProblem(
            f"the image of {row['name']}, {path}, was changed since it was first used: predictions and labels belong "
            "to the one before. Put that back, or reject the case and register the new image under another name."
        )
    return found, now


def remember_hash(ledger: Ledger, case_id: int, image_hash: str, seen: tuple[int, int]) -> None:
    """Inside a transaction."""
    ledger.run("UPDATE cases SET image_hash = ?, size = ?, mtime_ns = ? WHERE id = ?", image_hash, *seen, case_id)


def nifti_of(row: Row, image_hash: str, cache: Path) -> Path:
    """The case's image as .nii.gz: itself, or a copy that is made once.

    Raises:
        DataProblem: it cannot be read.
    """
    path = Path(row["image"])
    if row["kind"] == NIFTI and path.name.lower().endswith(".nii.gz"):
        return path
    copy = cache / f"{image_hash}.nii.gz"
    if not copy.exists():
        write_nifti(path, row["kind"], copy)
    return copy
