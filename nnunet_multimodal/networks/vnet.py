"""V-Net (Milletari et al. 2016) in parts, on the resolutions of nnU-Net's plans, in 2D or 3D.

What is V-Net's: stages of one, two and then three convolutions with a shortcut around them, strided convolutions
between the stages, PReLU. What is not: kernels come from the plans (V-Net: 5 in each axis), and each convolution is
followed by an instance norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn

CONVOLUTIONS = (1, 2, 3)  # in a stage, finest first; the coarser ones have three too


@dataclass(frozen=True)
class Layout:
    """What the plans say of each resolution, finest first; level 0 is the image's own.

    Attributes:
        features: channels of a level.
        kernels: kernel size of a level, an entry an axis.
        strides: from the level before to this one, an entry an axis; not read at level 0.
    """

    features: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.kernels[0])


def convolution(ndim: int) -> Any:
    """nn.Conv2d or nn.Conv3d."""
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def normalisation(ndim: int, channels: int) -> nn.Module:
    """nnU-Net's instance norm."""
    return (nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d)(channels, affine=True)


class ConvModule(nn.Sequential):
    """PReLU(Norm(Conv(x))), same size."""

    def __init__(self, layout: Layout, level: int, incoming: int, activated: bool = True) -> None:
        kernel, channels = layout.kernels[level], layout.features[level]
        super().__init__(
            convolution(layout.ndim)(incoming, channels, kernel, padding=tuple(size // 2 for size in kernel)),
            normalisation(layout.ndim, channels),
            *([nn.PReLU(channels)] if activated else []),
        )


class DownConv(nn.Sequential):
    """PReLU(Norm(Conv(x))) whose kernel is its stride: from one level to the next coarser."""

    def __init__(self, layout: Layout, level: int, incoming: int) -> None:
        stride, channels = layout.strides[level], layout.features[level]
        super().__init__(
            convolution(layout.ndim)(incoming, channels, stride, stride),
            normalisation(layout.ndim, channels),
            nn.PReLU(channels),
        )


class UpConv(nn.Sequential):
    """The same with a transposed convolution: to ``level`` from the next coarser one."""

    def __init__(self, layout: Layout, level: int, incoming: int) -> None:
        stride, channels = layout.strides[level + 1], layout.features[level]
        transposed: Any = nn.ConvTranspose2d if layout.ndim == 2 else nn.ConvTranspose3d
        super().__init__(
            transposed(incoming, channels, stride, stride), normalisation(layout.ndim, channels), nn.PReLU(channels)
        )


class ResidualStage(nn.Module):
    """Convolutions with a shortcut around them: PReLU(convolutions(x) + shortcut)."""

    def __init__(self, layout: Layout, level: int, incoming: int) -> None:
        super().__init__()
        count, channels = CONVOLUTIONS[min(level, len(CONVOLUTIONS) - 1)], layout.features[level]
        self.convolutions = nn.Sequential(
            *(
                ConvModule(layout, level, channels if index else incoming, activated=index < count - 1)
                for index in range(count)
            )
        )
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """shortcut: the level's channels, or one, which is added to each of them (V-Net's way with the image)."""
        result: Tensor = self.activation(self.convolutions(x) + shortcut)
        return result


class VNetEncoder(nn.Module):
    """Features of a one-channel image at levels 0 to ``depth``.

    Args:
        layout: has more than ``depth`` levels.
        depth: number of down-samplings.
    """

    def __init__(self, layout: Layout, depth: int) -> None:
        super().__init__()
        features = layout.features
        self.down = nn.ModuleList(DownConv(layout, level, features[level - 1]) for level in range(1, depth + 1))
        self.stages = nn.ModuleList(
            ResidualStage(layout, level, features[level] if level else 1) for level in range(depth + 1)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: [B, 1, (Z,) Y, X] -> one map a level, finest first."""
        features = [self.stages[0](image, image)]
        for down, stage in zip(self.down, self.stages[1:]):
            coarser = down(features[-1])
            features.append(stage(coarser, coarser))
        return features


class VNetDecoder(nn.Module):
    """Logits from features of each level.

    Args:
        layout: as the encoder's.
        incoming: channels of the features that it is given, finest first; the last are the bottleneck's.
        classes: C.
        dropout: share of the bottleneck's channels that is left out in training.
    """

    def __init__(self, layout: Layout, incoming: Sequence[int], classes: int, dropout: float) -> None:
        super().__init__()
        levels = range(len(incoming) - 1)
        self.dropout = (nn.Dropout2d if layout.ndim == 2 else nn.Dropout3d)(dropout)
        self.up = nn.ModuleList(
            UpConv(layout, level, layout.features[level + 1] if level < levels[-1] else incoming[-1])
            for level in levels
        )
        self.stages = nn.ModuleList(
            ResidualStage(layout, level, layout.features[level] + incoming[level]) for level in levels
        )
        self.segmentation = convolution(layout.ndim)(layout.features[0], classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: as ``incoming`` says -> logits [B, C, (Z,) Y, X]."""
        x = self.dropout(features[-1])
        for level in reversed(range(len(self.up))):
            finer = self.up[level](x)
            x = self.stages[level](cat((finer, features[level]), dim=1), finer)
        logits: Tensor = self.segmentation(x)
        return logits


def initialise(module: nn.Module) -> None:
    """He's normal initialisation for PReLU at its first slope; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=0.25)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
