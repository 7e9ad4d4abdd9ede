"""Scribbles drawn by nobody: strokes simulated inside a mask, as a hurried reader would leave them on an organ.

The free-form style follows the stroke generator that SEEM (Zou et al., NeurIPS 2023) trains with, on which CrossMR
builds: a few poly-lines that start somewhere in the organ and wander with a random walk of speed and heading. It is
written here without PIL or OpenCV and works on the bounding box of the mask, because four organs a sample have to fit
into a small part of nnU-Net's augmentation time (benchmarks/scribbles.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt

from nnunet_multimodal.data.contour import contour
from nnunet_multimodal.data.skeleton import skeleton
from nnunet_multimodal.errors import DataProblem, UsageError

REFERENCE_SIZE = 256  # sizes below are pixels of a 256x256 image, as in SEEM and CrossMR; `scale` carries them over
MAX_STROKES = 5
MAX_TURN = 0.5  # radians a stroke may turn from one vertex to the next


@dataclass(frozen=True)
class Pen:
    """How one kind of stroke moves and how thick it is. Intervals are half open, lengths in pixels."""

    vertices: tuple[int, int]
    width: tuple[int, int]
    speed: float  # upper bound, pixels from vertex to vertex
    acceleration: float  # upper bound of the change of speed at a vertex
    shake: float  # upper bound of the displacement of every other vertex
    slip: float  # the finished stroke slips as a whole; twice the standard deviation of how far


PENS = (
    Pen(vertices=(10, 30), width=(3, 10), speed=20, acceleration=15, shake=3, slip=6),  # SEEM's rand_curve
    Pen(vertices=(6, 22), width=(2, 5), speed=12, acceleration=8, shake=1, slip=3),  # SEEM's rand_curve_small
)


def scribble_scale(shape: Sequence[int]) -> float:
    """The scale at which strokes cover an image of this shape (last two axes) about as they cover 256x256.

    >>> scribble_scale((30, 320, 512))
    1.25
    """
    return float(np.clip(min(shape[-2:]) / REFERENCE_SIZE, 0.25, 2.0))


def simulate_scribble(
    mask: np.ndarray, rng: np.random.Generator | int, style: str = "freeform", scale: float = 1.0
) -> np.ndarray:
    """Draw one scribble inside a mask.

    Args:
        mask: [Y, X], or [Z, Y, X]: then every slice with foreground gets a scribble of its own. Foreground is not 0.
        rng: a generator, or a seed for one. The same seed draws the same scribble.
        style: one of ``STYLES``.
        scale: multiplies stroke lengths and widths, which are made for 256x256 pixels; see ``scribble_scale``.

    Returns:
        bool array of the mask's shape, inside the mask, empty only where the mask is empty.

    Raises:
        UsageError: the style is not known, or the scale is not positive.
        DataProblem: the mask is neither 2D nor 3D.
    """
    if style not in STYLES:
        raise UsageError(f"Unknown scribble style '{style}'. Known styles: {', '.join(sorted(STYLES))}.")
    if not scale > 0:
        raise UsageError(f"The scale of a scribble must be above 0, found {scale}.")
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3):
        raise DataProblem(f"A scribble needs a mask of 2 or 3 dimensions, found shape {mask.shape}.")
    mask = mask if mask.dtype == bool else mask != 0
    rng = np.random.default_rng(rng)
    if mask.ndim == 3:
        return np.stack([_on_slice(plane, rng, STYLES[style], scale) for plane in mask]) if len(mask) else mask.copy()
    return _on_slice(mask, rng, STYLES[style], scale)


def simulate_label_scribbles(
    labels: np.ndarray,
    classes: Sequence[int],
    rng: np.random.Generator | int,
    scale: float = 1.0,
    every: int = 1,
    axis: int = 0,
    style: str = "freeform",
) -> np.ndarray:
    """Scribble each organ of a label map, slice by slice.

    Args:
        labels: [Y, X], or a volume that is drawn on in the slices across ``axis``.
        classes: the labels to scribble.
        rng, scale: as in ``simulate_scribble``.
        every: each organ is drawn on every n-th of the slices that hold it, its middle slice always among them.
        style: one of ``STYLES``.

    Returns:
        array of the shape and type of ``labels``: k where organ k is scribbled, 0 elsewhere.
    """
    if every < 1:
        raise UsageError(f"'every' counts slices and must be at least 1, found {every}.")
    rng = np.random.default_rng(rng)
    scribbles = np.zeros_like(labels)
    volume, drawn = (labels[None], scribbles[None]) if labels.ndim == 2 else (labels, scribbles)
    if labels.ndim == 3:
        volume, drawn = np.moveaxis(volume, axis, 0), np.moveaxis(drawn, axis, 0)
    for organ in classes:
        mask = volume == organ
        holding = np.flatnonzero(mask.any(axis=(1, 2)))
        for z in holding[len(holding) // 2 % every :: every]:
            drawn[z][simulate_scribble(mask[z], rng, style, scale)] = organ
    return scribbles


def coverage(scribbles: np.ndarray, labels: np.ndarray, classes: Sequence[int]) -> dict[int, float]:
    """Share of each organ's voxels that its scribble covers; 0 for an organ that is not there.

    >>> coverage(np.array([[1, 0, 2]]), np.array([[1, 1, 2]]), classes=[1, 2, 3])
    {1: 0.5, 2: 1.0, 3: 0.0}
    """
    shares = {}
    for organ in classes:
        inside = labels == organ
        shares[organ] = float(np.mean(scribbles[inside] == organ)) if inside.any() else 0.0
    return shares


def freeform(mask: np.ndarray, rng: np.random.Generator, scale: float = 1.0, pen: Pen | None = None) -> np.ndarray:
    """SEEM's free-form strokes (the file credits Yu et al.) on a mask [Y, X] with foreground; may miss the mask."""
    pen = pen or PENS[rng.integers(len(PENS))]
    inside = np.flatnonzero(mask)
    count = int(rng.integers(1, min(MAX_STROKES, len(inside)) + 1))
    starts = np.stack(np.divmod(inside[rng.integers(len(inside), size=count)], mask.shape[1]), axis=1)
    lengths = rng.integers(*pen.vertices, size=count)
    widths = np.maximum(np.rint(rng.integers(*pen.width, size=count) * scale), 1).astype(int)
    return _draw(mask.shape, _walk(starts, int(lengths.max()), pen, rng, scale), lengths, widths) & mask


# what `simulate_scribble` can draw: (mask of the organ's bounding box, generator, scale) -> scribble, not yet clipped
STYLES: dict[str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]] = {
    "freeform": freeform,
    "skeleton": skeleton,
    "contour": contour,
}


def _on_slice(
    mask: np.ndarray,
    rng: np.random.Generator,
    style: Callable[[np.ndarray, np.random.Generator, float], np.ndarray],
    scale: float,
) -> np.ndarray:
    """One scribble on a mask [Y, X], drawn on its bounding box."""
    scribble = np.zeros_like(mask)
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return scribble
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    drawn = style(mask[box], rng, scale) & mask[box]
    scribble[box] = drawn if drawn.any() else _dab(mask[box])
    return scribble


def _dab(mask: np.ndarray) -> np.ndarray:
    """The pixel deepest inside the mask and its neighbours: what remains when every stroke slipped off the organ."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    deepest = np.zeros_like(mask)
    deepest.flat[depth.argmax()] = True
    return binary_dilation(deepest, mask=mask)


def _walk(starts: np.ndarray, length: int, pen: Pen, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Vertices [strokes, length, 2] of strokes that begin at ``starts`` [strokes, 2]."""
    count = len(starts)
    heading = rng.uniform(0, 2 * np.pi, (count, 1)) + rng.uniform(-MAX_TURN, MAX_TURN, (count, length - 1)).cumsum(1)
    first = rng.uniform(0, pen.speed, count)
    changes = rng.uniform(-pen.acceleration, pen.acceleration, (count, length - 1))
    speed = np.array([_between_walls(v, steps, pen.speed) for v, steps in zip(first.tolist(), changes.tolist())])
    vertices = np.zeros((count, length, 2))
    np.cumsum(speed * np.sin(heading), axis=1, out=vertices[:, 1:, 0])
    np.cumsum(speed * np.cos(heading), axis=1, out=vertices[:, 1:, 1])

    slipped, towards = np.abs(rng.normal(0, pen.slip / 2, count)), rng.uniform(0, 2 * np.pi, count)
    vertices += np.trunc(slipped * [np.cos(towards), np.sin(towards)]).T[:, None]
    shaken = rng.random((count, length, 1)) < 0.5
    vertices += shaken * rng.uniform(-pen.shake, pen.shake, vertices.shape)
    return starts[:, None] + scale * vertices


def _between_walls(value: float, steps: Sequence[float], highest: float) -> list[float]:
    """A random walk that stops at 0 and at ``highest``: no closed form, and so few numbers are for plain Python."""
    walk = []
    for step in steps:
        value += step
        if value < 0:
            value = 0.0
        elif value > highest:
            value = highest
        walk.append(value)
    return walk


def _draw(shape: tuple[int, ...], vertices: np.ndarray, lengths: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Strokes as bool [Y, X]: lines of their width, and a disc of radius width // 2 - 1 on every vertex.

    Args:
        vertices: [strokes, V, 2] in pixels; may lie outside the image.
        lengths: [strokes] how many of the vertices belong to the stroke.
        widths: [strokes] in pixels.
    """
    used = np.arange(vertices.shape[1]) < lengths[:, None]
    stroke, at = np.nonzero(used[:, 1:])
    points = [_fill_lines(vertices[stroke, at], vertices[stroke, at + 1], widths[stroke], shape)]
    radii = widths // 2 - 1
    for radius in set(radii[radii > 0].tolist()):
        centres = np.rint(vertices[(radii == radius)[:, None] & used]).astype(np.intp)
        points.append((centres[:, None] + _disc(radius)).reshape(-1, 2).T)
    y, x = np.concatenate(points, axis=1)
    seen = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    canvas = np.zeros(shape, dtype=bool)
    canvas[y[seen], x[seen]] = True
    return canvas


def _fill_lines(start: np.ndarray, end: np.ndarray, width: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels [2, points] of M straight lines from start [M, 2] to end [M, 2] that are width [M] pixels thick.

    A line goes pixel by pixel along the axis it runs along most; at each it is a short bar across that axis, as long
    as a cut through a slanted line of that width.
    """
    reach = width[:, None]
    near = ((np.maximum(start, end) > -reach) & (np.minimum(start, end) < shape + reach)).all(axis=1)
    start, width, step = start[near], width[near], (end - start)[near]
    steep = np.abs(step[:, 0]) > np.abs(step[:, 1])
    # the columns of `start` and `step` in the order (major axis, minor axis)
    start, step = (np.where(steep[:, None], vectors, vectors[:, ::-1]) for vectors in (start, step))
    along = np.ceil(np.abs(step[:, 0])).astype(np.intp) + 1  # steps of at most a pixel leave no gap
    stride = step / np.maximum(along - 1, 1)[:, None]
    across = np.rint(width * np.hypot(1, stride[:, 1])).astype(np.intp)
    first = start[:, 1] - (across - 1) / 2
    # each line is a small grid of points, `along` x `across`; all grids are numbered through in one flat array
    size = along * across
    line = np.repeat(np.arange(len(size)), size)
    row, column = np.divmod(np.arange(len(line)) - (size.cumsum() - size)[line], across[line])
    major = np.rint(start[line, 0] + row * stride[line, 0]).astype(np.intp)
    minor = np.rint(first[line] + row * stride[line, 1]).astype(np.intp) + column
    flip = steep[line]
    return np.stack([np.where(flip, major, minor), np.where(flip, minor, major)])


@cache
def _disc(radius: int) -> np.ndarray:
    """Offsets [pixels, 2] of a filled disc."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(y**2 + x**2 <= radius**2) - radius
