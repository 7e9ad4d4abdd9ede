from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_multimodal.losses import PartialCrossEntropyLoss

IGNORE = 4


def case(*size: int, share: float = 0.1):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, IGNORE, *size, generator=draw)
    labels = torch.randint(0, IGNORE, (2, 1, *size), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) > share] = IGNORE
    return logits.requires_grad_(), labels


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """-sum log p of the labelled voxels, one by one, and how many they are."""
    total, n = torch.zeros(()), 0
    for index in (labels[:, 0] != IGNORE).nonzero():
        image, *place = index.tolist()
        scores = logits[(image, slice(None), *place)]
        total = total - scores.softmax(0)[labels[(image, 0, *place)]].log()
        n += 1
    return total, n


@pytest.mark.parametrize("size", [(9, 11), (5, 6, 7)])
def test_mean_and_sum_over_the_labelled_voxels(size) -> None:
    logits, labels = case(*size)
    total, n = by_hand(logits, labels)
    assert 0 < n < labels.numel() / 4
    mean, added = (
        PartialCrossEntropyLoss(IGNORE)(logits, labels),
        PartialCrossEntropyLoss(IGNORE, "sum")(logits, labels),
    )
    torch.testing.assert_close(added, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, total / n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(added, mean * n, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, F.cross_entropy(logits, labels[:, 0], ignore_index=IGNORE))


def test_mean_is_over_the_batch_not_of_images() -> None:
    logits = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).repeat(2, 1, 1, 4)
    labels = torch.tensor([[0, 9, 9, 9], [1, 1, 1, 9]]).view(2, 1, 1, 4)
    wrong, right = math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))
    assert PartialCrossEntropyLoss(9)(logits, labels).item() == pytest.approx((wrong + 3 * right) / 4, abs=1e-6)
    assert PartialCrossEntropyLoss(9)(logits, labels).item() == pytest.approx(0.626928, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_labelled_is_exactly_zero_with_a_gradient_of_zero(reduction: str) -> None:
    logits, labels = case(4, 4, share=0)
    loss = PartialCrossEntropyLoss(IGNORE, reduction)(logits, labels)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and (logits.grad == 0).all()


def test_gradient_is_zero_where_nothing_is_labelled() -> None:
    logits, labels = case(6, 7)
    PartialCrossEntropyLoss(IGNORE)(logits, labels).backward()
    touched = (logits.grad != 0).any(1)
    assert torch.equal(touched, labels[:, 0] != IGNORE)


@pytest.mark.parametrize("ignore", [255, -1, 4])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_any_ignore_label_and_type_of_target(ignore: int, dtype: torch.dtype) -> None:
    logits, labels = case(4, 5)
    expected = PartialCrossEntropyLoss(IGNORE)(logits, labels)
    target = labels.masked_fill(labels == IGNORE, ignore).to(dtype)
    assert torch.equal(PartialCrossEntropyLoss(ignore)(logits, target), expected)


def test_half_precision_and_large_logits_are_finite() -> None:
    logits = torch.tensor([6e4, -6e4]).half().view(1, 2, 1, 1).requires_grad_()
    loss = PartialCrossEntropyLoss(2)(logits, torch.ones(1, 1, 1, 1, dtype=torch.int16))
    loss.backward()
    assert loss.item() == pytest.approx(2 * 6e4, rel=1e-3) and torch.isfinite(logits.grad).all()


def test_gradcheck() -> None:
    logits, labels = case(3, 3, share=0.5)
    assert torch.autograd.gradcheck(
        lambda x: PartialCrossEntropyLoss(IGNORE)(x, labels), logits.detach().double().requires_grad_()
    )


@pytest.mark.parametrize("ignore", [None, 4.0, "4", True])
def test_bad_ignore_label(ignore) -> None:
    with pytest.raises(TypeError, match="ignore_label must be an integer: found"):
        PartialCrossEntropyLoss(ignore)


@pytest.mark.parametrize("reduction", ["none", None, "Mean"])
def test_bad_reduction(reduction) -> None:
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum": found'):
        PartialCrossEntropyLoss(4, reduction)


@pytest.mark.parametrize("target", [(2, 3, 3), (2, 2, 3, 3), (2, 1, 3, 4), (1, 1, 3, 3)])
def test_shapes_that_do_not_fit(target) -> None:
    with pytest.raises(ValueError, match=r"do not fit: found \(2, 4, 3, 3\)"):
        PartialCrossEntropyLoss(4)(torch.zeros(2, 4, 3, 3), torch.zeros(target, dtype=torch.long))
