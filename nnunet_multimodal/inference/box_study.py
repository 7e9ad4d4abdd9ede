"""How well a box has to be drawn: Dice against how far its corners are off (SegEVOLution)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.evaluation.output import plain, write_csv

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

NAME = "box_shift"
COLUMNS = ("case", "organ", "shift", "draw", "dice", "box_alone")


def dice_of(mask: np.ndarray, reference: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool arrays; NaN where both are empty."""
    size = int(mask.sum()) + int(reference.sum())
    return 2 * int((mask & reference).sum()) / size if size else float("nan")


def filled(box: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """bool [*shape], the box [2, 3] as a mask: what one has without any network."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high + 1) for low, high in box.T.tolist())] = True
    return mask


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over cases and draws for each organ and shift, then over organs (organ "mean")."""
    organs = list(dict.fromkeys(row["organ"] for row in rows))
    table = []
    for shift in sorted({row["shift"] for row in rows}):
        of_shift = [row for row in rows if row["shift"] == shift]
        found = []
        for organ in organs:
            own = [row for row in of_shift if row["organ"] == organ]
            if own:
                means = {key: float(np.mean([row[key] for row in own])) for key in ("dice", "box_alone")}
                found.append({"organ": organ, "shift": shift, "boxes": len(own), **means})
        means = {key: float(np.mean([row[key] for row in found])) for key in ("dice", "box_alone")}
        table += [*found, {"organ": "mean", "shift": shift, "boxes": len(of_shift), **means}]
    return table


def write_study(output: Path, how: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Writes box_shift.json, .csv (a row a box) and .png (the curve) into a folder; returns the means."""
    table = summarise(rows)
    write_json(output / f"{NAME}.json", plain({**how, "mean": table, "boxes": list(rows)}))
    write_csv(output / f"{NAME}.csv", COLUMNS, rows)
    with written_whole(output / f"{NAME}.png") as temporary:
        temporary.write_bytes(curve(table))
    return table


def curve(table: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: a line for each organ, and the mean of what the boxes themselves would be as masks."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    shifts = sorted({row["shift"] for row in table})
    places = {shift: place for place, shift in enumerate(shifts)}  # 0, 1, 5, 10, 50: not to scale
    organs = [organ for organ in dict.fromkeys(row["organ"] for row in table) if organ != "mean"]
    for number, organ in enumerate([*organs, "mean"]):
        own = [row for row in table if row["organ"] == organ]
        style = {"color": "black", "linewidth": 2.2} if organ == "mean" else {"color": colormaps["tab10"](number % 10)}
        x = [places[row["shift"]] for row in own]
        axes.plot(x, [row["dice"] for row in own], marker="o", markersize=4, label=organ.replace("$", r"\$"), **style)
        if organ == "mean":
            alone = [row["box_alone"] for row in own]
            axes.plot(x, alone, color="0.5", linestyle=(0, (4, 3)), label="the box alone")
    axes.set_xticks(range(len(shifts)), [str(shift) for shift in shifts])
    axes.set_xlabel("corners off by up to ... voxels, each number by chance")
    axes.set_ylabel("DSC")
    axes.set_ylim(0, 1)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
