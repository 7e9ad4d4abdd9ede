"""The pictures of a study of shifts as PNG bytes: Dice against severity, and what the severities look like."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

COLUMNS = 3  # curves side by side

Curve = Sequence[tuple[float, float | None]]


def curves(values: Mapping[str, Mapping[str, Curve]], units: Mapping[str, str], loss: float) -> bytes:
    """One picture for each shift, one line for each modality; dotted where the line began, and 5 points below.

    Args:
        values: shift -> modality -> (severity, mean Dice) from level 0 on.
        units: shift -> unit of its severity.
        loss: of Dice, that is marked.
    """
    columns = min(COLUMNS, len(values))
    rows = math.ceil(len(values) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.9 * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for lines in values.values() for name in lines))
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(names)}
    handles = {}
    for axes, (shift, lines) in zip(places.flat, values.items()):
        for name, curve in lines.items():
            severities = [severity for severity, value in curve if value is not None]
            dice = [value for _, value in curve if value is not None]
            if not dice:
                continue
            (handles[name],) = axes.plot(
                severities, dice, color=colours[name], marker="o", markersize=4, linewidth=1.8, clip_on=False
            )
            axes.axhline(dice[0], color=colours[name], linewidth=0.9, linestyle=(0, (1, 2)))
            axes.axhline(dice[0] - loss, color=colours[name], linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.6)
        axes.set_title(shift, fontsize=10, loc="left")
        axes.set_xlabel(units[shift], fontsize=9)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places.flat[len(values) :]:
        axes.set_axis_off()
    for axes in places[:, 0]:
        axes.set_ylabel("DSC, mean of the organs", fontsize=9)
    if len(handles) > 1:
        figure.legend(
            handles=[*handles.values()], labels=[_plain(name) for name in handles], loc="outside lower center",
            ncols=min(7, len(handles)), frameon=False, fontsize=9,
        )  # fmt: skip
    return _png(figure)


def examples(pictures: Mapping[str, Sequence[tuple[str, np.ndarray]]], aspect: float) -> bytes:
    """A row of slices for each shift, all in the grey levels of the unshifted one.

    Args:
        pictures: shift -> (caption, slice [rows, columns], first row at the bottom), the unshifted one first.
        aspect: height of a voxel over its width.
    """
    first = next(iter(pictures.values()))[0][1]
    low, high = np.percentile(first, (0.5, 99.5))
    columns = max(len(row) for row in pictures.values())
    height = float(np.clip(1.75 * aspect * first.shape[0] / first.shape[1], 0.7, 3.0)) + 0.25
    figure = Figure(figsize=(1.75 * columns, height * len(pictures)), layout="constrained")
    places = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (shift, slices) in zip(places, pictures.items()):
        for axes in row:
            axes.set_axis_off()
        for axes, (caption, picture) in zip(row, slices):
            axes.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-9), origin="lower", aspect=aspect)
            axes.set_title(caption, fontsize=7)
        row[0].set_title(f"{shift}: none", fontsize=8, loc="left")
    return _png(figure)


def _plain(name: str) -> str:
    """matplotlib takes what is between two dollars for a formula."""
    return name.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()
