"""Losses under autocast: small sums over many voxels do not fit half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> Tensor:
    """fp32; fp64 stays, so that gradients can be checked."""
    return x if x.dtype == torch.float64 else x.float()
