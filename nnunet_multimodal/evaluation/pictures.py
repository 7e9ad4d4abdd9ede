"""The report's pictures as PNG bytes: box plots, and outlines of prediction and reference on a few slices."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from nnunet_multimodal.conversion.images import Volume

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

SLICES = 4
BOXES_PER_ROW = 28
FEW, MANY = 5, 200  # cases for a box, and for which points can still be told apart
MARGIN_MM = 25.0  # around the labels in the overlays
# Told apart by colour-blind readers too (Okabe and Ito), on a grey image and on white.
REFERENCE, PREDICTION = "#0096e0", "#f08000"


def box_plots(values: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> bytes:
    """Boxes of one metric between 0 and 1 for each organ, one beside the other for each modality.

    Args:
        values: organ -> modality -> values of the cases; every organ has the same modalities.
        title: above the picture; it names the metric and its definition.
    """
    organs = [*values]
    modalities = [*values[organs[0]]]
    per_row = max(1, BOXES_PER_ROW // len(modalities))
    chunks = [organs[start : start + per_row] for start in range(0, len(organs), per_row)]
    longest = max(len(organ) for organ in organs)
    slanted = longest * min(len(organs), per_row) > 90  # names that would run into one another
    height = 2.6 + (0.05 * longest if slanted else 0)
    width = float(np.clip(0.32 * len(modalities) * len(chunks[0]) + 0.25 * len(chunks[0]) + 1.2, 4.5, 11))
    figure = Figure(figsize=(width, height * len(chunks) + 0.7), layout="constrained")
    rows = figure.subplots(len(chunks), 1, squeeze=False)[:, 0]
    colours = {modality: colormaps["tab10"](i % 10) for i, modality in enumerate(modalities)}
    dice = np.random.default_rng(0)  # the jitter of the points: the same in every run
    for axes, chunk in zip(rows, chunks):
        for place, organ in enumerate(chunk):
            for i, modality in enumerate(modalities):
                found = np.asarray(values[organ][modality], dtype=float)
                if len(found):
                    middle = place + ((i + 0.5) / len(modalities) - 0.5) * 0.84
                    _box(axes, middle, found, colours[modality], 0.66 / len(modalities), dice)
        axes.set_xlim(-0.55, max(len(chunk), len(chunks[0])) - 0.45)
        axes.set_ylim(-0.03, 1.03)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(range(len(chunk)), [_plain(name) for name in chunk], fontsize=9, **turned)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].set_title(title, fontsize=10, loc="left")
    if len(modalities) > 1:
        handles = [Patch(facecolor=colours[m], edgecolor=colours[m], alpha=0.5, label=_plain(m)) for m in modalities]
        columns = min(7, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return _png(figure, 130)


def overlay(
    prediction: np.ndarray,
    reference: Volume,
    focus: Sequence[int],
    image: np.ndarray | None,
) -> bytes:
    """Outlines of one organ in prediction and reference on up to four slices across the coarsest axis.

    Args:
        prediction: label map [Z, Y, X] on the reference's grid.
        reference: label map [Z, Y, X] in RAS order.
        focus: the ids of the organ.
        image: [Z, Y, X] on the same grid; None draws on the reference's labels in grey.
    """
    axis = int(np.argmax(reference.spacing))
    rows, columns = (a for a in range(3) if a != axis)
    wanted, found = np.isin(reference.data, focus), np.isin(prediction, focus)
    window = _window((reference.data > 0) | found, reference.spacing, axis)
    places = _spread(np.any(wanted | found, axis=(rows, columns)))
    extent = [(cut.stop - cut.start) * reference.spacing[a] for a, cut in zip((rows, columns), window)]
    height = float(np.clip(2.4 * extent[0] / extent[1], 0.8, 5))
    figure = Figure(figsize=(2.4 * SLICES, height + 0.55), layout="constrained")
    limits = _grey_levels(image, wanted | found) if image is not None else (0.0, 1.0)
    for axes, place in zip(figure.subplots(1, SLICES, squeeze=False)[0], [*places, *[None] * SLICES]):
        axes.set_axis_off()
        if place is None:
            continue

        def cut(array: np.ndarray, place: int = place) -> np.ndarray:
            picture = np.take(array, place, axis=axis)[window]
            return picture[:, ::-1] if columns == 2 else picture  # radiological: the patient's right is on the left

        aspect = reference.spacing[rows] / reference.spacing[columns]
        if image is not None:
            axes.imshow(cut(image), cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower", aspect=aspect)
        else:
            axes.imshow(cut(reference.data) > 0, cmap="gray_r", vmin=0, vmax=5, origin="lower", aspect=aspect)
        for mask, colour, width in ((cut(wanted), REFERENCE, 2.2), (cut(found), PREDICTION, 1.3)):
            if mask.any():
                framed = np.pad(mask, 1).astype(float)  # an outline that ends at the picture's edge is closed there
                y, x = (np.arange(-1, n + 1) for n in mask.shape)
                axes.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=width)
        axes.set_title(f"slice {place + 1} of {reference.data.shape[axis]}", fontsize=8)
    handles = [
        Line2D([], [], color=REFERENCE, linewidth=2.2, label="reference"),
        Line2D([], [], color=PREDICTION, linewidth=1.3, label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _png(figure, 110)


def _box(axes: Any, place: float, found: np.ndarray, colour: Any, width: float, dice: np.random.Generator) -> None:
    """A box, or only the median where a box of few cases would say what is not there; and the cases as points."""
    line = {"color": colour}
    if len(found) >= FEW:
        axes.boxplot(
            found,
            positions=[place],
            widths=width,
            patch_artist=True,
            showfliers=len(found) > MANY,
            manage_ticks=False,
            boxprops={"facecolor": (*colour[:3], 0.25), "edgecolor": colour},
            medianprops={**line, "linewidth": 2},
            flierprops={"marker": ".", "markersize": 3, "markerfacecolor": colour, "markeredgewidth": 0},
            whiskerprops=line,
            capprops=line,
        )
    else:
        axes.hlines(np.median(found), place - width / 2, place + width / 2, colors=[colour], linewidth=2)
    if len(found) <= MANY:
        jitter = dice.uniform(-0.3, 0.3, len(found)) * width
        axes.plot(place + jitter, found, ".", color=colour, markersize=6, markeredgewidth=0, alpha=0.8, clip_on=False)


def _grey_levels(image: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Black and white: the organ's own range and twice as much on either side (CT has far more), within the image's."""
    low, high = (float(value) for value in np.percentile(image, [0.5, 99.5]))
    if inside.any():
        first, last = (float(value) for value in np.percentile(image[inside], [2, 98]))
        room = 2 * max(last - first, 1e-6)
        low, high = max(low, first - room), min(high, last + room)
    return low, max(high, low + 1e-6)


def _window(filled: np.ndarray, spacing: tuple[float, ...], axis: int) -> tuple[slice, slice]:
    """The rows and columns to show: all labels and some room around them."""
    cuts = []
    for other in (a for a in range(3) if a != axis):
        used = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != other)))
        room = round(MARGIN_MM / spacing[other])
        low, high = (used[0], used[-1]) if len(used) else (0, filled.shape[other] - 1)
        cuts.append(slice(max(0, int(low) - room), min(filled.shape[other], int(high) + room + 1)))
    return cuts[0], cuts[1]


def _spread(filled: np.ndarray) -> list[int]:
    """Up to four places, evenly spread over the filled ones; the middle if there are none."""
    places = np.flatnonzero(filled)
    if not len(places):
        return [len(filled) // 2]
    return sorted({int(places[round(i)]) for i in np.linspace(0, len(places) - 1, SLICES + 2)[1:-1]})


def _plain(text: str) -> str:
    """A name as it is: matplotlib takes what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font has not
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
