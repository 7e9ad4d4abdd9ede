"""Samples for referring to anything: organs and structures without labels, in real, repainted and made-up images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch.nn import functional as F

from nnunet_multimodal.data.pairs import ReferenceJitter
from nnunet_multimodal.data.prompts import SLICES_3D, draw_seed, scribble_channels
from nnunet_multimodal.data.structures import LEAST, find_cells, find_structure
from nnunet_multimodal.data.synthetic import paint, random_regions
from nnunet_multimodal.errors import DataProblem

REAL, REPAINTED, MADE_UP = "real", "repainted", "made up"


class BendingJitter(ReferenceJitter):
    """``ReferenceJitter`` and, on half of the samples, a smooth bend: the neighbouring slice, or another breath.

    Args:
        rotation, translation, scaling: as there.
        bend: largest displacement of a node of a coarse grid, as a share of the size.
        p_bend: share of the samples that are bent.
    """

    def __init__(
        self,
        rotation: float = 8.0,
        translation: float = 0.07,
        scaling: float = 0.08,
        bend: float = 0.03,
        p_bend: float = 0.5,
    ) -> None:
        super().__init__(rotation, translation, scaling)
        self.bend = bend
        self.p_bend = p_bend

    def get_parameters(self, **data_dict: Any) -> dict:
        drawn = super().get_parameters(**data_dict)
        ndim = data_dict["image"].ndim - 1
        if np.random.uniform() < self.p_bend:
            nodes = np.random.uniform(-2 * self.bend, 2 * self.bend, (1, ndim, *[5] * ndim))
            drawn["bend"] = torch.from_numpy(nodes).float()
        return drawn

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return self._bent(img, params, "bilinear", "border")

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        return self._bent(segmentation.float(), params, "nearest", "zeros").to(segmentation.dtype)

    @classmethod
    def _bent(cls, tensor: torch.Tensor, params: dict, mode: str, padding: str) -> torch.Tensor:
        if "bend" not in params:
            return cls._sample(tensor, params["affine"], mode, padding)
        size = tuple(tensor.shape[1:])
        grid = F.affine_grid(params["affine"][None], [1, *tensor.shape], align_corners=False)
        way = "bicubic" if len(size) == 2 else "trilinear"
        grid = grid + F.interpolate(params["bend"], size=size, mode=way, align_corners=True).movedim(1, -1)
        return F.grid_sample(tensor[None], grid, mode=mode, padding_mode=padding, align_corners=False)[0]


class OpenSetPair(BasicTransform):
    """Turns one labelled image into target, reference and scribbles of up to ``prompts`` things.

    In: image [1, ...], segmentation [S, ...] with the labels in channel 0. Out: image [2 + prompts, ...] float32 as the
    network takes it; segmentation [2, ...]: number of the prompt (1, 2, ...) that each voxel of the target and of the
    reference belongs to, 0 for none. The things do not overlap, and which prompt is an organ is drawn each time.

    Args:
        organs: labels that may be asked for.
        target, reference: intensity chains, as in ``ReferringPair``.
        jitter: geometry of the reference.
        prompts: most things asked for at a time; at least one.
        structures: share of the things that are no organs.
        repainted, made_up: share of the samples whose contrasts are painted by region, over the image or on nothing.
        mask_prompts: share of the things that are shown as a whole instead of by a scribble.
    """

    def __init__(
        self,
        organs: Sequence[int],
        target: BasicTransform,
        reference: BasicTransform,
        jitter: BasicTransform,
        prompts: int = 4,
        structures: float = 0.5,
        repainted: float = 0.2,
        made_up: float = 0.2,
        mask_prompts: float = 0.15,
        slices_3d: tuple[int, int] = SLICES_3D,
    ) -> None:
        super().__init__()
        self.organs = list(organs)
        self.target, self.reference, self.jitter = target, reference, jitter
        self.prompts = prompts
        self.structures, self.repainted, self.made_up = structures, repainted, made_up
        self.mask_prompts = mask_prompts
        self.slices_3d = slices_3d

    def get_parameters(self, **data_dict: Any) -> dict:
        image = data_dict["image"]
        if len(image) != 1:
            raise DataProblem(f"A referring pair is made from one image channel, found {len(image)}.")
        kind = np.random.uniform()
        return {
            "kind": MADE_UP if kind < self.made_up else REPAINTED if kind < self.made_up + self.repainted else REAL,
            "count": int(np.random.randint(min(2, self.prompts), self.prompts + 1)),
            "target": self.target.get_parameters(image=image),
            "reference": self.reference.get_parameters(image=image),
            "jitter": self.jitter.get_parameters(image=image),
            "seed": draw_seed(),
        }

    def apply(self, data_dict: dict, **params: Any) -> dict:
        rng = np.random.default_rng(params["seed"])
        clean, labels = data_dict["image"].float(), data_dict["segmentation"][:1]
        padded = (clean == 0) & (labels == -1)
        first, second, things = self._appearances(clean[0].numpy(), labels[0].numpy(), params, rng)
        target = self.target.apply({"image": torch.from_numpy(first)[None].clone()}, **params["target"])["image"]
        both = torch.stack([torch.from_numpy(things), padded[0].to(torch.int16)])
        seen = self.jitter.apply({"image": torch.from_numpy(second)[None], "segmentation": both}, **params["jitter"])
        reference = self.reference.apply({"image": seen["image"].clone()}, **params["reference"])["image"]
        # what nnU-Net padded stays 0, as it is at prediction; air is not exactly 0 after normalisation
        target[padded] = 0
        reference[seen["segmentation"][1:] == 1] = 0
        drawn = self._draw(seen["segmentation"][0].numpy(), rng)
        data_dict["image"] = torch.cat([target, reference, torch.from_numpy(drawn)])
        data_dict["segmentation"] = torch.cat([both[:1], seen["segmentation"][:1]])
        return data_dict

    def _appearances(
        self, image: np.ndarray, labels: np.ndarray, params: dict, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Base images of target and reference, and the things in them: int16, 0 for none."""
        plane = image.ndim == 2  # scikit-image cuts planes into cells; volumes have the other structures
        if params["kind"] == MADE_UP:
            regions = random_regions(image.shape, rng)
            first, second = paint(regions, rng), paint(regions, rng)
            return first, second, self._choose(second, np.zeros_like(labels), regions, params["count"], rng)
        cells = find_cells(image, rng) if plane else None
        things = self._choose(image, labels, cells, params["count"], rng)
        if params["kind"] == REAL:
            return image, image, things
        regions = random_regions(image.shape, rng) if cells is None else cells
        named = np.where(things > 0, regions.max() + things, regions)  # a thing has one contrast to its surroundings
        first = paint(named, rng, image)
        return first, paint(named, rng, image) if rng.random() < 0.3 else image, things

    def _choose(
        self, image: np.ndarray, labels: np.ndarray, cells: np.ndarray | None, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Things in random order, without overlap."""
        things = np.zeros(image.shape, dtype=np.int16)
        there = [organ for organ in self.organs if np.count_nonzero(labels == organ) >= LEAST]
        rng.shuffle(there)
        number = 0
        for _ in range(3 * count):
            if there and rng.random() >= self.structures:
                piece = labels == there.pop()
            else:
                piece = find_structure(image, rng, cells)
            free = piece & (things == 0)
            if np.count_nonzero(free) < max(LEAST, 0.8 * np.count_nonzero(piece)):
                continue
            number += 1
            things[free] = number
            if number == count:
                break
        return things

    def _draw(self, things: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Float32 [prompts, ...]: a scribble of each thing, or all of it."""
        drawn = scribble_channels(things, range(1, self.prompts + 1), rng, None, self.slices_3d)
        for number, channel in enumerate(drawn, start=1):
            if rng.random() < self.mask_prompts:
                channel[things == number] = 1
        return drawn
