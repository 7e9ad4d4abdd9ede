"""Pictures of a proposal: the slices on which the model is least sure, and the curves of the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from nnunet_multimodal.conversion.images import Volume
from nnunet_multimodal.relabel.colours import colour_of

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

SLICES = 4
APART = 0.08  # of the volume: neighbouring slices show the same doubt


def worst_slices(doubt: np.ndarray, mask: np.ndarray, axis: int, count: int = SLICES) -> list[int]:
    """The slices with most doubt, some way apart, in order; where there is no doubt, those with most of the mask.

    Args:
        doubt: [Z, Y, X], 0 and more.
        mask: [Z, Y, X], labels.
        axis: across which slices are cut.
        count: at most so many.

    Example:
        >>> doubt = np.zeros((20, 2, 2)); doubt[3] = 2; doubt[4] = 1.5; doubt[15] = 1
        >>> worst_slices(doubt, doubt > 9, 0, count=2)
        [3, 15]
    """
    others = tuple(other for other in range(3) if other != axis)
    weight = np.asarray(doubt, dtype=np.float64).sum(axis=others)
    if not weight.any():
        weight = (mask > 0).sum(axis=others).astype(np.float64)
    gap = max(1, round(APART * len(weight)))
    chosen: list[int] = []
    for place in np.argsort(-weight, kind="stable"):
        if len(chosen) < count and weight[place] > 0 and all(abs(place - other) > gap for other in chosen):
            chosen.append(int(place))
    return sorted(chosen) or [len(weight) // 2]


def proposal_picture(image: Volume, mask: np.ndarray, doubt: np.ndarray, organs: Mapping[str, int]) -> bytes:
    """PNG: the worst slices across the coarsest axis with the outlines of the mask, and the doubt in red on them.

    Args:
        image: [Z, Y, X] in RAS order.
        mask: labels on the same grid.
        doubt: 0 to 100 on the same grid.
        organs: name -> id.
    """
    axis = int(np.argmax(image.spacing))
    rows, columns = (other for other in range(3) if other != axis)
    places = worst_slices(doubt, mask, axis)
    data = np.asarray(image.data, dtype=np.float32)
    low, high = (float(value) for value in np.percentile(data, [1, 99.5]))
    height = image.spacing[rows] * data.shape[rows] / (image.spacing[columns] * data.shape[columns])
    figure = Figure(figsize=(2.3 * SLICES, float(np.clip(2.3 * height, 0.8, 4.5)) + 0.25), layout="constrained")
    present = [value for value in organs.values() if (mask == value).any()]
    for axes, place in zip(figure.subplots(1, SLICES, squeeze=False)[0], [*places, *[None] * SLICES]):
        axes.set_axis_off()
        if place is None:
            continue

        def cut(array: np.ndarray, place: int = place) -> np.ndarray:
            picture = np.take(array, place, axis=axis)
            return picture[:, ::-1] if columns == 2 else picture  # radiological: the patient's right is on the left

        aspect = image.spacing[rows] / image.spacing[columns]
        axes.imshow(cut(data), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
        shown = np.ma.masked_less(cut(doubt).astype(np.float32), 5)
        axes.imshow(shown, cmap="autumn_r", vmin=0, vmax=100, alpha=0.45, origin="lower", aspect=aspect)
        for value in present:
            where = cut(mask) == value
            if where.any():
                framed = np.pad(where, 1).astype(float)  # an outline that ends at the picture's edge is closed there
                y, x = (np.arange(-1, n + 1) for n in where.shape)
                axes.contour(
                    x, y, framed, levels=[0.5], colors=[[part / 255 for part in colour_of(value)]], linewidths=1.4
                )
        axes.set_title(f"slice {place + 1} of {data.shape[axis]}", fontsize=8)
    return _png(figure)


def curve(values: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, share: bool = True) -> bytes:
    """PNG of lines with a point for each pair.

    Args:
        values: name of the line -> (x, y); the first line is drawn thick.
        across, up: names of the axes.
        share: y lies between 0 and 1.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(values.items()):
        x, y = [point[0] for point in points], [point[1] for point in points]
        style = {"color": "black", "linewidth": 2.4} if number == 0 else {"color": colormaps["tab20"](number % 20)}
        axes.plot(x, y, marker="o", markersize=5 if number == 0 else 3.5, label=name.replace("$", r"\$"), **style)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if share:
        lowest = min((y for points in values.values() for _, y in points), default=0.0)
        axes.set_ylim(min(0.0, lowest) if lowest < 0.5 else 0.5, 1.0)
    else:
        axes.set_ylim(bottom=0)
    _whole_cycles(axes, [x for points in values.values() for x, _ in points])
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=1 + len(values) // 12, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def efforts(of_cycles: Mapping[int, Sequence[float]], up: str, marks: Mapping[int, float] | None = None) -> bytes:
    """PNG: a point for each case over its cycle, and the median as a line.

    Args:
        of_cycles: cycle -> value of each case.
        up: name of the axis.
        marks: cycle -> value drawn as a second line (what it would have been otherwise).
    """
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    dice = np.random.default_rng(0)
    for cycle, values in of_cycles.items():
        axes.plot(cycle + dice.uniform(-0.15, 0.15, len(values)), values, ".", color="#f08000", alpha=0.7, markersize=6)
        axes.hlines(float(np.median(values)), cycle - 0.28, cycle + 0.28, colors="black", linewidth=2)
    handles = [
        Line2D([], [], color="#f08000", marker=".", linestyle="", label="a case"),
        Line2D([], [], color="black", linewidth=2, label="median"),
    ]
    if marks:
        for cycle, value in marks.items():
            axes.hlines(value, cycle - 0.28, cycle + 0.28, colors="#0096e0", linewidth=2, linestyles="dashed")
        handles.append(Line2D([], [], color="#0096e0", linestyle="dashed", label="median from empty"))
    axes.set_xlabel("cycle of the model that proposed")
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    _whole_cycles(axes, [*of_cycles])
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def _whole_cycles(axes: Any, cycles: Sequence[float]) -> None:
    """Ticks at whole numbers, also where there is one cycle only."""
    axes.set_xlim(min(cycles) - 0.5, max(cycles) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
