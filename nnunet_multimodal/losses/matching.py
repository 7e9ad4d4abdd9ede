"""Which query answers for which organ.

Source: CrossMR, 3.2: cost beta' L_BCE + gamma' L_DSC with beta' = gamma' = 2, infinite for a query of another organ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def matching_cost(mask_logits: Tensor, targets: Tensor, bce: float = 2.0, dice: float = 2.0) -> Tensor:
    """Cost of every query against every target of its group, in fp32.

    Both terms are written as products, so nothing of size queries x targets x pixels is ever held:
    mean BCE = mean softplus(x) - x.t / P, and Dice as in ``mask_dice`` with smoothing 1.

    Args:
        mask_logits: [B, G, Q, ...], Q queries in each of G groups.
        targets: [B, G, T, ...] in [0, 1].

    Returns:
        [B, G, T, Q].
    """
    # nnU-Net calls the loss under autocast, whose half-precision products overflow on a large organ.
    with torch.autocast(mask_logits.device.type, enabled=False):
        logits, targets = mask_logits.float().flatten(3), targets.float().flatten(3)
        pixels = logits.shape[-1]
        cross_entropy = F.softplus(logits).mean(-1).unsqueeze(2) - targets @ logits.transpose(2, 3) / pixels
        probability = logits.sigmoid()
        overlap = targets @ probability.transpose(2, 3)
        total = probability.sum(-1).unsqueeze(2) + targets.sum(-1).unsqueeze(3)
        return bce * cross_entropy + dice * (1 - (2 * overlap + 1) / (total + 1))


@torch.no_grad()
def match_organs(mask_logits: Tensor, targets: Tensor, bce: float = 2.0, dice: float = 2.0) -> Tensor:
    """The best query of each organ's own block.

    An organ has one target, so the assignment problem falls apart into one minimum per block: the same result as
    scipy's ``linear_sum_assignment`` with infinite cost outside the blocks, without leaving the device.

    Args:
        mask_logits: [B, K, N, ...], N queries for each of K organs.
        targets: [B, K, ...].

    Returns:
        long [B, K], in [0, N).

    Raises:
        ValueError: a shape does not fit, or a logit is NaN or infinite (scipy refuses these, too).

    Example:
        >>> logits = torch.tensor([[[[9.0, -9.0], [-9.0, 9.0]]]])  # one organ, two queries, two pixels
        >>> match_organs(logits, torch.tensor([[[0.0, 1.0]]]))
        tensor([[1]])
    """
    _check(mask_logits, targets)
    return matching_cost(mask_logits, targets.unsqueeze(2), bce, dice).squeeze(2).argmin(-1)


@torch.no_grad()
def match_any(mask_logits: Tensor, targets: Tensor, present: Tensor, bce: float = 2.0, dice: float = 2.0) -> Tensor:
    """One query for each present organ out of all K N (ablation noOrganMatch: SEEM without the organ's block).

    Returns:
        long [B, K], in [0, K N), counted organ by organ; 0 where the organ is not present.
    """
    from scipy.optimize import linear_sum_assignment  # only the ablation leaves the device

    _check(mask_logits, targets)
    cost = matching_cost(mask_logits.flatten(1, 2).unsqueeze(1), targets.unsqueeze(1), bce, dice).squeeze(1)
    index = torch.zeros(targets.shape[:2], dtype=torch.long)
    for entry, (rows, wanted) in enumerate(zip(cost.cpu(), present.cpu())):
        organs = wanted.nonzero().flatten()
        _, queries = linear_sum_assignment(rows[organs].numpy())
        index[entry, organs] = torch.as_tensor(queries)
    return index.to(targets.device)


def _check(mask_logits: Tensor, targets: Tensor) -> None:
    if mask_logits.ndim < 4 or mask_logits.shape[:2] != targets.shape[:2] or mask_logits.shape[3:] != targets.shape[2:]:
        raise ValueError(
            f"mask_logits [B, K, N, ...] and targets [B, K, ...] do not fit: found {tuple(mask_logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if not torch.isfinite(mask_logits).all():
        raise ValueError("mask_logits hold NaN or infinite values: nothing can be matched")
