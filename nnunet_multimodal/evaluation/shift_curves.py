"""Curves of a study of shifts: Dice against severity, and the one number that a curve comes to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_multimodal.data.shifts import SHIFTS
from nnunet_multimodal.evaluation.summary import ALL_ORGANS

NONE = "none"  # the shift of level 0
LOSS = 0.05  # of Dice


def curve_of(
    rows: Sequence[Mapping[str, Any]], shift: str, scope: str, name: str, organ: str = ALL_ORGANS
) -> list[tuple[float, float | None]]:
    """(severity, mean Dice) from level 0 on; the severity that level 0 has in this shift's unit."""
    here = [row for row in rows if (row["scope"], row["name"], row["organ"]) == (scope, name, organ)]
    start = [(SHIFTS[shift].none, row["dsc_mean"]) for row in here if row["shift"] == NONE]
    return start + [(row["severity"], row["dsc_mean"]) for row in here if row["shift"] == shift]


def severity_at_loss(curve: Sequence[tuple[float, float | None]], loss: float = LOSS) -> float | None:
    """Where a curve has first lost so much of its first value, linearly between two levels; None if it never does.

    Args:
        curve: (severity, Dice) from level 0 on; a Dice of None is left out.
        loss: of Dice.

    Example:
        >>> severity_at_loss([(1.0, 0.90), (1.5, 0.88), (2.0, 0.80), (2.5, 0.86)])  # 0.85 lies 3/8 behind 1.5
        1.6875
    """
    points = [(severity, value) for severity, value in curve if value is not None]
    if not points or curve[0][1] is None:
        return None
    wanted = curve[0][1] - loss
    for (before, higher), (after, lower) in itertools.pairwise(points):
        if lower <= wanted + 1e-9:
            return before + (after - before) * min(1.0, (higher - wanted) / (higher - lower))
    return None
