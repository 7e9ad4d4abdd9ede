"""The plans' own U-Net, opened up: its decoder features instead of its segmentation maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat, nn


def decoder_features(encoder: Any, decoder: Any, image: Tensor, finest_stage: int = 0) -> list[Tensor]:
    """Features of nnU-Net's encoder-decoder, one map a stage, down to a chosen resolution.

    Runs the loop of ``UNetDecoder.forward`` without its segmentation layers, and stops early: what only needs the
    coarse stages does not pay for the fine ones, which are the expensive ones.

    Args:
        encoder: nnU-Net encoder with ``return_skips=True`` (plain or residual), 2D or 3D.
        decoder: the matching ``UNetDecoder`` (``transpconvs`` and ``stages``, coarse to fine).
        image: [B, C, (Z,) Y, X].
        finest_stage: index of the last stage wanted; 0 is full resolution, ``n_stages - 1`` the bottleneck.

    Returns:
        list indexed by stage, so ``features[0]`` is full resolution and ``features[-1]`` the bottleneck; entries finer
        than ``finest_stage`` are left out, i.e. the list starts at ``finest_stage``.
    """
    return decode(decoder, encoder(image), finest_stage)


def decode(decoder: Any, skips: list[Tensor], finest_stage: int = 0) -> list[Tensor]:
    """The decoder's half of ``decoder_features``: encoder features ``skips`` -> the same list."""
    features = [skips[-1]]
    for step, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages)):
        if len(skips) - 2 - step < finest_stage:
            break
        features.append(stage(cat((upsample(features[-1]), skips[-2 - step]), dim=1)))
    return features[::-1]


class PromptedUNet(nn.Module):
    """A stock U-Net whose last input channels are binary prompts.

    nnU-Net resamples every channel with cubic splines, which turns a drawn scribble into ringing fractions. They are
    made binary again before the first convolution, so that training (scribbles drawn on the patch) and prediction
    (scribbles read from a resampled file) show the network the same thing.

    Args:
        network: an nnU-Net U-Net (``encoder`` and ``decoder``); its state_dict keys are kept.
        prompt_channels: how many of the last input channels are prompts.
    """

    def __init__(self, network: Any, prompt_channels: int) -> None:
        super().__init__()
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        self.prompt_channels = prompt_channels

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x: [B, C + prompts, (Z,) Y, X] -> what the stock decoder gives (a list with deep supervision)."""
        image, prompts = x[:, : -self.prompt_channels], x[:, -self.prompt_channels :]
        return self.decoder(self.encoder(cat((image, binary_prompts(prompts).to(image.dtype)), dim=1)))


def binary_prompts(prompts: Tensor, threshold: float = 0.5, faintest: float = 0.1) -> Tensor:
    """Resampled prompt channels made binary again, [B, K, ...] -> bool of the same shape.

    Half-way is the natural cut, but a thin scribble that was sampled down peaks below it. A non-empty scribble must not
    vanish, so the cut is at most half of the channel's own peak; what peaks below ``faintest`` is ringing of a scribble
    that lies elsewhere, not a scribble.
    """
    peak = prompts.flatten(2).amax(dim=2).view(*prompts.shape[:2], *[1] * (prompts.ndim - 2))
    return (prompts > (0.5 * peak).clamp(max=threshold)) & (peak > faintest)
