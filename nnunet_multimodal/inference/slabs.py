"""Prediction of a large volume in slabs: the segmentation of the whole, in a fraction of its memory.

nnU-Net keeps the logits of all classes of the whole volume, and then all of them once more on the image's own grid.
Here the volume is cut into slabs along its longest axis, and each is finished (logits, resampling, labels) before the
next one begins. The tiles are those of the whole volume, at their places there and in their order; one that reaches
into two slabs is predicted for both. So every logit is, bit for bit, nnU-Net's. Resampling along the axis needs the
neighbouring voxel, which is kept from the slab before. By nnU-Net's default plans each number is computed there as it
is for the whole, so that the labels are the same, too. Where plans resample by torch, resampled logits differ by 1e-5
(measured on logits of about 10), which may now and then turn a voxel between two classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.configuration import ANISO_THRESHOLD, default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from scipy import ndimage
from torch import Tensor

from nnunet_multimodal.errors import UsageError

Tile = tuple[Any, ...]  # nnU-Net's slicer: channels, then a slice (or a slice's number, in 2d) for each axis
CHUNK = 64e6  # bytes of logits that are resampled at a time


@dataclass
class Work:
    """What is common to all slabs of a volume.

    Attributes:
        predictor: with a model loaded.
        data: the preprocessed image [channels, ...], padded to at least one tile.
        tiles: of the whole padded image, in nnU-Net's order.
        axis: along which slabs are cut, of the image's axes.
        inside: where the image lies in the padded one.
        on_tile: called before a tile is predicted, with whether it is predicted for the first time.
    """

    predictor: nnUNetPredictor
    data: Tensor
    tiles: list[Tile]
    axis: int
    inside: tuple[slice, ...]
    on_tile: Callable[[bool], Any] = lambda first: None
    seen: set[tuple[int, int]] = field(default_factory=set)


def plan_work(predictor: nnUNetPredictor, image: Tensor, slabs: int) -> tuple[Work, list[tuple[int, int]]]:
    """How an image is cut.

    Args:
        predictor: with a model loaded.
        image: float [channels, ...], preprocessed.
        slabs: how many are wanted; no more than there are voxels along the axis.

    Returns:
        What is common, and the slabs: beginning and end along the axis of the image, without the padding.
    """
    padded, revert = pad_nd_image(
        image, predictor.configuration_manager.patch_size, "constant", {"value": 0}, True, None
    )
    tiles = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
    inside = tuple(slice(int(cut.start), int(cut.stop)) for cut in revert[1:])
    shape = tuple(image.shape[1:])
    axis = int(np.argmax(shape))
    if isinstance(tiles[0][1], int) and shape[0] >= slabs:
        axis = 0  # in 2d, slices know nothing of each other: no tile is predicted twice
    work = Work(predictor, padded, tiles, axis, inside)
    return work, _cut(work, shape[axis], min(slabs, shape[axis]))


def _cut(work: Work, length: int, slabs: int) -> list[tuple[int, int]]:
    """Slabs of about the same size, with the cuts where the fewest tiles reach over them."""
    before = work.inside[work.axis].start
    extents = {_extent(tile, work.axis) for tile in work.tiles}

    def cost(place: int, wanted: float) -> tuple[int, float]:
        return sum(start < place + before < stop for start, stop in extents), abs(place - wanted)

    room = length // (4 * slabs)
    cuts = [0]
    for number in range(1, slabs):
        wanted = number * length / slabs
        low, high = max(cuts[-1] + 1, round(wanted) - room), min(length - (slabs - number), round(wanted) + room)
        cuts.append(min(range(low, high + 1), key=lambda place: cost(place, wanted)))
    return [*zip(cuts, [*cuts[1:], length])]


def _extent(tile: Tile, axis: int) -> tuple[int, int]:
    """From where to where a tile reaches along an axis of the padded image."""
    place = tile[axis + 1]
    return (place, place + 1) if isinstance(place, int) else (place.start, place.stop)


def tiles_to_predict(work: Work, slabs: Sequence[tuple[int, int]]) -> int:
    """How many tiles are predicted in all, those that reach into several slabs once for each."""
    return sum(len(_tiles_of(work, *slab)) for slab in slabs)


def _tiles_of(work: Work, start: int, stop: int) -> list[int]:
    before = work.inside[work.axis].start
    extents = (_extent(tile, work.axis) for tile in work.tiles)
    return [i for i, (low, high) in enumerate(extents) if low < stop + before and high > start + before]


# --- the logits of a slab --------------------------------------------------------------------------------------------


@torch.inference_mode()
def slab_logits(work: Work, start: int, stop: int) -> Tensor:
    """half [classes, ...] of a part of the image; as nnU-Net gives them for the whole, mean over the folds.

    Args:
        work: of the image.
        start, stop: along the axis, without the padding.
    """
    predictor = work.predictor
    threads = torch.get_num_threads()
    torch.set_num_threads(min(default_num_processes, threads))
    network = getattr(predictor.network, "_orig_mod", predictor.network)
    total: Tensor | None = None
    try:
        for fold, parameters in enumerate(predictor.list_of_parameters):
            network.load_state_dict(parameters)
            predictor.network = predictor.network.to(predictor.device)
            predictor.network.eval()
            with _autocast(predictor.device):
                logits = _accumulate(work, start, stop, fold)
            total = logits if total is None else total.add_(logits)
    finally:
        torch.set_num_threads(threads)
    assert total is not None
    if len(predictor.list_of_parameters) > 1:
        total /= len(predictor.list_of_parameters)
    return total


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """As nnU-Net: on a GPU only."""
    return torch.autocast("cuda", enabled=True) if device.type == "cuda" else contextlib.nullcontext()


def _accumulate(work: Work, start: int, stop: int, fold: int) -> Tensor:
    """nnU-Net's sliding window, of which only what lies in the slab is kept; in main memory."""
    predictor, axis = work.predictor, work.axis
    low, high = start + work.inside[axis].start, stop + work.inside[axis].start
    shape = [*work.data.shape[1:]]
    shape[axis] = high - low
    logits = torch.zeros((predictor.label_manager.num_segmentation_heads, *shape), dtype=torch.half)
    weights = torch.zeros(shape, dtype=torch.half)
    patch = tuple(predictor.configuration_manager.patch_size)
    gaussian = torch.ones(patch, dtype=torch.half)
    if predictor.use_gaussian:
        gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    for index in _tiles_of(work, start, stop):
        tile = work.tiles[index]
        work.on_tile((fold, index) not in work.seen)
        work.seen.add((fold, index))
        piece = torch.clone(work.data[tile][None], memory_format=torch.contiguous_format).to(predictor.device)
        prediction = predictor._internal_maybe_mirror_and_predict(piece)[0].to("cpu")
        if predictor.use_gaussian:
            prediction *= gaussian
        to, of = _overlap(tile, axis, low, high)
        logits[to] += prediction[of]
        weights[to[1:]] += gaussian[of[1:]]
    torch.div(logits, weights, out=logits)
    if torch.any(torch.isinf(logits)):
        raise RuntimeError("the logits are too large for half precision (infinite)")
    inside = list(work.inside)
    inside[axis] = slice(None)
    return logits[(slice(None), *inside)]


def _overlap(tile: Tile, axis: int, low: int, high: int) -> tuple[Tile, Tile]:
    """Where in the slab the tile's logits go, and which of them: [low, high) along an axis of the padded image."""
    place = tile[axis + 1]
    to, of = list(tile), [slice(None) for entry in tile if isinstance(entry, slice)]
    if isinstance(place, int):
        to[axis + 1] = place - low
    else:
        begin, end = max(place.start, low), min(place.stop, high)
        to[axis + 1] = slice(begin - low, end - low)
        of[sum(isinstance(entry, slice) for entry in tile[: axis + 1])] = slice(begin - place.start, end - place.start)
    return tuple(to), tuple(of)


# --- from logits to labels -------------------------------------------------------------------------------------------


class Labels:
    """The segmentation of a volume on its own grid, made of the logits of one slab after the other."""

    def __init__(self, predictor: nnUNetPredictor, properties: dict[str, Any], shape: Sequence[int], axis: int) -> None:
        """
        Args:
            predictor: with a model loaded.
            properties: of the image, by nnU-Net's preprocessing.
            shape: of the preprocessed image, without channels.
            axis: along which the slabs lie.

        Raises:
            UsageError: the plans resample probabilities in a way that is not known here.
        """
        self.predictor, self.properties, self.axis = predictor, properties, axis
        self.shape = [int(length) for length in properties["shape_after_cropping_and_before_resampling"]]
        plans, configuration = predictor.plans_manager, predictor.configuration_manager
        self.image_spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        missing = len(self.shape) - len(configuration.spacing)  # 2d plans have no spacing between slices
        self.own_spacing = [*self.image_spacing[:missing], *configuration.spacing]
        self.resample, self.keeps_half = configuration.resampling_fn_probabilities, True
        self.nearest = self.linear = False
        self.rounded: int | None = None  # another axis along which the nearest voxel is taken
        if list(shape) != self.shape:
            self._look_at_resampling()
        places, last = _places(shape[axis], self.shape[axis]), shape[axis] - 1
        floor = np.floor(places + 0.5 if self.nearest else places)
        self.share = np.zeros(len(places)) if self.nearest else places - floor  # of the upper neighbour
        self.lower = floor.astype(int).clip(0, last)
        self.upper = np.where(self.share == 0, self.lower, floor.astype(int) + 1).clip(0, last)
        along = [_places(n, m) for n, m in zip(shape, self.shape)]
        along[axis] = np.zeros(1)
        if self.rounded is not None:
            along[self.rounded] = np.floor(along[self.rounded] + 0.5)
        self.grid = np.meshgrid(*along, indexing="ij")
        self.segmentation = np.zeros(
            self.shape, np.uint8 if len(predictor.label_manager.foreground_labels) < 255 else np.uint16
        )
        self.done = 0  # voxels along the axis
        self.kept: np.ndarray | None = None  # logits at the end of the slab before
        self.kept_from = 0

    def _look_at_resampling(self) -> None:
        function, words = self.resample.func.__name__, self.resample.keywords
        threshold = words.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD)
        force = words.get("force_separate_z", None if function.startswith("resample_torch") else False)
        separate, low_axis = determine_do_sep_z_and_axis(force, self.own_spacing, self.image_spacing, threshold)
        across = separate and low_axis == self.axis
        if function == "resample_data_or_seg_to_shape":
            order = words.get("order_z", 0) if across else words.get("order", 3)
            self.nearest = order == 0
            if order == 1 and not across and words.get("order_z", 0) == 0:
                self.linear, self.rounded = True, int(low_axis) if separate else None
            known = order in (0, 1) and not words.get("is_seg")
        elif function.startswith("resample_torch"):
            mode = words.get("aniso_axis_mode", "nearest-exact") if across else words.get("mode", "linear")
            self.nearest = mode == "nearest-exact"
            known = mode in ("linear", "nearest-exact") and not words.get("is_seg")
            self.keeps_half = False  # it answers in single precision
        else:
            known = False
        if not known:
            raise UsageError(
                f"--slabs can resample linearly or to the nearest voxel; the plans have {function} with {words}. "
                "Predict without --slabs."
            )

    def add(self, logits: np.ndarray, start: int) -> None:
        """The next slab.

        Args:
            logits: half [classes, ...].
            start: where it begins along the axis of the preprocessed image.
        """
        axis = self.axis + 1
        if self.kept is not None:
            logits, start = np.concatenate((self.kept, logits), axis), self.kept_from
        stop = start + logits.shape[axis]
        ready = int(np.searchsorted(self.upper, stop))  # voxels whose neighbours are there
        sizes = [length for place, length in enumerate(self.shape) if place != self.axis]
        step = max(1, int(CHUNK / (8 * logits.shape[0] * np.prod(sizes))))
        for first in range(self.done, ready, step):
            chosen = np.arange(first, min(first + step, ready))
            self.segmentation[(slice(None),) * self.axis + (chosen,)] = self._labels(logits, chosen, start)
        self.done = max(self.done, ready)
        if self.done < len(self.lower):
            self.kept_from = min(int(self.lower[self.done]), stop)
            self.kept = logits.take(range(self.kept_from - start, stop - start), axis)

    def _labels(self, logits: np.ndarray, chosen: np.ndarray, start: int) -> np.ndarray:
        """Of some of the image's voxels along the axis."""
        axis = self.axis + 1
        if self.linear:
            part = np.concatenate([self._voxel(logits, int(place), start) for place in chosen], axis)
            return np.asarray(self.predictor.label_manager.convert_logits_to_segmentation(part))
        part = logits.take(self.lower[chosen] - start, axis)
        if (self.share[chosen] != 0).any():
            share = self.share[chosen].reshape([-1 if place == axis else 1 for place in range(logits.ndim)])
            upper = logits.take(self.upper[chosen] - start, axis)
            part = (1 - share) * part.astype(np.float64) + share * upper.astype(np.float64)
        shape = [len(chosen) if place == self.axis else length for place, length in enumerate(self.shape)]
        if list(part.shape[1:]) != shape:
            wide = part.astype(np.float64, copy=False)
            part = np.asarray(self.resample(wide, shape, self.own_spacing, self.image_spacing))
        if self.keeps_half:
            part = part.astype(logits.dtype, copy=False)
        return np.asarray(self.predictor.label_manager.convert_logits_to_segmentation(part))

    def _voxel(self, logits: np.ndarray, place: int, start: int) -> np.ndarray:
        """half [classes, ...] one voxel thick: with the very arithmetic of scipy's zoom of the whole."""
        pair = logits.take([self.lower[place] - start, self.upper[place] - start], self.axis + 1)
        where = [
            np.full_like(each, self.share[place]) if axis == self.axis else each for axis, each in enumerate(self.grid)
        ]
        result = np.empty((len(logits), *where[0].shape), logits.dtype)
        for channel, of in zip(pair, result):
            of[...] = ndimage.map_coordinates(channel.astype(np.float64), where, order=1, mode="nearest")
        return result

    def finish(self) -> np.ndarray:
        """[Z, Y, X] as the image was read, with what nnU-Net had cropped."""
        assert self.done == len(self.lower), "not all slabs were added"
        whole = np.zeros(self.properties["shape_before_cropping"], self.segmentation.dtype)
        box = self.properties["bbox_used_for_cropping"]
        whole = np.asarray(insert_crop_into_image(whole, self.segmentation, box))
        return whole.transpose(self.predictor.plans_manager.transpose_backward)


def _places(length: int, wanted: int) -> np.ndarray:
    """Where the voxels of an axis lie in one of another length, as scipy and torch compute it."""
    return np.asarray(length / wanted * (np.arange(wanted) + 0.5) - 0.5)


def segment(work: Work, slabs: Sequence[tuple[int, int]], properties: dict[str, Any]) -> np.ndarray:
    """The segmentation of an image, as nnU-Net's prediction and export give it.

    Args:
        work, slabs: from ``plan_work``.
        properties: of the image, by nnU-Net's preprocessing.

    Returns:
        [Z, Y, X] as the image was read.

    Raises:
        UsageError: the plans resample in a way that is not known here.
    """
    shape = [cut.stop - cut.start for cut in work.inside]
    labels = Labels(work.predictor, properties, shape, work.axis)
    for start, stop in slabs:
        labels.add(slab_logits(work, start, stop).numpy(), start)
    return labels.finish()
