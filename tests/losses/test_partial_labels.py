"""Losses of partially labelled samples: against loops, against nnU-Net's, and what must not have a gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from nnunet_multimodal.losses import MarginalLoss, MaskedTaskLoss

CLASSES, IGNORE = 4, 4
ANNOTATED = torch.tensor([[True, True, False, True], [True, False, False, True]])


def case(*size: int, ignore: bool = False) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, CLASSES, *size, generator=draw)
    labels = torch.randint(0, CLASSES + ignore, (2, 1, *size), generator=draw)
    return logits.double().requires_grad_(), labels


def places(labels: Tensor, entry: int) -> Any:
    return itertools.product(*(range(length) for length in labels.shape[2:])) if entry < len(labels) else []


def dice_by_hand(p: Any, labels: Tensor, annotated: Tensor, batch_dice: bool, ignore: int | None) -> float:
    """p(entry, class, place) -> number."""
    sums: dict[Any, list[float]] = {}
    for entry in range(labels.shape[0]):
        for k in range(1, annotated.shape[1]):
            if not annotated[entry, k]:
                continue
            found = sums.setdefault(k if batch_dice else (entry, k), [0.0, 0.0])
            for place in places(labels, entry):
                label = int(labels[(entry, 0, *place)])
                if label == ignore:
                    continue
                found[0] += 2 * p(entry, k, place) * (label == k)
                found[1] += p(entry, k, place) + (label == k)
    return -sum((a + 1e-5) / (b + 1e-5) for a, b in sums.values()) / len(sums)


# --- softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 4), (2, 3, 4)])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_marginal_loss_by_hand(size: tuple[int, ...], ignore: int | None, batch_dice: bool) -> None:
    logits, labels = case(*size, ignore=ignore is not None)
    loss = MarginalLoss(batch_dice, ignore_label=ignore)
    loss.annotated = ANNOTATED
    entropy, n = 0.0, 0
    for entry in range(2):
        for place in places(labels, entry):
            label = int(labels[(entry, 0, *place)])
            if label == ignore:
                continue
            p = logits[(entry, slice(None), *place)].softmax(0)
            if label and ANNOTATED[entry, label]:
                q = p[label]
            else:  # background, and a class that should not have been drawn there
                q = p[0] + sum(p[k] for k in range(1, CLASSES) if not ANNOTATED[entry, k])
            entropy, n = entropy - float(q.log()), n + 1
    probabilities = logits.detach().softmax(1)
    dice = dice_by_hand(lambda b, k, place: float(probabilities[(b, k, *place)]), labels, ANNOTATED, batch_dice, ignore)
    assert float(loss.cross_entropy(logits, labels)) == pytest.approx(entropy / n, abs=1e-9)
    assert float(loss(logits, labels)) == pytest.approx(entropy / n + dice, abs=1e-9)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize("said", [False, True])
def test_with_all_classes_annotated_it_is_nnunets(batch_dice: bool, ignore: int | None, said: bool) -> None:
    logits, labels = case(6, 5, ignore=ignore is not None)
    stock = DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        ignore_label=ignore,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    ours = MarginalLoss(batch_dice, ignore_label=ignore)
    ours.annotated = torch.ones(2, CLASSES, dtype=torch.bool) if said else None
    found, wanted = ours(logits, labels), stock(logits.float(), labels.float())
    torch.testing.assert_close(found.float(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], torch.autograd.grad(wanted, logits)[0], atol=1e-6, rtol=0
    )


def test_what_nobody_looked_for_may_be_found_in_the_background() -> None:
    """Sure of an unannotated class or of background: the loss is the same, and sure of an annotated one it is not."""
    target = torch.zeros(1, 1, 4, 4)
    loss = MarginalLoss()
    loss.annotated = torch.tensor([[True, True, False]])
    values = []
    for k in range(3):
        logits = torch.zeros(1, 3, 4, 4)
        logits[:, k] = 20
        values.append(float(loss.cross_entropy(logits, target)))
    assert values[0] == pytest.approx(0, abs=1e-6) and values[2] == pytest.approx(0, abs=1e-6) and values[1] > 10


def test_gradient_of_the_marginal_loss() -> None:
    logits, labels = case(3, 2)
    loss = MarginalLoss()
    loss.annotated = ANNOTATED
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits)


# --- sigmoid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 4), (2, 3, 4)])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_masked_tasks_by_hand(size: tuple[int, ...], ignore: int | None, batch_dice: bool) -> None:
    logits, labels = case(*size, ignore=ignore is not None)
    loss = MaskedTaskLoss(batch_dice, ignore_label=ignore)
    loss.annotated = ANNOTATED
    entropy, n = 0.0, 0
    for entry in range(2):
        for place in places(labels, entry):
            label = int(labels[(entry, 0, *place)])
            for k in range(1, CLASSES):
                if ANNOTATED[entry, k] and label != ignore:
                    p = float(logits[(entry, k, *place)].sigmoid())
                    entropy -= float(torch.tensor(p if label == k else 1 - p, dtype=torch.float64).log())
                    n += 1
    probabilities = logits.detach().sigmoid()
    dice = dice_by_hand(lambda b, k, place: float(probabilities[(b, k, *place)]), labels, ANNOTATED, batch_dice, ignore)
    assert float(loss(logits, labels)) == pytest.approx(entropy / n + dice, abs=1e-9)


def regions_of(labels: Tensor, ignore: bool) -> Tensor:
    """Four overlapping regions, and where nothing is labelled."""
    parts = [labels == 1, (labels == 1) | (labels == 2), labels == 3, (labels > 0) & (labels < IGNORE)]
    return torch.cat([*parts, *([labels == IGNORE] if ignore else [])], dim=1)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_of_regions_with_all_annotated_it_is_nnunets(batch_dice: bool) -> None:
    logits, labels = case(6, 5)
    target = regions_of(labels, ignore=False)
    stock = DC_and_BCE_loss(
        {},
        {"batch_dice": batch_dice, "do_bg": True, "smooth": 1e-5, "ddp": False},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    found = MaskedTaskLoss(batch_dice, regions=True)(logits, target)
    wanted = stock(logits.float(), target.float())
    torch.testing.assert_close(found.float(), wanted, atol=1e-5, rtol=0)


def test_of_regions_with_an_ignore_label() -> None:
    logits, labels = case(6, 5, ignore=True)
    loss = MaskedTaskLoss(regions=True, ignore_label=9)
    loss.annotated = ANNOTATED
    found = loss(logits, regions_of(labels, ignore=True))
    (gradient,) = torch.autograd.grad(found, logits)
    ignored = (labels == IGNORE).expand_as(logits)
    assert ignored.any() and not gradient[ignored].any() and gradient[~ignored].any()
    other = logits.detach().clone()
    other[ignored] += 5
    assert float(loss(other, regions_of(labels, ignore=True))) == float(found)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_null_tasks_have_no_part_in_the_loss(regions: bool, batch_dice: bool) -> None:
    """Cross-check 21: the loss does not depend on their logits, and their gradient is exactly 0."""
    logits, labels = case(6, 5)
    target = regions_of(labels, ignore=False) if regions else labels
    annotated = ANNOTATED.clone()
    annotated[0, 0] = not regions  # of regions, the first one is a task too; of labels it is the background
    loss = MaskedTaskLoss(batch_dice, regions=regions)
    loss.annotated = annotated
    found = loss(logits, target)
    (gradient,) = torch.autograd.grad(found, logits)
    for entry in range(2):
        for k in range(0 if regions else 1, CLASSES):
            assert bool(gradient[entry, k].any()) is bool(annotated[entry, k]), (entry, k)
    other = logits.detach().clone()
    other[~annotated] = 1e3 * torch.randn(other[~annotated].shape, dtype=torch.float64)
    assert float(loss(other, target)) == float(found)


@pytest.mark.parametrize("kind", [MarginalLoss, MaskedTaskLoss])
def test_a_class_that_no_sample_annotates_is_not_in_the_mean(kind: Any) -> None:
    """Two samples of which nobody annotates classes 2 and 3: Dice as if they did not exist."""
    logits, labels = case(6, 5)
    labels = (labels == 1).long()
    for batch_dice in (False, True):
        whole, few = kind(batch_dice), kind(batch_dice)
        whole.annotated = torch.tensor([[True, True, False, False]] * 2)
        p = (logits.softmax(1) if kind is MarginalLoss else logits.sigmoid())[:, 1:2]
        y = (labels == 1).double()
        labelled = torch.ones_like(labels, dtype=torch.bool)
        wanted = few.dice(p, y, labelled, torch.ones(2, 1, dtype=torch.bool))
        entropy = whole(logits, labels) - wanted
        if kind is MarginalLoss:
            torch.testing.assert_close(entropy, whole.cross_entropy(logits, labels))
        else:
            torch.testing.assert_close(entropy, torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1:2], y))


@pytest.mark.parametrize("loss", [MarginalLoss(ignore_label=IGNORE), MaskedTaskLoss(ignore_label=IGNORE)])
def test_nothing_labelled(loss: Any) -> None:
    """No NaN; nnU-Net's Dice of nothing, which pulls at nothing."""
    logits, _ = case(4, 4)
    loss.annotated = ANNOTATED
    found = loss(logits, torch.full((2, 1, 4, 4), IGNORE))
    (gradient,) = torch.autograd.grad(found, logits)
    assert float(found) == pytest.approx(-1) and not gradient.any()


def test_a_mask_of_another_batch() -> None:
    loss = MarginalLoss()
    loss.annotated = ANNOTATED[:1]
    with pytest.raises(ValueError, match=r"annotated is \(1, 4\), expected \[B, C\] = \(2, 4\)"):
        loss(*case(4, 4))
