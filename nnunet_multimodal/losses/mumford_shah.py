"""Mumford-Shah functional of the prediction on the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_multimodal.losses.precision import at_least_single
from nnunet_multimodal.losses.total_variation import TotalVariationLoss


class MumfordShahLoss(nn.Module):
    """Each class should be of one brightness and have a short boundary.

    L = 1/V sum_c sum_i sum_n p_i^c (I_i^n - m_c^n)^2 + tv L_TV(p),   m_c^n = sum_i p_i^c I_i^n / sum_i p_i^c,

    n over image channels, m_c of each image of the batch, V all voxels of the batch, L_TV as ``TotalVariationLoss``.

    Source: Kim and Ye, Mumford-Shah Loss Functional for Image Segmentation with Deep Learning (IEEE TIP 2020); "MS" in
    WSL4MIS, whose code hands image and probabilities over in the wrong order. Both sum over voxels; we divide by V, so
    that the weight does not depend on the patch: WSL4MIS's 1e-6 is 0.8 for 12 images of 256 x 256.
    The image takes no gradient. Nor do the means: at the mean the slope of the squared distances is 0 anyhow.

    Args:
        tv: weight of the boundary's length.

    Raises:
        ValueError: tv is negative or not finite; shapes that do not fit.

    Example:
        >>> image = torch.tensor([1.0, 1.0, 5.0, 5.0]).expand(1, 1, 2, 4)
        >>> left = (image < 3).float()
        >>> MumfordShahLoss(tv=0)(torch.cat([left, 1 - left], 1), image).item()
        0.0
    """

    def __init__(self, tv: float = 1.0) -> None:
        super().__init__()
        if not 0 <= tv < float("inf"):
            raise ValueError(f"tv must be a finite number of at least 0: found {tv!r}")
        self.tv = tv
        self.length = TotalVariationLoss()

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """The loss, a scalar, computed in fp32.

        Args:
            probabilities: [B, C, ...].
            image: [B, N, ...].
        """
        if (
            probabilities.ndim < 3
            or image.ndim != probabilities.ndim
            or image.shape[0] != probabilities.shape[0]
            or image.shape[2:] != probabilities.shape[2:]
        ):
            raise ValueError(
                f"probabilities [B, C, ...] and image [B, N, ...] do not fit: found {tuple(probabilities.shape)} and "
                f"{tuple(image.shape)}"
            )
        with torch.autocast(probabilities.device.type, enabled=False):
            p = at_least_single(probabilities)
            flat, values = p.flatten(2), image.detach().to(p.dtype).flatten(2)
            loss = p.new_zeros(())
            for channel in values.unbind(1):
                mass = flat.detach().sum(2).clamp(min=torch.finfo(p.dtype).tiny)
                mean = (flat.detach() @ channel.unsqueeze(2)).squeeze(2) / mass
                loss = loss + (flat * (channel.unsqueeze(1) - mean.unsqueeze(2)).square()).sum()
            return loss * (p.shape[1] / max(p.numel(), 1)) + self.tv * self.length(p)
