"""CmFNet's third branch, which has no image of its own: it fuses the features of two others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat, nn

from nnunet_multimodal.networks.vnet import ConvModule, DownConv, Layout, VNetDecoder


class CrossModalFusion(nn.Module):
    """CFF: f_mm = PReLU(Conv(Concat(f_ct, f_mr))) at each level that both branches have.

    Args:
        layout: of all branches.
        common: the coarsest level that both have.
        convolve: False leaves the features concatenated (the paper's baseline without CFF).
    """

    def __init__(self, layout: Layout, common: int, convolve: bool = True) -> None:
        super().__init__()
        doubled = [2 * layout.features[level] for level in range(common + 1)]
        self.levels = nn.ModuleList(
            ConvModule(layout, level, channels) if convolve else nn.Identity() for level, channels in enumerate(doubled)
        )
        self.channels = list(layout.features[: common + 1]) if convolve else doubled

    def forward(self, ct: Sequence[Tensor], mr: Sequence[Tensor]) -> list[Tensor]:
        """Features of both branches, finest first -> one map for each common level, of ``channels``."""
        return [fuse(cat(pair, dim=1)) for fuse, *pair in zip(self.levels, ct, mr)]


class CrossModalExtraction(nn.Sequential):
    """CFE: three convolutions at half the resolution of the coarsest fused features, for what lies deeper in both."""

    def __init__(self, layout: Layout, level: int, incoming: int) -> None:
        channels = layout.features[level]
        super().__init__(DownConv(layout, level, incoming), *(ConvModule(layout, level, channels) for _ in range(3)))


class CrossModalBranch(nn.Module):
    """Fusion at each common level, extraction below, and a decoder whose skips are the fused features.

    The paper fuses the down-sampled levels 1 to 3 and does not say what its decoder has at full resolution; here that
    level is fused like the others.

    Args:
        layout: has a level below ``common`` where there is extraction.
        common: the coarsest level that both branches have.
        classes: C.
        dropout: see ``VNetDecoder``.
        cff: fuse by convolution, not only by concatenation.
        cfe: extract; without it the coarsest fused features are the bottleneck.
    """

    def __init__(
        self, layout: Layout, common: int, classes: int, dropout: float, cff: bool = True, cfe: bool = True
    ) -> None:
        super().__init__()
        self.fusion = CrossModalFusion(layout, common, cff)
        incoming = self.fusion.channels
        self.extraction: nn.Module | None = None
        if cfe:
            self.extraction = CrossModalExtraction(layout, common + 1, incoming[-1])
            incoming = [*incoming, layout.features[common + 1]]
        self.decoder = VNetDecoder(layout, incoming, classes, dropout)

    def forward(self, ct: Sequence[Tensor], mr: Sequence[Tensor]) -> Tensor:
        """Encoder features of both branches, finest first -> logits [B, C, (Z,) Y, X]."""
        fused = self.fusion(ct, mr)
        if self.extraction is not None:
            fused.append(self.extraction(fused[-1]))
        logits: Tensor = self.decoder(fused)
        return logits
