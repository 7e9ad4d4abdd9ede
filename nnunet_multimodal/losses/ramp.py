"""How a term of the loss grows in the first steps of training. No torch."""

from __future__ import annotations

import math


def ramp_up(step: float, total: float) -> float:
    """The sigmoid-shaped ramp exp(-5 (1 - t / T)^2): 0.0067 at step 0, 1 from ``total`` on.

    Source: Laine and Aila, Temporal Ensembling (ICLR 2017); PA-Seg and WSL4MIS use it for their regularisers.

    Args:
        step: t, an epoch or an iteration, from 0.
        total: T, in the same unit; 0 means no ramp.

    Raises:
        ValueError: a negative step or total.

    Example:
        >>> [round(ramp_up(step, 4), 3) for step in range(6)]
        [0.007, 0.06, 0.287, 0.732, 1.0, 1.0]
    """
    if step < 0 or total < 0:
        raise ValueError(f"step and total of a ramp must not be negative: found {step} and {total}")
    return 1.0 if step >= total else math.exp(-5 * (1 - step / total) ** 2)
