"""The loss of one prompted mask (SegVol)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.losses.precision import at_least_single


class PromptedLoss(nn.Module):
    """Dice and binary cross-entropy of masks, each over the voxels that are labelled.

    L = mean over masks of 1 - 2 Σ p t / (Σ p + Σ t + 1)  +  mean over masks of mean BCE(logit, t),

    with sums over the voxels of one mask. SegVol's Dice: it is smoothed below only, so that an empty mask has no
    gradient of it, and the cross-entropy alone says that there is nothing.
    """

    def forward(self, logits: Tensor, targets: Tensor, labelled: Tensor | None = None) -> Tensor:
        """
        Args:
            logits: [P, 1, ...].
            targets: of the same shape, 0 or 1.
            labelled: of the same shape, 0 where nobody knows; None for everywhere. A mask without a labelled voxel
                adds nothing.

        Returns:
            The loss, a scalar.
        """
        logits, targets = at_least_single(logits).flatten(1), targets.flatten(1).to(logits.dtype)
        known = (labelled.flatten(1) if labelled is not None else targets.new_ones(targets.shape)).to(logits.dtype)
        probability, targets = logits.sigmoid() * known, targets * known
        dice = 1 - 2 * (probability * targets).sum(1) / (probability.sum(1) + targets.sum(1) + 1)
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known
        voxels = known.sum(1)
        return (dice * (voxels > 0) + entropy.sum(1) / voxels.clamp(min=1)).mean()


class PromptedByText(nn.Module):
    """The same of a network's answer to all texts at once, against a label map.

    Args:
        organs: label of each text.
        ignore: label of voxels that nobody labelled; None if there is none.
    """

    def __init__(self, organs: list[int], ignore: int | None = None) -> None:
        super().__init__()
        self.loss, self.organs, self.ignore = PromptedLoss(), organs, ignore

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits [B, 1 + organs, ...], background first; target [B, 1, ...] -> scalar."""
        labelled = None if self.ignore is None else target != self.ignore
        each = [self.loss(logits[:, i + 1 :][:, :1], target == k, labelled) for i, k in enumerate(self.organs)]
        return sum(each[1:], each[0]) / len(each)
