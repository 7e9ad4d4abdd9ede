"""Two intensity chains: what another sequence would have shown, and what the same one would show another day.

CrossMR (set 1 and set 2 of its paired augmentation) makes a target-like and a reference-like image of one slice. Its
target set is noise or Gibbs ringing with contrast and scale changes. Ours goes further: on unseen contrasts a random
intensity curve did more for a small prototype than any change of architecture, for a plain U-Net too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

from nnunet_multimodal.data.intensity import BiasField, Blur, Gibbs, Noise, Remap, Scale, Sometimes

ROUNDING = 1e-5  # a standard deviation below this share of the mean is float32's rounding of a constant image


class ContrastChain(ImageOnlyTransform):
    """Sends each chosen channel of an image [C, ...] through its own draw of a list of transforms.

    Args:
        steps: transforms that draw everything random in ``get_parameters``.
        channels: channels to change; None means all. The others stay bit for bit what they were.
        zscore: bring each changed channel back to mean 0 and standard deviation 1, as nnU-Net does with every image.
    """

    def __init__(self, steps: Sequence[BasicTransform], channels: Sequence[int] | None, zscore: bool) -> None:
        super().__init__()
        self.steps = list(steps)
        self.channels = None if channels is None else list(channels)
        self.zscore = zscore

    def get_parameters(self, **data_dict: Any) -> dict:
        image = data_dict["image"]
        channels = range(len(image)) if self.channels is None else self.channels
        return {"draws": {c: [step.get_parameters(image=image[c : c + 1]) for step in self.steps] for c in channels}}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel, draws in params["draws"].items():
            one = {"image": img[channel : channel + 1]}  # a view: like nnU-Net's own transforms we work in place
            for step, drawn in zip(self.steps, draws):
                one = step.apply(one, **drawn)
            img[channel] = zscore(one["image"][0]) if self.zscore else one["image"][0]
        return img


class TargetContrast(ContrastChain):
    """The strong chain: an image of the same anatomy in a contrast that nobody measured.

    In the order in which a scanner would do it: tissue contrast (intensity curve, gamma), receive coil (bias field),
    resolution (blur, low resolution, Gibbs ringing), noise. The result is z-scored again.

    Args:
        channels: image channels to change; None means all.
        p_remap: share of the samples with an intensity curve; the rest keep their contrast, which is a real one.
        p_gamma, p_blur, p_low_resolution: as often as in nnU-Net's own chain.
        p_bias: most abdominal images have a visible field; but it is cheap to learn.
        p_gibbs: ringing is rare, and the Fourier transforms are the dearest step.
        p_noise: a little more often than nnU-Net (0.1), because DWI is noisier than its training images.
        remap, bias_strength, gamma, blur, low_resolution, gibbs_kept, noise: ranges; see the transforms.
        ignore_axes: spatial axes that low resolution leaves alone: (0,) for strongly anisotropic 3D patches.
    """

    def __init__(
        self,
        channels: Sequence[int] | None = None,
        *,
        p_remap: float = 0.75,
        p_gamma: float = 0.3,
        p_bias: float = 0.3,
        p_blur: float = 0.1,
        p_low_resolution: float = 0.125,
        p_gibbs: float = 0.1,
        p_noise: float = 0.15,
        remap: tuple[int, int] = (2, 6),
        gamma: tuple[float, float] = (0.7, 1.5),
        bias_strength: tuple[float, float] = (0.1, 0.6),
        blur: tuple[float, float] = (0.5, 1.2),
        low_resolution: tuple[float, float] = (0.5, 1.0),
        gibbs_kept: tuple[float, float] = (0.4, 0.8),
        noise: tuple[float, float] = (0.0, 0.25),
        ignore_axes: tuple[int, ...] | None = None,
    ) -> None:
        # batchgeneratorsv2's own transforms gate with torch.rand; at probability 1 nothing depends on that draw
        steps = [
            Sometimes(Remap(remap), p_remap),
            Sometimes(_gamma(gamma, keep_statistics=False), p_gamma),
            Sometimes(BiasField(bias_strength), p_bias),
            Sometimes(Blur(blur), p_blur),
            Sometimes(SimulateLowResolutionTransform(low_resolution, False, True, ignore_axes), p_low_resolution),
            Sometimes(Gibbs(gibbs_kept), p_gibbs),
            Sometimes(Noise(noise), p_noise),
        ]
        super().__init__(steps, channels, zscore=True)


class ReferenceContrast(ContrastChain):
    """The mild chain: the image as it is, or slightly changed in contrast, brightness, gamma and noise.

    Args:
        channels: image channels to change; None means all.
        p_scale, p_gamma, p_noise: with these probabilities a quarter of the references stays as it was.
        contrast, brightness, gamma, noise: ranges; see the transforms.
    """

    def __init__(
        self,
        channels: Sequence[int] | None = None,
        *,
        p_scale: float = 0.5,
        p_gamma: float = 0.3,
        p_noise: float = 0.15,
        contrast: tuple[float, float] = (0.85, 1.15),
        brightness: tuple[float, float] = (-0.15, 0.15),
        gamma: tuple[float, float] = (0.85, 1.2),
        noise: tuple[float, float] = (0.0, 0.1),
    ) -> None:
        steps = [
            Sometimes(Scale(contrast, brightness), p_scale),
            Sometimes(_gamma(gamma, keep_statistics=True), p_gamma),
            Sometimes(Noise(noise), p_noise),
        ]
        super().__init__(steps, channels, zscore=False)


def zscore(image: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std over all voxels, in a new tensor; zeros where the image is constant."""
    mean = image.mean()
    centred = image - mean
    flat = centred.flatten()
    std = (torch.dot(flat, flat) / flat.numel()).sqrt()  # torch.std takes five times as long
    if std <= ROUNDING * mean.abs():
        return torch.zeros_like(image)
    return centred.div_(std)


def _gamma(gamma: tuple[float, float], keep_statistics: bool) -> GammaTransform:
    """nnU-Net's gamma; BGContrast darkens and brightens equally often."""
    return GammaTransform(
        BGContrast(gamma), 0, synchronize_channels=False, p_per_channel=1, p_retain_stats=float(keep_statistics)
    )
