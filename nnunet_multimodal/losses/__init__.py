"""Losses: pure torch, each with its equation."""

from nnunet_multimodal.losses.mask import mask_bce, mask_dice
from nnunet_multimodal.losses.matching import match_any, match_organs, matching_cost
from nnunet_multimodal.losses.open_set import OpenSetLoss
from nnunet_multimodal.losses.referring import ReferringLoss

__all__ = ["OpenSetLoss", "ReferringLoss", "mask_bce", "mask_dice", "match_any", "match_organs", "matching_cost"]
