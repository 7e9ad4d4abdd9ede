"""Image and label of one training case, read and checked the same way by every converter."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dataset import FILE_ENDING, CaseFiles, Repairs, first_names, place_file
from nnunet_multimodal.conversion.images import (
    Volume,
    check_label_values,
    check_not_constant,
    compare_geometry,
    read_labels,
    read_volume,
    write_like,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedCase:
    """A case that can be converted."""

    files: CaseFiles
    ids: frozenset[int]  # labels in it, background too
    needs_writing: bool  # something was repaired, or has to be compressed


def check_case(files: CaseFiles, allowed: Iterable[int] | None, repairs: Repairs) -> CheckedCase:
    """Reads a case and makes sure that training can use it; ``allowed`` None takes any ids that may be labels.

    Raises:
        DataProblem: faults.md, rows 11 to 19, 23 and 24.
    """
    return check_volumes(files, *read_case(files, repairs), allowed)


def check_volumes(files: CaseFiles, image: Volume, label: Volume, allowed: Iterable[int] | None) -> CheckedCase:
    """The same for a case that has been read."""
    check_not_constant(image)
    ids = np.unique(label.data)
    check_label_values(label, set(_plausible(ids) if allowed is None else allowed))
    compressed = all(path.name.endswith(FILE_ENDING) for path in (files.image, files.label))
    needs_writing = bool(image.changes or label.changes or not compressed)
    return CheckedCase(files, frozenset(int(value) for value in ids), needs_writing)


def read_case(files: CaseFiles, repairs: Repairs) -> tuple[Volume, Volume]:
    """Image and label on one grid, with the repairs that were allowed."""
    image = read_volume(files.image, repairs.nan_to, repairs.reorthonormalize)
    label = read_labels(files.label, repairs.reorthonormalize)
    label = compare_geometry(image, label, "label", repairs.allow_affine_mismatch, repairs.fix_header)
    return image, label


def place_labels(files: CaseFiles, target: Path, label: Volume, ids: Mapping[int, int]) -> None:
    """The case's labels with other ids, or a link to the file if these are its own already.

    Args:
        files: of the case.
        target: ends in ``.nii.gz``.
        label: as read; all its values are whole numbers from 0 on.
        ids: its id -> the data set's; what is not here becomes background.
    """
    kind = np.uint8 if max(ids.values()) < 256 else np.uint16
    common = np.array([ids.get(value, 0) for value in range(int(label.data.max()) + 1)], dtype=kind)
    mapped = common[label.data.astype(np.intp)]
    if np.array_equal(mapped, label.data):
        place_file(files.label, target, label)
    else:
        write_like(target, mapped, label)


def note_what_is_absent(organs: Mapping[str, int], checked: Sequence[CheckedCase], among: str = "") -> None:
    """Legal but rarely meant: an organ that no case has, a case that has no organ; ``among`` as in "CT "."""
    for name, value in organs.items():
        if not any(value in case.ids for case in checked):
            log.warning("note: no %scase has %s (%d).", among, name, value)
    empty = [case.files.case for case in checked if not case.ids & set(organs.values())]
    if empty:
        log.warning("note: %d %scases have no labelled voxel: %s", len(empty), among, first_names(empty))


def _plausible(ids: np.ndarray) -> frozenset[int]:
    """What may be a label where none is declared: whole numbers from 0 on, but not the 255 of a 0/255 mask."""
    whole = {int(value) for value in ids if value >= 0 and value == np.rint(value)} | {0}
    return frozenset(whole - {255} if whole == {0, 255} else whole)
