"""Conditional random field loss in a window: similar neighbours should be of one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_multimodal.losses.kernels import read_kernels
from nnunet_multimodal.losses.pairwise import Plane, half_window, make_plane, pair_energy
from nnunet_multimodal.losses.precision import at_least_single

KERNELS = ({"weight": 1.0, "sigma_xy": 6.0, "sigma_intensity": 0.1},)  # of PA-Seg, WSL4MIS, toshas/GatedCRFLoss


class GatedCRFLoss(nn.Module):
    """Neighbours of like brightness should have like class probabilities.

    L = 1/V sum_i sum_j K_ij (1 - sum_c p_i^c p_j^c)
    K_ij = sum_n w_n exp(-|x_i - x_j|^2 / (2 sigma_xy_n^2) - |I_i - I_j|^2 / (2 sigma_intensity_n^2))

    over ordered pairs j != i, both inside the image, j in the square window of side 2 radius + 1 around i; V is the
    number of pixels of the batch. This is CmFNet's Eq. 5 where probabilities sum to 1: sum_c p_i^c (1 - p_j^c).
    Distances are in pixels, brightness in the image's own unit (nnU-Net: standard deviations).

    Source: Obukhov et al., Gated CRF Loss for Weakly Supervised Semantic Image Segmentation (2019). Their code, and
    those made from it, count neighbours outside the image, where p is 0, as a constant; here there are none. The
    gradient is the same. The memory needed does not depend on the window: two to three times the probabilities.

    The gradient is that of the probabilities; the image takes none, and there is no second derivative.

    Args:
        kernels: each {"weight", "sigma_xy", "sigma_intensity"}; without weight it is 1, without a sigma its term is
            left out.
        radius: of the window, in pixels.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an option out of range; shapes that do not fit.

    Example:
        >>> image = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])
        >>> edge = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])
        >>> smeared = torch.tensor([[[[0.0, 1.0, 1.0, 1.0]]]])
        >>> loss = GatedCRFLoss(radius=1)
        >>> [round(loss(torch.cat([p, 1 - p], 1), image).item(), 4) for p in (edge, smeared)]
        [0.0, 0.4931]
    """

    def __init__(self, kernels: Sequence[Mapping[str, Any]] = KERNELS, radius: int = 5) -> None:
        super().__init__()
        self.kernels, self.radius = read_kernels(kernels), check_radius(radius)
        self.planes = [make_plane((1, 2), half_window(self.radius), self.kernels)]

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """The loss, a scalar, computed in fp32.

        Args:
            probabilities: [B, C, Y, X]; or [B, C, Z, Y, X], whose axial slices are as many images.
            image: [B, I, Y, X] or [B, I, Z, Y, X], one channel or several.
        """
        check_shapes(probabilities, image, (4, 5))
        if probabilities.ndim == 4:  # images of a batch are like slices of one volume
            probabilities, image = probabilities.transpose(0, 1)[None], image.transpose(0, 1)[None]
        return mean_energy(probabilities, image, self.planes)


def mean_energy(probabilities: Tensor, image: Tensor, planes: Sequence[Plane]) -> Tensor:
    """The energy of pairs in fp32, divided by the number of voxels."""
    with torch.autocast(probabilities.device.type, enabled=False):
        p = at_least_single(probabilities)
        energy = pair_energy(p, image.detach().to(p.dtype), planes)
        return energy / (p.numel() // p.shape[1])


def check_radius(radius: int) -> int:
    if isinstance(radius, bool) or not isinstance(radius, int):
        raise TypeError(f"radius must be an integer: found {radius!r}")
    if radius < 1:
        raise ValueError(f"radius must be at least 1: found {radius}")
    return radius


def check_shapes(probabilities: Tensor, image: Tensor, axes: tuple[int, ...]) -> None:
    found = f"found {tuple(probabilities.shape)} and {tuple(image.shape)}"
    if probabilities.ndim not in axes:
        layouts = " or ".join("[B, C, Y, X]" if n == 4 else "[B, C, Z, Y, X]" for n in axes)
        raise ValueError(f"probabilities must be {layouts}: {found}")
    if image.ndim != probabilities.ndim or probabilities.shape[0] != image.shape[0]:
        raise ValueError(f"image must have the axes and the batch of the probabilities: {found}")
    if image.shape[2:] != probabilities.shape[2:]:
        raise ValueError(f"image and probabilities must have the same size: {found}")
    if 0 in probabilities.shape or 0 in image.shape:
        raise ValueError(f"probabilities and image must not be empty: {found}")
    if not (probabilities.is_floating_point() and image.is_floating_point()):
        raise ValueError(f"probabilities and image must be floating: found {probabilities.dtype} and {image.dtype}")
