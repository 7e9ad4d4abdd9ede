"""A picture of what was referred to and what was found."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from nnunet_multimodal.conversion.images import Volume

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

COLUMNS = 4


def write_overlay(
    path: Path,
    reference: Volume,
    scribbles: np.ndarray,
    target: Volume,
    segmentation: np.ndarray,
    organs: dict[str, int],
    slice_axis: int,
    served: np.ndarray | None = None,
) -> None:
    """Reference slices with their scribbles above the target slices with the outlines found, as PNG.

    Args:
        path: file to write.
        reference, target: images as read, [Z, Y, X] in RAS order.
        scribbles, segmentation: label maps on their grids.
        organs: name -> label.
        slice_axis: axis of [Z, Y, X] to cut along.
        served: int [K, n_target], the reference slice that answered (2d); without it slices are matched by order.
    """
    shown = spread(_filled(segmentation, slice_axis), target.data.shape[slice_axis])
    height = max(_height(reference, slice_axis), _height(target, slice_axis))  # of a picture 3 inches wide
    figure = Figure(figsize=(3 * len(shown), 2 * (height + 0.3) + 0.4), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, len(shown), squeeze=False))
    scribbled = np.flatnonzero(_filled(scribbles, slice_axis))
    for column, place in enumerate(shown):
        if served is not None and (served[:, place] >= 0).any():
            at = int(np.bincount(served[:, place][served[:, place] >= 0]).argmax())
        else:
            wanted = place * (reference.data.shape[slice_axis] - 1) / max(1, target.data.shape[slice_axis] - 1)
            at = int(scribbled[np.abs(scribbled - wanted).argmin()]) if len(scribbled) else round(wanted)
        _draw(axes[0, column], reference, scribbles, at, slice_axis, organs, filled=True)
        axes[0, column].set_title(f"reference, slice {at}", fontsize=9)
        _draw(axes[1, column], target, segmentation, place, slice_axis, organs, filled=False)
        axes[1, column].set_title(f"target, slice {place}", fontsize=9)
    handles = [
        matplotlib.lines.Line2D([], [], color=colour(label), linewidth=3, label=name) for name, label in organs.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=100)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def spread(filled: np.ndarray, length: int) -> list[int]:
    """Up to four slices, evenly spread over those with something in them; the middle one if there are none."""
    places = np.flatnonzero(filled)
    if not len(places):
        return [length // 2]
    return sorted({int(places[round(i)]) for i in np.linspace(0, len(places) - 1, COLUMNS + 2)[1:-1]})


def colour(label: int) -> tuple[float, float, float, float]:
    """The same colour for the same label in every picture."""
    return colormaps["tab20"](2 * (label - 1) % 19)


def _height(volume: Volume, axis: int) -> float:
    rows, columns = (a for a in range(3) if a != axis)
    extent = [length * spacing for length, spacing in zip(volume.data.shape, volume.spacing)]
    return float(np.clip(3 * extent[rows] / extent[columns], 1, 9))


def _filled(labels: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray((labels > 0).any(axis=tuple(a for a in range(3) if a != axis)))


def _draw(axes, volume: Volume, labels: np.ndarray, place: int, axis: int, organs: dict[str, int], filled: bool):
    """One slice in radiological view: the patient's right is on the left, anterior or superior is up."""
    image, marks = (np.take(a, place, axis=axis) for a in (volume.data, labels))
    rows, columns = (a for a in range(3) if a != axis)
    if columns == 2:  # the columns run from left to right of the patient (RAS): turn them round
        image, marks = image[:, ::-1], marks[:, ::-1]
    low, high = np.percentile(image, [0.5, 99.5])
    aspect = volume.spacing[rows] / volume.spacing[columns]
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
    for label in organs.values():
        mask = marks == label
        if not mask.any():
            continue
        if filled:
            layer = np.zeros((*mask.shape, 4))
            layer[mask] = colour(label)
            axes.imshow(layer, origin="lower", aspect=aspect, interpolation="nearest")
        else:
            axes.contour(mask, levels=[0.5], colors=[colour(label)], linewidths=1.2)
    axes.set_axis_off()
