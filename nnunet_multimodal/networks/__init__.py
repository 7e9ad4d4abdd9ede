"""Networks: pure torch modules that know nothing of nnU-Net's trainer, plans or files."""

from nnunet_multimodal.networks.cmfnet import CmFNet
from nnunet_multimodal.networks.context_prior import ContextOutput, ContextPriorUNet
from nnunet_multimodal.networks.crossmr import CrossMRNetwork, Prompt, ReferringOutput
from nnunet_multimodal.networks.lora import inject_lora, merge_lora
from nnunet_multimodal.networks.memory import Memory
from nnunet_multimodal.networks.mixture import LearnedMixture, ModalityMixture
from nnunet_multimodal.networks.modality_head import ModalityHead
from nnunet_multimodal.networks.open_set import OpenSetNetwork, OpenSetOutput
from nnunet_multimodal.networks.segvol import SegVolNetwork
from nnunet_multimodal.networks.text_conditioned import TextConditionedNetwork, TextOutput
from nnunet_multimodal.networks.text_swin import TextSwinUNETR
from nnunet_multimodal.networks.text_unet import TextUNet
from nnunet_multimodal.networks.told import ToldNetwork
from nnunet_multimodal.networks.unet import PromptedUNet, binary_prompts, decoder_features

__all__ = [
    "CmFNet",
    "ContextOutput",
    "ContextPriorUNet",
    "CrossMRNetwork",
    "LearnedMixture",
    "Memory",
    "ModalityHead",
    "ModalityMixture",
    "OpenSetNetwork",
    "OpenSetOutput",
    "Prompt",
    "PromptedUNet",
    "ReferringOutput",
    "SegVolNetwork",
    "TextConditionedNetwork",
    "TextOutput",
    "TextSwinUNETR",
    "TextUNet",
    "ToldNetwork",
    "binary_prompts",
    "decoder_features",
    "inject_lora",
    "merge_lora",
]
