"""The paper's nnUNet-Scribble: scribbles of the target itself as further input channels."""

from __future__ import annotations

from typing import Any, ClassVar

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_multimodal.data.prompts import KeepChannels, SimulatePrompts
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.networks import PromptedUNet
from nnunet_multimodal.trainers.base import MultimodalTrainer, after_labels


class nnUNetTrainerScribble(MultimodalTrainer):
    """nnU-Net that is shown scribbles of the image it segments.

    paper: CrossMR's baseline nnUNet-Scribble, one-hot instead of one channel of labels.
    dataset: the image, then one binary scribble channel per organ named noNorm (``convert scribble``).
    differs: the last channels are drawn on the fly in training, and made binary in the network.

    Setting ``scribbles``: ``simulated`` (default) or ``stored``, which trains on the files' own scribbles.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {**MultimodalTrainer.settings_defaults, "scribbles": "simulated"}

    def check_dataset(self) -> None:
        """The last channels must be one scribble per organ."""
        organs = self.label_manager.foreground_labels
        count = len(self.channel_names)
        if self.label_manager.has_regions or self.prompt_channels != list(range(count - len(organs), count)):
            raise DataProblem(
                f"{self.plans_manager.dataset_name} has channels {self.channel_names} and labels "
                f"{list(self.dataset_json['labels'])}; {type(self).__name__} needs images, then one channel named "
                f"noNorm per organ ({len(organs)}). Run: nnunet_multimodal convert scribble"
            )
        if self.settings["scribbles"] not in ("simulated", "stored"):
            raise UsageError(f"scribbles: expected 'simulated' or 'stored', found {self.settings['scribbles']!r}.")

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' network, its prompt channels made binary."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return PromptedUNet(network, prompt_channels=num_output_channels - 1)

    def arrange(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """Only the images go through geometry; scribbles are drawn from the label where it ends up."""
        if self.settings["scribbles"] == "stored":
            return super().arrange(stock)
        images = [c for c in range(len(self.channel_names)) if c not in self.prompt_channels]
        at = after_labels(stock)
        return [
            KeepChannels(images),
            *stock[:at],
            SimulatePrompts(self.label_manager.foreground_labels, replace=False),
            *stock[at:],
        ]
