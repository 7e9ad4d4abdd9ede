"""Scribbles drawn on the label map of a case, background among them: what ``scribbles simulate`` writes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.crossmr import draw_scribbles, drawing_plane
from nnunet_multimodal.conversion.dataset import FILE_ENDING
from nnunet_multimodal.conversion.images import (
    Volume,
    body_mask,
    check_label_values,
    compare_geometry,
    read_labels,
    read_volume,
    write_like,
)
from nnunet_multimodal.conversion.scribble_dataset import Legend
from nnunet_multimodal.data.background import background_scribbles
from nnunet_multimodal.data.scribbles import coverage
from nnunet_multimodal.errors import DataProblem

UNLABELLED = 255  # where nobody drew, in a file with drawn background
BACKGROUND_STREAM = 1  # of random numbers: with or without background, the organs get the same scribbles


@dataclass(frozen=True)
class Drawing:
    """How scribbles are drawn.

    Attributes:
        style: of the strokes, see ``data.scribbles``.
        background: see ``data.background``; "none" leaves it out.
        every: on every n-th slice of an organ.
        seed: the same for the same scribbles.
    """

    style: str = "freeform"
    background: str = "none"
    every: int = 1
    seed: int = 0


def legend_of(drawing: Drawing, classes: Mapping[str, tuple[int, ...]] | None) -> Legend:
    """What the values in the files mean; what no class has is background."""
    unlabelled, background = (0, None) if drawing.background == "none" else (UNLABELLED, 0)
    return Legend(unlabelled, background, classes, unnamed_to_background=True)


def simulate_file(
    path: Path,
    case: str,
    output: Path,
    drawing: Drawing,
    classes: Mapping[str, tuple[int, ...]] | None = None,
    images: Sequence[Path] = (),
    unknown: Sequence[int] = (),
) -> dict[str, float]:
    """Draw on one label map, and write OUTPUT/CASE.nii.gz.

    Args:
        path: the label map.
        case: its name.
        output: an existing folder.
        drawing: how to draw.
        classes: name -> values, drawn as the first of them; None draws all that is there.
        images: background is drawn inside the body in these only; none is everywhere.
        unknown: values that may not be there: nobody knows whether that is background.

    Returns:
        The share of each drawn class, by its value, that is covered; with background, that of "0" as well.

    Raises:
        DataProblem: the file cannot be read, holds what is no label, or none of the classes where no background is
            drawn either; or it has an unknown value.
    """
    volume = read_labels(path)
    values = np.unique(volume.data)
    if there := [value for value in unknown if value in values]:
        raise DataProblem(
            f"{path} has voxels labelled ignore ({there[0]}), of which nobody knows whether they are background. "
            "Scribbles are simulated on label maps that are complete; leave this one out."
        )
    check_label_values(volume, {int(value) for value in values if value >= 0 and value == np.rint(value)} | {0})
    organs = [int(value) for value in values if value > 0]
    wanted = organs if classes is None else [value for of_class in classes.values() for value in of_class]
    if drawing.background == "none" and not set(wanted) & set(organs):
        missing = f", wanted {', '.join(map(str, wanted))}" if wanted else ""
        found = ", ".join(f"{value:g}" for value in values[:10])
        raise DataProblem(f"{path} has nothing to scribble on: found {found}{missing}.")
    if classes is not None:
        volume = replace(volume, data=legend_of(drawing, classes).of_dense(volume.data))
        organs = [of_class[0] for of_class in classes.values()]
    body = None
    for image in map(read_volume, images):
        compare_geometry(image, volume, "label")
        mask = body_mask(image.data)
        body = mask if body is None else body | mask
    drawn = draw_weak_labels(volume, organs, case, drawing, body)
    write_like(output / f"{case}{FILE_ENDING}", drawn, volume)
    shown = organs if drawing.background == "none" else [0, *organs]
    return {str(value): round(share, 4) for value, share in coverage(drawn, volume.data, shown).items()}


def draw_weak_labels(
    label: Volume, classes: Sequence[int], case: str, drawing: Drawing, body: np.ndarray | None = None
) -> np.ndarray:
    """Scribbles of a label map.

    Args:
        label: [Z, Y, X]; what is not of ``classes`` is background.
        classes: the labels to draw.
        case: its name, of which the random numbers depend together with the seed.
        drawing: how to draw.
        body: bool [Z, Y, X], background is drawn inside of it only; None is everywhere.

    Returns:
        uint8 or uint16 [Z, Y, X]: k class k, and 0 elsewhere; with background that is 0, and 255 elsewhere.

    Raises:
        DataProblem: background is to be drawn, but the class numbers reach 255.
    """
    highest = max(classes, default=0)
    if drawing.background != "none" and highest >= UNLABELLED:
        raise DataProblem(f"{label.path} has class {highest}; with background, classes up to {UNLABELLED - 1} can be.")
    drawn = draw_scribbles(label, classes, drawing.seed, case, drawing.every, drawing.style)
    result = drawn.astype(np.uint8 if highest < 256 else np.uint16)
    if drawing.background == "none":
        return result
    axis, scale = drawing_plane(label)
    rng = np.random.default_rng([drawing.seed, zlib.crc32(case.encode()), BACKGROUND_STREAM])
    organs = np.where(np.isin(label.data, classes), label.data, 0)
    slices = np.asarray(np.moveaxis(drawn > 0, axis, 0).any(axis=(1, 2)))
    free = background_scribbles(
        organs, rng, drawing.background, drawing.style, scale, drawing.every, axis, slices, body
    )
    result[(drawn == 0) & ~free] = UNLABELLED
    return result
