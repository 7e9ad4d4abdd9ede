"""EntropyLoss, TotalVariationLoss and MumfordShahLoss against their equations, voxel by voxel, and ramp_up."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunet_multimodal.losses import EntropyLoss, MumfordShahLoss, TotalVariationLoss, ramp_up

SIZES = [(4, 5), (3, 4, 2)]


def case(size: tuple[int, ...], channels: int = 1):
    draw = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, *size, generator=draw, dtype=torch.float64)
    return (p / p.sum(1, keepdim=True)).requires_grad_(), torch.randn(
        2, channels, *size, generator=draw, dtype=torch.float64
    )


def voxels(size: tuple[int, ...]):
    return itertools.product(*(range(n) for n in size))


def entropy(p: torch.Tensor) -> float:
    total, size = 0.0, p.shape[2:]
    for b, place in itertools.product(range(len(p)), voxels(size)):
        total -= sum(value * math.log(value) for value in p[(b, slice(None), *place)].tolist())
    return total / (len(p) * math.prod(size))


def variation(p: torch.Tensor) -> float:
    total, size = 0.0, p.shape[2:]
    for b, c, place, axis in itertools.product(range(len(p)), range(p.shape[1]), voxels(size), range(len(size))):
        beside = [n + (axis == k) for k, n in enumerate(place)]
        if beside[axis] < size[axis]:
            total += abs(p[(b, c, *beside)] - p[(b, c, *place)]).item()
    return total / (len(p) * math.prod(size))


def mumford_shah(p: torch.Tensor, image: torch.Tensor) -> float:
    total, size = 0.0, p.shape[2:]
    for b, c, n in itertools.product(range(len(p)), range(p.shape[1]), range(image.shape[1])):
        shares = {place: p[(b, c, *place)].item() for place in voxels(size)}
        mean = sum(w * image[(b, n, *place)].item() for place, w in shares.items()) / sum(shares.values())
        total += sum(w * (image[(b, n, *place)].item() - mean) ** 2 for place, w in shares.items())
    return total / (len(p) * math.prod(size))


@pytest.mark.parametrize("size", SIZES)
def test_entropy(size) -> None:
    p, _ = case(size)
    assert EntropyLoss()(p).item() == pytest.approx(entropy(p), rel=1e-12)
    assert EntropyLoss()(p.float()).item() == pytest.approx(entropy(p), rel=1e-6)


@pytest.mark.parametrize("size", [*SIZES, (1, 6), (6, 1), (1, 1)])
def test_total_variation(size) -> None:
    p, _ = case(size)
    assert TotalVariationLoss()(p).item() == pytest.approx(variation(p), rel=1e-12)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_mumford_shah(size, channels: int) -> None:
    p, image = case(size, channels)
    assert MumfordShahLoss(tv=0)(p, image).item() == pytest.approx(mumford_shah(p, image), rel=1e-12)
    expected = mumford_shah(p, image) + 0.3 * variation(p)
    assert MumfordShahLoss(tv=0.3)(p, image).item() == pytest.approx(expected, rel=1e-12)


def test_numbers_by_hand() -> None:
    p = torch.tensor([[0.25, 1.0], [0.75, 0.0]]).view(1, 2, 1, 2)
    image = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
    assert EntropyLoss()(p).item() == pytest.approx((math.log(4) / 4 + 0.75 * math.log(4 / 3)) / 2, abs=1e-6)
    assert TotalVariationLoss()(p).item() == pytest.approx((0.75 + 0.75) / 2, abs=1e-6)
    # means (0.25 x 2 + 1 x 4) / 1.25 = 3.6 and 2; 0.25 x 1.6^2 + 1 x 0.4^2 = 0.8 and 0
    assert MumfordShahLoss(tv=0)(p, image).item() == pytest.approx(0.8 / 2, abs=1e-6)
    assert MumfordShahLoss()(p, image).item() == pytest.approx(0.4 + 0.75, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_gradcheck(size) -> None:
    p, image = case(size, 2)
    assert torch.autograd.gradcheck(EntropyLoss(), p)
    assert torch.autograd.gradcheck(TotalVariationLoss(), p)
    assert torch.autograd.gradcheck(lambda x: MumfordShahLoss(tv=0.5)(x, image), p)  # though the means are detached


def test_certain_predictions() -> None:
    """Zero loss and, through softmax, a gradient without NaN; a class that is nowhere has no mean."""
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0] = 500
    logits.requires_grad_()
    p = logits.softmax(1)
    assert (p[:, 1:] == 0).all()
    image = torch.full((1, 1, 4, 4), 7.0)
    for loss in (EntropyLoss()(p), TotalVariationLoss()(p), MumfordShahLoss()(p, image)):
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.item() == 0 and torch.isfinite(slope).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(1, 3, 64, 64, generator=draw).softmax(1).to(dtype).requires_grad_()
    image = (1000 * torch.randn(1, 1, 64, 64, generator=draw)).to(dtype)
    for loss, inputs in ((EntropyLoss(), (p,)), (TotalVariationLoss(), (p,)), (MumfordShahLoss(), (p, image))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(*inputs)
        assert found.dtype == torch.float32 and torch.isfinite(found)
        torch.testing.assert_close(found, loss(*(x.float() for x in inputs)), rtol=1e-6, atol=0)
        assert torch.isfinite(torch.autograd.grad(found, p)[0]).all()


def test_the_image_takes_no_gradient_and_layouts_do_not_matter() -> None:
    p, image = case((4, 5), 2)
    image.requires_grad_()
    expected = MumfordShahLoss()(p, image)
    expected.backward()
    assert image.grad is None
    turned = p.detach().transpose(2, 3).contiguous().transpose(2, 3)
    for loss, inputs in ((EntropyLoss(), ()), (TotalVariationLoss(), ()), (MumfordShahLoss(), (image,))):
        torch.testing.assert_close(loss(turned, *inputs), loss(p, *inputs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tv", [-0.1, math.nan, math.inf])
def test_bad_weight(tv: float) -> None:
    with pytest.raises(ValueError, match="tv must be a finite number of at least 0: found"):
        MumfordShahLoss(tv)


def test_bad_shapes() -> None:
    for loss in (EntropyLoss(), TotalVariationLoss()):
        with pytest.raises(ValueError, match=r"probabilities must be \[B, C, ...\]: found \(2, 3\)"):
            loss(torch.rand(2, 3))
    for image in ((2, 4, 4), (1, 1, 4, 4), (2, 1, 4, 5)):
        with pytest.raises(ValueError, match=r"do not fit: found \(2, 3, 4, 4\)"):
            MumfordShahLoss()(torch.rand(2, 3, 4, 4), torch.rand(image))


def test_ramp_up() -> None:
    assert ramp_up(0, 30) == pytest.approx(math.exp(-5), abs=1e-12)
    assert ramp_up(15, 30) == pytest.approx(0.286505, abs=1e-6)  # exp(-5 / 4)
    assert ramp_up(30, 30) == ramp_up(1000, 30) == ramp_up(0, 0) == 1.0
    values = [ramp_up(step, 30) for step in range(31)]
    assert values == sorted(values)
    for step, total in ((-1, 30), (1, -30)):
        with pytest.raises(ValueError, match="must not be negative"):
            ramp_up(step, total)


def test_examples_of_the_docstrings() -> None:
    import doctest
    import importlib

    names = ("entropy", "gated_crf", "multi_view_crf", "mumford_shah", "pairwise", "partial_cross_entropy", "ramp")
    for name in (*names, "total_variation"):
        result = doctest.testmod(importlib.import_module(f"nnunet_multimodal.losses.{name}"))
        assert result.attempted > 0 and result.failed == 0, name
