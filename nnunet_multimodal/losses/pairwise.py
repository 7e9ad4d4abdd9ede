"""Sum over pairs of neighbouring voxels, with its gradient, in one pass and without a copy per neighbour.

Let K_ij be the similarity of voxels i and j in one window (0 elsewhere and for j = i), p_i the class probabilities, and

    E(p) = sum_i sum_j K_ij (1 - p_i . p_j),   k_i = sum_j K_ij,   q_i = sum_j K_ij p_j.

K is symmetric and takes no gradient, so E = sum_i (k_i - p_i . q_i) and dE/dp = -2 q: whoever has q has both. And q
comes from one half of the window, each offset o serving both of its directions: q_i += K p_j and q_j += K p_i with
j = i + o. The value is summed as

    E(p) = sum_i sum_c (1 - p_i^c) q_i^c + sum_i k_i (1 - sum_c p_i^c),

the same by symmetry, but nothing large cancels, and probabilities that sum to 1 do without k. Others take it along as
the q of one more class, which is 1 everywhere.

The work is done in blocks that stay in a processor's cache. A block has margins in which p is 0: with them an offset
is the same step in memory for all its voxels, and what it finds outside the image is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_multimodal.losses.kernels import FAINTEST, Kernel

BLOCK = 2**17  # probabilities in a block, for each thread: with as many of q they fill half of a 2 MB cache
BLOCK_ELSEWHERE = 2**22  # on a GPU, where what counts is that few calls are needed
RUN = 6  # offsets whose K is computed in one call: more no longer pay for the cache they take


@dataclass(frozen=True)
class Offset:
    """A step along two axes, a > 0 or a = 0 and b > 0, and what kernels make of its length.

    ``constant`` sums the kernels without brightness, ``factors`` the others, for each of the plane's rates.
    """

    a: int
    b: int
    constant: float
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Plane:
    """A view: the two of the axes Z, Y, X = 0, 1, 2 that windows span, a before b, and the offsets along them.

    Brightness is multiplied by ``scale``; with D the squared difference then, exp(-rate D) is a similarity. There is a
    rate for each different sigma_intensity.
    """

    a: int
    b: int
    scale: float
    rates: tuple[float, ...]
    offsets: tuple[Offset, ...]


def half_window(radius: int) -> list[tuple[int, int]]:
    """One of each two opposite offsets in a square window, without (0, 0).

    Example:
        >>> half_window(1)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
    """
    span = range(-radius, radius + 1)
    return [(a, b) for a in range(radius + 1) for b in span if a > 0 or b > 0]


def make_plane(
    axes: tuple[int, int],
    offsets: Sequence[tuple[int, int]],
    kernels: Sequence[Kernel],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    twice: Sequence[tuple[int, int]] = (),
) -> Plane:
    """A plane with what kernels make of its offsets; those in ``twice`` stand for another plane's, too."""
    sigmas = sorted({kernel.sigma_intensity for kernel in kernels if kernel.sigma_intensity is not None})
    widest = max(sigmas, default=1.0)
    made = []
    for a, b in offsets:
        squared = (a * spacing[axes[0]]) ** 2 + (b * spacing[axes[1]]) ** 2
        times = 2 if (a, b) in twice else 1
        of_sigma = dict.fromkeys([None, *sigmas], 0.0)
        for kernel in kernels:
            of_sigma[kernel.sigma_intensity] += times * kernel.of_distance(squared)
        if any(of_sigma.values()):
            made.append(Offset(a, b, of_sigma.pop(None), tuple(of_sigma.values())))
    rates = tuple((widest / sigma) ** 2 for sigma in sigmas)
    return Plane(*axes, 1 / (math.sqrt(2) * widest), rates, tuple(made))


def pair_energy(p: Tensor, image: Tensor, planes: Sequence[Plane]) -> Tensor:
    """E(p) summed over the planes: a scalar, differentiable once, by p only.

    Args:
        p: [N, C, Z, Y, X], fp32 or fp64.
        image: [N, I, Z, Y, X] of the same type.
        planes: as made by ``make_plane``.
    """
    return _PairEnergy.apply(p, image, planes)


class _PairEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, image: Tensor, planes: Sequence[Plane]) -> Tensor:
        missing = 1 - p.sum(1)
        summing_to_one = missing.abs().max() <= 8 * torch.finfo(p.dtype).eps  # up to what softmax rounds
        q = torch.zeros_like(p)  # in the layout of p, so that autograd keeps what backward returns instead of a copy
        k = None if summing_to_one else torch.zeros_like(missing)
        for plane in planes:
            _add_products(p, image, q, k, plane)
        energy = torch.zeros_like(missing) if k is None else missing.mul_(k)
        for p_class, q_class in zip(p.unbind(1), q.unbind(1)):
            energy.addcmul_(1 - p_class, q_class)
        ctx.save_for_backward(q)
        return energy.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (q,) = ctx.saved_tensors
        return q * (-2 * grad), None, None


def _add_products(p: Tensor, image: Tensor, q: Tensor, k: Tensor | None, plane: Plane) -> None:
    """q += K p and k += K 1 over all offsets of a plane, block by block."""
    if not plane.offsets:
        return
    order = (0, 1 + plane.a, *(1 + axis for axis in range(3) if axis != plane.a))
    b_last = plane.b == 2
    height, *rest = (p.shape[1 + axis] for axis in order[1:])
    width, slices = (rest[1], rest[0]) if b_last else rest
    reach = min(max(offset.a for offset in plane.offsets), height - 1)
    margin = min(max(abs(offset.b) for offset in plane.offsets), width - 1)
    limit = BLOCK * torch.get_num_threads() if p.device.type == "cpu" else BLOCK_ELSEWHERE
    classes = p.shape[1] + (k is not None)
    voxels = limit // classes
    depth = max(1, min(slices, voxels // (height * (width + margin))))
    rows = max(1, min(height, voxels // (depth * (width + margin))))
    room = _Room(p, classes, image.shape[1], min(rows + reach, height) * depth * (width + margin))
    blocks: dict[tuple[int, ...], _Block] = {}
    for entry in range(len(p)):
        volumes = [x[entry].permute(order) for x in (p, image, q)]
        volume_k = None if k is None else k[entry].unsqueeze(0).permute(order)
        for s in range(0, slices, depth):
            for top in range(0, height, rows):
                across = slice(s, min(s + depth, slices))
                down = slice(top, min(top + rows + reach, height))
                where = (slice(None), down, *((across, slice(None)) if b_last else (slice(None), across)))
                key = (down.stop - top, across.stop - s, min(rows, height - top))
                if key not in blocks:
                    blocks[key] = _Block(room, plane, *key, width, margin)
                part_p, part_image, part_q = (volume[where] for volume in volumes)
                blocks[key].add(part_p, part_image, part_q, None if volume_k is None else volume_k[where])


class _Room:
    """The memory that all blocks work in, one after the other."""

    def __init__(self, like: Tensor, classes: int, channels: int, voxels: int) -> None:
        self.classes, self.channels = classes, channels
        self.p, self.q = (like.new_empty(classes * voxels) for _ in range(2))
        self.image = like.new_empty(channels * voxels)
        self.scratch = like.new_empty(3, RUN * voxels)
        self.zero, self.one = like.new_zeros(1), like.new_ones(1)


class _Pairs(NamedTuple):
    """The voxels of a block that have a neighbour at one offset, and that neighbour; K is weight times factor."""

    weight: Tensor
    factor: float
    p_here: Tensor
    p_there: Tensor
    q_here: Tensor
    q_there: Tensor


class _Run(NamedTuple):
    """Some offsets with the same a and one b after the other: K and what it takes, [offsets, voxels]."""

    image: list[tuple[Tensor, Tensor]]  # here and there, channel by channel
    exponent: Tensor
    difference: Tensor
    total: Tensor
    constants: Tensor  # [offsets, 1]
    factors: Tensor  # [rates, offsets, 1]
    pairs: list[_Pairs]


class _Block:
    """A block of one shape, and the views that its offsets need, made once.

    Args:
        height: its rows along a, of which the first ``rows`` are its own, and the others neighbours' of these only.
        slices: its extent along the axis that windows do not span.
        width, margin: its extent along b, and that of the margin there.
    """

    def __init__(self, room: _Room, plane: Plane, height: int, slices: int, rows: int, width: int, margin: int) -> None:
        wide, b_last = width + margin, plane.b == 2
        size = (height, slices, wide) if b_last else (height, wide, slices)
        inside = (..., slice(width)) if b_last else (..., slice(width), slice(None))
        self.room, self.plane, self.rows = room, plane, rows
        self.row, self.step = slices * wide, 1 if b_last else slices  # of one along a and along b, in memory
        self.length = height * self.row
        self.single = len(plane.rates) == 1 and not any(offset.constant for offset in plane.offsets)
        self.p = room.p[: room.classes * self.length].view(room.classes, self.length)
        self.q = room.q[: room.classes * self.length].view(room.classes, self.length)
        self.image = room.image[: room.channels * self.length].view(room.channels, self.length)
        self.p_inside, self.q_inside, self.image_inside = (
            x.view(len(x), *size)[inside] for x in (self.p, self.q, self.image)
        )
        offsets = [offset for offset in plane.offsets if offset.a < height and abs(offset.b) < width]
        self.runs = [self._prepare(run) for run in _runs(offsets)]

    def _prepare(self, offsets: Sequence[Offset]) -> _Run:
        jumps = [offset.a * self.row + offset.b * self.step for offset in offsets]
        count = min(self.rows * self.row, self.length - jumps[-1])
        here = slice(count)
        image = [(x[here], x[jumps[0] : jumps[-1] + count].unfold(0, count, self.step)) for x in self.image]
        scratch = self.room.scratch[:, : len(offsets) * count].view(3, len(offsets), count)
        exponent, difference, total = scratch
        rates, constants = self.plane.rates, [offset.constant for offset in offsets]
        if not rates:
            weights, values = [self.room.one] * len(offsets), constants
        elif self.single:
            weights, values = list(exponent), [offset.factors[0] for offset in offsets]
        else:
            weights, values = list(total), [1.0] * len(offsets)
        pairs = []
        for jump, weight, value in zip(jumps, weights, values):
            there = slice(jump, jump + count)
            pairs.append(_Pairs(weight, value, *(x[:, part] for x in (self.p, self.q) for part in (here, there))))
        factors = [[offset.factors[n] for offset in offsets] for n in range(len(rates))]
        of = self.room.one.new_tensor
        return _Run(image, exponent, difference, total, of(constants)[:, None], of(factors)[..., None], pairs)

    def add(self, p: Tensor, image: Tensor, q: Tensor, k: Tensor | None) -> None:
        """q += K p and k += K 1 for the pairs whose first voxel lies in the block's own rows."""
        self.p.zero_()
        self.p_inside[: len(p)] = p
        self.p_inside[len(p) :] = 1  # the class that is 1 everywhere, where k is wanted
        self.image.zero_()
        self.image_inside.copy_(image).mul_(self.plane.scale)
        self.q.zero_()
        for run in self.runs:
            self._weigh(run)
            for weight, factor, p_here, p_there, q_here, q_there in run.pairs:
                q_here.addcmul_(weight, p_there, value=factor)
                q_there.addcmul_(weight, p_here, value=factor)
        q += self.q_inside[: len(p)]
        if k is not None:
            k += self.q_inside[len(p) :]

    def _weigh(self, run: _Run) -> None:
        """Computes the weights of a run's pairs.

        No exponent is below -40: from -87 on, numbers are denormal, and a processor takes a hundred times longer to
        multiply these. On noise of deviation 1 the loss as a whole took ten times longer.
        """
        rates = self.plane.rates
        if not rates:
            return
        # In place where nothing else is needed: this is a good part of all the work, and the cache is small.
        difference = run.exponent if len(run.image) == 1 else run.difference
        so_far = self.room.zero
        for here, there in run.image:
            torch.sub(here, there, out=difference)
            so_far = torch.addcmul(so_far, difference, difference, value=-1, out=run.exponent)
        if self.single:
            run.exponent.clamp_(min=FAINTEST).exp_()
            return
        run.total.copy_(run.constants.expand_as(run.total))
        for rate, factors in zip(rates, run.factors):
            similarity = torch.mul(run.exponent, rate, out=run.difference).clamp_(min=FAINTEST).exp_()
            run.total.addcmul_(similarity, factors)


def _runs(offsets: Sequence[Offset]) -> list[list[Offset]]:
    """Cuts offsets, in their order, where b does not go on by one or RUN is reached."""
    runs: list[list[Offset]] = []
    for offset in offsets:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.a, last.b + 1) == (offset.a, offset.b) and len(runs[-1]) < RUN:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return runs
