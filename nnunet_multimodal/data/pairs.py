"""Referring samples from single labelled images: a target to segment, a reference in another contrast, its scribbles.

CrossMR's paired augmentation. Image and labels have been through the geometric augmentation; from there on target and
reference go their own ways. A small misregistration between them keeps the network from copying pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch.nn.functional import affine_grid, grid_sample

from nnunet_multimodal.data.prompts import SLICES_3D, draw_seed, scribble_channels
from nnunet_multimodal.errors import DataProblem


class ReferenceJitter(BasicTransform):
    """A small affine of its own for the reference: breathing, and another position on the table.

    Image [C, ...] bilinearly with its border repeated, segmentation [S, ...] nearest with 0 outside. Volumes rotate and
    scale in plane (axes 1 and 2) and shift along all three axes: slices are thick, and patients do not tumble.

    Args:
        rotation: largest angle, in degrees.
        translation: largest shift, as a share of the size.
        scaling: largest deviation of the zoom from 1.
    """

    def __init__(self, rotation: float = 6.0, translation: float = 0.04, scaling: float = 0.05) -> None:
        super().__init__()
        self.rotation = rotation
        self.translation = translation
        self.scaling = scaling

    def get_parameters(self, **data_dict: Any) -> dict:
        shape = data_dict["image"].shape[1:]
        angle = np.deg2rad(np.random.uniform(-self.rotation, self.rotation))
        zoom = np.random.uniform(1 - self.scaling, 1 + self.scaling)
        shift = np.random.uniform(-self.translation, self.translation, size=len(shape))
        # grid_sample counts axes from the last (x, y, z) and each axis from -1 to 1, so a shift of the whole size is 2;
        # a rotation between axes of unequal length has to go through pixels
        aspect = shape[-2] / shape[-1]
        affine = np.eye(len(shape), len(shape) + 1)
        affine[:2, :2] = (
            np.array(
                [
                    [np.cos(angle), -np.sin(angle) * aspect],
                    [np.sin(angle) / aspect, np.cos(angle)],
                ]
            )
            / zoom
        )
        affine[:, -1] = 2 * shift
        return {"affine": torch.from_numpy(affine).float()}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return self._sample(img, params["affine"], "bilinear", "border")

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        return self._sample(segmentation.float(), params["affine"], "nearest", "zeros").to(segmentation.dtype)

    @staticmethod
    def _sample(tensor: torch.Tensor, affine: torch.Tensor, mode: str, padding: str) -> torch.Tensor:
        grid = affine_grid(affine[None], [1, *tensor.shape], align_corners=False)
        return grid_sample(tensor[None], grid, mode=mode, padding_mode=padding, align_corners=False)[0]


class ReferringPair(BasicTransform):
    """Turns one labelled image into what the referring network sees.

    In: image [1, ...], segmentation [S, ...] with the labels in channel 0. Out: image [2 + K, ...] float32 with the
    target, the reference and a binary scribble for each of the K organs, drawn on the reference; the segmentation is
    unchanged and belongs to the target. An organ that the reference does not hold has an empty channel.

    Args:
        organs: labels, in the order of their channels.
        target: intensity chain of the target; None leaves it as it is.
        reference: intensity chain of the reference; None leaves it as it is.
        jitter: geometry of the reference; None keeps the two aligned.
        scribble_scale: of the strokes; None: from the image size.
        slices_3d: least and most slices (inclusive) that are scribbled in a volume, for each organ.
        paired: False is the ablation without paired augmentation: the reference is a copy of the changed target.
        repaint: what gives regions of the target contrasts of their own before the chain (``Repaint``); it may look at
            the labels.
    """

    def __init__(
        self,
        organs: Sequence[int],
        target: BasicTransform | None,
        reference: BasicTransform | None,
        jitter: ReferenceJitter | None,
        scribble_scale: float | None = None,
        slices_3d: tuple[int, int] = SLICES_3D,
        paired: bool = True,
        repaint: BasicTransform | None = None,
    ) -> None:
        super().__init__()
        self.organs = list(organs)
        self.target = target
        self.reference = reference
        self.jitter = jitter
        self.scribble_scale = scribble_scale
        self.slices_3d = slices_3d
        self.paired = paired
        self.repaint = repaint

    def get_parameters(self, **data_dict: Any) -> dict:
        image = data_dict["image"]
        if len(image) != 1:
            raise DataProblem(f"A referring pair is made from one image channel, found {len(image)}.")

        def draw(transform: BasicTransform | None) -> dict | None:
            return None if transform is None else transform.get_parameters(image=image)

        return {
            "repaint": draw(self.repaint),
            "target": draw(self.target),
            "reference": draw(self.reference if self.paired else None),
            "jitter": draw(self.jitter if self.paired else None),
            "seed": draw_seed(),
        }

    def apply(self, data_dict: dict, **params: Any) -> dict:
        # the chains work in place, hence the copies
        clean, labels = data_dict["image"].float(), data_dict["segmentation"][:1]
        anew = self._changed(self.repaint, {"image": clean.clone(), "segmentation": labels}, params["repaint"])
        target = self._changed(self.target, {"image": anew["image"]}, params["target"])["image"]
        # what nnU-Net padded stays 0, as it is at prediction; air is not exactly 0 after normalisation
        target[(clean == 0) & (labels == -1)] = 0
        seen = {"image": clean.clone() if self.paired else target.clone(), "segmentation": labels}
        seen = self._changed(self.jitter, seen, params["jitter"])
        reference = self._changed(self.reference, {"image": seen["image"].clone()}, params["reference"])["image"]
        reference[(seen["image"] == 0) & (seen["segmentation"] == -1)] = 0
        rng = np.random.default_rng(params["seed"])
        scribbles = scribble_channels(
            seen["segmentation"][0].numpy(), self.organs, rng, self.scribble_scale, self.slices_3d
        )
        data_dict["image"] = torch.cat([target, reference, torch.from_numpy(scribbles)])
        return data_dict

    @staticmethod
    def _changed(transform: BasicTransform | None, sample: dict, drawn: dict | None) -> dict:
        return sample if transform is None or drawn is None else transform.apply(sample, **drawn)
