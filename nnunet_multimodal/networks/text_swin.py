"""MulModSeg on MONAI's SwinUNETR, the paper's second backbone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.networks.text_conditioned import Features, TextConditionedNetwork

MULTIPLE = 32  # five halvings


class TextSwinUNETR(TextConditionedNetwork):
    """SwinUNETR under the text-conditioned head; without deep supervision, as in the paper's code.

    Its input must be divisible by 32. nnU-Net's patches are not always: what is missing is padded with zeros, the mean
    of a z-scored image, and cut off again.

    Args:
        ndim: 2 or 3.
        feature_size: S2, 48 in the paper; the bottleneck has 16 times as many channels.
        modalities, classes, text, only: see ``TextConditionedNetwork``.
        channels: of the image.
    """

    def __init__(
        self,
        ndim: int,
        modalities: tuple[str, ...],
        classes: int,
        text: int,
        feature_size: int = 48,
        channels: int = 1,
        only: int | None = None,
    ) -> None:
        from monai.networks.nets import SwinUNETR  # a second of import that the U-Net does not need

        stages = [feature_size * 2**stage for stage in range(5)]
        super().__init__([feature_size], stages, ndim, modalities, classes, text, deep_supervision=False, only=only)
        backbone: Any = SwinUNETR(in_channels=channels, out_channels=1, feature_size=feature_size, spatial_dims=ndim)
        self.backbone = backbone
        self.backbone.out = nn.Identity()  # its own head; what comes out is the last decoder feature
        # SwinUNETR.forward keeps to itself what we need of it.
        self._stages: list[Tensor] = []
        self.backbone.swinViT.register_forward_hook(self._keep_stages)
        self.backbone.encoder10.register_forward_hook(self._keep_bottleneck)

    def _keep_stages(self, module: nn.Module, inputs: tuple, output: list[Tensor]) -> None:
        self._stages = output[:-1]

    def _keep_bottleneck(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._stages = [*self._stages, output]

    def features(self, image: Tensor) -> Features:
        """The last decoder feature is the one scale."""
        shape = image.shape[2:]
        missing = [-size % MULTIPLE for size in shape]
        padding = [p for size in reversed(missing) for p in (0, size)]
        finest = self.backbone(F.pad(image, padding) if any(missing) else image)
        stages, self._stages = self._stages, []
        return Features([finest[(..., *(slice(size) for size in shape))]], stages)
