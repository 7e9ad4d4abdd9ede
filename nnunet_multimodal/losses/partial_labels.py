"""Dice and cross-entropy where a sample counts only for the classes that its data set annotates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.losses.precision import at_least_single

Sum = Callable[[Tensor], Tensor]


class PartialLabelLoss(nn.Module):
    """What both losses share: which classes of which sample are annotated, and the Dice of those.

    Dice_bk = (2 sum_v m p_k y_k + s) / (sum_v m p_k + sum_v m y_k + s) of sample b and class k, m the labelled voxels;
    the loss is minus the mean over the annotated pairs (b, k). With ``batch_dice`` the sums also run over the samples
    in which k is annotated, and the mean over the classes that some sample has. Exactly nnU-Net's where all is
    annotated.

    Args:
        batch_dice: as in nnU-Net's plans.
        smooth: s, nnU-Net's 1e-5.
        over_ranks: with ``batch_dice``, the sum of a tensor over all processes, with gradient; None in a single one.

    Attributes:
        annotated: bool [B, C], background included where there is one, of the next batch; None: everything is.
    """

    def __init__(self, batch_dice: bool = False, smooth: float = 1e-5, over_ranks: Sum | None = None) -> None:
        super().__init__()
        self.batch_dice, self.smooth, self.over_ranks = batch_dice, smooth, over_ranks
        self.annotated: Tensor | None = None

    def annotated_in(self, logits: Tensor) -> Tensor:
        """[B, C] bool on the logits' device.

        Raises:
            ValueError: it was said of another number of samples or classes.
        """
        shape = logits.shape[:2]
        if self.annotated is None:
            return torch.ones(shape, dtype=torch.bool, device=logits.device)
        if self.annotated.shape != shape:
            raise ValueError(f"annotated is {tuple(self.annotated.shape)}, expected [B, C] = {tuple(shape)}")
        return self.annotated.to(logits.device)

    def dice(self, p: Tensor, y: Tensor, labelled: Tensor, counts: Tensor) -> Tensor:
        """Minus the mean Dice: p, y [B, K, ...], labelled [B, 1, ...], counts [B, K] (which pairs) -> a number."""
        axes = tuple(range(2, p.ndim))
        share = labelled.to(p.dtype)
        intersection, predicted, there = ((each * share).sum(axes) for each in (p * y, p, y))
        pairs = counts.to(p.dtype)
        if self.batch_dice:
            sums = [(each * pairs).sum(0) for each in (intersection, predicted, there, torch.ones_like(pairs))]
            if self.over_ranks is not None:
                sums = [self.over_ranks(each) for each in sums]
            intersection, predicted, there, pairs = (*sums[:3], (sums[3] > 0).to(p.dtype))
        dice = (2 * intersection + self.smooth) / (predicted + there + self.smooth).clamp_min(1e-8)
        return -(dice * pairs).sum() / pairs.sum().clamp(min=1)


class MarginalLoss(PartialLabelLoss):
    """Softmax: the classes that a sample does not annotate are one with its background.

        q_0 = p_0 + sum_{k not annotated} p_k,   q_k = p_k;   L = -mean_v log q_{y(v)} + Dice loss of annotated classes

    Label 0 of such a sample says "background, or one of the classes that nobody looked for", and that is what q_0 is:
    the network may find them there. Where an annotated class is labelled, they are excluded, as is the background.

    Source: marginal loss (Shi et al., Medical Image Analysis 2021), with nnU-Net's Dice and reductions.

    Args:
        batch_dice, smooth, over_ranks: see ``PartialLabelLoss``.
        ignore_label: voxels of this label count for nothing; None where there is no such label.

    Example:
        >>> loss = MarginalLoss()
        >>> loss.annotated = torch.tensor([[True, True, False]])
        >>> logits = torch.zeros(1, 3, 2, 2)  # every p is 1/3, so q_0 is 2/3
        >>> target = torch.zeros(1, 1, 2, 2)
        >>> round(float(loss.cross_entropy(logits, target)), 4)  # -log 2/3
        0.4055
    """

    def __init__(
        self,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        over_ranks: Sum | None = None,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(batch_dice, smooth, over_ranks)
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits [B, C, ...], background first; target [B, 1, ...] -> a number, 0 where nothing is labelled."""
        log_p = at_least_single(logits).log_softmax(1)
        annotated = self.annotated_in(logits)
        labels, labelled = self._labels(target, annotated)
        y = torch.zeros_like(log_p).scatter_(1, labels, 1)
        dice = self.dice(log_p[:, 1:].exp(), y[:, 1:], labelled, annotated[:, 1:])
        return self._cross_entropy(log_p, labels, labelled, annotated) + dice

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """The first term alone."""
        annotated = self.annotated_in(logits)
        return self._cross_entropy(at_least_single(logits).log_softmax(1), *self._labels(target, annotated), annotated)

    def _labels(self, target: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [B, 1, ...] of annotated classes, 0 for all others, and where there is a label, bool of that shape."""
        labels = target.long()
        labelled = torch.ones_like(labels, dtype=torch.bool)
        if self.ignore_label is not None:
            labelled = labels != self.ignore_label
            labels = labels.where(labelled, 0)
        known = torch.arange(annotated.shape[1], device=labels.device) * annotated
        return known.gather(1, labels.flatten(1)).view_as(labels), labelled

    @staticmethod
    def _cross_entropy(log_p: Tensor, labels: Tensor, labelled: Tensor, annotated: Tensor) -> Tensor:
        merged = ~annotated
        merged[:, 0] = True
        others = ~merged.view(*merged.shape, *[1] * (log_p.ndim - 2))
        background = log_p.masked_fill(others, -torch.inf).logsumexp(1, keepdim=True)
        log_q = torch.where(labels == 0, background, log_p.gather(1, labels))
        return -(log_q * labelled).sum() / labelled.sum().clamp(min=1)


class MaskedTaskLoss(PartialLabelLoss):
    """Sigmoid: each class is a task of its own, and the tasks that a sample does not annotate are left out.

        L = mean over annotated (b, k) and labelled voxels of BCE(z_bk, y_bk) + Dice loss of annotated pairs

    So the loss does not depend on the logits of a task that is not annotated (Hermes' null tasks). Of regions it is
    nnU-Net's loss where all is annotated and no ignore label is used (with one, nnU-Net sums over regions what is a
    mean here).

    Args:
        batch_dice, smooth, over_ranks: see ``PartialLabelLoss``.
        regions: target is one-hot, [B, C, ...]; else it holds labels, and channel 0 of the logits, the background, is
            no task.
        ignore_label: of labels; with ``regions`` any number, and the last channel of the target says what is ignored.
            None where there is no such label.
    """

    def __init__(
        self,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        over_ranks: Sum | None = None,
        regions: bool = False,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(batch_dice, smooth, over_ranks)
        self.regions, self.ignore_label = regions, ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits [B, C, ...], target [B, C (+ 1), ...] or [B, 1, ...] -> a number, 0 where nothing is labelled."""
        annotated = self.annotated_in(logits)
        z = at_least_single(logits)
        labelled = torch.ones_like(target[:, :1], dtype=torch.bool)
        if self.regions:
            if self.ignore_label is not None:
                labelled, target = ~target[:, -1:].bool(), target[:, :-1]
            y = target.to(z.dtype)
        else:
            labels = target.long()
            if self.ignore_label is not None:
                labelled = labels != self.ignore_label
                labels = labels.where(labelled, 0)
            y = torch.zeros_like(z).scatter_(1, labels, 1)[:, 1:]
            z, annotated = z[:, 1:], annotated[:, 1:]
        counted = labelled * annotated.view(*annotated.shape, *[1] * (z.ndim - 2))
        entropy = (F.binary_cross_entropy_with_logits(z, y, reduction="none") * counted).sum()
        return entropy / counted.sum().clamp(min=1) + self.dice(z.sigmoid(), y, labelled, annotated)
