"""Matching costs against loops over pairs, and matching against scipy's assignment (methods.md 6, checks 8 and 9)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nnunet_multimodal.losses import mask_bce, mask_dice, match_any, match_organs, matching_cost


def slow_cost(logits: Tensor, target: Tensor, bce: float, dice: float) -> float:
    """Cost of one query against one target, pixel by pixel in double precision."""
    entropy = overlap = total = 0.0
    for x, t in zip(logits.flatten().tolist(), target.flatten().tolist()):
        p = 1 / (1 + math.exp(-x))
        entropy -= t * math.log(p) + (1 - t) * math.log(1 - p)
        overlap += p * t
        total += p + t
    return bce * entropy / target.numel() + dice * (1 - (2 * overlap + 1) / (total + 1))


def random_case(seed: int, shape: tuple[int, ...] = (4, 3), soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits [B, K, N, ...] and targets [B, K, ...] of a random size."""
    rng = np.random.default_rng(seed)
    batch, organs, queries = rng.integers(1, 4), rng.integers(1, 5), rng.integers(1, 7)
    logits = torch.from_numpy(rng.normal(0, 4, (batch, organs, queries, *shape)).astype(np.float32))
    targets = rng.random((batch, organs, *shape)).astype(np.float32)
    return logits, torch.from_numpy(targets if soft else (targets < 0.4).astype(np.float32))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)], ids=["2d", "3d"])
@pytest.mark.parametrize("soft", [False, True])
def test_cost_equals_a_loop_over_pairs(shape: tuple[int, ...], soft: bool) -> None:
    logits, _ = random_case(1, shape)
    batch, groups, queries = logits.shape[:3]
    targets = torch.rand(batch, groups, 3, *shape, generator=torch.Generator().manual_seed(0))
    targets = targets if soft else (targets < 0.4).float()
    cost = matching_cost(logits, targets, bce=1.5, dice=3.0)
    assert cost.shape == (batch, groups, 3, queries)
    for b, g, t, q in np.ndindex(*cost.shape):
        expected = slow_cost(logits[b, g, q], targets[b, g, t], 1.5, 3.0)
        assert cost[b, g, t, q].item() == pytest.approx(expected, abs=1e-5)


def test_cost_by_hand() -> None:
    """x = (ln 3, -ln 3) gives p = (3/4, 1/4); t = (1, 0): BCE = ln 4/3; Dice = 1 - (2*0.75 + 1) / (1 + 1 + 1) = 1/6."""
    logits = torch.tensor([[[[math.log(3), -math.log(3)]]]])
    targets = torch.tensor([[[[1.0, 0.0]]]])
    assert matching_cost(logits, targets).item() == pytest.approx(2 * math.log(4 / 3) + 2 / 6, abs=1e-6)
    assert mask_bce(logits[:, 0], targets[:, 0]).item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert mask_dice(logits[:, 0], targets[:, 0]).item() == pytest.approx(1 / 6, abs=1e-6)


def test_a_cost_is_the_loss_of_the_same_pair() -> None:
    logits, targets = random_case(2)
    expected = 2 * mask_bce(logits[:, :, 0], targets) + 2 * mask_dice(logits[:, :, 0], targets)
    torch.testing.assert_close(matching_cost(logits, targets.unsqueeze(2))[:, :, 0, 0], expected, atol=1e-5, rtol=1e-5)


def test_organs_are_matched_as_scipy_does_with_infinity_outside_the_block() -> None:
    chosen = set()
    for seed in range(200):
        logits, targets = random_case(seed, shape=(3, 3) if seed % 2 else (2, 2, 2), soft=seed % 3 == 0)
        index = match_organs(logits, targets)
        batch, organs, queries = logits.shape[:3]
        assert index.shape == (batch, organs) and index.dtype == torch.long
        for b in range(batch):
            cost = np.full((organs * queries, organs), np.inf)
            for k in range(organs):
                for q in range(queries):
                    cost[k * queries + q, k] = slow_cost(logits[b, k, q], targets[b, k], 2.0, 2.0)
            rows, columns = linear_sum_assignment(cost)
            expected = np.empty(organs, dtype=int)
            expected[columns] = rows - columns * queries
            assert index[b].tolist() == expected.tolist(), f"seed {seed}"
        chosen |= set(index.flatten().tolist())
    assert len(chosen) > 3  # the cases were not all trivial


def test_any_query_is_matched_as_scipy_does() -> None:
    for seed in range(40):
        logits, targets = random_case(1000 + seed)
        batch, organs, queries = logits.shape[:3]
        present = torch.from_numpy(np.random.default_rng(seed).random((batch, organs)) < 0.7)
        index = match_any(logits, targets, present)
        assert index.shape == (batch, organs) and index.dtype == torch.long
        for b in range(batch):
            wanted = present[b].nonzero().flatten().tolist()
            cost = np.zeros((len(wanted), organs * queries))
            for row, k in enumerate(wanted):
                for q in range(organs * queries):
                    cost[row, q] = slow_cost(logits[b, q // queries, q % queries], targets[b, k], 2.0, 2.0)
            expected = np.zeros(organs, dtype=int)
            expected[wanted] = linear_sum_assignment(cost)[1]
            assert index[b].tolist() == expected.tolist(), f"seed {seed}"


def test_any_query_serves_one_organ_only_and_may_come_from_another_block() -> None:
    """Query 1 of organ 0 draws both organs' mask; the organ it fits less badly must take another one."""
    full, empty = [20.0, 20.0], [-20.0, -20.0]
    logits = torch.tensor([[[empty, [20.0, -20.0]], [full, empty]]])  # queries 0..3
    targets = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert match_any(logits, targets, torch.tensor([[True, True]])).tolist() == [[2, 1]]
    assert match_organs(logits, targets).tolist() == [[1, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    logits, targets = random_case(3)
    logits.view(-1)[5] = bad
    with pytest.raises(ValueError, match="NaN"):
        match_organs(logits, targets)
    with pytest.raises(ValueError, match="NaN"):
        match_any(logits, targets, torch.ones(targets.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        ((1, 2, 3, 4, 4), (1, 3, 4, 4)),  # organs
        ((2, 2, 3, 4, 4), (1, 2, 4, 4)),  # batch
        ((1, 2, 3, 4, 4), (1, 2, 8, 8)),  # grid
        ((1, 2, 3, 4, 4), (1, 2, 1, 4, 4)),  # axes
        ((1, 2, 3), (1, 2)),  # no pixels
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit") as error:
        match_organs(torch.zeros(logits), torch.zeros(targets))
    assert str(logits) in str(error.value) and str(targets) in str(error.value)


def test_costs_are_finite_in_fp16_and_at_its_limits() -> None:
    logits = torch.tensor([65504.0, -65504.0, 0.0, 300.0], dtype=torch.float16).view(1, 1, 4, 1).repeat(1, 1, 1, 9)
    targets = (torch.arange(9) % 2).float().view(1, 1, 1, 9)
    cost = matching_cost(logits, targets)
    assert cost.dtype == torch.float32 and torch.isfinite(cost).all()
    assert match_organs(logits, targets[:, :, 0]).tolist() == [[2]]


def test_cost_is_finite_under_half_precision_autocast() -> None:
    """nnU-Net calls the loss under autocast; a large organ's sum of logits is beyond fp16."""
    logits = torch.full((1, 1, 2, 256, 256), 12.0)
    targets = torch.ones(1, 1, 256, 256)
    with torch.autocast("cpu", dtype=torch.float16):
        cost = matching_cost(logits, targets.unsqueeze(2))
    torch.testing.assert_close(cost, matching_cost(logits, targets.unsqueeze(2)))
    assert torch.isfinite(cost).all()
