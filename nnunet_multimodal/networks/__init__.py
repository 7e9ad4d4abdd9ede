"""Networks: pure torch modules that know nothing of nnU-Net's trainer, plans or files."""

from nnunet_multimodal.networks.crossmr import CrossMRNetwork, Prompt, ReferringOutput
from nnunet_multimodal.networks.unet import PromptedUNet, binary_prompts, decoder_features

__all__ = ["CrossMRNetwork", "Prompt", "PromptedUNet", "ReferringOutput", "binary_prompts", "decoder_features"]
