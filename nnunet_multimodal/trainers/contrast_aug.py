"""Train on one contrast, predict on others: the stock network under CrossMR's target-like intensity chain."""

from __future__ import annotations

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_multimodal.data.contrast import TargetContrast
from nnunet_multimodal.trainers.base import MultimodalTrainer, is_intensity, thick_axes


class nnUNetTrainerContrastAug(MultimodalTrainer):
    """nnU-Net with CrossMR's target-like intensity chain instead of its own.

    paper: CrossMR, paired augmentation, set 1; strengthened (methods.md 1.4: it matters more than architecture).
    dataset: any.
    differs: the intensity transforms; nothing else.
    """

    def replace_intensity(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """Puts the chain where nnU-Net's intensity transforms begin."""
        at = next(i for i, transform in enumerate(stock) if is_intensity(transform))
        kept = [transform for transform in stock if not is_intensity(transform)]
        return [*kept[:at], TargetContrast(ignore_axes=thick_axes(stock)), *kept[at:]]
