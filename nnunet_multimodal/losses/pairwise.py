"""Sum over pairs of neighbouring voxels, with its gradient, in one pass and without a copy per neighbour.

Let K_ij be the similarity of voxels i and j in one window (0 elsewhere and for j = i), p_i the class probabilities, and

    E(p) = sum_i sum_j K_ij (1 - p_i . p_j),   k_i = sum_j K_ij,   q_i = sum_j K_ij p_j.

K is symmetric and takes no gradient, so E = sum_i (k_i - p_i . q_i) and dE/dp = -2 q: whoever has q has both. And q
comes from one half of the window, each offset o serving both of its directions: q_i += K p_j and q_j += K p_i with
j = i + o. k is the q of a class that is 1 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_multimodal.losses.kernels import Kernel

BLOCK = 16384  # voxels worked on at once: their probabilities, q and K stay in a processor's cache


@dataclass(frozen=True)
class Plane:
    """A view: the two spatial axes that windows span (of Z, Y, X = 0, 1, 2), and the offsets along them to be summed.

    An offset (a, b) is a > 0, or a = 0 and b > 0. ``factors`` has its factor for each kernel.
    """

    axes: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]
    factors: tuple[tuple[float, ...], ...]


def half_window(radius: int) -> list[tuple[int, int]]:
    """One of each two opposite offsets in a square window, without (0, 0).

    Example:
        >>> half_window(1)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
    """
    span = range(-radius, radius + 1)
    return [(a, b) for a in range(radius + 1) for b in span if a > 0 or b > 0]


def pair_energy(p: Tensor, image: Tensor, planes: Sequence[Plane], kernels: Sequence[Kernel]) -> Tensor:
    """E(p) summed over the planes: a scalar, differentiable once, by p only.

    Args:
        p: [N, C, Z, Y, X], fp32 or fp64.
        image: [N, I, Z, Y, X] of the same type.
    """
    return _PairEnergy.apply(p, image, planes, kernels)


class _PairEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, image: Tensor, planes: Sequence[Plane], kernels: Sequence[Kernel]) -> Tensor:
        n, classes, *size = p.shape
        q = p.new_zeros(n, classes + 1, *size)
        for plane in planes:
            a, b = plane.axes
            order = (0, 1 + a, 1 + 3 - a - b, 1 + b)
            for entry in range(n):
                part_p, part_image, part_q = (x[entry].permute(order) for x in (p, image, q))
                _add_products(part_p, part_image, part_q, plane, kernels)
        ctx.save_for_backward(q)
        rest = q[:, classes].clone()
        for c in range(classes):
            rest.addcmul_(p[:, c], q[:, c], value=-1)
        return rest.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (q,) = ctx.saved_tensors
        return q[:, :-1] * (-2 * grad), None, None, None


def _add_products(p: Tensor, image: Tensor, q: Tensor, plane: Plane, kernels: Sequence[Kernel]) -> None:
    """q += K [p, 1] for a volume laid out as [C, A, S, B]: windows span A and B, slices S are independent.

    Works on blocks of rows with a margin of the window's height below and its width at the right, where p is 0: with
    it, an offset is the same step in memory for all voxels of a block, and what it finds outside the image is nothing.
    """
    _, height, slices, width = p.shape
    reach_a = min(max(a for a, _ in plane.offsets), height - 1)
    wide = width + min(max(abs(b) for _, b in plane.offsets), width - 1)
    depth = max(1, min(slices, BLOCK // (height * wide)))
    rows = min(height, max(1, BLOCK // (depth * wide)))
    for s in range(0, slices, depth):
        for top in range(0, height, rows):
            block = (slice(None), slice(top, top + rows + reach_a), slice(s, s + depth), slice(width))
            _add_block(p[block], image[block], q[block], min(rows, height - top), wide, plane, kernels)


def _add_block(
    p: Tensor, image: Tensor, q: Tensor, rows: int, wide: int, plane: Plane, kernels: Sequence[Kernel]
) -> None:
    """q += K [p, 1] for the pairs whose upper voxel lies in the block's first rows."""
    classes, height, slices, width = p.shape
    step = slices * wide
    values = p.new_zeros(classes + 1, height, slices, wide)
    values[:classes, ..., :width] = p
    values[classes, ..., :width] = 1
    seen = image.new_zeros(image.shape[0], height, slices, wide)
    seen[..., :width] = image
    values, seen = values.flatten(1), seen.flatten(1)
    found = torch.zeros_like(values)
    for (a, b), factors in zip(plane.offsets, plane.factors):
        if a >= height or abs(b) >= width:
            continue
        offset = a * step + b
        count = min(min(rows, height - a) * step, values.shape[1] - offset)
        here, there = slice(0, count), slice(offset, offset + count)
        weight = _similarity(seen[:, here], seen[:, there], factors, kernels)
        found[:, here].addcmul_(weight, values[:, there])
        found[:, there].addcmul_(weight, values[:, here])
    q += found.view(classes + 1, height, slices, wide)[..., :width]


def _similarity(one: Tensor, other: Tensor, factors: Sequence[float], kernels: Sequence[Kernel]) -> Tensor:
    squared = (one - other).square().sum(0)
    total: Any = 0.0
    for factor, kernel in zip(factors, kernels):
        if kernel.sigma_intensity is None:
            total = total + factor
        else:
            total = total + factor * (squared * (-0.5 / kernel.sigma_intensity**2)).exp()
    return total if isinstance(total, Tensor) else torch.full_like(squared, total)


def plane_of(
    axes: tuple[int, int],
    offsets: Sequence[tuple[int, int]],
    kernels: Sequence[Kernel],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    shared: Sequence[tuple[int, int]] = (),
) -> Plane:
    """A plane with the factors of its offsets; those in ``shared`` count twice, for another plane has them, too."""
    squared = [math.hypot(a * spacing[axes[0]], b * spacing[axes[1]]) ** 2 for a, b in offsets]
    times = [2.0 if offset in shared else 1.0 for offset in offsets]
    factors = tuple(tuple(t * kernel.of_distance(d) for kernel in kernels) for d, t in zip(squared, times))
    return Plane(axes, tuple(offsets), factors)
