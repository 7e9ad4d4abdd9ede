"""Zoom-out-zoom-in: find a thing in the whole volume made small, then look closely where it is (SegVol)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnunet_multimodal.data.prompt_sampling import box_of
from nnunet_multimodal.inference.prompted import Asker, Question, spatial
from nnunet_multimodal.inference.prompts import within


@dataclass(frozen=True)
class Zoomed:
    """What zooming found.

    Attributes:
        logits: [Z, Y, X] of the volume.
        region: where it was looked at closely; None where nothing was found from afar, and that is the result.
    """

    logits: Tensor
    region: tuple[slice, ...] | None


def found_region(mask: np.ndarray, window: Sequence[int]) -> tuple[slice, ...] | None:
    """The box around what was found from afar, at least one window large where the volume is.

    From afar a border is known to a voxel of the small volume, so there is that much more on each side; SegVol, which
    has no such margin, cuts off what it did not see. SegVol pads to both sides, too, and drops what sticks out of the
    volume; here the region is moved into it instead, so that a window at the border is not half padding.

    Args:
        mask: bool [Z, Y, X].
        window: of the network.

    Returns:
        A slice an axis; None for an empty mask.
    """
    box = box_of(mask)
    if box is None:
        return None
    region = []
    for first, last, size, length in zip(*box.tolist(), window, mask.shape):
        margin = -(-length // size) - 1  # none where the volume was not made smaller
        wanted = min(max(last - first + 1 + 2 * margin, size), length)
        begin = min(max((first + last + 1 - wanted) // 2, 0), length - wanted)
        region.append(slice(begin, begin + wanted))
    return tuple(region)


def zoom(asker: Asker, image: Tensor, question: Question) -> Zoomed:
    """Zooms out, then in.

    Source: SegVol's inference, methods.md 5.3. Up close, the prompts are:
      text: always, as it is;
      points: those in the window, and the box around what was found from afar;
      box: as it is if one window holds the region, else around what was found from afar in each window.
    A window with nothing of these is not asked, and keeps what was seen from afar.

    Args:
        asker: the network.
        image: [C, Z, Y, X], preprocessed.
        question: about it.
    """
    coarse = asker.whole(image, [question])[0]
    mask = (coarse > 0).numpy()
    region = found_region(mask, asker.window)
    if region is None:
        return Zoomed(coarse, None)
    begin = [part.start for part in region]
    length = [part.stop - part.start for part in region]
    inside = mask[region]
    one_window = all(size <= wide for size, wide in zip(length, asker.window))
    own = within(question.located, begin, length)

    def asking(corner: tuple[int, ...]) -> list[Question | None]:
        """corner: of a window, in the region; it may begin before it, in padding."""
        part = within(own, corner, asker.window)
        if question.located.box is None and not len(question.located.points):
            return [Question(question.text, part)]  # by text alone
        if question.located.box is None or not one_window:
            part = replace(part, box=_box_in(inside, corner, asker.window))
        asked = Question(question.text, part)
        return [asked if asked.asks else None]

    fine, asked = asker.sliding(image[spatial(region)], [question], asking)
    result = coarse.clone()
    result[region] = torch.where(asked[0], fine[0], coarse[region])
    return Zoomed(result, region)


def _box_in(mask: np.ndarray, corner: Sequence[int], window: Sequence[int]) -> np.ndarray | None:
    """The box around what a window holds of a mask, counted from the window's first voxel."""
    part = mask[tuple(slice(max(0, low), max(0, low + size)) for low, size in zip(corner, window))]
    box = box_of(part)
    return None if box is None else box - np.minimum(corner, 0)
