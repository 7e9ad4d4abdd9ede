"""LoRA: a trained model of one modality becomes one of another, by a few per cent of its parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.networks.lora import inject_lora
from nnunet_multimodal.trainers.adapting import AdaptingTrainer, low_rank_settings
from nnunet_multimodal.trainers.settings import read_settings


class nnUNetTrainerLoRA(AdaptingTrainer):
    """The network of a starting model, frozen, with trainable factors of low rank in its layers.

    paper: SegEVOLution (SegVol adapted to MRI by LoRA), on the plans' own network.
    dataset: any whose channels are the starting model's; plans made by ``nnunet_multimodal adapt``.
    differs: only the factors and the output layers learn; AdamW.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **AdaptingTrainer.settings_defaults,
        "train_norm": False,  # scale and shift of normalisation layers
        "train_bias": False,  # of the layers with factors
    }
    settled_settings: ClassVar[tuple[str, ...]] = (*AdaptingTrainer.settled_settings, "train_norm", "train_bias")

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The stock network with factors."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = read_settings(configuration_manager.configuration)
        try:
            return inject_lora(
                network,
                **low_rank_settings(settings),
                trained=settings["trained_layers"],
                train_norm=settings["train_norm"],
                train_bias=settings["train_bias"],
            )
        except ValueError as error:
            raise UsageError(f"settings of LoRA in the plans: {error}") from error
