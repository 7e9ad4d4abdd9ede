"""Contrasts that belong to regions: another sequence tells tissues apart that this one shows alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_multimodal.data.prompts import draw_seed
from nnunet_multimodal.data.structures import find_cells
from nnunet_multimodal.data.synthetic import paint, random_regions
from nnunet_multimodal.errors import UsageError


class Repaint(BasicTransform):
    """Paints a share of the images anew, region by region, over what they show.

    No curve over grey values can tell two organs apart that have the same grey value. Regions are pieces of the image
    found without labels (slices) or random cells (volumes), and the labelled organs, so that an organ always has one
    contrast to its surroundings and odd contrasts are nothing that only organs have.

    In: image [C, ...], segmentation [S, ...] with the labels in channel 0. Each channel is painted independently and
    comes out with mean 0 and standard deviation 1, as nnU-Net's z-score gives it.

    Args:
        share: of the images that are painted.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"painted": bool(np.random.uniform() < self.share), "seed": draw_seed()}

    def apply(self, data_dict: dict, **params: Any) -> dict:
        if not params["painted"]:
            return data_dict
        rng = np.random.default_rng(params["seed"])
        labels = data_dict["segmentation"][0].numpy()
        painted = []
        for channel in data_dict["image"].float().numpy():
            regions = find_cells(channel, rng) if channel.ndim == 2 else random_regions(channel.shape, rng)
            named = np.where(labels > 0, int(regions.max()) + labels, regions).astype(np.int64)
            painted.append(torch.from_numpy(paint(named, rng, channel)))
        data_dict["image"] = torch.stack(painted)
        return data_dict


def check_share(share: float) -> None:
    """Raises UsageError where the setting ``repainted`` is no share."""
    if not 0 <= share <= 1:
        raise UsageError(f"repainted is the share of images that are painted, from 0 to 1; found {share}.")
