"""From a subject to an image: a scan of one contrast on its own grid, with what scanners and patients do to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnunet_multimodal.data.phantom.anatomy import Anatomy
from nnunet_multimodal.data.phantom.shapes import rotation, spline_field
from nnunet_multimodal.data.phantom.signal import Contrast, tissue_signal
from nnunet_multimodal.data.phantom.tissues import NAMES, Tissue

SUBSLICES = 3  # a thick slice is the mean of so many: partial volume


@dataclass(frozen=True)
class Position:
    """Where the patient lies in one session, and how that session's slices are laid.

    Attributes:
        turn: rotation matrix [3, 3] from the scanner's to the body's coordinates.
        shift: mm; the body's point at the scanner's origin.
        bend: mm, control points [3, 4, 4, 4] of a smooth deformation (breath-hold, bowel).
        offset: mm by which the grid is moved.
    """

    turn: np.ndarray
    shift: np.ndarray
    bend: np.ndarray
    offset: np.ndarray


def draw_position(rng: np.random.Generator, motion: float, spacing: Sequence[float]) -> Position:
    """A session's position; motion 1 is about 3 mm in plane, 4 mm along the body, 1 degree, and 1.5 mm of bending."""
    return Position(
        turn=rotation(motion * rng.normal(0, (0.7, 0.7, 1.2))),
        shift=motion * rng.normal(0, (3.0, 2.0, 4.0)),
        bend=motion * 1.5 * rng.standard_normal((3, 4, 4, 4)),
        offset=rng.uniform(-0.5, 0.5, 3) * np.asarray(spacing),
    )


def acquire(
    anatomy: Anatomy,
    contrast: Contrast,
    position: Position,
    tissues: dict[str, Tissue],
    extent: Sequence[float],
    spacing: Sequence[float],
    rng: np.random.Generator,
    noise: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scan a subject.

    Args:
        anatomy: the subject.
        contrast: the sequence.
        position: of the session.
        tissues: this subject's.
        extent, spacing: mm of the field of view and of the phantom's voxels; the contrast scales the latter.
        rng: of coil, noise and scaling.
        noise: 1 the contrast's own, 0 none.

    Returns:
        image int16 [X, Y, Z] (CT in HU), organ numbers uint8 [X, Y, Z], affine [4, 4] to RAS+ mm.
    """
    voxel = np.asarray(spacing, float) * (contrast.pixel, contrast.pixel, contrast.thickness)
    shape = np.maximum(1, np.floor(np.asarray(extent) / voxel + 1e-6).astype(int))
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = position.offset - (shape - 1) * voxel / 2

    where = _sample_points(anatomy, position, contrast, rng, shape, voxel, affine)
    fine = _signal_map(anatomy, contrast, tissues)
    air = tissues["air"].hu if contrast.sequence == "ct" else 0.0  # beyond what was drawn
    sampled = ndimage.map_coordinates(fine, where, order=1, mode="constant", cval=air, prefilter=False)
    signal = sampled.reshape(*shape[:2], shape[2], SUBSLICES).mean(-1)
    organs = ndimage.map_coordinates(anatomy.organ, where, order=0, mode="constant", cval=0, prefilter=False)
    organs = _majority(organs.reshape(*shape[:2], shape[2], SUBSLICES))

    if contrast.sequence == "ct":
        image = signal + _blurred_noise(rng, signal.shape, noise * contrast.snr)
        image = np.clip(image, -1024, 3000)
    else:
        image = _magnitude(np.abs(signal), contrast, rng, noise)
    return np.round(image).astype(np.int16), organs, affine


def _sample_points(
    anatomy: Anatomy, position: Position, contrast: Contrast, rng: np.random.Generator,
    shape: np.ndarray, voxel: np.ndarray, affine: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Where in the anatomy's voxels each sub-slice's voxel lies: float32 [3, X * Y * Z * SUBSLICES]."""
    count = (int(shape[0]), int(shape[1]), int(shape[2]) * SUBSLICES)
    along = (np.arange(count[2]) - (SUBSLICES - 1) / 2) / SUBSLICES
    axes = [np.arange(count[0]), np.arange(count[1]), along]
    scanner = [(affine[k, 3] + voxel[k] * a).astype(np.float32) for k, a in enumerate(axes)]
    x, y, z = np.meshgrid(*scanner, indexing="ij", sparse=True)
    turn = position.turn.astype(np.float32)
    where = np.empty((3, *count), np.float32)
    for k in range(3):
        bend = _spread(position.bend[k], count)
        where[k] = turn[k, 0] * x + turn[k, 1] * y + turn[k, 2] * z + np.float32(position.shift[k]) + bend
    if contrast.warp:
        where[1] += contrast.warp * spline_field(rng, count, (3, 3, 2))
    for k in range(3):
        where[k] = (where[k] - anatomy.origin[k]) / anatomy.spacing[k]
    return where.reshape(3, -1)


def _spread(control: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Control points linearly spread over a grid."""
    result = control.astype(np.float32)
    for axis, size in enumerate(shape):
        at = np.linspace(0, control.shape[axis] - 1, size, dtype=np.float32)
        low = np.minimum(at.astype(int), control.shape[axis] - 2)
        part = (at - low).reshape([-1 if k == axis else 1 for k in range(3)])
        result = np.take(result, low, axis) * (1 - part) + np.take(result, low + 1, axis) * part
    return result


def _signal_map(anatomy: Anatomy, contrast: Contrast, tissues: dict[str, Tissue]) -> np.ndarray:
    """Signal of each voxel of the anatomy: its tissue's, and uneven; float32."""
    base = np.array([tissue_signal(tissues[name], tissues["fat"], contrast) for name in NAMES], np.float32)
    scale = 200 if contrast.sequence == "ct" else base  # HU have no zero that unevenness could be relative to
    spread = scale * np.array([tissues[name].texture for name in NAMES], np.float32)
    return base[anatomy.tissue] + spread[anatomy.tissue] * anatomy.texture


def _majority(organs: np.ndarray) -> np.ndarray:
    """The organ that most sub-slices have, [..., SUBSLICES] -> [...]; in a tie the first of them."""
    best = organs[..., 0].copy()
    votes = (organs == best[..., None]).sum(-1)
    for k in range(1, organs.shape[-1]):
        other = (organs == organs[..., k : k + 1]).sum(-1)
        best = np.where(other > votes, organs[..., k], best)
        votes = np.maximum(votes, other)
    return best.astype(np.uint8)


def _magnitude(signal: np.ndarray, contrast: Contrast, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Coil sensitivity, Rician noise, and the arbitrary scale of an MR image."""
    coil = np.exp(0.16 * np.clip(spline_field(rng, signal.shape, (2, 2, 1)), -2.5, 2.5))
    signal = signal * coil
    bright = float(np.percentile(signal[signal > 0.1 * signal.max()], 90)) if signal.max() > 0 else 1.0
    sigma = noise * bright / contrast.snr
    real = signal + sigma * rng.standard_normal(signal.shape, np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, np.float32)
    return np.hypot(real, imaginary) * (rng.uniform(300, 900) / bright)


def _blurred_noise(rng: np.random.Generator, shape: tuple[int, ...], sd: float) -> np.ndarray:
    """CT noise: neighbouring pixels vary together, as the reconstruction kernel makes them."""
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (0.7, 0.7, 0))
    return grain * np.float32(sd / max(float(grain.std()), 1e-6))
