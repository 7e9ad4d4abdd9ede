"""Left and right in a label map: what looks exchanged, and which side of the body a piece lies on.

Everything is measured along the patient's left-right axis, as the affine gives it; storage order does not matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cc3d
import numpy as np
from scipy import ndimage

from nnunet_multimodal.data.sides import sided_pairs

Ids = int | Sequence[int]

PIECE = 0.1  # share of an organ from which on a second piece of it is no speck
ALIKE = 3.0  # a left and a right organ differ less than this many times in volume, unless the image cuts one off
CLEARLY = 0.8  # share of a piece's voxels on one side of the midline from which on it lies there
MIDLINE_WORDS = {"spine", "spinal", "vertebra", "vertebrae", "sacrum"}  # organs whose centre is the body's

EXCHANGED, ASTRAY, PIECES, ASYMMETRIC = "exchanged", "astray", "pieces", "asymmetric"


@dataclass(frozen=True)
class SideFinding:
    """Something odd about a left and a right organ.

    Attributes:
        kind: ``exchanged`` (the left one lies to the right of the right one), ``astray`` (a piece lies on the other
            side of the midline), ``pieces`` (an organ of several large pieces) or ``asymmetric`` (one is far larger).
        left, right: the pair's names.
        text: for people.
    """

    kind: str
    left: str
    right: str
    text: str

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json."""
        return asdict(self)


@dataclass(frozen=True)
class Pieces:
    """The connected components (26 neighbours) of an organ.

    Attributes:
        box: where they lie in the label map.
        components: number of the component that each voxel of the box belongs to; 0 for none.
        voxels: [n], of component 1, 2, ...
        centres: [n, 3], mm towards the patient's right, front and head (RAS).
    """

    box: tuple[slice, ...]
    components: np.ndarray
    voxels: np.ndarray
    centres: np.ndarray

    def __len__(self) -> int:
        return len(self.voxels)

    def shares_left_of(self, midline: float, affine: np.ndarray) -> np.ndarray:
        """[n], the share of each one's voxels to the patient's left of the midline (mm)."""
        z, y, x = (np.arange(cut.start, cut.stop) * affine[0, 2 - axis] for axis, cut in enumerate(self.box))
        left = z[:, None, None] + y[:, None] + x + affine[0, 3] < midline
        return np.bincount(self.components[left], minlength=len(self) + 1)[1:] / self.voxels


def check_sides(labels: np.ndarray, label_names: Mapping[str, Ids], affine: np.ndarray) -> list[SideFinding]:
    """What is odd about organs that come in a left and a right.

    Args:
        labels: whole numbers [Z, Y, X].
        label_names: name -> id, or ids of a region; those without a partner of the other side only help to find the
            midline.
        affine: [4, 4], voxel index (x, y, z) to mm, RAS: the first coordinate grows towards the patient's right.

    Returns:
        The findings, pair by pair. A pair of which one is absent has none of ``exchanged`` and ``asymmetric``: it may
        have been taken out, or lie outside the image.

    Example:
        >>> labels = np.zeros((4, 4, 12), int)
        >>> labels[1:3, 1:3, 1:4], labels[1:3, 1:3, 8:11] = 2, 1
        >>> [finding.kind for finding in check_sides(labels, {"left_kidney": 1, "right_kidney": 2}, np.eye(4))]
        ['exchanged']
    """
    findings = []
    found = find_pairs(labels, label_names, affine)
    middle = midline_of(labels, label_names, affine, found)
    for pair in found:
        findings += _check_pair(pair, middle if pair.midline is None else pair.midline, affine)
    return findings


@dataclass(frozen=True)
class Pair:
    """A left and a right organ, as they lie in a label map.

    Attributes:
        names, ids: of the left one, then of the right one.
        pieces: of the left one, then of the right one.
        cut: whether the image ends in one of them.
        midline: mm towards the patient's right, halfway between the two largest pieces of both taken together, whatever
            their labels; None if these are not about alike or do not lie beside each other.
    """

    names: tuple[str, str]
    ids: tuple[tuple[int, ...], tuple[int, ...]]
    pieces: tuple[Pieces, Pieces]
    cut: bool
    midline: float | None


def find_pairs(labels: np.ndarray, label_names: Mapping[str, Ids], affine: np.ndarray) -> list[Pair]:
    """The pairs of which at least one is there; arguments as of ``check_sides``."""
    ids = {name: as_ids(value) for name, value in label_names.items()}
    boxes = _boxes(labels, ids)
    pairs = []
    for left, right in sided_pairs([*label_names]):
        box = _union([boxes[value] for value in ids[left] + ids[right] if value in boxes])
        if box is None:
            continue
        inside = labels[box]
        masks = [np.isin(inside, ids[name]) for name in (left, right)]
        first, second = (_pieces(mask, box, affine) for mask in masks)
        together = _pieces(masks[0] | masks[1], box, affine)
        cut = any(each.start == 0 or each.stop == length for each, length in zip(box, labels.shape))
        pairs.append(Pair((left, right), (ids[left], ids[right]), (first, second), cut, _between(together)))
    return pairs


def midline_of(
    labels: np.ndarray, label_names: Mapping[str, Ids], affine: np.ndarray, pairs: Sequence[Pair]
) -> float | None:
    """Where the body's middle is, in mm towards the patient's right: the median of what the organs say.

    A pair says it if its two largest pieces lie beside each other, whatever their labels; a spine or a sacrum by its
    centre. None if nothing says it: an image may show one half of the body only.
    """
    said = [pair.midline for pair in pairs if pair.midline is not None]
    central = {n: as_ids(v) for n, v in label_names.items() if MIDLINE_WORDS & {*re.findall(r"[a-z]+", n.lower())}}
    boxes = _boxes(labels, central) if central else {}
    for ids in central.values():
        box = _union([boxes[value] for value in ids if value in boxes])
        if box is not None:
            places = np.argwhere(np.isin(labels[box], ids)) + [cut.start for cut in box]
            said.append(float(_towards_right(places, affine).mean()))
    return float(np.median(said)) if said else None


def _check_pair(pair: Pair, midline: float | None, affine: np.ndarray) -> list[SideFinding]:
    left, right = pair.names
    volumes = [int(pieces.voxels.sum()) for pieces in pair.pieces]
    findings = []

    def add(kind: str, text: str) -> None:
        findings.append(SideFinding(kind, left, right, text))

    exchanged = False
    if all(volumes):
        centres = [float(np.average(pieces.centres[:, 0], weights=pieces.voxels)) for pieces in pair.pieces]
        exchanged = centres[0] > centres[1]
        if exchanged:
            add(EXCHANGED, f"{left} lies to the right of {right} (by {centres[0] - centres[1]:.0f} mm)")
    for side, (name, pieces, volume) in enumerate(zip(pair.names, pair.pieces, volumes)):
        large = np.flatnonzero(pieces.voxels >= PIECE * volume)
        large = large[np.argsort(-pieces.voxels[large], kind="stable")]
        percent = [f"{100 * voxels / volume:.0f} %" for voxels in pieces.voxels[large]]
        if midline is not None and not exchanged and volume:
            on_left = pieces.shares_left_of(midline, affine)[large]
            for share, size in zip(on_left if side else 1 - on_left, percent):
                if share >= CLEARLY:
                    add(ASTRAY, f"a piece of {name} ({size}) lies on the patient's {'left' if side else 'right'}")
        if len(large) > 1:
            add(PIECES, f"{name} is in {len(large)} pieces ({', '.join(percent)})")
    if all(volumes) and max(volumes) > ALIKE * min(volumes) and not pair.cut:
        larger, smaller = (left, right) if volumes[0] > volumes[1] else (right, left)
        add(ASYMMETRIC, f"{larger} is {max(volumes) / min(volumes):.1f} times as large as {smaller}")
    return findings


def _between(together: Pieces) -> float | None:
    """Halfway between the two largest pieces, if these are about alike and lie beside each other."""
    if len(together) < 2:
        return None
    first, second = np.argsort(-together.voxels, kind="stable")[:2]
    if together.voxels[first] > ALIKE * together.voxels[second]:
        return None
    x, y, z = together.centres[first] - together.centres[second]
    if abs(x) <= math.hypot(y, z):
        return None
    return float(together.centres[first][0] + together.centres[second][0]) / 2


def _pieces(mask: np.ndarray, box: tuple[slice, ...], affine: np.ndarray) -> Pieces:
    """The connected components of a mask that was cut out of a label map."""
    if not mask.any():
        return Pieces(box, np.zeros(mask.shape, np.uint8), np.zeros(0, int), np.zeros((0, 3)))
    components = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    numbers = cc3d.statistics(components, no_slice_conversion=True)
    centres = numbers["centroids"][1:] + [cut.start for cut in box]
    mm = centres[:, ::-1] @ affine[:3, :3].T + affine[:3, 3]
    return Pieces(box, components, numbers["voxel_counts"][1:].astype(int), mm)


def _boxes(labels: np.ndarray, ids: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[slice, ...]]:
    """The smallest box around each of the ids that is there."""
    wanted = {value for each in ids.values() for value in each}
    whole = labels if labels.dtype.kind in "iu" else labels.astype(np.int32)
    found = ndimage.find_objects(whole, max(wanted, default=0) or 1)
    return {value: found[value - 1] for value in wanted if value > 0 and found[value - 1] is not None}


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...] | None:
    """The smallest box around some; None for none."""
    if not boxes:
        return None
    return tuple(slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in zip(*boxes))


def _towards_right(places: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels [n, 3] (z, y, x) -> mm towards the patient's right."""
    return np.asarray(places[:, ::-1] @ affine[0, :3] + affine[0, 3])


def as_ids(value: Ids) -> tuple[int, ...]:
    """An id, or the ids of a region, as a tuple."""
    return (int(value),) if isinstance(value, (int, np.integer)) else tuple(int(each) for each in value)
