"""Losses: pure torch, each with its equation."""

from nnunet_multimodal.losses.entropy import EntropyLoss
from nnunet_multimodal.losses.gated_crf import GatedCRFLoss
from nnunet_multimodal.losses.mask import mask_bce, mask_dice
from nnunet_multimodal.losses.matching import match_any, match_organs, matching_cost
from nnunet_multimodal.losses.multi_view_crf import MultiViewCRFLoss
from nnunet_multimodal.losses.mumford_shah import MumfordShahLoss
from nnunet_multimodal.losses.open_set import OpenSetLoss
from nnunet_multimodal.losses.partial_cross_entropy import PartialCrossEntropyLoss
from nnunet_multimodal.losses.partial_labels import MarginalLoss, MaskedTaskLoss
from nnunet_multimodal.losses.ramp import ramp_up
from nnunet_multimodal.losses.referring import ReferringLoss
from nnunet_multimodal.losses.total_variation import TotalVariationLoss

__all__ = [
    "EntropyLoss",
    "GatedCRFLoss",
    "MarginalLoss",
    "MaskedTaskLoss",
    "MultiViewCRFLoss",
    "MumfordShahLoss",
    "OpenSetLoss",
    "PartialCrossEntropyLoss",
    "ReferringLoss",
    "TotalVariationLoss",
    "mask_bce",
    "mask_dice",
    "match_any",
    "match_organs",
    "matching_cost",
    "ramp_up",
]
