"""CrossMR: scribble on one contrast, segment in the others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_multimodal.data.contrast import ReferenceContrast, TargetContrast
from nnunet_multimodal.data.pairs import ReferenceJitter, ReferringPair
from nnunet_multimodal.data.prompts import KeepChannels
from nnunet_multimodal.data.repaint import Repaint, check_share
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses import ReferringLoss
from nnunet_multimodal.networks import CrossMRNetwork, ReferringOutput
from nnunet_multimodal.trainers.base import MultimodalTrainer, is_intensity, thick_axes
from nnunet_multimodal.trainers.schedule import adamw
from nnunet_multimodal.trainers.settings import read_settings

NETWORK_SETTINGS: dict[str, Any] = {
    "queries": 11,  # N of the paper
    "width": 128,  # SEEM has 512; methods.md appendix D: 128 to 256 for nnU-Net's patches
    "heads": 4,
    "hidden": 512,
    "layers": 6,  # twice through the three levels; SEEM has 9
    "levels": 3,
    "mask_stage": 2,  # masks for matching at stride 4, SEEM's; the answer itself is at full resolution
    "max_tokens": 512,
    "tokens_first": True,  # the paper has cross-attention first; a prototype learned faster this way
    "visual_tokens": True,
    "organ_queries": True,
    "pool_batch_tokens": False,
    "cross_sample": 0.25,
}


class nnUNetTrainerCrossMR(MultimodalTrainer):
    """Draw scribbles on one reference contrast; the organ is segmented in every other.

    paper: CrossMR (All You Need Is a Reference), on nnU-Net's encoder-decoder in place of FocalNet.
    dataset: channels target, reference, then one scribble per organ named noNorm (``convert crossmr``).
    differs: network, loss, AdamW; target and reference are made on the fly from one labelled contrast.
    """

    deep_supervision = False  # a prediction per decoder layer takes its place
    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "num_epochs": 50,
        "initial_lr": 1e-3,  # from scratch the same for the encoder, too: a tenth of it learned next to nothing
        "weight_decay": 1e-2,
        "warmup_iterations": 50,
        "gradient_clip": 1.0,
        "pretrained_encoder_lr": 0.1,  # of initial_lr, where starting_model is set (the paper's)
        "paired_augmentation": True,
        "repainted": 0.0,  # share of targets whose regions get contrasts of their own; paired augmentation only
        "loss_bce": 2.5,
        "loss_dice": 2.5,
        "match_bce": 2.0,
        "match_dice": 2.0,
        "loss_selection": 0.4,
        **NETWORK_SETTINGS,
    }

    def check_dataset(self) -> None:
        """Target, reference, and a scribble for each organ."""
        check_share(self.settings.get("repainted", 0.0))
        if self.is_cascaded:
            raise UsageError(f"{type(self).__name__} has no cascade: train 2d, 3d_fullres or 3d_lowres.")
        if self.label_manager.has_ignore_label:
            raise DataProblem(
                f"{self.plans_manager.dataset_name} has an ignore label: {type(self).__name__} needs dense labels of "
                "the reference contrast."
            )
        organs = self.label_manager.foreground_labels
        names = [name.casefold() for name in self.channel_names]
        if self.label_manager.has_regions or names != ["target", "reference"] + ["nonorm"] * len(organs):
            raise DataProblem(
                f"{self.plans_manager.dataset_name} has channels {self.channel_names} and labels "
                f"{list(self.dataset_json['labels'])}; {type(self).__name__} needs target, reference, then one channel "
                f"named noNorm per organ ({len(organs)}). Run: nnunet_multimodal convert crossmr"
            )

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' U-Net for one image channel, inside the referring network."""
        settings = read_settings(configuration_manager.configuration)
        unet = nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, 1, 1, False)
        return CrossMRNetwork(
            unet,
            channels=list(unet.encoder.output_channels),
            organs=num_output_channels - 1,
            **{key: settings[key] for key in NETWORK_SETTINGS},
        )

    def configure_optimizers(self):
        """AdamW; the encoder slower only if it was pretrained."""
        encoder = [p for name, p in self.bare_network().named_parameters() if name.startswith("encoder.")]
        rest = [p for name, p in self.bare_network().named_parameters() if not name.startswith("encoder.")]
        pretrained = self.settings["starting_model"] is not None
        groups = [
            {"params": encoder, "lr_scale": self.settings["pretrained_encoder_lr"] if pretrained else 1.0},
            {"params": rest, "lr_scale": 1.0},
        ]
        return adamw(self, groups)

    def _build_loss(self) -> nn.Module:
        settings = self.settings
        referring = ReferringLoss(
            settings["loss_bce"],
            settings["loss_dice"],
            settings["match_bce"],
            settings["match_dice"],
            settings["loss_selection"],
            organ_match=settings["organ_queries"],
        )
        return Objective(referring, super()._build_loss(), self.label_manager.foreground_labels)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none to switch."""

    # --- data --------------------------------------------------------------------------------------------------------

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Never mirrored at prediction: a kept reference would not be mirrored with the target."""
        configured = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return configured

    def arrange(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """One image through nnU-Net's geometry, then two appearances and fresh scribbles."""
        geometry = [t for t in stock if not is_intensity(t) and not isinstance(t, MaskImageTransform)]
        intensity = ComposeTransforms([t for t in stock if is_intensity(t)])
        at = next(i for i, t in enumerate(geometry) if isinstance(t, RemoveLabelTansform))
        pair = [self.pairing(intensity, thick_axes(stock)), *self.masking()]
        return [KeepChannels([1]), *geometry[:at], *pair, *geometry[at:]]

    def masking(self) -> list[BasicTransform]:
        """Where nnU-Net normalised inside the non-zero region only, both appearances are 0 outside of it."""
        if not self.configuration_manager.use_mask_for_norm[1]:
            return []
        return [MaskImageTransform(apply_to_channels=[0, 1], channel_idx_in_seg=0, set_outside_to=0)]

    def pairing(self, stock_intensity: BasicTransform | None, thick: tuple[int, ...] | None = None) -> ReferringPair:
        """What makes target, reference and scribbles of one image; thick: axes that low resolution leaves alone."""
        organs = self.label_manager.foreground_labels
        if self.settings["paired_augmentation"]:
            chains = TargetContrast(ignore_axes=thick), ReferenceContrast(), ReferenceJitter()
            repaint = Repaint(self.settings["repainted"]) if self.settings["repainted"] else None
            return ReferringPair(organs, *chains, repaint=repaint)
        return ReferringPair(organs, stock_intensity, None, None, paired=False)

    def get_validation_transforms(
        self, deep_supervision_scales, is_cascaded=False, foreground_labels=None, regions=None, ignore_label=None
    ) -> BasicTransform:
        """Pairs as in training, without its geometry: the pseudo Dice is of contrasts unlike the reference."""
        stock = super().get_validation_transforms(
            deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )
        if not self.settings["paired_augmentation"]:
            return stock
        return ComposeTransforms([KeepChannels([1]), self.pairing(None), *self.masking(), *stock.transforms])


class Objective(nn.Module):
    """The referring loss in training; nnU-Net's Dice and cross-entropy of the logits in validation."""

    def __init__(self, referring: ReferringLoss, of_logits: nn.Module, organs: list[int]) -> None:
        super().__init__()
        self.referring, self.of_logits, self.organs = referring, of_logits, organs

    def forward(self, output: Tensor | ReferringOutput, target: Tensor) -> Tensor:
        """output of the network in either mode; target [B, 1, ...] label map."""
        if isinstance(output, Tensor):
            return self.of_logits(output, target)
        parts = [output.answer, output.scores, *output.masks]
        if not torch.stack([torch.isfinite(part).all() for part in parts]).all():
            return torch.stack([part.sum() for part in parts]).sum()  # not finite either: the trainer stops, says where
        masks = torch.cat([target == organ for organ in self.organs], dim=1)
        return self.referring(output.masks, output.scores, output.answer, output.present, masks)


class nnUNetTrainerCrossMR_noVisualTokens(nnUNetTrainerCrossMR):
    """The queries never see the scribble's tokens; only the score of each query does."""

    fixed_settings: ClassVar[dict[str, Any]] = {"visual_tokens": False}


class nnUNetTrainerCrossMR_noOrganMatch(nnUNetTrainerCrossMR):
    """Any query may answer for any organ."""

    fixed_settings: ClassVar[dict[str, Any]] = {"organ_queries": False}


class nnUNetTrainerCrossMR_noPairedAug(nnUNetTrainerCrossMR):
    """Target and reference are the same image, under nnU-Net's own intensity transforms."""

    fixed_settings: ClassVar[dict[str, Any]] = {"paired_augmentation": False}


class nnUNetTrainerCrossMR_visualAcrossBatch(nnUNetTrainerCrossMR):
    """An organ's tokens come from the whole batch."""

    fixed_settings: ClassVar[dict[str, Any]] = {"pool_batch_tokens": True}
