"""DMSPS: two decoders that teach each other by dynamically mixed soft pseudo labels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.losses.pseudo_labels import MixedPseudoLabelLoss
from nnunet_multimodal.networks.two_decoders import TwoDecoders
from nnunet_multimodal.trainers.settings import read_settings
from nnunet_multimodal.trainers.weak import WeakTrainer, freeze_unused_heads


class nnUNetTrainerDMSPS(WeakTrainer):
    """A second decoder, behind dropout; a random mixture of both answers is each one's pseudo label.

    paper: DMSPS (Han et al., Medical Image Analysis 2024), its first stage.
    dataset: scribbles, with nnU-Net's ignore label for what nobody drew (``scribbles import``).
    differs: the second decoder, which is stored and not used at prediction; the loss.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **WeakTrainer.settings_defaults,
        "ramp_up": 0.0,
        "pseudo_weight": 8.0,
        "pseudo_sharpened": True,  # the published code's cross-entropy; False: of the logits (losses/pseudo_labels.py)
        "decoder_dropout": 0.5,
    }

    def check_dataset(self) -> None:
        """A weight is no less than 0, and not all channels are dropped."""
        super().check_dataset()
        if self.settings["pseudo_weight"] < 0:
            raise UsageError(f"pseudo_weight: expected at least 0, found {self.settings['pseudo_weight']!r}.")
        if not 0 <= self.settings["decoder_dropout"] < 1:
            raise UsageError(f"decoder_dropout: expected 0 to below 1, found {self.settings['decoder_dropout']!r}.")

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' network and the decoder of another one."""
        settings = read_settings(configuration_manager.configuration)
        first, second = (
            WeakTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
            for _ in range(2)
        )
        if not enable_deep_supervision:
            freeze_unused_heads(second.decoder)
        return TwoDecoders(first, second.decoder, settings["decoder_dropout"])

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Of both decoders."""
        super().set_deep_supervision_enabled(enabled)
        network: Any = self.bare_network()
        network.second.deep_supervision = network.decoder.deep_supervision

    def weak_loss(self) -> nn.Module:
        """What is drawn, and the mixed pseudo labels."""
        settings = self.settings
        return MixedPseudoLabelLoss(
            self.partial_loss(), settings["pseudo_weight"], settings["pseudo_sharpened"], self.scales()
        )
