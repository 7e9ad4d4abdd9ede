"""Learning rates by hand: warm-up, decay, groups, and a training that goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_multimodal.trainers.schedule import WarmupCosine, WarmupPoly, adamw


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value]))


def run(schedule: WarmupPoly, optimizer: torch.optim.Optimizer, epochs: range, steps: int) -> list[list[float]]:
    """Rates of all groups at each step."""
    rates = []
    for epoch in epochs:
        schedule.step(epoch)
        for _ in range(steps):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def make(epochs: int = 2, clip: float = 1.0) -> tuple[WarmupPoly, torch.optim.Optimizer]:
    """Five steps an epoch, four of them warm-up; the first group at a tenth."""
    optimizer = torch.optim.SGD([{"params": [parameter()], "lr_scale": 0.1}, {"params": [parameter()]}], lr=123.0)
    return WarmupPoly(optimizer, 0.8, epochs, 5, 4, clip, exponent=1.0), optimizer


def test_rates_by_hand() -> None:
    """10 steps in all, exponent 1, peak 0.8: 0.8 (1 - t/10) min(1, (t+1)/4)."""
    schedule, optimizer = make()
    expected = [0.2, 0.36, 0.48, 0.56, 0.48, 0.40, 0.32, 0.24, 0.16, 0.08]
    rates = run(schedule, optimizer, range(2), 5)
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert [rate for rate, _ in rates] == pytest.approx([0.1 * rate for rate in expected])


def test_default_exponent_is_nnunets() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    schedule = WarmupPoly(optimizer, 0.01, epochs=4, iterations=25, warmup=0, clip=1.0)
    schedule.step(2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**0.9)


def test_the_rate_that_is_logged_is_the_rate_of_the_first_step() -> None:
    schedule, optimizer = make()
    schedule.step(1)
    logged = [group["lr"] for group in optimizer.param_groups]
    schedule.step(1)
    assert run(schedule, optimizer, range(1, 2), 1)[0] == pytest.approx(logged)


def test_a_training_that_goes_on_has_the_rates_it_would_have_had() -> None:
    schedule, optimizer = make(epochs=4)
    whole = run(schedule, optimizer, range(4), 5)
    schedule, optimizer = make(epochs=4)
    run(schedule, optimizer, range(2), 5)
    run(schedule, optimizer, range(2, 3), 2)  # interrupted in the third epoch
    saved = optimizer.state_dict()
    schedule, optimizer = make(epochs=4)
    optimizer.load_state_dict(saved)
    np.testing.assert_allclose(run(schedule, optimizer, range(2, 4), 5), whole[10:], rtol=1e-6)


def test_beyond_the_end_the_rate_is_zero_not_complex() -> None:
    schedule, optimizer = make()
    rates = run(schedule, optimizer, range(2, 4), 5)
    assert all(rate == [0.0, 0.0] for rate in rates)


def test_the_gradient_of_all_groups_together_is_clipped() -> None:
    schedule, optimizer = make(clip=0.5)
    schedule.step(0)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])  # norm 5
    optimizer.step()
    assert first.grad.item() == pytest.approx(0.3, abs=1e-5) and second.grad.item() == pytest.approx(0.4, abs=1e-5)
    assert first.item() == pytest.approx(1 - 0.1 * 0.2 * 0.3, abs=1e-6)
    assert second.item() == pytest.approx(1 - 0.2 * 0.4, abs=1e-6)


def test_a_small_gradient_is_left_as_it_is() -> None:
    schedule, optimizer = make(clip=10.0)
    schedule.step(0)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert (first.grad.item(), second.grad.item()) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [({"warmup_iterations": 7}, 7), ({"warmup_epochs": 3}, 30), ({"warmup_epochs": 10}, 50)],
    ids=["iterations", "epochs", "a tenth of the training at most"],
)
def test_adamw_by_a_trainers_settings(settings: dict[str, Any], warmup: int) -> None:
    trainer: Any = SimpleNamespace(
        settings={**settings, "gradient_clip": 0.5},
        initial_lr=0.02,
        weight_decay=0.3,
        num_epochs=50,
        num_iterations_per_epoch=10,
    )
    slow, fast = parameter(), parameter()
    groups = [{"params": [slow], "lr_scale": 0.1}, {"params": [fast]}]
    optimizer, schedule = adamw(trainer, groups, WarmupCosine)
    assert isinstance(optimizer, torch.optim.AdamW) and type(schedule) is WarmupCosine
    assert schedule.optimizer is optimizer and (schedule.epochs, schedule.iterations) == (50, 10)
    assert (schedule.initial_lr, schedule.warmup, schedule.clip) == (0.02, warmup, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.02, 0.3)] * 2
    assert optimizer.param_groups[0]["params"] == [slow] and optimizer.param_groups[0]["lr_scale"] == 0.1
    assert type(adamw(trainer, [parameter()])[1]) is WarmupPoly
