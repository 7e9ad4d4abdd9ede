"""Cross-entropy of the labelled voxels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.losses.precision import at_least_single


class PartialCrossEntropyLoss(nn.Module):
    """Cross-entropy over the voxels that have a label; all others are left out.

    L = -sum_{i labelled} log softmax(x_i)[s_i], divided by the number of labelled voxels of the whole batch ("mean").

    Sources: Tang et al., Normalized Cut Loss for Weakly-supervised CNN Segmentation (CVPR 2018); CmFNet, L_pCE, prints
    the sum. Public code (WSL4MIS, PA-Seg) takes the mean, and so do we: a patch has some hundred labelled voxels, and
    nnU-Net's learning rate is made for means.

    Args:
        ignore_label: the value of an unlabelled voxel; any integer that is no class.
        reduction: "mean" or "sum".

    Raises:
        TypeError: ignore_label is not an integer.
        ValueError: an unknown reduction; shapes that do not fit.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 2, 2, requires_grad=True)
        >>> scribble = torch.tensor([[[[0, 4], [4, 4]]]])
        >>> round(PartialCrossEntropyLoss(ignore_label=4)(logits, scribble).item(), 4)  # log 4
        1.3863
    """

    def __init__(self, ignore_label: int, reduction: str = "mean") -> None:
        super().__init__()
        if isinstance(ignore_label, bool) or not isinstance(ignore_label, int):
            raise TypeError(f"ignore_label must be an integer: found {ignore_label!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum": found {reduction!r}')
        self.ignore_label, self.reduction = ignore_label, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar; exactly 0 with a gradient of 0 where nothing is labelled.

        Args:
            logits: [B, C, ...].
            target: [B, 1, ...], classes and ignore_label, of any number type.
        """
        if logits.ndim < 3 or target.shape != (logits.shape[0], 1, *logits.shape[2:]):
            raise ValueError(
                f"logits [B, C, ...] and target [B, 1, ...] do not fit: found {tuple(logits.shape)} and "
                f"{tuple(target.shape)}"
            )
        labels = target[:, 0].long()
        total = F.cross_entropy(at_least_single(logits), labels, ignore_index=self.ignore_label, reduction="sum")
        if self.reduction == "sum":
            return total
        return total / (labels != self.ignore_label).sum().clamp(min=1)  # torch's own mean is NaN without labels
