"""CmFNet's loss against its three formulas, by hand and by a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_multimodal.losses import GatedCRFLoss, MultiViewCRFLoss, PartialCrossEntropyLoss
from nnunet_multimodal.losses.cmfnet import CmFNetLoss
from nnunet_multimodal.losses.coarser import Coarser

IGNORE = 2


def logits_of(p: list[float], *size: int) -> Tensor:
    """[1, 2, len(p), 1]: two classes, the first with these probabilities."""
    first = torch.tensor(p).view(1, 1, -1, 1)
    return torch.cat((first, 1 - first), dim=1).log()


def labels(*values: int) -> Tensor:
    return torch.tensor(values).view(1, 1, -1, 1)


def make(**options: object) -> CmFNetLoss:
    crf = GatedCRFLoss([{"sigma_intensity": 1.0}], radius=1)
    return CmFNetLoss(PartialCrossEntropyLoss(IGNORE), crf, **options)  # type: ignore[arg-type]


# two pixels, of which the first is drawn as class 0
MM, CT, MR = [0.9, 0.6], [0.8, 0.3], [0.5, 0.7]
TARGET = labels(0, IGNORE)
IMAGE = torch.tensor([[[[0.0], [2.0]], [[0.0], [1.0]]]])  # the CT differs by 2, the MR by 1


def pair(image_step: float) -> float:
    """The CRF of two pixels (methods.md, check 7): 2 K (1 - ab - (1-a)(1-b)) / 2."""
    a, b = MM
    return math.exp(-(image_step**2) / 2) * (1 - a * b - (1 - a) * (1 - b))


SSL = -(math.log(0.9) + math.log(0.8) + math.log(0.5))
IMR = 0.2 * pair(2.0) + 0.2 * pair(1.0)
IMC = 0.8 * (0.1**2 + 0.3**2) / 2 + 0.8 * (0.4**2 + 0.1**2) / 2  # both classes differ alike: the mean over classes too


def outputs() -> list[Tensor]:
    return [logits_of(p).requires_grad_() for p in (MM, CT, MR)]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, SSL + IMR + IMC),
        ({"lambdas": (0.0, 0.0), "alphas": (0.0, 0.0)}, SSL),
        ({"alphas": (0.0, 0.0)}, SSL + IMR),
        ({"lambdas": (0.0, 0.0)}, SSL + IMC),
        ({"lambdas": (0.5, 0.0), "alphas": (0.0, 2.0)}, SSL + 0.5 * pair(2.0) + 2 * (0.4**2 + 0.1**2) / 2),
    ],
)
def test_the_three_terms_by_hand(weights: dict, expected: float) -> None:
    loss = make(**weights)
    assert loss(outputs(), TARGET, IMAGE).item() == pytest.approx(expected, abs=1e-5)
    assert sum(float(part) for part in loss.parts.values()) == pytest.approx(expected, abs=1e-5)


def test_the_ramp_is_of_the_regularisation_alone() -> None:
    loss = make()
    loss.ramp = 0.25
    assert loss(outputs(), TARGET, IMAGE).item() == pytest.approx(SSL + 0.25 * (IMR + IMC), abs=1e-5)
    assert float(loss.parts["imr"]) == pytest.approx(IMR, abs=1e-5)  # the log says what it is without the ramp


def test_the_channels_may_come_in_another_order() -> None:
    swapped = IMAGE.flip(1)
    loss = make(lambdas=(0.5, 0.1), channels=(1, 0))
    assert loss(outputs(), TARGET, swapped).item() == pytest.approx(
        SSL + 0.5 * pair(2.0) + 0.1 * pair(1.0) + IMC, abs=1e-5
    )


def test_one_image_for_both_branches() -> None:
    calls = 0

    def crf(p: Tensor, image: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return GatedCRFLoss([{"sigma_intensity": 1.0}], radius=1)(p, image)

    loss = CmFNetLoss(PartialCrossEntropyLoss(IGNORE), crf, channels=(0, 0))
    assert loss(outputs(), TARGET, IMAGE[:, :1]).item() == pytest.approx(SSL + 0.4 * pair(2.0) + IMC, abs=1e-5)
    assert calls == 1


def test_in_validation_the_fused_answer_is_judged_by_what_is_drawn() -> None:
    assert make()(outputs()[0], TARGET).item() == pytest.approx(-math.log(0.9), abs=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_whom_the_consistency_moves(detach: bool) -> None:
    mm, ct, mr = outputs()
    empty = labels(IGNORE, IGNORE)
    make(lambdas=(0.0, 0.0), detach=detach)([mm, ct, mr], empty, IMAGE).backward()
    assert (mm.grad.abs().sum() == 0) == detach
    assert ct.grad.abs().sum() > 0 and mr.grad.abs().sum() > 0


def test_the_crf_moves_the_fused_answer_alone() -> None:
    mm, ct, mr = outputs()
    make(alphas=(0.0, 0.0))([mm, ct, mr], labels(IGNORE, IGNORE), IMAGE).backward()
    assert mm.grad.abs().sum() > 0
    assert ct.grad.abs().sum() == 0 and mr.grad.abs().sum() == 0  # but they are there: distributed training goes on


def test_nothing_drawn_and_nothing_regularised_is_exactly_0() -> None:
    given = outputs()
    loss = make(lambdas=(0.0, 0.0), alphas=(0.0, 0.0))(given, labels(IGNORE, IGNORE), IMAGE)
    loss.backward()
    assert loss.item() == 0 and all((each.grad == 0).all() for each in given)


def test_regularisations_are_in_full_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 3, 6, 6, generator=generator) for _ in range(3)]
    image, target = 40 * torch.randn(1, 2, 6, 6, generator=generator), torch.full((1, 1, 6, 6), 3)
    loss = CmFNetLoss(PartialCrossEntropyLoss(3), GatedCRFLoss(radius=2))
    expected = loss([each.bfloat16().float() for each in given], target, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss([each.bfloat16() for each in given], target, image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_in_3d_by_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    size = (3, 4, 5)
    given = [torch.randn(2, 3, *size, generator=generator, dtype=torch.float64) for _ in range(3)]
    image = torch.randn(2, 2, *size, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 1, *size), generator=generator)
    kernels = [{"weight": 0.7, "sigma_xy": 2.0, "sigma_intensity": 0.8}]
    loss = CmFNetLoss(PartialCrossEntropyLoss(3), MultiViewCRFLoss(kernels, radius=1), (0.3, 0.4), (0.5, 0.6))
    p = [each.softmax(1) for each in given]
    ssl = sum(-p[b].log().gather(1, target.clamp(max=2))[target < 3].mean() for b in range(3))
    imc = sum(w * ((p[0] - p[b]) ** 2).sum() / p[0].numel() for w, b in ((0.5, 1), (0.6, 2)))
    voxels = [(z, y, x) for z in range(3) for y in range(4) for x in range(5)]
    imr = 0.0
    for weight, channel in ((0.3, 0), (0.4, 1)):
        for entry in range(2):
            for a in voxels:
                for b in voxels:
                    apart = [abs(i - j) for i, j in zip(a, b)]
                    if a == b or max(apart) > 1:
                        continue
                    views = sum(step == 0 for step in apart)  # planes that hold both
                    step = image[(entry, channel, *a)] - image[(entry, channel, *b)]
                    k = 0.7 * math.exp(-sum(n * n for n in apart) / 8) * math.exp(-(float(step) ** 2) / 1.28)
                    unlike = 1 - float((p[0][(entry, slice(None), *a)] * p[0][(entry, slice(None), *b)]).sum())
                    imr += weight * views / 3 * k * unlike / (2 * 60)
    assert loss(given, target, image).item() == pytest.approx(float(ssl) + float(imc) + imr, rel=1e-4)


# --- on a coarser grid -----------------------------------------------------------------------------------------------


def test_a_coarser_grid_is_of_means() -> None:
    seen: list[Tensor] = []
    regulariser = Coarser(lambda p, image: seen.extend((p, image)) or p.sum(), (1, 2))
    p = torch.tensor([[[[0.0, 1.0, 0.5]], [[1.0, 0.0, 0.5]]]])
    regulariser(p, torch.tensor([[[[2.0, 4.0, 7.0]]]]))
    assert seen[0].tolist() == [[[[0.5, 0.5]], [[0.5, 0.5]]]]  # an incomplete block is a mean of what there is
    assert seen[1].tolist() == [[[[3.0, 7.0]]]]


def test_every_voxel_of_a_block_has_its_share_of_the_gradient() -> None:
    p = torch.rand(1, 2, 4, 6, 5).softmax(1).requires_grad_()
    Coarser(MultiViewCRFLoss(radius=1), (1, 2, 2))(p, torch.randn(1, 1, 4, 6, 5)).backward()
    assert (p.grad != 0).all()
    torch.testing.assert_close(p.grad[..., 0, 0], p.grad[..., 1, 1])


def test_factor_1_changes_nothing() -> None:
    p, image = torch.rand(1, 2, 5, 5), torch.rand(1, 1, 5, 5)
    assert Coarser(GatedCRFLoss(), (1, 1))(p, image) == GatedCRFLoss()(p, image)


def test_a_block_is_no_larger_than_the_image() -> None:
    seen: list[Tensor] = []
    regulariser = Coarser(lambda p, image: seen.append(p) or p.sum(), (1, 8, 2))
    regulariser(torch.rand(1, 2, 3, 4, 4).softmax(1), torch.randn(1, 1, 3, 4, 4))
    assert seen[0].shape == (1, 2, 3, 1, 2)
