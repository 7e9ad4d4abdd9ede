"""Sine position code for 2D and 3D feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(size: tuple[int, ...], width: int, device: torch.device | None = None) -> Tensor:
    """The normalised sine code of DETR and Mask2Former, for any number of axes.

    Each axis gets ``width // ndim`` channels (rounded down to even; what is left stays zero): sines and cosines of the
    relative position in [0, 2 pi] at wavelengths in geometric progression up to 10000.

    Returns:
        [prod(size), width], in the order of ``flatten``.
    """
    ndim = len(size)
    share = width // ndim // 2 * 2
    wavelength = 10000 ** (torch.arange(share // 2, device=device, dtype=torch.float32) * 2 / share)
    code = torch.zeros(*size, width, device=device)
    for axis, length in enumerate(size):
        position = (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length * 2 * math.pi
        angle = position[:, None] / wavelength
        values = torch.cat((angle.sin(), angle.cos()), dim=1)
        view = [1] * ndim + [share]
        view[axis] = length
        code[..., axis * share : (axis + 1) * share] = values.view(view)
    return code.flatten(0, ndim - 1)
