"""Without training: an organ outlined from its scribble on the reference, and copied to where the target is.

What a trained model that is referred to has to beat. The outline comes from a random walker in each scribbled slice,
the copy from the geometry that the files state. Also here: images altered so that such a copy no longer fits (moved
content, other slice grids, a mirrored body). Arrays are [Z, Y, X], slices along Z; affines act on voxels (x, y, z).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from skimage.segmentation import random_walker

from nnunet_multimodal.data.slices import SliceMatch, nearest_scribbled

TIE = 1e-6  # of two equally near voxels the lower one is taken, whatever the last digit of an affine says

# --- outlines --------------------------------------------------------------------------------------------------------


def walk_slice(image: np.ndarray, scribbles: np.ndarray, far: float = 30.0, beta: float = 2000.0) -> np.ndarray:
    """Organs of one slice by random walkers (Grady 2006, scikit-image's solver), one for each scribbled organ.

    Seeds are the organ's scribble against the other organs' scribbles and everything further than ``far`` from the
    organ's own. Edges weigh exp(-beta / 10 (difference of neighbours)^2), grey values standardised in the part of the
    slice that is walked. A pixel goes to the likeliest organ if that is likelier than not.

    Args:
        image: [Y, X].
        scribbles: int [Y, X], 0 none, k organ k.
        far: in pixels; without any pixel so far away and without another scribble, the organ fills the slice.
        beta: how much an edge of the image stops the walker.

    Returns:
        int [Y, X], 0 background, k organ k.

    Example:
        >>> image, scribbles = np.zeros((1, 9)), np.zeros((1, 9), int)
        >>> image[0, 2:5], scribbles[0, 3] = 1, 4
        >>> walk_slice(image, scribbles, far=2).tolist()
        [[0, 0, 4, 4, 4, 0, 0, 0, 0]]
    """
    organs = [int(organ) for organ in np.unique(scribbles) if organ]
    likely = np.full((len(organs) + 1, *image.shape), 0.5)
    likely[1:] = 0
    for row, organ in zip(likely[1:], organs):
        own = scribbles == organ
        near = distance_transform_edt(~own) <= far
        seeds = np.where(own, 1, np.where(near & (scribbles == 0), 0, 2))  # 0: to be found, 2: not the organ
        part = _box(near, margin=1)
        if (seeds[part] == 2).any() and (seeds[part] == 0).any():
            row[part] = _walk(image[part].astype(float), seeds[part], beta)
        else:
            row[seeds < 2] = 1
    return np.array([0, *organs])[likely.argmax(axis=0)]


def _walk(values: np.ndarray, seeds: np.ndarray, beta: float) -> np.ndarray:
    """Probability [Y, X] that a walker meets a seed of value 1 first; seeds 0 are to be found."""
    deviation = values.std()
    if deviation == 0:  # scikit-image would divide by it; without edges every step is as likely
        values, beta = np.arange(values.size, dtype=float).reshape(values.shape), 0.0
    else:
        values = (values - values.mean()) / deviation
    # a direct solver: the parts are small
    return random_walker(values, seeds, beta=beta, mode="bf", return_full_prob=True)[0]


def walk_volume(image: np.ndarray, scribbles: np.ndarray, far: float = 30.0, beta: float = 2000.0) -> np.ndarray:
    """:func:`walk_slice` on every slice [Y, X] that has a scribble, int [Z, Y, X]; the others stay 0."""
    result = np.zeros(scribbles.shape, dtype=int)
    for index in np.flatnonzero(scribbles.any(axis=(1, 2))):
        result[index] = walk_slice(image[index], scribbles[index], far, beta)
    return result


def outlined_where_scribbled(labels: np.ndarray, scribbles: np.ndarray) -> np.ndarray:
    """The label map [Z, Y, X] with each organ kept only on the slices on which it has a scribble."""
    result = np.zeros_like(labels)
    for organ in np.unique(scribbles[scribbles > 0]):
        drawn = (scribbles == organ).any(axis=(1, 2))
        result[drawn] = np.where(labels[drawn] == organ, organ, result[drawn])
    return result


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    places = np.argwhere(mask)
    low, high = places.min(axis=0) - margin, places.max(axis=0) + margin + 1
    return tuple(slice(max(0, int(a)), int(b)) for a, b in zip(low, high))


# --- copies ----------------------------------------------------------------------------------------------------------


def fill_slices(outlines: np.ndarray, scribbles: np.ndarray, reach: float, thickness: float) -> np.ndarray:
    """Every slice shows each organ as its nearest scribbled slice does, by the rule by which ``refer`` serves slices.

    Args:
        outlines: int [Z, Y, X], organs on their scribbled slices.
        scribbles: int [Z, Y, X], which says what those slices are.
        reach: how far beyond an organ's first and last scribbled slice, in mm.
        thickness: distance of neighbouring slices, in mm.
    """
    result = np.zeros_like(outlines)
    order = np.arange(len(outlines))
    for organ in np.unique(scribbles[scribbles > 0]):
        drawn = (scribbles == organ).any(axis=(1, 2))
        serving = nearest_scribbled(SliceMatch(order, "order", order.astype(float)), drawn, reach, thickness)
        copied = (outlines == organ)[serving] & (serving >= 0)[:, None, None]
        result[copied & (result == 0)] = organ
    return result


def copy_by_position(
    data: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: tuple[int, ...], order: int = 0
) -> np.ndarray:
    """What lies at the same place in space, on the target's grid [Z, Y, X]: labels by order 0, images by order 1.

    Half a voxel beyond the outer centres still belongs to the outer voxels; further out a label map has 0 and an image
    goes on as it ended.
    """
    to_source = np.linalg.inv(affine) @ target_affine  # voxels (x, y, z)
    x, y, z = np.ix_(*(np.arange(size) for size in target_shape[::-1]))
    places = [row[0] * x + row[1] * y + row[2] * z + row[3] for row in to_source[:3]]
    return _take(data, [place.transpose(2, 1, 0) for place in reversed(places)], order)


def copy_by_order(
    data: np.ndarray, spacing: tuple[float, ...], target_shape: tuple[int, ...], target_spacing: tuple[float, ...]
) -> np.ndarray:
    """Labels of another patient on the target's grid: slices in relative order, planes centre on centre in true size.

    Args:
        data: int [Z, Y, X].
        spacing, target_spacing: mm along (z, y, x).
        target_shape: (Z, Y, X).
    """
    places = []
    for axis, (size, target_size) in enumerate(zip(data.shape, target_shape)):
        scale = target_spacing[axis] / spacing[axis]
        if axis == 0:  # a single slice goes with the middle one
            scale = (size - 1) / (target_size - 1) if target_size > 1 else 0.0
        places.append((size - 1) / 2 + scale * (np.arange(target_size) - (target_size - 1) / 2))
    return _take(data, list(np.broadcast_arrays(*np.ix_(*places))), order=0)


def _take(data: np.ndarray, places: list[np.ndarray], order: int) -> np.ndarray:
    """Values at places (z, y, x), each an array of the result's shape."""
    if order > 0:
        return map_coordinates(data.astype(np.float32), places, order=order, mode="nearest")
    voxels = [np.ceil(place - 0.5 - TIE).astype(int) for place in places]
    inside = np.logical_and.reduce([(v >= 0) & (v < size) for v, size in zip(voxels, data.shape)])
    found = data[tuple(np.clip(v, 0, size - 1) for v, size in zip(voxels, data.shape))]
    return np.where(inside, found, 0).astype(data.dtype)


# --- altered images --------------------------------------------------------------------------------------------------


def shift_content(data: np.ndarray, offset: tuple[int, int, int], fill: float | None = None) -> np.ndarray:
    """The content moved by whole voxels (z, y, x) against its header, as by a patient who moved between two series.

    Args:
        data: [Z, Y, X].
        offset: content at voxel v is found at v + offset.
        fill: what comes in at the border; None repeats the outer voxels (images), a label map takes 0.
    """
    widths = [(max(0, step), max(0, -step)) for step in offset]
    if fill is None:
        padded = np.pad(data, widths, mode="edge")
    else:
        padded = np.pad(data, widths, mode="constant", constant_values=fill)
    begin = [max(0, -step) for step in offset]
    return padded[tuple(slice(b, b + size) for b, size in zip(begin, data.shape))]


def other_grid(
    affine: np.ndarray,
    shape: tuple[int, ...],
    thickness: float = 1.0,
    offset: float = 0.0,
    degrees: float = 0.0,
    turn_axis: int = 2,
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Another grid over the same body: thicker or thinner slices, begun elsewhere, the stack turned about its centre.

    Args:
        affine, shape: of the grid [Z, Y, X].
        thickness: of the new slices, in old ones.
        offset: where the first new slice lies, in new slices beyond the first old one.
        degrees: by how much the grid is turned.
        turn_axis: about which voxel axis (x, y, z): 2 turns the slices in their plane, 0 tilts them.

    Returns:
        The new affine and shape (Z, Y, X); the new centres lie within the old stack unless the grid is turned.
    """
    count = max(1, int(np.floor((shape[0] - 1) / thickness - offset + TIE)) + 1)
    stretch = np.diag([1.0, 1.0, thickness, 1.0])
    stretch[2, 3] = offset * thickness
    centre = (affine @ [*((np.array(shape[::-1]) - 1) / 2), 1.0])[:3]
    axis = affine[:3, turn_axis] / np.linalg.norm(affine[:3, turn_axis])
    cross = np.cross(np.eye(3), axis)  # Rodrigues: cross @ v is the vector product of axis and v
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    turn[:3, 3] = centre - turn[:3, :3] @ centre
    return turn @ affine @ stretch, (count, shape[1], shape[2])


def mirror(data: np.ndarray, affine: np.ndarray, plane: float) -> tuple[np.ndarray, np.ndarray]:
    """The body mirrored at the sagittal plane x = ``plane`` (mm): what lay at x lies at 2 plane - x.

    Data and affine change together, so every file of a subject, on whatever grid, shows the same mirrored body, and
    the voxel axes keep their directions (a file that runs to the right still does).
    """
    at_plane = np.diag([-1.0, 1.0, 1.0, 1.0])
    at_plane[0, 3] = 2 * plane
    turn_back = np.eye(4)  # the axis that runs most nearly along left-right is counted from its other end
    axis = int(np.argmax(np.abs(affine[0, :3])))
    turn_back[axis, axis], turn_back[axis, 3] = -1, data.shape[2 - axis] - 1
    return np.flip(data, axis=2 - axis), at_plane @ affine @ turn_back


def exchange(labels: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The label map with the values of each pair exchanged."""
    result = labels.copy()
    for first, second in pairs:
        result[labels == first], result[labels == second] = second, first
    return result


def only_middle_slice(scribbles: np.ndarray) -> np.ndarray:
    """Of each organ's scribbled slices only the middle one (of two, the lower)."""
    result = np.zeros_like(scribbles)
    for organ in np.unique(scribbles[scribbles > 0]):
        slices = np.flatnonzero((scribbles == organ).any(axis=(1, 2)))
        middle = slices[(len(slices) - 1) // 2]
        result[middle][scribbles[middle] == organ] = organ
    return result


def exchanged_share(found: np.ndarray, truth: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    """Of the voxels of organs that come in pairs, the share that was given the other one's label; NaN without any."""
    own = np.isin(truth, [label for pair in pairs for label in pair])
    wrong = sum(int(((truth == a) & (found == b)).sum() + ((truth == b) & (found == a)).sum()) for a, b in pairs)
    return wrong / int(own.sum()) if own.any() else float("nan")
