"""Controlled shifts of an image, each of a strength in physical terms: how far can an image leave what was trained on?

The corruptions are those of torchio (Pérez-García et al., TorchIO, 2021), which ROOD-MRI (Boone et al., 2023) uses in
steps of severity for the same question. What is random (a sign, a field, the noise) is drawn once for each case and is
the same at every level, so that along a curve only the strength changes. Arrays are [Z, Y, X] or [C, Z, Y, X] in the
order in which nnU-Net reads them; the grid never changes. Numpy only.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_multimodal.errors import UsageError

ORDER = 3  # of the coil field's polynomial, as torchio's
GHOSTS = 4  # torchio draws 4 to 10; the fewest are the strongest


# --- the corruptions -------------------------------------------------------------------------------------------------


def change_gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """x -> low + (high - low) ((x - low) / (high - low))^exponent, with low and high the image's least and greatest.

    Hounsfield units, which are negative, keep their range; a constant image stays as it is.

    Example:
        >>> change_gamma(np.array([-1000.0, 0.0, 1000.0]), 2.0).tolist()
        [-1000.0, -500.0, 1000.0]
    """
    low, high = float(image.min()), float(image.max())
    if not high > low:
        return image.copy()
    return low + (high - low) * ((image - low) / (high - low)) ** exponent


def add_noise(image: np.ndarray, share: float, noise: np.ndarray) -> np.ndarray:
    """x -> x + share * s * noise, with s the standard deviation of the foreground: the voxels above the image's mean.

    Args:
        image: [Z, Y, X].
        share: of the foreground's standard deviation.
        noise: of the image's shape, drawn from the standard normal distribution.

    Example:
        >>> add_noise(np.array([0.0, 0.0, 4.0, 8.0]), 0.5, np.array([1.0, 0.0, -1.0, 2.0])).tolist()  # s = 2
        [1.0, 0.0, 3.0, 10.0]
    """
    foreground = image[image > image.mean()]
    deviation = float(foreground.std()) if foreground.size else 0.0
    return image + share * deviation * noise


def coil_field(
    shape: Sequence[int], coefficients: np.ndarray, ratio: float, inside: np.ndarray | None = None
) -> np.ndarray:
    """exp of a polynomial of the position, which goes from -1 to 1 along each axis, scaled to a range.

    Args:
        shape: of the image, (Z, Y, X).
        coefficients: [4, 4, 4], of z^i y^j x^k; what does not depend on the position has no effect.
        ratio: brightest over darkest place; the field goes from 1 / sqrt(ratio) to sqrt(ratio).
        inside: bool, of the shape; where it has to go from one to the other (elsewhere it stays between them). None:
            everywhere.

    Example:
        >>> linear = np.zeros((4, 4, 4)); linear[0, 0, 1] = 7
        >>> coil_field((1, 1, 3), linear, 4.0).round(9).tolist()
        [[[0.5, 1.0, 2.0]]]
    """
    z, y, x = (np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape)
    field = np.asarray(np.polynomial.polynomial.polygrid3d(z, y, x, coefficients))
    seen = field if inside is None else field[inside]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    if not high > low:
        return np.ones(shape)
    return np.exp(((field.clip(low, high) - low) / (high - low) - 0.5) * math.log(ratio))


def multiply(image: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Signal, counted from the image's minimum, times a field: the air of a CT stays air."""
    low = float(image.min())
    return low + (image - low) * field


def thicken(image: np.ndarray, factor: float, axis: int) -> np.ndarray:
    """Slices ``factor`` times as thick: each the mean of what it covers, interpolated linearly onto the old grid.

    A voxel that a slice covers in part has that weight; beyond the first and the last slice's middle they are repeated.
    The first slice begins with the volume, so that in a volume of few slices a structure may be hit better or worse.

    Example:
        >>> thicken(np.array([0.0, 2.0, 4.0, 8.0]), 2.0, 0).tolist()  # slices of 1 and 6, middles at 0.5 and 2.5
        [1.0, 2.25, 4.75, 6.0]
    """
    size = image.shape[axis]
    starts = np.arange(0, size - 1e-6, factor)
    edges = np.arange(size)
    covered = np.clip(np.minimum(starts[:, None] + factor, edges + 1) - np.maximum(starts[:, None], edges), 0, None)
    covered /= covered.sum(axis=1, keepdims=True)  # [slices, size]
    middles = starts + factor / 2 - 0.5
    back = np.stack([np.interp(edges, middles, row) for row in np.eye(len(starts))], axis=1)  # [size, slices]
    return np.moveaxis(np.tensordot(back @ covered, image, axes=(1, axis)), 0, axis)


def add_ghosts(image: np.ndarray, share: float, axis: int, ghosts: int = GHOSTS) -> np.ndarray:
    """Periodic motion: every ``ghosts``-th line of k-space along an axis keeps 1 - ghosts * share of itself.

    The line of frequency 0 stays, as torchio's. In the image: copies at every ``1 / ghosts`` of the field of view, each
    of ``share`` of the signal, are taken away, and the mean along the axis stays.

    Example:
        >>> add_ghosts(np.array([8.0, 0, 0, 0, 0, 0, 0, 0]), 0.25, 0).round(9).tolist()
        [7.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    """
    spectrum = np.fft.fft(image, axis=axis)
    lines = np.fft.fftfreq(image.shape[axis], 1 / image.shape[axis]).round().astype(int)
    keep = np.where((lines % ghosts == 0) & (lines != 0), 1 - ghosts * share, 1.0)
    return np.fft.ifft(spectrum * keep.reshape([-1 if a == axis else 1 for a in range(image.ndim)]), axis=axis).real


# --- which there are, and how strong ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """One kind of shift.

    Attributes:
        name: on the command line.
        what: becomes of the image, for people.
        unit: of the severity.
        none: severity that changes nothing, at level 0.
        strongest: severity of the last level.
        geometric: the levels are steps of a factor, else of a difference.
        source: where the operation comes from, and its usual range in training.
        apply: (images [C, Z, Y, X], spacing (z, y, x), severity, generator) -> the images, float64.
    """

    name: str
    what: str
    unit: str
    none: float
    strongest: float
    geometric: bool
    source: str
    apply: Callable[[np.ndarray, Sequence[float], float, np.random.Generator], np.ndarray]

    def severity(self, level: int, levels: int) -> float:
        """Of level 0 (unshifted) to ``levels`` (strongest)."""
        share = level / levels
        if self.geometric:
            return float(self.none * (self.strongest / self.none) ** share)
        return self.none + share * (self.strongest - self.none)


def _gamma(images: np.ndarray, spacing: Sequence[float], severity: float, draw: np.random.Generator) -> np.ndarray:
    exponent = severity if draw.random() < 0.5 else 1 / severity
    return np.stack([change_gamma(image, exponent) for image in images])


def _noise(images: np.ndarray, spacing: Sequence[float], severity: float, draw: np.random.Generator) -> np.ndarray:
    return np.stack([add_noise(image, severity, draw.standard_normal(image.shape)) for image in images])


def _bias(images: np.ndarray, spacing: Sequence[float], severity: float, draw: np.random.Generator) -> np.ndarray:
    coefficients = draw.uniform(-1, 1, (ORDER + 1,) * 3)
    coefficients[np.indices(coefficients.shape).sum(axis=0) > ORDER] = 0
    body = images[0] > images[0].mean()  # a polynomial's extremes lie in corners of the image, which are air
    field = coil_field(images.shape[1:], coefficients, severity, body)
    return np.stack([multiply(image, field) for image in images])


def _resolution(images: np.ndarray, spacing: Sequence[float], severity: float, draw: np.random.Generator) -> np.ndarray:
    axis = slice_axis(images.shape[1:], spacing)
    return np.stack([thicken(image, severity, axis) for image in images])


def _ghosting(images: np.ndarray, spacing: Sequence[float], severity: float, draw: np.random.Generator) -> np.ndarray:
    axis = phase_axis(images.shape[1:], spacing)
    return np.stack([add_ghosts(image, severity / 100, axis) for image in images])


def slice_axis(shape: Sequence[int], spacing: Sequence[float]) -> int:
    """The axis across the slices: of the coarsest spacing, the first of several; never one of a single voxel."""
    long = [axis for axis, size in enumerate(shape) if size > 1] or [0]
    return max(long, key=lambda axis: round(float(spacing[axis]), 3))


def phase_axis(shape: Sequence[int], spacing: Sequence[float]) -> int:
    """The first axis inside the slices (front to back in an axial image), along which phase is usually encoded."""
    long = [axis for axis, size in enumerate(shape) if size > 1] or [0]
    slices = slice_axis(shape, spacing)
    return next(axis for axis in long if axis != slices or len(long) < 3)


SHIFTS = {
    shift.name: shift
    for shift in (
        Shift(
            "gamma", "another intensity curve: x^gamma on the image's range; darker in half of the cases, brighter "
            "(x^(1/gamma)) in the others", "gamma", 1.0, 2.5, True,
            "torchio RandomGamma (trains with 0.74 to 1.35; nnU-Net with 0.7 to 1.5)", _gamma,
        ),
        Shift(
            "noise", "Gaussian noise; sigma as a share of the standard deviation of the foreground (voxels above the "
            "mean)", "sigma / sd", 0.0, 1.0, False, "torchio RandomNoise (trains with up to 0.25)", _noise,
        ),
        Shift(
            "bias", "uneven coil: a smooth field (exp of a cubic polynomial) times the signal above the minimum; its "
            "range is that inside the foreground", "brightest / darkest", 1.0, 9.0, True,
            "torchio RandomBiasField (Van Leemput et al., 1999; Sudre et al., 2017)", _bias,
        ),
        Shift(
            "resolution", "thicker slices: means of so many voxels across the slices (the axis of the coarsest "
            "spacing), interpolated back onto the grid", "times as thick", 1.0, 5.0, False,
            "torchio RandomAnisotropy (Billot et al., 2020; trains with 1.5 to 5)", _resolution,
        ),
        Shift(
            "ghosting", f"periodic motion: {GHOSTS} ghosts along the first axis inside the slices", "% of the signal",
            0.0, 25.0, False, "torchio RandomGhosting (trains with 5 to 25 % in 4 to 10 ghosts)", _ghosting,
        ),
    )
}  # fmt: skip


def parse_shifts(text: str) -> list[str]:
    """``gamma,noise`` -> their names, each once; ``all`` is all of them.

    Raises:
        UsageError: there is no such shift; names the nearest.
    """
    names = [name.strip().casefold() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return [*SHIFTS]
    for name in names:
        if name not in SHIFTS:
            close = difflib.get_close_matches(name, SHIFTS, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(f"--shift: no shift is called '{name}'.{hint} There are: {', '.join(SHIFTS)}; or all.")
    if not names:
        raise UsageError(f"--shift names none. There are: {', '.join(SHIFTS)}; or all.")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Change:
    """What is done to every image of a level.

    Attributes:
        shift: a key of ``SHIFTS``.
        severity: in its unit.
        seed: of what is drawn, together with the shift and the name of the case.
        channels: that are images; the others (scribbles, masks) are left alone.
    """

    shift: str
    severity: float
    seed: int
    channels: tuple[int, ...]

    def __call__(self, images: np.ndarray, spacing: Sequence[float], case: str) -> np.ndarray:
        """images [C, Z, Y, X] of a case -> float32, the same for the same seed and case, whatever the level.

        Channels are of one scan: all get the same curve, field and axis, and noise of their own.
        """
        key = hashlib.sha256(f"{self.seed}/{self.shift}/{case}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(key[:8], "little"))
        result = images.astype(np.float32)
        chosen = list(self.channels)
        changed = SHIFTS[self.shift].apply(images[chosen].astype(np.float64), spacing, self.severity, draw)
        result[chosen] = changed.astype(np.float32)
        return result
