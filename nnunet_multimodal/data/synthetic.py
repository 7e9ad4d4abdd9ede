"""Images whose contrast belongs to regions, not to intensities: what no curve over grey values can make.

After SynthSeg (Billot et al., Medical Image Analysis 2023): a label map is painted with a random intensity per region.
Target and reference are painted independently, so nothing but shape and place tells which region is which.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from nnunet_multimodal.data.structures import coarse_steps, enlarged


def random_regions(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A body of many regions: int [..., Y, X], 0 outside, numbered from 1.

    Voronoi cells of random points in waved coordinates inside an ellipse.
    """
    step = coarse_steps(shape)
    if max(step) > 1:
        small = tuple(-(-size // s) for size, s in zip(shape, step))
        return enlarged(_regions(small, rng), step, shape)
    return _regions(shape, rng)


def _regions(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    count = int(rng.integers(12, 40))
    points = rng.uniform(0, 1, (count, len(shape)))
    wave = _smooth_noise(shape, rng, len(shape)) * rng.uniform(0.02, 0.08)
    axes = np.meshgrid(*(np.linspace(0, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    place = np.stack(axes).astype(np.float32) + wave
    stretch = np.exp(rng.uniform(-0.4, 0.4, (count, 1))).astype(np.float32)  # cells of different sizes
    flat = place.reshape(len(shape), -1)
    nearest = np.zeros(flat.shape[1], dtype=np.int32)
    best = np.full(flat.shape[1], np.inf, dtype=np.float32)
    for number, point in enumerate(points.astype(np.float32)):
        distance = ((flat - point[:, None]) ** 2).sum(0) * stretch[number]
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], number
    centred = np.abs(place - 0.5) / rng.uniform(0.35, 0.5, len(shape)).reshape(-1, *[1] * len(shape))
    body = (centred[-2:] ** 2).sum(0) < 1
    return np.where(body, nearest.reshape(shape) + 1, 0)


def paint(regions: np.ndarray, rng: np.random.Generator, image: np.ndarray | None = None) -> np.ndarray:
    """An image of the regions: a random intensity each, a little texture, a little blur.

    Args:
        regions: int, numbered from 0.
        rng: the same state paints the same image.
        image: mixed in with a random weight, so that its details stay; None paints the regions alone.

    Returns:
        float32 of the same shape, mean 0 and standard deviation 1.
    """
    table = rng.uniform(0, 1, int(regions.max()) + 1).astype(np.float32)
    if rng.random() < 0.7:
        table[0] = 0  # air is dark in every scanner
    painted = table[regions] + rng.uniform(0, 0.12) * _smooth_noise(regions.shape, rng)[0]
    painted = ndimage.gaussian_filter(painted, float(rng.uniform(0.3, 0.9)))
    painted += rng.normal(0, rng.uniform(0.01, 0.08), regions.shape).astype(np.float32)
    painted = _normalised(painted)
    if image is not None:
        weight = float(rng.uniform(0.2, 0.8)) * (1 if rng.random() < 0.5 else -1)
        painted = _normalised(painted + weight * _normalised(image))
    return painted.astype(np.float32)


def _smooth_noise(shape: tuple[int, ...], rng: np.random.Generator, channels: int = 1) -> np.ndarray:
    """[channels, ...] of about unit amplitude, from a coarse grid."""
    coarse = [max(2, min(n, int(rng.integers(4, 9)))) for n in shape]
    values = rng.normal(0, 1, (channels, *coarse)).astype(np.float32)
    way = "bilinear" if len(shape) == 2 else "trilinear"
    return F.interpolate(torch.from_numpy(values)[None], size=shape, mode=way, align_corners=True)[0].numpy()


def _normalised(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / max(float(image.std()), 1e-6)
