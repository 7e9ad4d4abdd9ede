"""SegVol's Dice and cross-entropy, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_multimodal.losses.prompted import PromptedByText, PromptedLoss


def slow(logits: list[float], targets: list[int], labelled: list[int]) -> float:
    overlap = probabilities = size = entropy = known = 0.0
    for logit, target, label in zip(logits, targets, labelled):
        if not label:
            continue
        probability = 1 / (1 + math.exp(-logit))
        overlap += probability * target
        probabilities += probability
        size += target
        entropy -= math.log(probability if target else 1 - probability)
        known += 1
    if not known:
        return 0.0
    return 1 - 2 * overlap / (probabilities + size + 1) + entropy / known


@pytest.mark.parametrize("some_unlabelled", [False, True])
def test_against_a_loop(some_unlabelled: bool) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 1, 2, 3, 2), torch.rand(3, 1, 2, 3, 2) > 0.6
    labelled = torch.rand(3, 1, 2, 3, 2) > 0.3 if some_unlabelled else torch.ones(3, 1, 2, 3, 2, dtype=torch.bool)
    expected = sum(
        slow(*(each[row].flatten().tolist() for each in (logits, targets.int(), labelled.int()))) for row in range(3)
    )
    found = PromptedLoss()(logits, targets, labelled if some_unlabelled else None)
    assert float(found) == pytest.approx(expected / 3, abs=1e-5)


def test_by_hand() -> None:
    """Two voxels at p = 0.5, one of them in the mask: Dice 1 - 2·0.5/(1 + 1 + 1), entropy ln 2."""
    found = PromptedLoss()(torch.zeros(1, 1, 2, 1, 1), torch.tensor([1, 0]).reshape(1, 1, 2, 1, 1))
    assert float(found) == pytest.approx(1 - 1 / 3 + math.log(2), abs=1e-6)


def test_an_empty_mask_learns_from_the_entropy_alone() -> None:
    logits = torch.zeros(1, 1, 4, 1, 1, requires_grad=True)
    PromptedLoss()(logits, torch.zeros(1, 1, 4, 1, 1)).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.125] * 4)  # of BCE: p / 4


def test_without_a_labelled_voxel_it_is_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 1, 4, 1, 1, requires_grad=True)
    loss = PromptedLoss()(logits, torch.ones(1, 1, 4, 1, 1), torch.zeros(1, 1, 4, 1, 1))
    loss.backward()
    assert float(loss) == 0 and logits.grad is not None and not logits.grad.any()


def test_ignored_voxels_have_no_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3] * 2).reshape(1, 1, 2, 2, 2)
    PromptedByText([1, 2], ignore=3)(logits, target).backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, target[0, 0] == 3].any() and not logits.grad[:, 0].any()
    assert logits.grad[:, 1:, target[0, 0] != 3].all()


def test_the_answer_to_all_texts_is_the_mean_over_organs() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 2, 2, 2), torch.randint(0, 6, (2, 1, 2, 2, 2))
    one = PromptedLoss()
    expected = (one(logits[:, 1:2], target == 2) + one(logits[:, 2:3], target == 5)) / 2
    torch.testing.assert_close(PromptedByText([2, 5])(logits, target), expected)
