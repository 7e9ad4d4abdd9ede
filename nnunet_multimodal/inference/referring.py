"""Refer to a scribbled reference: encode it once, predict every target on its own grid.

2d: a target slice is answered with the tokens of the scribbled reference slice that serves it, organ by organ. 3d: the
reference volume's tokens serve every tile. The sliding window, the resampling and the export are nnU-Net's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_multimodal.conversion.images import Volume
from nnunet_multimodal.data.slices import SliceMatch, match_slices, nearest_scribbled
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.inference.frame import Frame, own_frame, shared_frame
from nnunet_multimodal.networks import CrossMRNetwork, Memory, OpenSetNetwork, Prompt
from nnunet_multimodal.networks.crossmr import ABSENT
from nnunet_multimodal.networks.memory import join_memories, mix_memories

MAX_WINDOWS = 64  # 3d: windows in which the reference is encoded, once; more than any body needs


@dataclass
class Prepared:
    """An image as nnU-Net's preprocessing leaves it.

    Attributes:
        image: float32 [1, z, y, x], axes in the plans' order, cropped, normalised, resampled.
        properties: nnU-Net's, needed to go back.
        volume: the image as read.
    """

    image: Tensor
    properties: dict[str, Any]
    volume: Volume


@dataclass
class Reference:
    """A scribbled reference, ready to be encoded.

    Attributes:
        prepared: the reference image.
        scribbles: bool [K, z, y, x] on the prepared grid.
        slices: bool [K, n], which slices of the reference as read are scribbled (along the plans' slice axis).
    """

    prepared: Prepared
    scribbles: Tensor
    slices: np.ndarray


@dataclass
class Answer:
    """A prediction for one target.

    Attributes:
        segmentation: uint8 [Z, Y, X] on the target's own grid.
        match: how slices were matched (2d), else None.
        served: int [K, n_target], the reference slice that answered for each organ and target slice, or -1 (2d).
    """

    segmentation: np.ndarray
    match: SliceMatch | None
    served: np.ndarray | None


class PromptedNetwork(nn.Module):
    """The referring network with its prompt fixed, as nnU-Net's predictor calls it: image in, logits out."""

    def __init__(self, network: CrossMRNetwork | OpenSetNetwork) -> None:
        super().__init__()
        self.network = network
        self.prompt: Prompt | Memory | None = None

    def forward(self, target: Tensor) -> Tensor:
        """target [B, 1, ...] -> logits [B, 1 + K, ...]; further channels say where each voxel lies."""
        if isinstance(self.network, OpenSetNetwork):
            assert isinstance(self.prompt, Memory)
            return self.network.segment(target[:, :1], self.prompt, places=target[:, 1:])
        assert isinstance(self.prompt, Prompt)
        return self.network.segment(target, self.prompt)


class ReferringPredictor:
    """nnU-Net's predictor for a referring network.

    Args:
        predictor: from ``load_referring_model``.
    """

    def __init__(self, predictor: nnUNetPredictor) -> None:
        self.predictor = predictor
        self.network: CrossMRNetwork | OpenSetNetwork = predictor.network
        self.prompted = PromptedNetwork(self.network)
        predictor.network = self.prompted
        self.configuration = predictor.configuration_manager
        self.dimensions = len(self.configuration.patch_size)
        self.axes = list(predictor.plans_manager.transpose_forward)
        self.open_set = isinstance(self.network, OpenSetNetwork)  # takes organs that are not in the data set
        labels = predictor.dataset_json["labels"]
        foreground = predictor.label_manager.foreground_labels
        self._of_data_set = {name: value for name, value in labels.items() if value in foreground}
        self.names: dict[str, int] = self._of_data_set  # what is looked for
        self.organs: list[int] = list(foreground)

    def ask_for(self, more: dict[str, int]) -> None:
        """Looks from now on for the data set's organs and these, name -> label from 1 to 255 (open set only)."""
        if not self.open_set:
            raise UsageError("only a model of nnUNetTrainerCrossMR_openSet takes organs that are not in its data set.")
        self.names = dict(sorted({**self._of_data_set, **more}.items(), key=lambda item: item[1]))
        self.organs = list(self.names.values())
        # nnU-Net's own labels have no gaps; answer() turns the numbers back
        numbered = {"background": 0, **{name: k for k, name in enumerate(self.names, start=1)}}
        self.predictor.label_manager = LabelManager(numbered, None)

    @property
    def slice_axis(self) -> int:
        """The axis of a volume as read [Z, Y, X] along which the 2d configuration takes its slices."""
        return self.axes[0]

    def prepare(self, volume: Volume) -> Prepared:
        """nnU-Net's preprocessing of one image."""
        properties: dict[str, Any] = {"spacing": list(volume.spacing)}
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        image, _, properties = preprocessor.run_case_npy(
            volume.data[None].astype(np.float32), None, properties,
            self.predictor.plans_manager, self.configuration, self.predictor.dataset_json,
        )  # fmt: skip
        return Prepared(torch.from_numpy(np.ascontiguousarray(image)).float(), properties, volume)

    def reference(self, volume: Volume, scribbles: np.ndarray) -> Reference:
        """A reference with its scribbles.

        Args:
            volume: the reference image.
            scribbles: int [Z, Y, X] on its grid, values are label numbers, 0 where nothing is drawn.
        """
        prepared = self.prepare(volume)
        drawn = torch.zeros(len(self.organs), *prepared.image.shape[1:], dtype=torch.bool)
        other_axes = tuple(axis for axis in range(3) if axis != self.slice_axis)
        for k, organ in enumerate(self.organs):
            index = self._to_prepared(np.argwhere(scribbles == organ), prepared)
            drawn[k, index[:, 0], index[:, 1], index[:, 2]] = True
        slices = np.stack([(scribbles == organ).any(axis=other_axes) for organ in self.organs])
        return Reference(prepared, drawn, slices)

    def encode(self, reference: Reference) -> list[dict[int, Any]]:
        """The reference's prompts for each fold: by prepared slice (2d), or one under key 0 (3d).

        They are all that is kept of the reference: any number of targets is answered from them.
        """
        prompts: list[dict[int, Any]] = []
        for weights in self.predictor.list_of_parameters:
            self._load(weights)
            with torch.inference_mode():
                encode = self._encode_slices if self.dimensions == 2 else self._encode_volume
                prompts.append(encode(reference))
        return prompts

    def answer(
        self,
        target: Volume,
        reference: Reference,
        prompts: list[dict[int, Any]],
        reach: float = 0.0,
        matching: str = "auto",
    ) -> Answer:
        """Segments one target.

        Args:
            target: the image, on any grid.
            reference, prompts: from ``reference`` and ``encode``.
            reach: 2d: how far beyond an organ's first and last scribbled slice it is looked for, in mm.
            matching: 2d: ``auto``, ``position`` or ``order``, see ``match_slices``.
        """
        prepared = self.prepare(target)
        served = None
        match: SliceMatch | None = match_slices(
            target.affine, target.data.shape, reference.prepared.volume.affine,
            reference.prepared.volume.data.shape, self.slice_axis, matching,  # type: ignore[arg-type]
        )  # fmt: skip
        assert match is not None
        frame = shared_frame(target, reference.prepared.volume, match.method == "position")
        if self.dimensions == 3:
            match = None
        else:
            spacing = reference.prepared.volume.spacing[self.slice_axis]
            served = np.stack([nearest_scribbled(match, slices, reach, spacing) for slices in reference.slices])
        logits: Tensor | None = None
        for weights, of_fold in zip(self.predictor.list_of_parameters, prompts):
            self._load(weights)
            if served is None:
                self.prompted.prompt = of_fold[0]
                fold = self._slide(prepared, frame, slice(None))
            else:
                fold = self._answer_slices(prepared, reference, of_fold, served, frame)
            logits = fold if logits is None else logits + fold
        assert logits is not None
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits / len(prompts), self.predictor.plans_manager, self.configuration, self.predictor.label_manager,
            prepared.properties, return_probabilities=False,
        )  # fmt: skip
        return Answer(np.array([0, *self.organs], dtype=np.uint8)[np.asarray(segmentation)], match, served)

    # --- encoding ----------------------------------------------------------------------------------------------------

    def _encode_slices(self, reference: Reference) -> dict[int, Any]:
        everything = [slice(0, n) for n in reference.scribbles.shape[2:]]
        drawn = reference.scribbles.flatten(2).any(2).any(0).nonzero().flatten().tolist()
        return {place: self._prompt(reference, (slice(place, place + 1), *everything)) for place in drawn}

    def _encode_volume(self, reference: Reference) -> dict[int, Any]:
        windows = covering_windows(reference.scribbles.any(0), self.configuration.patch_size, MAX_WINDOWS)
        prompts: list[Any] = [self._prompt(reference, window) for window in windows]
        return {0: join_memories(prompts) if self.open_set else join_prompts(prompts)}

    def _prompt(self, reference: Reference, window: tuple[slice, ...]) -> Prompt | Memory:
        """Encodes one slice or window, padded as nnU-Net's predictor pads a target."""
        divisor = np.prod(np.array(self.network.strides), axis=0)
        cut = (slice(None), *window)
        together = torch.cat((reference.prepared.image[cut], reference.scribbles[cut].float()))
        divisors = [1, *([1] if self.dimensions == 2 else []), *divisor]
        padded, inner = pad_nd_image(together, self.configuration.patch_size, "constant", {"value": 0}, True, divisors)
        begin = [wanted.start - pad.start for wanted, pad in zip(window, inner[1:])]
        places = self._places(reference.prepared, own_frame(reference.prepared.volume), begin, padded.shape[1:])
        flat = slice(None) if self.dimensions == 3 else 0  # a slice has no axis 0
        padded, places = (x[:, flat][None].to(self.predictor.device) for x in (padded, places))
        with torch.autocast(self.predictor.device.type, enabled=self.predictor.device.type == "cuda"):
            if isinstance(self.network, OpenSetNetwork):
                return self.network.prompt(padded[:, :1], padded[:, 1:] > 0.5, places)
            return self.network.prompt(padded[:, :1], padded[:, 1:] > 0.5)

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.network.load_state_dict(weights)
        self.network.to(self.predictor.device).eval()

    # --- answering ---------------------------------------------------------------------------------------------------

    def _answer_slices(
        self, prepared: Prepared, reference: Reference, prompts: dict[int, Any], served: np.ndarray, frame: Frame
    ) -> Tensor:
        heads = self.predictor.label_manager.num_segmentation_heads
        logits = torch.full((heads, *prepared.image.shape[1:]), ABSENT)
        logits[0] = 0
        first = prepared.properties["bbox_used_for_cropping"][0][0]
        to_slice = self._prepared_slices(reference.prepared)
        mixed: dict[tuple[int, ...], Prompt | Memory] = {}
        places = range(prepared.image.shape[1])

        def sources_of(place: int) -> tuple[int, ...]:
            return tuple(to_slice[s] if s >= 0 else -1 for s in served[:, first + place])

        for sources, run in itertools.groupby(places, sources_of):  # neighbours with the same prompt in one go
            if not any(s in prompts for s in sources):
                continue
            if sources not in mixed:
                chosen = [prompts.get(source) for source in sources]
                mixed[sources] = mix_memories(chosen) if self.open_set else mix_prompts(prompts, sources)
            self.prompted.prompt = mixed[sources]
            together = list(run)
            part = slice(together[0], together[-1] + 1)
            logits[:, part] = self._slide(prepared, frame, part)
        return logits

    def _slide(self, prepared: Prepared, frame: Frame, part: slice) -> Tensor:
        """nnU-Net's sliding window over some slices, with the places of the voxels where the network wants them."""
        image = prepared.image[:, part]
        if not self.open_set:
            return self.predictor.predict_sliding_window_return_logits(image).float().cpu()
        # padded here and not by nnU-Net, as the places go on into the padding
        padded, inner = pad_nd_image(image, self.configuration.patch_size, "constant", {"value": 0}, True)
        begin = [-pad.start for pad in inner[1:]]
        begin[0] += part.start or 0
        places = self._places(prepared, frame, begin, padded.shape[1:])
        logits = self.predictor.predict_sliding_window_return_logits(torch.cat((padded, places)))
        return logits[(slice(None), *inner[1:])].float().cpu()

    def _places(self, prepared: Prepared, frame: Frame, begin: list[int], size: tuple[int, ...]) -> Tensor:
        """Where prepared voxels lie, in mm in the reference's frame: [ndim, *size] from voxel ``begin`` on."""
        low = [edge for edge, _ in prepared.properties["bbox_used_for_cropping"]]
        cropped = prepared.properties["shape_after_cropping_and_before_resampling"]
        places = frame.offset[self.axes].reshape(3, 1, 1, 1)
        for axis in range(3):  # the inverse of _to_prepared
            at = np.arange(begin[axis], begin[axis] + size[axis]) + 0.5
            voxel = at * cropped[axis] / prepared.image.shape[1 + axis] - 0.5 + low[axis]
            direction = frame.matrix[self.axes, self.axes[axis]].reshape(3, 1, 1, 1)
            places = places + direction * voxel.reshape(*[-1 if other == axis else 1 for other in range(3)])
        places = np.broadcast_to(places, (3, *size))[3 - self.dimensions :]
        return torch.from_numpy(places.astype(np.float32))

    def _to_prepared(self, voxels: np.ndarray, prepared: Prepared) -> np.ndarray:
        """Voxels [n, 3] of the volume as read -> the prepared voxels that they fall into [n, 3].

        Each drawn voxel keeps a place, so a thin scribble survives any resampling.
        """
        low = np.array([begin for begin, _ in prepared.properties["bbox_used_for_cropping"]])
        cropped = np.array(prepared.properties["shape_after_cropping_and_before_resampling"])
        size = np.array(prepared.image.shape[1:])
        place = (voxels[:, self.axes] - low + 0.5) * size / cropped - 0.5
        return np.clip(np.rint(place), 0, size - 1).astype(int)

    def _prepared_slices(self, prepared: Prepared) -> dict[int, int]:
        """Slice of the volume as read -> prepared slice (2d never resamples across slices, only crops)."""
        begin = prepared.properties["bbox_used_for_cropping"][0][0]
        count = prepared.image.shape[1]
        length = prepared.volume.data.shape[self.slice_axis]
        return {s: int(np.clip(s - begin, 0, count - 1)) for s in range(length)}


def mix_prompts(prompts: dict[int, Prompt], sources: tuple[int, ...]) -> Prompt:
    """One prompt of which organ k comes from slice sources[k]; -1, or a slice that is not encoded, leaves it out."""
    some = next(iter(prompts.values()))
    chosen = [prompts.get(source) for source in sources]

    def gather(field) -> Tensor:
        return torch.cat([field(some if p is None else p)[:, k : k + 1] for k, p in enumerate(chosen)], dim=1)

    known = torch.tensor([[p is not None for p in chosen]], device=some.present.device)
    return Prompt(
        [gather(lambda p, level=level: p.tokens[level]) for level in range(len(some.tokens))],
        gather(lambda p: p.visible) & known[..., None],
        gather(lambda p: p.signature),
        gather(lambda p: p.present) & known,
    )


def join_prompts(prompts: list[Prompt]) -> Prompt:
    """The prompts of several windows of one reference as one: all tokens, and the mean feature of all points."""
    counts = torch.stack([p.visible.sum(-1, keepdim=True) for p in prompts])
    signatures = torch.stack([p.signature for p in prompts])
    return Prompt(
        [torch.cat([p.tokens[level] for p in prompts], dim=2) for level in range(len(prompts[0].tokens))],
        torch.cat([p.visible for p in prompts], dim=2),
        (signatures * counts).sum(0) / counts.sum(0).clamp(min=1),
        torch.stack([p.present for p in prompts]).any(0),
    )


def covering_windows(drawn: Tensor, size: list[int], most: int) -> list[tuple[slice, ...]]:
    """Windows of the patch size that cover the drawn voxels, each around what is left in the first one's reach.

    Args:
        drawn: bool [z, y, x].
        size: patch size.
        most: at most so many windows.
    """
    left = drawn.nonzero().float()
    shape = torch.tensor(drawn.shape)
    patch = torch.minimum(torch.tensor(size), shape)
    windows: list[tuple[slice, ...]] = []
    while len(left) and len(windows) < most:
        near = left[((left - left[0]).abs() < patch / 2).all(1)]
        begin = ((near.amin(0) + near.amax(0)) / 2 - patch / 2).round().long()
        begin = torch.minimum(begin.clamp(min=0), shape - patch)
        windows.append(tuple(slice(int(b), int(b + p)) for b, p in zip(begin, patch)))
        left = left[~((left >= begin) & (left < begin + patch)).all(1)]
    return windows


def organ_volumes(segmentation: np.ndarray, volume: Volume, organs: dict[str, int]) -> dict[str, float]:
    """Millilitres of each organ."""
    voxel = float(np.prod(volume.spacing)) / 1000
    return {name: round(int((segmentation == label).sum()) * voxel, 3) for name, label in organs.items()}


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
