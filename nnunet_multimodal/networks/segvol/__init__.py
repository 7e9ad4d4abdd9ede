"""SegVol: a 3D vision transformer that segments what a text, points or a box ask for."""

from nnunet_multimodal.networks.segvol.decoder import MaskDecoder
from nnunet_multimodal.networks.segvol.network import SegVolNetwork
from nnunet_multimodal.networks.segvol.positions import RandomPositions
from nnunet_multimodal.networks.segvol.prompts import NEGATIVE, PADDING, POSITIVE, PromptEncoder, Prompts
from nnunet_multimodal.networks.segvol.two_way import Attention, TwoWayTransformer

__all__ = [
    "NEGATIVE",
    "PADDING",
    "POSITIVE",
    "Attention",
    "MaskDecoder",
    "PromptEncoder",
    "Prompts",
    "RandomPositions",
    "SegVolNetwork",
    "TwoWayTransformer",
]
