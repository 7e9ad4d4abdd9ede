"""The visual sampler of SEEM and CrossMR: scribbled points of the reference become tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GOLDEN_RATIO = 2654435769  # of 2^32: multiples of it, modulo 2^32, are spread evenly whatever their number


def pick_points(scribbles: Tensor, count: int, random: bool) -> tuple[Tensor, Tensor]:
    """Up to ``count`` scribbled points for each organ.

    Every organ gets the same number, so a long scribble does not crowd out a short one (in SEEM a multinomial with
    equal mass per mask does this; a fixed share keeps the shapes static).

    Args:
        scribbles: bool [B, K, (Z,) Y, X].
        count: points per organ.
        random: a random subset without replacement (training); else an even, reproducible one (prediction).

    Returns:
        coordinates: float [B, K, T, ndim] in grid_sample's order (x, y(, z)), in [-1, 1], pixel centres
            (``align_corners=False``); T = min(count, number of pixels).
        valid: bool [B, K, T]; where False the organ has no further point and the coordinates mean nothing.
    """
    size = scribbles.shape[2:]
    drawn = scribbles.flatten(2)
    if random:
        priority = torch.rand(drawn.shape, device=drawn.device)
    else:
        priority = (drawn.cumsum(-1) * GOLDEN_RATIO % 2**32).float() / 2**32
    priority = priority.masked_fill(~drawn, -1.0)
    value, index = priority.topk(min(count, drawn.shape[-1]), dim=-1)
    coordinates = []
    for length in reversed(size):  # last axis first: grid_sample wants x, y, z
        coordinates.append(((index % length).float() + 0.5) * (2.0 / length) - 1.0)
        index = index // length
    return torch.stack(coordinates, dim=-1), value >= 0


def sample_features(features: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolates features at points: F^ref at the scribble (CrossMR, 3.1).

    Args:
        features: [B, C, (Z,) Y, X], at any resolution of the image that the coordinates belong to.
        coordinates: [B, K, T, ndim] as ``pick_points`` gives them.

    Returns:
        [B, K, T, C].
    """
    batch, organs, points, ndim = coordinates.shape
    grid = coordinates.view(batch, *[1] * (ndim - 1), organs * points, ndim)
    # In fp32: half precision moves a point by up to 0.06 pixels in 256.
    sampled = F.grid_sample(features.float(), grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.reshape(batch, features.shape[1], organs, points).permute(0, 2, 3, 1)


class VisualSampler(nn.Module):
    """Tokens from each feature level, by a learned matrix per level (SEEM's ``mask_spatial_embed``) and an indicator.

    Args:
        width: d, channels of features and tokens.
        levels: number of feature levels.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(levels))
        self.indicator = nn.Parameter(torch.zeros(width))  # "this is a positive prompt", as opposed to a query

    def forward(self, features: list[Tensor], coordinates: Tensor, valid: Tensor) -> list[Tensor]:
        """features: levels x [B, d, ...] -> levels x [B, K, T, d], zero where not valid."""
        return [
            (projection(sample_features(level, coordinates)) + self.indicator) * valid.unsqueeze(-1)
            for projection, level in zip(self.projections, features)
        ]


def mean_feature(features: Tensor, coordinates: Tensor, valid: Tensor) -> Tensor:
    """s_k: the mean feature at the organ's points, [B, K, C]; zeros for an organ without a point."""
    weight = valid.unsqueeze(-1).to(features.dtype)
    return (sample_features(features, coordinates) * weight).sum(2) / weight.sum(2).clamp(min=1)
