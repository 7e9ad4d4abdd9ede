from __future__ import annotations

import pytest
import torch

from nnunet_multimodal.losses import OpenSetLoss, mask_bce, mask_dice
from nnunet_multimodal.losses.open_set import shares


def parts(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    answer = torch.randn(2, 2, 8, 8, generator=draw, requires_grad=True)
    reference = torch.randn(2, 2, 4, 4, generator=draw, requires_grad=True)
    carried = [torch.rand(2, 2, n, n, generator=draw) * 0.9 + 0.05 for n in (2, 4)]
    target, seen = (torch.rand(2, 2, 8, 8, generator=draw) > 0.5 for _ in range(2))
    return answer, reference, carried, target, seen


def test_is_the_sum_of_its_equation() -> None:
    answer, reference, carried, target, seen = parts()
    present = torch.tensor([[True, False], [True, True]])

    def masks(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (2 * mask_bce(logits, wanted) + 3 * mask_dice(logits, wanted))[present].mean()

    def coarse(mask: torch.Tensor, n: int) -> torch.Tensor:
        return mask.float().view(2, 2, n, 8 // n, n, 8 // n).mean((3, 5))

    expected = masks(answer, target.float()) + 0.7 * (
        masks(reference, coarse(seen, 4))
        + 0.5 * masks(torch.logit(carried[0]), coarse(target, 2))
        + 0.5 * masks(torch.logit(carried[1]), coarse(target, 4))
    )
    found = OpenSetLoss(bce=2, dice=3, steps=0.7)(answer, reference, carried, present, target, seen)
    torch.testing.assert_close(found, expected)


def test_nothing_asked_for_is_zero_with_a_gradient_of_zero() -> None:
    answer, reference, carried, target, seen = parts()
    loss = OpenSetLoss()(answer, reference, carried, torch.zeros(2, 2, dtype=torch.bool), target, seen)
    loss.backward()
    assert loss.item() == 0 and answer.grad is not None and (answer.grad == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    answer, reference, carried, target, seen = parts()
    with torch.no_grad():
        answer[0, 0, 0, 0], answer[0, 0, 0, 1] = value, -value
    present = torch.ones(2, 2, dtype=torch.bool)
    assert not torch.isfinite(OpenSetLoss()(answer, reference, carried, present, target, seen))


def test_certain_masks_that_were_carried_have_a_finite_loss() -> None:
    answer, reference, _, target, seen = parts()
    certain = [torch.ones(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)]
    present = torch.ones(2, 2, dtype=torch.bool)
    assert torch.isfinite(OpenSetLoss()(answer, reference, certain, present, target, seen))


def test_shares_of_volumes() -> None:
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[0, 0, 0, :2, :2] = 1
    found = shares(mask, torch.zeros(1, 1, 1, 2, 2))
    assert found.flatten().tolist() == [0.5, 0, 0, 0]
