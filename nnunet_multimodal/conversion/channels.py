"""A scribbled reference becomes extra channels of the target, so that the stock ``nnUNetv2_predict`` can be used.

Everything is brought onto the target's grid. In 2d a target slice gets one whole reference slice, the scribbled one
that serves most organs and lies nearest, moved only within its plane; in 3d the reference is resampled where it lies.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates
from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import FILE_ENDING, Repairs, case_id, check_all, numbered, place_file
from nnunet_multimodal.conversion.images import (
    Volume,
    check_not_constant,
    check_scribbles,
    read_labels,
    read_volume,
    write_like,
)
from nnunet_multimodal.data.slices import SliceMatch, match_slices, nearest_scribbled
from nnunet_multimodal.errors import DataProblem, UsageError

log = logging.getLogger(__name__)


def prepare_channels(
    reference: Path,
    scribbles: Path,
    targets: Sequence[Path],
    organs: Mapping[str, int],
    output: Path,
    configuration_dims: int = 2,
    reach: float = 0.0,
    repairs: Repairs = Repairs(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    slice_axis: int | None = None,
) -> list[Path]:
    """Write ``CASE_0000`` (target), ``CASE_0001`` (reference) and ``CASE_0002``... (a scribble per organ).

    Args:
        reference: the scribbled image.
        scribbles: label map on its grid, 0 none, k organ k.
        targets: images to segment; the case is named after the file.
        organs: organ to id, 1..K, as the data set of the model has them.
        output: folder, made if it is missing.
        configuration_dims: 2 or 3, as the configuration of the model.
        reach: in 2d, how far beyond the first and last scribbled slice the nearest one serves, in mm.
        repairs: what may be put right in the input.
        overwrite: replace files of the same name in ``output``.
        slice_axis: of [Z, Y, X], along which the 2d model takes its slices (the plans' ``transpose_forward[0]``);
            None: the coarsest axis of the reference.

    Returns:
        The files of all cases, K + 2 each.

    Raises:
        UsageError: files are in the way, or the configuration is neither 2 nor 3.
        DataProblem: an input cannot be used; nothing was written.
    """
    if configuration_dims not in (2, 3):
        raise UsageError(f"A configuration has 2 or 3 dimensions, found {configuration_dims}.")
    cases = _name_cases(targets)
    names = {case: _channel_names(case, len(organs)) for case in cases}
    in_the_way = [name for files in names.values() for name in files if os.path.lexists(output / name)]
    if in_the_way and not overwrite:
        raise UsageError(f"{output} already holds {in_the_way[0]}. Take another folder, or pass --overwrite.")
    image, drawn = _read_reference(reference, scribbles, organs, repairs)

    def prepare(path: Path) -> _Channels:
        return _resample(image, drawn, _read_image(path, repairs), organs, configuration_dims, reach, slice_axis)

    # First pass: every target is read and tried, so that a bad one stops us before anything is written.
    check_all(cases.values(), prepare, "targets")
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for case, path in tqdm(cases.items(), desc=f"writing {output.name}", unit="case", disable=None):
        _write_case(output, names[case], prepare(path))
        written += [output / name for name in names[case]]
    return written


def _name_cases(targets: Sequence[Path]) -> dict[str, Path]:
    sources: dict[str, list[Path]] = {}
    for path in targets:
        sources.setdefault(case_id(path), []).append(path)
    twice = [
        f"Case id '{case}' comes from {' and '.join(map(str, paths))}."
        for case, paths in sources.items()
        if len(paths) > 1
    ]
    if twice:
        raise DataProblem(numbered("Every target needs a name of its own; nothing was written.", twice))
    return {case: paths[0] for case, paths in sources.items()}


def _channel_names(case: str, organs: int) -> list[str]:
    return [f"{case}_{index:04d}{FILE_ENDING}" for index in range(2 + organs)]


def _read_image(path: Path, repairs: Repairs) -> Volume:
    image = read_volume(path, repairs.nan_to, repairs.reorthonormalize)
    check_not_constant(image)
    return image


def _read_reference(
    reference: Path, scribbles: Path, organs: Mapping[str, int], repairs: Repairs
) -> tuple[Volume, Volume]:
    image = _read_image(reference, repairs)
    drawn = read_labels(scribbles, repairs.reorthonormalize)
    drawn = check_scribbles(
        drawn,
        image,
        dict(organs),
        allow_affine_mismatch=repairs.allow_affine_mismatch,
        fix_header=repairs.fix_header,
    )
    if not drawn.data.any():
        raise DataProblem(f"{scribbles} holds no scribble. Draw one on each organ that you want segmented.")
    return image, drawn


# --- onto the target's grid ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Channels:
    target: Volume
    reference: np.ndarray  # float32 [Z, Y, X] on the target's grid
    scribbles: list[np.ndarray]  # bool [Z, Y, X] on the target's grid, one per organ
    notes: list[str]


def _resample(
    image: Volume,
    drawn: Volume,
    target: Volume,
    organs: Mapping[str, int],
    dims: int,
    reach: float,
    slice_axis: int | None = None,
) -> _Channels:
    # Without plans: the model saw slices of the reference contrast, so its coarsest axis says what a slice is.
    axis = int(np.argmax(np.round(image.spacing, 3))) if slice_axis is None else slice_axis
    match = match_slices(target.affine, target.data.shape, image.affine, image.data.shape, axis)
    notes = []
    if match.method == "order":
        notes.append(f"{target.path} and {image.path} do not share a frame; slices are matched by order.")
    to_reference = _voxel_map(image, target, match, axis)
    shape, air = target.data.shape, float(image.data.min())
    if dims == 2:
        served = np.stack(
            [
                nearest_scribbled(match, _scribbled_slices(drawn.data == organ, axis), reach, image.spacing[axis])
                for organ in organs.values()
            ]
        )
        serving, mixed = _choose_slices(served, match)
        if mixed:
            notes.append(
                f"organs are scribbled on different slices, so on {mixed} slices of {target.path} some strokes come "
                "from a neighbouring slice; `nnunet_multimodal refer` answers every organ from its own slice."
            )
        reference = _pull(image.data, to_reference, shape, axis, serving, outside=air)
        scribbles = [
            _move_slices(drawn.data == organ, to_reference, shape, axis, of_organ)
            for organ, of_organ in zip(organs.values(), served)
        ]
    else:
        reference = _pull(image.data, to_reference, shape, outside=air)
        scribbles = [_move(drawn.data == organ, to_reference, shape) for organ in organs.values()]
    notes += _check_what_arrived(target, drawn, organs, scribbles)
    return _Channels(target, reference, scribbles, notes)


def _scribbled_slices(mask: np.ndarray, axis: int) -> np.ndarray:
    """bool [n], which slices of a mask [Z, Y, X] have a stroke."""
    return np.asarray(mask.any(axis=tuple(other for other in range(3) if other != axis)))


def _choose_slices(served: np.ndarray, match: SliceMatch) -> tuple[np.ndarray, int]:
    """The one reference slice to show with each target slice: the one that serves most organs there, then the nearest.

    Args:
        served: int [K, n_target], the slice that serves each organ, or -1.
        match: gives the slice where no organ is served; without a scribble the image may still help.

    Returns:
        int [n_target], and on how many target slices the organs would rather have different ones.
    """
    serving, mixed = match.index.copy(), 0
    for index, of_organs in enumerate(served.T):
        candidates = of_organs[of_organs >= 0].tolist()
        if candidates:
            place = match.position[index]
            serving[index] = max(candidates, key=lambda c: (candidates.count(c), -abs(c - place), -c))
            mixed += len(set(candidates)) > 1
    return serving, mixed


def _check_what_arrived(
    target: Volume, drawn: Volume, organs: Mapping[str, int], scribbles: Sequence[np.ndarray]
) -> list[str]:
    """Notes on organs whose scribble lies elsewhere; an error if that is all of them."""
    if not any(scribble.any() for scribble in scribbles):
        raise DataProblem(
            f"No scribble of {drawn.path} lies within {target.path}. Check that both show the same part of the patient."
        )
    return [
        f"the scribble of {name} does not reach {target.path}; it will not be found there."
        for (name, organ), scribble in zip(organs.items(), scribbles)
        if not scribble.any() and (drawn.data == organ).any()
    ]


def _voxel_map(image: Volume, target: Volume, match: SliceMatch, axis: int) -> np.ndarray:
    """[4, 4]: target voxel (z, y, x, 1) to reference voxel (z, y, x, 1).

    Where the frames do not agree, the volumes are laid over each other centre on centre, in true size within the slice.
    """
    if match.method == "position":
        flip = np.eye(4)[[2, 1, 0, 3]]  # affines act on (x, y, z)
        return flip @ np.linalg.inv(image.affine) @ target.affine @ flip
    scale = np.array(target.spacing) / np.array(image.spacing)
    offset = (np.array(image.data.shape) - 1) / 2 - scale * (np.array(target.data.shape) - 1) / 2
    steps = np.diff(match.position)
    scale[axis], offset[axis] = (steps[0] if steps.size else 0.0), match.position[0]
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = offset
    return matrix


def _pull(
    data: np.ndarray,
    matrix: np.ndarray,
    shape: tuple[int, ...],
    axis: int = 0,
    serving: np.ndarray | None = None,
    order: int = 1,
    outside: float = 0.0,
) -> np.ndarray:
    """Sample the reference at every target voxel, one target slice at a time to save memory; float32 [Z, Y, X].

    Args:
        data: [Z, Y, X] of the reference.
        matrix: [4, 4], from :func:`_voxel_map`.
        shape: (Z, Y, X) of the target.
        axis: of the slices.
        serving: int [n_target], the one reference slice to sample for each target slice, -1 for none; None samples each
            voxel where it lies.
        order: 0 nearest, 1 linear.
        outside: value where the reference has nothing.
    """
    data = data.astype(np.float32, copy=False)
    result = np.full(shape, outside, dtype=np.float32)
    slices = np.moveaxis(result, axis, 0)  # a view: filling it fills the result
    plane = np.indices(slices.shape[1:], dtype=float)
    for index in range(shape[axis]) if serving is None else np.flatnonzero(serving >= 0):
        voxels = np.insert(plane, axis, index, axis=0)
        places = np.tensordot(matrix[:3, :3], voxels, axes=1) + matrix[:3, 3, None, None]
        if serving is not None:
            places[axis] = serving[index]
        slices[index] = _sample(data, places, order, outside)
    return result


def _sample(data: np.ndarray, places: np.ndarray, order: int, outside: float) -> np.ndarray:
    """Interpolate at places [3, ...]; half a voxel beyond the outer centres still belongs to the outer voxels."""
    limits = np.array(data.shape).reshape(3, *[1] * (places.ndim - 1)) - 0.5
    inside = ((places >= -0.5) & (places <= limits)).all(axis=0)
    values = map_coordinates(data, places, order=order, mode="nearest")
    return np.where(inside, values, outside)


def _move(mask: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring a scribble [Z, Y, X] onto the target's grid without losing a stroke.

    Sampling by nearest neighbour keeps strokes solid on a finer grid; sending every scribbled voxel to its nearest
    target voxel keeps them on a coarser one. The union does both.
    """
    result = _pull(mask, matrix, shape, order=0) > 0
    back = np.linalg.pinv(matrix)  # pinv: a single slice matched by order has no extent
    _mark(result, np.argwhere(mask) @ back[:3, :3].T + back[:3, 3])
    return result


def _move_slices(
    mask: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], axis: int, served: np.ndarray
) -> np.ndarray:
    """As :func:`_move`, for one reference slice per target slice (-1: none) and within the plane only."""
    result = _pull(mask, matrix, shape, axis, served, order=0) > 0
    if not mask.any():
        return result
    plane = [other for other in range(3) if other != axis]
    back = np.linalg.inv(matrix[np.ix_(plane, plane)])
    for index in np.flatnonzero(served >= 0):
        pixels = np.argwhere(mask.take(served[index], axis=axis))
        places = np.full((len(pixels), 3), float(index))
        places[:, plane] = (pixels - matrix[plane, 3] - matrix[plane, axis] * index) @ back.T
        _mark(result, places)
    return result


def _mark(mask: np.ndarray, places: np.ndarray) -> None:
    """Set the voxels nearest to places [n, 3]; what lies outside the grid is left out."""
    nearest = np.rint(places).astype(int)
    inside = ((nearest >= 0) & (nearest < mask.shape)).all(axis=1)
    mask[tuple(nearest[inside].T)] = True


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_case(output: Path, names: Sequence[str], channels: _Channels) -> None:
    """All files of a case in a hidden folder first, so that a case is never there by half."""
    target = channels.target
    for note in channels.notes:
        log.warning("note: %s", note)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as temporary:
        folder = Path(temporary)
        place_file(target.path, folder / names[0], target)
        write_like(folder / names[1], channels.reference, target)
        for name, scribble in zip(names[2:], channels.scribbles):
            write_like(folder / name, scribble, target)
        for name in names:
            if target.path.absolute() != (output / name).absolute():  # already where it belongs
                os.replace(folder / name, output / name)
