"""Referring to an organ that was never labelled in training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_multimodal.data.contrast import ReferenceContrast, TargetContrast
from nnunet_multimodal.data.open_set import BendingJitter, OpenSetPair
from nnunet_multimodal.data.pairs import ReferringPair
from nnunet_multimodal.data.prompts import KeepChannels
from nnunet_multimodal.losses.open_set import OpenSetLoss
from nnunet_multimodal.networks.open_set import OpenSetNetwork, OpenSetOutput
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.crossmr import nnUNetTrainerCrossMR
from nnunet_multimodal.trainers.settings import read_settings

NETWORK_SETTINGS: dict[str, Any] = {
    "width": 64,
    "key_width": 64,
    "heads": 2,
    "max_places": 4096,  # a stage of more places than 64 x 64 is not attended to
    "negative_prompts": True,  # an organ also learns where the others are
    "answers": 2,  # organs answered in a training sample: most of a step's time
}
DATA_SETTINGS: dict[str, Any] = {
    "prompts": 4,  # things scribbled in a training sample: what is not answered tells the others where they are not
    "structures": 0.5,  # with organs alone the network answers to nothing else
    "repainted": 0.2,
    "made_up": 0.2,
    "mask_prompts": 0.15,
}


class nnUNetTrainerCrossMR_openSet(nnUNetTrainerCrossMR):
    """Scribble on any organ of the reference, labelled in training or not; it is segmented in every other contrast.

    paper: CrossMR's task, with a memory network (after STM, Oh et al. 2019) in place of its queries.
    dataset: as nnUNetTrainerCrossMR: target, reference, one scribble per organ named noNorm (``convert crossmr``).
    differs: network, loss, AdamW; half of what is asked for in training are structures found without labels.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "num_epochs": 50,
        "initial_lr": 1e-3,
        "weight_decay": 1e-2,
        "warmup_iterations": 50,
        "gradient_clip": 1.0,
        "pretrained_encoder_lr": 0.1,  # of initial_lr, where starting_model is set
        "loss_bce": 2.5,
        "loss_dice": 2.5,
        "loss_steps": 0.4,
        "bfloat16_on_cpu": False,  # 1.5 times as fast on a processor with AMX
        **NETWORK_SETTINGS,
        **DATA_SETTINGS,
    }

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' U-Net for one image channel, inside the memory network; it knows no number of organs."""
        settings = read_settings(configuration_manager.configuration)
        unet = nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, 1, 1, False)
        return OpenSetNetwork(
            unet,
            channels=list(unet.encoder.output_channels),
            spacing=list(configuration_manager.spacing),
            patch_size=list(configuration_manager.patch_size),
            **{key: settings[key] for key in NETWORK_SETTINGS},
        )

    def _build_loss(self) -> nn.Module:
        settings = self.settings
        referring = OpenSetLoss(settings["loss_bce"], settings["loss_dice"], settings["loss_steps"])
        return OpenSetObjective(referring, nnUNetTrainer._build_loss(self))

    def pairing(self, stock_intensity: BasicTransform | None, thick: tuple[int, ...] | None = None) -> BasicTransform:
        """Target, reference and scribbles of organs and structures of one image."""
        return OpenSetPair(
            self.label_manager.foreground_labels,
            TargetContrast(ignore_axes=thick),
            ReferenceContrast(),
            BendingJitter(),
            **{key: self.settings[key] for key in DATA_SETTINGS},
        )

    def get_validation_transforms(
        self, deep_supervision_scales, is_cascaded=False, foreground_labels=None, regions=None, ignore_label=None
    ) -> BasicTransform:
        """The organs alone, in a contrast unlike the reference's, as CrossMR has them."""
        stock = MultimodalTrainer.get_validation_transforms(
            self, deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )
        organs = self.label_manager.foreground_labels
        pair = ReferringPair(organs, TargetContrast(), ReferenceContrast(), BendingJitter())
        return ComposeTransforms([KeepChannels([1]), pair, *self.masking(), *stock.transforms])

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, which knows mixed precision on GPUs only."""
        mixed = self.device.type == "cpu" and self.settings["bfloat16_on_cpu"]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return super().train_step(batch)


class OpenSetObjective(nn.Module):
    """The open-set loss in training; nnU-Net's Dice and cross-entropy of the logits in validation."""

    def __init__(self, referring: OpenSetLoss, of_logits: nn.Module) -> None:
        super().__init__()
        self.referring, self.of_logits = referring, of_logits

    def forward(self, output: Tensor | OpenSetOutput, target: Tensor) -> Tensor:
        """Output of the network in either mode; target [B, 2, ...] from ``OpenSetPair``, or labels [B, 1, ...]."""
        if isinstance(output, Tensor):
            return self.of_logits(output, target)
        number = (output.organ + 1).view(*output.organ.shape, *[1] * (target.ndim - 2))
        masks = [target[:, at : at + 1] == number for at in (0, 1)]
        return self.referring(output.answer, output.reference, output.carried, output.present, *masks)
