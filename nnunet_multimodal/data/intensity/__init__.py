"""Intensity transforms, one a file. Each takes an image [C, ...] and treats its channels alike; contrast.py composes.

Parameters are drawn from numpy's global generator and never look at the grey values; applying them is deterministic.
"""

from nnunet_multimodal.data.intensity.bias_field import BiasField
from nnunet_multimodal.data.intensity.blur import Blur
from nnunet_multimodal.data.intensity.gibbs import Gibbs
from nnunet_multimodal.data.intensity.noise import Noise
from nnunet_multimodal.data.intensity.remap import Remap
from nnunet_multimodal.data.intensity.scale import Scale
from nnunet_multimodal.data.intensity.sometimes import Sometimes

__all__ = ["BiasField", "Blur", "Gibbs", "Noise", "Remap", "Scale", "Sometimes"]
