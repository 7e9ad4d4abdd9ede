"""Losses of methods in which a network teaches itself: mixed soft pseudo labels, and a teacher that may be unsure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_multimodal.losses.weak import WeakLoss


def soft_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """-1/V sum_i sum_c q_i^c log softmax(x_i)^c, in fp32.

    Args:
        logits: x, [B, C, ...].
        wanted: q, probabilities of the same shape.
    """
    return -(wanted * logits.float().log_softmax(1)).sum(1).mean()


class MixedPseudoLabelLoss(WeakLoss):
    """Two decoders learn what is drawn, and each learns elsewhere from a random mixture of both.

    L = (L_partial(x1, s) + L_partial(x2, s)) / 2 + r w (H(q, p1) + H(q, p2)) / 2,
    q = a p1 + (1 - a) p2 without gradient, a drawn from 0 to 1 anew in each step, H the cross-entropy.

    Source: DMSPS, Han et al., Medical Image Analysis 2024. ``sharpened`` takes H of the probabilities where the logits
    belong, H(q, softmax(p)), as the authors' published code does: softmax of numbers from 0 to 1 is flat, so that its
    gradient draws p to one class; of the logits it only draws p1 and p2 together.

    Args:
        partial, scales: as for ``WeakLoss``.
        weight: w.
        sharpened: see above.
    """

    def __init__(
        self, partial: nn.Module, weight: float = 8.0, sharpened: bool = True, scales: Sequence[float] | None = None
    ) -> None:
        super().__init__(partial, scales=scales)
        self.weight, self.sharpened = weight, sharpened

    def forward(self, output: Any, target: Tensor | Sequence[Tensor], image: Tensor | None = None) -> Tensor:
        """``output`` is a pair in training; in validation, without an image, what one decoder says."""
        if image is None:
            return super().forward(output, target)
        pair = [one if isinstance(one, Tensor) else one[0] for one in output]
        loss = torch.stack([self.of_drawn(one, target) for one in output]).mean()
        with torch.autocast(pair[0].device.type, enabled=False):
            probabilities = [logits.float().softmax(1) for logits in pair]
            share = torch.rand((), device=loss.device)
            mixed = (share * probabilities[0] + (1 - share) * probabilities[1]).detach()
            learners = probabilities if self.sharpened else pair
            term = self.weight * torch.stack([soft_cross_entropy(one, mixed) for one in learners]).mean()
        self.parts = {"partial": loss.detach(), "pseudo": term.detach()}
        return loss + self.ramp * term


def entropy_of(probabilities: Tensor) -> Tensor:
    """-sum_c p^c log p^c of each voxel, [B, C, ...] -> [B, 1, ...]."""
    return -(probabilities * (probabilities + 1e-6).log()).sum(1, keepdim=True)


def sure_consistency(student: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    """Squared difference of two answers where the teacher is sure, and 0 where it never is.

    sum_i m_i sum_c (p_i^c - q_i^c)^2 / (2 sum_i m_i), m_i = 1 where the entropy of q_i is below the threshold.

    Source: USTM, Liu et al., Pattern Recognition 2022, after Yu et al., MICCAI 2019; the 2 is of the public code.

    Args:
        student: p, probabilities [B, C, ...].
        teacher: q, the mean over the teacher's passes; takes no gradient.
        threshold: in nats.
    """
    sure = (entropy_of(teacher) < threshold).to(student.dtype)
    return (sure * (student - teacher).square()).sum() / (2 * sure.sum()).clamp(min=1e-8)
