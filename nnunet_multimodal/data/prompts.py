"""Prompt channels on their way through the augmentation: geometry as a label, intensity never, scribbles on the fly.

nnU-Net's spatial transform interpolates image channels and its intensity transforms change all of them. So binary
prompts travel as extra channels of the segmentation, like the previous stage's labels in nnU-Net's cascade, and come
back to the image at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform

from nnunet_multimodal.data.scribbles import scribble_scale, simulate_scribble
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.networks.unet import binary_prompts

SLICES_3D = (1, 4)  # how many slices of a volume a reader scribbles on, for one organ


class KeepChannels(ImageOnlyTransform):
    """Keeps image channels ``channels`` and forgets the rest, before any work is spent on them."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return img[self.channels]


class PromptsToSegmentation(BasicTransform):
    """Before geometry: image channels ``channels`` become the last segmentation channels, 1 or 0."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image, segmentation = data_dict["image"], data_dict["segmentation"]
        moved = {c % len(image) for c in self.channels}
        prompts = binary_prompts(image[self.channels][None])[0].to(segmentation.dtype)
        data_dict["image"] = image[[c for c in range(len(image)) if c not in moved]]
        data_dict["segmentation"] = torch.cat([segmentation, prompts])
        return data_dict


class PromptsToImage(BasicTransform):
    """After geometry: the last ``count`` segmentation channels become the last image channels, 1.0 where they are 1.

    What the spatial transform padded (-1) is no prompt.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image, segmentation = data_dict["image"], data_dict["segmentation"]
        kept = len(segmentation) - self.count
        data_dict["image"] = torch.cat([image, (segmentation[kept:] == 1).to(image.dtype)])
        data_dict["segmentation"] = segmentation[:kept]
        return data_dict


class SimulatePrompts(BasicTransform):
    """Appends (or replaces) one channel per organ: a scribble simulated from the target's own labels, channel 0.

    Args:
        organs: labels, in the order of their channels.
        scale: of the strokes; None: from the image size.
        slices_3d: least and most slices (inclusive) that are scribbled in a volume, for each organ.
        replace: the image already ends in one channel per organ; the scribbles take their place.
    """

    def __init__(
        self,
        organs: Sequence[int],
        scale: float | None = None,
        slices_3d: tuple[int, int] = SLICES_3D,
        replace: bool = False,
    ) -> None:
        super().__init__()
        self.organs = list(organs)
        self.scale = scale
        self.slices_3d = slices_3d
        self.replace = replace

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"seed": draw_seed()}

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image, labels = data_dict["image"], data_dict["segmentation"][0]
        if self.replace:
            if len(image) <= len(self.organs):
                raise UsageError(
                    f"The last {len(self.organs)} channels are prompts, but the image has only {len(image)} channels."
                )
            image = image[: len(image) - len(self.organs)]
        rng = np.random.default_rng(params["seed"])
        scribbles = scribble_channels(labels.numpy(), self.organs, rng, self.scale, self.slices_3d)
        data_dict["image"] = torch.cat([image, torch.from_numpy(scribbles)])
        return data_dict


def draw_seed() -> np.ndarray:
    """A seed from numpy's global generator: the only one that differs from worker to worker in nnU-Net."""
    return np.random.randint(0, 2**32, size=4, dtype=np.uint32)


def scribble_channels(
    labels: np.ndarray,
    organs: Sequence[int],
    rng: np.random.Generator,
    scale: float | None = None,
    slices_3d: tuple[int, int] = SLICES_3D,
) -> np.ndarray:
    """Prompts float32 [K, ...], 0.0 or 1.0: a scribble of each organ on labels [Y, X] or, on a few slices, [Z, Y, X].

    An organ that is not there has an empty channel.
    """
    scale = scribble_scale(labels.shape) if scale is None else scale
    prompts = np.zeros((len(organs), *labels.shape), dtype=np.float32)
    for prompt, organ in zip(prompts, organs):
        mask = labels == organ
        if labels.ndim == 2:
            prompt[:] = simulate_scribble(mask, rng, scale=scale)
            continue
        holding = np.flatnonzero(mask.any(axis=(1, 2)))
        count = min(int(rng.integers(slices_3d[0], slices_3d[1] + 1)), len(holding))
        for z in rng.choice(holding, size=count, replace=False):
            prompt[z] = simulate_scribble(mask[z], rng, scale=scale)
    return prompts
