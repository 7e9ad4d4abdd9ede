"""CmFNet: a branch for each of two registered modalities, and one that fuses them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.cross_modal import CrossModalBranch
from nnunet_multimodal.networks.text_conditioned import LIMIT
from nnunet_multimodal.networks.vnet import Layout, VNetDecoder, VNetEncoder, initialise

BRANCHES = ("mm", "ct", "mr")  # in the order of the outputs in training


class CmFNet(nn.Module):
    """Three V-Net branches: one sees the CT, one the MR, the cross-modal one (mm) their features.

    In train mode ``forward`` gives the logits of all branches, [y_mm, y_ct, y_mr]; in eval mode those of
    ``output_branch``, within +-1000. A branch of one modality does not look at the other one's channel, so it answers
    where that modality is missing.

    Args:
        layout: what the plans say of each level.
        classes: C.
        channels: of the input, for the CT and the MR branch; the same twice for images of one modality.
        depths: down-samplings of the CT and the MR branch (the paper: 3 and 4); they may differ.
        dropout: share of each bottleneck's channels left out in training (the paper: 0.5, it does not say where).
        cff, cfe: see ``CrossModalBranch``.

    Raises:
        ValueError: the layout has too few levels.

    Attributes:
        output_branch: ``mm``, ``ct`` or ``mr``. A plain attribute: it is chosen for each case, not learned.
    """

    def __init__(
        self,
        layout: Layout,
        classes: int,
        channels: tuple[int, int] = (0, 1),
        depths: tuple[int, int] = (3, 4),
        dropout: float = 0.5,
        cff: bool = True,
        cfe: bool = True,
    ) -> None:
        super().__init__()
        common, levels = min(depths), len(layout.features)
        needed = levels_of(depths, cfe)
        if common < 1 or needed > levels:
            raise ValueError(f"depths {depths} need {needed} levels and at least one down-sampling; found {levels}")
        self.channels = channels
        self.output_branch = "mm"
        self.ct_encoder, self.mr_encoder = (VNetEncoder(layout, depth) for depth in depths)
        self.ct_decoder, self.mr_decoder = (
            VNetDecoder(layout, layout.features[: depth + 1], classes, dropout) for depth in depths
        )
        self.mm = CrossModalBranch(layout, common, classes, dropout, cff, cfe)
        self.apply(initialise)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image: [B, channels, (Z,) Y, X]."""
        ct, mr = (image[:, channel : channel + 1] for channel in self.channels)
        if self.training:
            of_ct, of_mr = self.ct_encoder(ct), self.mr_encoder(mr)
            return [self.mm(of_ct, of_mr), self.ct_decoder(of_ct), self.mr_decoder(of_mr)]
        if self.output_branch == "mm":
            logits = self.mm(self.ct_encoder(ct), self.mr_encoder(mr))
        elif self.output_branch == "ct":
            logits = self.ct_decoder(self.ct_encoder(ct))
        elif self.output_branch == "mr":
            logits = self.mr_decoder(self.mr_encoder(mr))
        else:
            raise ValueError(f"output_branch has to be one of {', '.join(BRANCHES)}; found {self.output_branch!r}")
        return torch.clamp(logits, -LIMIT, LIMIT)


def levels_of(depths: tuple[int, int], cfe: bool = True) -> int:
    """How many levels the plans must have; extraction lies one below the coarsest common one."""
    return 1 + max(*depths, min(depths) + cfe)
