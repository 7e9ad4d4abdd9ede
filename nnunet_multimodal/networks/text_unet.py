"""MulModSeg on the plans' own U-Net."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnunet_multimodal.networks.text_conditioned import Features, TextConditionedNetwork
from nnunet_multimodal.networks.unet import decode


class TextUNet(TextConditionedNetwork):
    """nnU-Net's encoder-decoder (plain or residual) under the text-conditioned head.

    ``encoder`` and ``decoder`` keep the stock state_dict keys, so a stock checkpoint can be a starting model.

    Args:
        network: nnU-Net's U-Net from the plans.
        modalities, classes, text, deep_supervision, only: see ``TextConditionedNetwork``.
    """

    def __init__(
        self,
        network: Any,
        modalities: tuple[str, ...],
        classes: int,
        text: int,
        deep_supervision: bool,
        only: int | None = None,
    ) -> None:
        channels = list(network.encoder.output_channels)
        ndim = 2 if network.encoder.conv_op is nn.Conv2d else 3
        super().__init__(channels[:-1], channels, ndim, modalities, classes, text, deep_supervision, only)
        self.encoder: Any = network.encoder
        self.decoder: Any = network.decoder
        # The stock heads would be parameters without a gradient, on which distributed training stops.
        self.decoder.seg_layers = nn.ModuleList()

    def features(self, image: Tensor) -> Features:
        """Every decoder stage is a scale."""
        skips = self.encoder(image)
        return Features(decode(self.decoder, skips)[:-1], skips)
