"""Train on one contrast, predict on others: the stock network under CrossMR's target-like intensity chain."""

from __future__ import annotations

from typing import Any, ClassVar

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_multimodal.data.contrast import TargetContrast
from nnunet_multimodal.data.repaint import Repaint, check_share
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.trainers.base import MultimodalTrainer, is_intensity, thick_axes


class nnUNetTrainerContrastAug(MultimodalTrainer):
    """nnU-Net with CrossMR's target-like intensity chain instead of its own.

    paper: CrossMR, paired augmentation, set 1; strengthened (methods.md 1.4: it matters more than architecture).
    dataset: any.
    differs: the intensity transforms; nothing else.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "repainted": 0.0,  # share of images whose regions get contrasts of their own (data/repaint.py)
    }

    def check_dataset(self) -> None:
        """Repainting tells labelled from unlabelled: it must not meet an ignore label."""
        check_share(self.settings["repainted"])
        if self.settings["repainted"] and self.label_manager.has_ignore_label:
            raise DataProblem(
                f"{self.plans_manager.dataset_name} has an ignore label: repainting would show the network where the "
                'labels are. Set "repainted" to 0 in the plans\' section nnunet_multimodal.'
            )

    def replace_intensity(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """Puts the chain where nnU-Net's intensity transforms begin."""
        at = next(i for i, transform in enumerate(stock) if is_intensity(transform))
        kept = [transform for transform in stock if not is_intensity(transform)]
        repaint = [Repaint(self.settings["repainted"])] if self.settings["repainted"] else []
        return [*kept[:at], *repaint, TargetContrast(ignore_axes=thick_axes(stock)), *kept[at:]]
