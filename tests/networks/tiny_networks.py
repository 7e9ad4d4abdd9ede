"""Tiny networks of nnU-Net's own kinds, and images with scribbles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_multimodal.networks import CrossMRNetwork

every_kind = pytest.mark.parametrize(
    ("ndim", "encoder"),
    [(2, "plain"), (2, "residual"), (3, "plain"), (3, "residual")],
    ids=["plain-2d", "residual-2d", "plain-3d", "residual-3d"],
)


def make_unet(
    ndim: int = 2,
    encoder: str = "plain",
    features: Sequence[int] = (4, 6, 8),
    channels: int = 1,
    classes: int = 3,
    deep_supervision: bool = False,
    strides: Sequence[int | Sequence[int]] | None = None,
) -> Any:
    """A U-Net with the arguments that nnU-Net's plans give it."""
    torch.manual_seed(7)
    stages = len(features)
    common: dict[str, Any] = dict(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=list(features),
        conv_op=nn.Conv2d if ndim == 2 else nn.Conv3d,
        kernel_sizes=3,
        strides=strides or [1] + [2] * (stages - 1),
        num_classes=classes,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )
    if encoder == "plain":
        return PlainConvUNet(n_conv_per_stage=[1] * stages, **common)
    return ResidualEncoderUNet(n_blocks_per_stage=[1] * stages, **common)


def make_referring(
    ndim: int = 2, encoder: str = "plain", features: Sequence[int] = (4, 6, 8), organs: int = 2, **settings: Any
) -> CrossMRNetwork:
    """A tiny referring network."""
    unet = make_unet(ndim, encoder, features, classes=1)
    small = dict(queries=3, width=8, heads=2, hidden=12, layers=3, levels=2, max_tokens=10 * organs)
    torch.manual_seed(8)
    return CrossMRNetwork(unet, list(features), organs, **{**small, **settings})


def size_of(ndim: int) -> tuple[int, ...]:
    """A grid that three stages divide, with axes of different length."""
    return (16, 8) if ndim == 2 else (4, 8, 16)


def stacked(ndim: int, organs: int = 2, batch: int = 2, seed: int = 0) -> Tensor:
    """Input channels target, reference and a scribble per organ: every organ is scribbled in every entry."""
    generator = torch.Generator().manual_seed(seed)
    size = size_of(ndim)
    x = torch.randn(batch, 2 + organs, *size, generator=generator)
    x[:, 2:] = 0
    for entry in range(batch):
        for organ in range(organs):
            row = (entry + 3 * organ) % size[-2]
            x[entry, 2 + organ, ..., row, organ : organ + 4] = 1
    return x
