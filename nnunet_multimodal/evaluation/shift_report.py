"""shift.html: the curves, their tables and examples in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

from nnunet_multimodal.conversion.dataset import first_names
from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.data.shifts import SHIFTS, Change, slice_axis
from nnunet_multimodal.evaluation.report import embed, environment
from nnunet_multimodal.evaluation.shift_curves import LOSS, curve_of
from nnunet_multimodal.evaluation.summary import ALL_CASES, ALL_ORGANS
from nnunet_multimodal.evaluation.terminal import aligned


@dataclass(frozen=True)
class Example:
    """An image to show the shifts on.

    Attributes:
        case: its name.
        images: [C, Z, Y, X], as read.
        spacing: (z, y, x).
        seed, channels: of ``Change``.
        affine: [4, 4], voxel (x, y, z) to mm in RAS; None for a picture without a place.
    """

    case: str
    images: np.ndarray
    spacing: Sequence[float]
    seed: int
    channels: tuple[int, ...]
    affine: np.ndarray | None = None


def write_report(path: Path, content: Mapping[str, Any], example: Example | None = None) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: the HTML file.
        content: of shift.json; names in it come from files and are escaped.
        example: an image to show the shifts on.
    """
    from nnunet_multimodal.evaluation.shift_pictures import curves, examples

    scopes = scopes_of(content)
    shifts = content["settings"]["shifts"]
    lines = {shift: {name: curve_of(content["rows"], shift, scope, name) for scope, name in scopes} for shift in shifts}
    page = environment().get_template("shift.html.jinja").render(
        content=content,
        scopes=scopes,
        all_organs=ALL_ORGANS,
        curves=embed(curves(lines, {shift: SHIFTS[shift].unit for shift in shifts}, LOSS)),
        tables=tables(content),
        lost=lost_by_place(content),
        example=None if example is None else embed(examples(*example_slices(content, example))),
        case=None if example is None else example.case,
    )  # fmt: skip
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def scopes_of(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(scope, name) of the lines: each modality; all cases where there is only one, or none is known."""
    names = content["modalities"]
    return [("modality", name) for name in names] if len(names) > 1 else [("all", ALL_CASES)]


def lost_by_place(content: Mapping[str, Any]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """(shift, modality or all cases, organ) -> row of ``lost_5_points``."""
    return {(row["shift"], row["name"], row["organ"]): row for row in content["lost_5_points"]}


def tables(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """shift -> ``severities`` from level 0 on, and ``rows``: (modality or all cases, organ) -> Dice at each."""
    organs = [ALL_ORGANS, *content["settings"]["labels"]]
    result = {}
    for shift in content["settings"]["shifts"]:
        rows = {
            (name, organ): curve_of(content["rows"], shift, scope, name, organ)
            for scope, name in scopes_of(content)
            for organ in organs
        }
        result[shift] = {
            "severities": [severity for severity, _ in next(iter(rows.values()))],
            "rows": {place: [dice for _, dice in curve] for place, curve in rows.items()},
        }
    return result


def example_slices(
    content: Mapping[str, Any], example: Example
) -> tuple[dict[str, list[tuple[str, np.ndarray]]], float]:
    """shift -> (severity, the middle slice of the first image) of each level; height of its voxels over their width."""
    turn = np.array([[0, 1], [1, 1], [2, 1]], float)  # of (x, y, z): nnU-Net's readers leave arrays as they are stored
    if example.affine is not None and not np.isnan(stored := io_orientation(example.affine)).any():
        turn = stored
    channel = example.channels[0]
    shape = apply_orientation(example.images[channel].T, turn).T.shape
    spacing = [example.spacing[2 - int(np.flatnonzero(turn[:, 0] == 2 - axis)[0])] for axis in range(3)]
    axis = next((axis for axis, size in enumerate(shape) if size == 1), slice_axis(shape, spacing))

    rows, columns = (a for a in range(3) if a != axis)

    def cut(images: np.ndarray) -> np.ndarray:
        upright = apply_orientation(images[channel].T, turn).T
        picture = np.asarray(np.take(upright, shape[axis] // 2, axis=axis))
        return picture[:, ::-1] if columns == 2 else picture  # radiological: the patient's right is on the left

    found = {}
    for shift, table in tables(content).items():
        pictures = [("", cut(example.images))]
        for severity in table["severities"][1:]:
            changed = Change(shift, severity, example.seed, example.channels)(
                example.images, example.spacing, example.case
            )
            pictures.append((f"{severity:.3g}", cut(changed)))
        found[shift] = pictures
    return found, float(spacing[rows] / spacing[columns])


def describe(content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The table for the terminal (a line for each shift and modality, levels across), and lines about problems."""
    lost = lost_by_place(content)
    levels = content["settings"]["levels"]
    lines = [["DSC", "", "none", *(f"level {number}" for number in range(1, levels + 1)), "5 points lost at"]]
    for shift, table in tables(content).items():
        for (name, organ), dice in table["rows"].items():
            if organ != ALL_ORGANS:
                continue
            row = lost[(shift, name, organ)]
            at = f"not up to {row['strongest']:.3g}" if row["severity"] is None else f"{row['severity']:.3g}"
            values = ["-" if value is None else f"{value:.3f}" for value in dice]
            lines.append([shift, name, *values, f"{at} {row['unit']}"])
    problems = [f"left out: {problem}" for problem in content["left_out"].values()]
    problems += [
        f"{key}, counted as missed: {problem}" for key, cases in content["failed"].items() for problem in cases.values()
    ]
    for what, names in (
        ("images without a reference", content["without_reference"]),
        ("references without an image", content["without_image"]),
    ):
        if names:
            problems.append(f"{what}, in no curve ({len(names)}): {first_names(names)}")
    head = f"{content['cases']} cases, mean of the organs' means"
    return "\n".join([head, *(line.rstrip() for line in aligned(lines))]), problems
