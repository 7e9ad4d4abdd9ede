"""Corrected masks come back: checked, measured against their proposals, written down, in that order, case by case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_multimodal.conversion.images import Volume, read_volume
from nnunet_multimodal.errors import MultimodalError, UsageError
from nnunet_multimodal.relabel.checks import check_mask
from nnunet_multimodal.relabel.formats import read_mask, split_format
from nnunet_multimodal.relabel.ledger import ACCEPTED, PROPOSED, REJECTED, Row
from nnunet_multimodal.relabel.packages import DOUBT, IMAGE, MASK, batch_folder, untouched
from nnunet_multimodal.relabel.pool import checked_hash, nifti_of, remember_hash
from nnunet_multimodal.relabel.project import Project
from nnunet_multimodal.relabel.store import content_hash

_TAIL = re.compile(r"(.+?)(?:[_-](?:mask|seg|segmentation|label|labels))?", re.IGNORECASE)


@dataclass
class Accepted:
    """What ``accept`` did.

    Attributes:
        accepted: the cases.
        same: cases whose accepted mask is this one already.
        untouched: cases whose package nobody has saved.
        doubtful: case -> what looks wrong; accepted only with ``confirm``.
        failed: case or file -> what is wrong.
        confirmed: case -> doubts that were confirmed.
        remarks: case -> what is odd about it; it was accepted all the same.
    """

    accepted: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    doubtful: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    confirmed: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One mask to enter: what it is, how it differs from its proposal."""

    case_id: int
    mask: str
    details: dict[str, Any]


# --- finding ---------------------------------------------------------------------------------------------------------


def masks_of_batches(project: Project, outcome: Accepted, also_untouched: bool) -> dict[str, Path]:
    """case -> mask, of all packages that are open and that somebody has saved."""
    rows = project.ledger.all(
        "SELECT c.name, p.batch, p.mask AS proposed FROM cases c JOIN proposals p ON p.id = c.proposal "
        "WHERE c.state = ? ORDER BY p.id",
        PROPOSED,
    )
    found = {}
    for row in rows:
        path = batch_folder(project, row["batch"]) / row["name"] / MASK
        if not path.is_file():
            outcome.failed[row["name"]] = (
                f"{path} is gone. Save the corrected mask there, or name its folder: accept DIR."
            )
        elif untouched(project, row["proposed"], path) and not also_untouched:
            outcome.untouched.append(row["name"])
        else:
            found[row["name"]] = path
    return found


def masks_in(folder: Path, known: Iterable[str], outcome: Accepted) -> dict[str, Path]:
    """case -> mask, of all volumes in a folder: ``CASE.nii.gz``, ``CASE_mask.nrrd``, ``CASE/mask.nii.gz``.

    Raises:
        UsageError: there is no such folder, or no mask in it.
    """
    if not folder.is_dir():
        raise UsageError(f"No such folder of masks: {folder}")
    cases = set(known)
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        stem, kind = split_format(path)
        if hidden or kind is None or path.name in (IMAGE, DOUBT):
            continue
        name = _case_of(stem, path, cases)
        if name is None:
            outcome.failed[str(path)] = f"{path} belongs to no case: no image is named {stem}. Name it after its image."
        elif name in found:
            outcome.failed[name] = f"{path} and {found[name]} are both of {name}. Take one away."
        else:
            found[name] = path
    if not found and not outcome.failed:
        raise UsageError(f"{folder} holds no mask (.nii.gz, .nii, .nrrd, .mha).")
    return {name: path for name, path in found.items() if name not in outcome.failed}


def _case_of(stem: str, path: Path, cases: set[str]) -> str | None:
    tail = _TAIL.fullmatch(stem)
    for name in (stem, stem.removesuffix("_0000"), tail[1] if tail else stem):
        if name in cases:
            return name
    return (
        path.parent.name if stem.casefold() in ("mask", "segmentation", "label") and path.parent.name in cases else None
    )


# --- accepting -------------------------------------------------------------------------------------------------------


def accept_masks(
    project: Project,
    masks: Mapping[str, Path],
    who: str,
    outcome: Accepted,
    minutes: Mapping[str, float] | None = None,
    confirm: Iterable[str] = (),
    start: bool = False,
) -> None:
    """Accepts masks case by case: one that is wrong costs its case, one that was accepted stays so whatever comes.

    Args:
        project: open, its lock held.
        masks: case -> file.
        who: corrected them.
        outcome: filled in.
        minutes: case -> of work.
        confirm: cases whose doubts are meant.
        start: they are the labels that the project starts from, corrections of nothing.
    """
    confirmed = set(confirm)
    operation = project.ledger.new_operation()
    for name, path in tqdm(masks.items(), desc="accepting", unit="case", disable=None):
        row = project.ledger.case(name)
        assert row is not None
        try:
            entry = _look(project, row, path, outcome, name in confirmed, (minutes or {}).get(name), start)
        except (MultimodalError, ValueError) as problem:
            outcome.failed[name] = str(problem)
            continue
        if entry is not None:
            enter(project, [entry], who, operation)
            outcome.accepted.append(name)


def _look(
    project: Project, row: Row, path: Path, outcome: Accepted, confirmed: bool, minutes: float | None, start: bool
) -> Entry | None:
    """Checks and stores a mask; None if there is nothing to enter."""
    image_hash, seen = checked_hash(row)
    image = read_volume(nifti_of(row, image_hash, project.images), nan_to=0.0, reorthonormalize=True)
    proposed = None
    if row["proposal"] is not None:
        proposed = project.ledger.value("SELECT mask FROM proposals WHERE id = ?", row["proposal"])
    proposal = None if proposed is None else project.masks.read(proposed).data
    checked = check_mask(read_mask(path), image, project.labels, proposal)
    if row["state"] == ACCEPTED and content_hash(checked.labels, image) == row["mask"]:
        outcome.same.append(row["name"])
        return None
    if checked.doubts and not confirmed:
        outcome.doubtful[row["name"]] = checked.doubts
        return None
    if checked.doubts:
        outcome.confirmed[row["name"]] = checked.doubts
    if checked.remarks:
        outcome.remarks[row["name"]] = checked.remarks
    mask = project.masks.put(checked.labels, image)
    if image_hash != row["image_hash"]:
        with project.ledger.transaction():
            remember_hash(project.ledger, row["id"], image_hash, seen)
    details = {
        "file": str(path),
        "doubts": checked.doubts,
        "remarks": checked.remarks,
        "minutes": minutes,
        "start": start,
    }
    details |= compared(checked.labels, proposal, image, project.organs)
    return Entry(row["id"], mask, details)


def enter(project: Project, entries: Sequence[Entry], who: str, operation: int) -> None:
    """The ledger's part, in one transaction; the masks are in the store already."""
    ledger = project.ledger
    with ledger.transaction():
        for entry in entries:
            proposal = ledger.one(
                "SELECT p.id, p.batch, p.mask, b.model, m.cycle FROM cases c JOIN proposals p ON p.id = c.proposal "
                "JOIN batches b ON b.id = p.batch JOIN models m ON m.id = b.model WHERE c.id = ?",
                entry.case_id,
            )
            source = {} if proposal is None else {key: proposal[key] for key in ("batch", "model", "cycle")}
            changes = {"state": ACCEPTED, "mask": entry.mask, "acceptance": ledger.next_event()}
            ledger.change_case(entry.case_id, changes, "accept", who, operation, {**entry.details, **source})


def compared(
    labels: np.ndarray, proposal: np.ndarray | None, image: Volume, organs: Mapping[str, int]
) -> dict[str, Any]:
    """How much was changed.

    Args:
        labels: accepted, [Z, Y, X].
        proposal: on the same grid; None if there was none.
        image: of the case.
        organs: name -> id.

    Returns:
        ``voxels``: in all organs of the mask, what would have had to be drawn from empty; ``changed``: voxels in which
        mask and proposal differ; ``organs``: name -> ``dsc`` (None where neither has it), ``added``, ``removed``,
        ``voxels``.
    """
    drawn = np.isin(labels, [*organs.values()])
    result: dict[str, Any] = {"voxels": int(drawn.sum()), "voxel_ml": float(np.prod(image.spacing)) / 1000}
    if proposal is None:
        result |= {"changed": None}
    else:
        result |= {"changed": int((labels != proposal).sum())}
    result["organs"] = {}
    for name, value in organs.items():
        now = labels == value
        each: dict[str, Any] = {"voxels": int(now.sum()), "dsc": None}
        if proposal is not None:
            before = proposal == value
            both, size = int((now & before).sum()), int(now.sum()) + int(before.sum())
            each |= {
                "dsc": 2 * both / size if size else None,
                "added": int(now.sum()) - both,
                "removed": int(before.sum()) - both,
            }
        result["organs"][name] = each
    return result


def reject(project: Project, names: Sequence[str], who: str, reason: str) -> list[str]:
    """Takes cases out of pool and training until ``undo``; those that were not out already."""
    ledger = project.ledger
    with project.changing("reject"), ledger.transaction():
        rows = [row for row in ledger.require_cases(names) if row["state"] != REJECTED]
        operation = ledger.new_operation()
        for row in rows:
            changes = {"state": REJECTED, "mask": None, "acceptance": None}
            ledger.change_case(row["id"], changes, "reject", who, operation, {"reason": reason})
    return [row["name"] for row in rows]


def minutes_of(words: Sequence[str], cases: Iterable[str]) -> dict[str, float]:
    """``["12"]`` -> of every case; ``["p1=12", "p2=7.5"]`` -> of these.

    Raises:
        UsageError: a word is neither, or names no case.
    """
    result: dict[str, float] = {}
    known = set(cases)
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"--minutes {word}: expected MINUTES or CASE=MINUTES, 0 or more.")
        if equals and name not in known:
            raise UsageError(f"--minutes {word}: there is no mask of {name} to accept.")
        result |= {name: value} if equals else {case: value for case in known if case not in result}
    return result
