"""The similarity of two voxels: a sum of Gaussians of their distance and of their difference in brightness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("weight", "sigma_xy", "sigma_intensity")
FAINTEST = -40.0  # an exponent below it counts as this: e^-40 = 4e-18 changes nothing, see pairwise.py


@dataclass(frozen=True)
class Kernel:
    """w exp(-d^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_intensity^2)); where a sigma is None, its term is not."""

    weight: float
    sigma_xy: float | None
    sigma_intensity: float | None

    def of_distance(self, squared: float) -> float:
        """The factor of a squared distance, weight included; 0 where it is too small to matter."""
        exponent = 0.0 if self.sigma_xy is None else -squared / (2 * self.sigma_xy**2)
        return self.weight * math.exp(exponent) if exponent > FAINTEST else 0.0


def read_kernels(kernels: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """Kernels from a list of {"weight": w, "sigma_xy": s, "sigma_intensity": t}, as they stand in a plans file.

    Raises:
        TypeError: not a list of dictionaries.
        ValueError: no kernel, an unknown key, no sigma at all, or a number that is not positive and finite.
    """
    if isinstance(kernels, (str, Mapping)) or not isinstance(kernels, Sequence):
        raise TypeError(f"kernels must be a list of dictionaries: found {kernels!r}")
    if not kernels:
        raise ValueError("kernels is empty: at least one is needed")
    return [_read_kernel(position, kernel) for position, kernel in enumerate(kernels)]


def _read_kernel(position: int, kernel: Mapping[str, Any]) -> Kernel:
    where = f"kernels[{position}]"
    if not isinstance(kernel, Mapping):
        raise TypeError(f"{where} must be a dictionary: found {kernel!r}")
    if unknown := [key for key in kernel if key not in KEYS]:
        raise ValueError(f"{where} has unknown keys {unknown}: known are {list(KEYS)}")
    for key, value in kernel.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} must be a positive, finite number: found {value!r}")
    if "sigma_xy" not in kernel and "sigma_intensity" not in kernel:
        raise ValueError(f"{where} has neither sigma_xy nor sigma_intensity: it would treat all pairs alike")
    return Kernel(kernel.get("weight", 1.0), kernel.get("sigma_xy"), kernel.get("sigma_intensity"))
