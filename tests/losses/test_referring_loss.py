"""The referring loss against a slow reference written out here, and what must hold for training to go on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nnunet_multimodal.losses import ReferringLoss
from nnunet_multimodal.losses.referring import mean_of_present

BETA, GAMMA, BETA_MATCH, GAMMA_MATCH, SELECTION, TAU = 2.5, 2.0, 1.5, 3.0, 0.4, 0.1


def pair(logits: Tensor, target: Tensor, bce: float, dice: float) -> float:
    """bce * mean cross-entropy + dice * (1 - Dice with smoothing 1) of one mask."""
    x, t = logits.double().flatten(), target.double().flatten()
    p = torch.sigmoid(x)
    entropy = -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean()
    return float(bce * entropy + dice * (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))


def slow_loss(
    masks: list[Tensor], scores: Tensor, answer: Tensor, present: Tensor, targets: Tensor, organ_match: bool
) -> float:
    """The docstring's equation, one organ after another."""
    batch, organs = present.shape
    queries = masks[0].shape[2]
    coarse_size = masks[0].shape[3:]
    factor = [f // c for f, c in zip(targets.shape[2:], coarse_size)]
    coarse = torch.zeros(batch, organs, *coarse_size)
    for place in np.ndindex(*coarse_size):  # share of each cell that is organ
        cell = tuple(slice(p * f, (p + 1) * f) for p, f in zip(place, factor))
        coarse[(..., *place)] = targets[(..., *cell)].float().flatten(2).mean(-1)

    def matched(layer: Tensor, b: int) -> dict[int, int]:
        """organ -> query counted over all organs"""
        wanted = [k for k in range(organs) if present[b, k]]
        cost = np.full((len(wanted), organs * queries), np.inf)
        for row, k in enumerate(wanted):
            for q in range(organs * queries):
                if not organ_match or q // queries == k:
                    cost[row, q] = pair(layer[b, q // queries, q % queries], coarse[b, k], BETA_MATCH, GAMMA_MATCH)
        return dict(zip(wanted, linear_sum_assignment(cost)[1].tolist()))

    count = int(present.sum())
    total = 0.0
    for b in range(batch):
        for k in range(organs):
            if present[b, k]:
                total += pair(answer[b, k], targets[b, k], BETA, GAMMA) / count
        for layer in masks:
            for k, q in matched(layer, b).items():
                total += pair(layer[b, q // queries, q % queries], coarse[b, k], BETA, GAMMA) / count / len(masks)
        for k, q in matched(masks[-1], b).items():
            log_probability = scores[b, k].double().log_softmax(0)
            if organ_match:
                costs = [pair(masks[-1][b, k, i], coarse[b, k], BETA_MATCH, GAMMA_MATCH) for i in range(queries)]
                wanted = (-torch.tensor(costs, dtype=torch.float64) / TAU).softmax(0)
            else:
                wanted = torch.zeros(organs * queries, dtype=torch.float64)
                wanted[q] = 1
            total -= SELECTION * float((wanted * log_probability).sum()) / count
    return total


def case(
    size: tuple[int, ...], seed: int = 0, organ_match: bool = True, layers: int = 2
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """masks, scores, answer, present, targets: B = 2, K = 3, N = 4; masks at half resolution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 2).requires_grad_()

    coarse = tuple(s // 2 for s in size)
    masks = [normal(2, 3, 4, *coarse) for _ in range(layers)]
    targets = torch.rand(2, 3, *size, generator=generator) < 0.4
    present = torch.tensor([[True, False, True], [False, True, True]])
    return masks, normal(2, 3, 4 if organ_match else 12), normal(2, 3, *size), present, targets


def loss_function(organ_match: bool = True) -> ReferringLoss:
    return ReferringLoss(BETA, GAMMA, BETA_MATCH, GAMMA_MATCH, SELECTION, TAU, organ_match)


@pytest.mark.parametrize("size", [(6, 8), (4, 2, 6)], ids=["2d", "3d"])
@pytest.mark.parametrize("organ_match", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(size: tuple[int, ...], organ_match: bool, seed: int) -> None:
    arguments = case(size, seed, organ_match)
    expected = slow_loss(*arguments, organ_match)
    assert loss_function(organ_match)(*arguments).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    """One organ, one query, all logits 0 on a half-full target: BCE = ln 2, Dice = 1 - (1 + 1) / (1 + 1 + 1) = 1/3.

    The coarse grid has one cell, half of it organ: p = t = 1/2, so Dice = 1 - (2 * 1/4 + 1) / (1/2 + 1/2 + 1) = 1/4.
    A single query has the score's whole softmax: nothing to select.
    """
    targets = torch.tensor([[[[1.0, 0.0]]]])
    loss = ReferringLoss()(
        [torch.zeros(1, 1, 1, 1, 1)], torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 2), torch.ones(1, 1).bool(), targets
    )
    assert loss.item() == pytest.approx(2.5 * (math.log(2) + 1 / 3) + 2.5 * (math.log(2) + 1 / 4), abs=1e-6)


@pytest.mark.parametrize("organ_match", [True, False])
def test_gradient_flows_to_every_output(organ_match: bool) -> None:
    masks, scores, answer, present, targets = case((6, 8), organ_match=organ_match)
    loss_function(organ_match)(masks, scores, answer, present, targets).backward()
    for name, output in [("scores", scores), ("answer", answer), *((f"layer {i}", m) for i, m in enumerate(masks))]:
        assert output.grad is not None, name
        assert torch.isfinite(output.grad).all(), name
        assert (output.grad[present] if name in ("scores", "answer") else output.grad).abs().sum() > 0, name
    assert scores.grad is not None and answer.grad is not None
    assert scores.grad[~present].abs().sum() == 0
    assert answer.grad[~present].abs().sum() == 0
    if organ_match:  # one query of each present organ has a mask loss, the others have none
        for layer in masks:
            assert layer.grad is not None
            touched = layer.grad.flatten(3).abs().sum(-1) > 0
            assert touched.sum(-1).tolist() == present.int().tolist()


@pytest.mark.parametrize("organ_match", [True, False])
def test_nothing_scribbled_gives_exactly_zero_with_zero_gradients(organ_match: bool) -> None:
    masks, scores, answer, present, targets = case((6, 8), organ_match=organ_match)
    loss = loss_function(organ_match)(masks, scores, answer, torch.zeros_like(present), targets)
    loss.backward()
    assert loss.item() == 0.0
    for output in (*masks, scores, answer):
        assert output.grad is not None and (output.grad == 0).all()


def test_absent_organs_change_nothing() -> None:
    masks, scores, answer, present, targets = case((6, 8))
    before = loss_function()(masks, scores, answer, present, targets)
    changed = answer.detach().clone()
    changed[~present] = 37.0
    other_targets = targets.clone()
    other_targets[~present] = True
    assert loss_function()(masks, scores, changed, present, other_targets).item() == before.item()


@pytest.mark.parametrize("size", [(6, 8), (4, 2, 6)], ids=["2d", "3d"])
@pytest.mark.parametrize("scale", [1.0, 60000.0])
def test_finite_for_logits_in_the_range_of_fp16(size: tuple[int, ...], scale: float) -> None:
    masks, scores, answer, present, targets = case(size)
    outputs = [t.detach().clamp(-1, 1).mul(scale).half().requires_grad_() for t in (*masks, scores, answer)]
    loss = loss_function()(outputs[:-2], outputs[-2], outputs[-1], present, targets)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    loss.backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in outputs)


def test_more_scribbled_organs_do_not_make_a_larger_loss() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    assert mean_of_present(values, torch.tensor([[True, False], [True, False]])).item() == 2.0
    assert mean_of_present(values, torch.tensor([[False, False], [False, True]])).item() == 9.0
    assert mean_of_present(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_a_perfect_answer_costs_less_than_a_wrong_one() -> None:
    masks, scores, _, present, targets = case((6, 8))
    right = (targets.float() * 2 - 1) * 20
    good = loss_function()(masks, scores, right, present, targets)
    bad = loss_function()(masks, scores, -right, present, targets)
    assert bad.item() - good.item() > GAMMA * 0.8
