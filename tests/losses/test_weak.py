"""The losses of training from scribbles: how their parts are put together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.losses import EntropyLoss, PartialCrossEntropyLoss
from nnunet_multimodal.losses.pseudo_labels import (
    MixedPseudoLabelLoss,
    entropy_of,
    soft_cross_entropy,
    sure_consistency,
)
from nnunet_multimodal.losses.weak import WeakLoss

IGNORE = 2


def sample(seed: int = 0, shape: tuple[int, ...] = (2, 2, 4, 4)) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two classes, labels of which about half are ignored, an image."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    target = torch.randint(0, 4, (shape[0], 1, *shape[2:]), generator=generator).clamp(max=IGNORE)
    return logits, target, torch.randn((shape[0], 1, *shape[2:]), generator=generator)


def partial(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target[:, 0], ignore_index=IGNORE)


def test_the_regulariser_counts_by_its_ramp_and_only_with_an_image() -> None:
    logits, target, image = sample()
    loss = WeakLoss(PartialCrossEntropyLoss(IGNORE), lambda p, i: 3 * EntropyLoss()(p) + 0 * i.sum())
    loss.ramp = 0.25
    probabilities = logits.softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    expected = partial(logits, target)
    assert torch.allclose(loss(logits, target, image), expected + 0.25 * 3 * entropy, atol=1e-6)
    assert {name: float(part.detach()) for name, part in loss.parts.items()} == pytest.approx(
        {"partial": float(expected.detach()), "regulariser": float(3 * entropy.detach())}, abs=1e-6
    )
    assert torch.allclose(loss(logits, target), expected, atol=1e-6)
    assert set(loss.parts) == {"partial"}


def test_nothing_drawn_is_exactly_zero_with_a_gradient() -> None:
    logits, target, image = sample()
    loss = WeakLoss(PartialCrossEntropyLoss(IGNORE))(logits, torch.full_like(target, IGNORE), image)
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad is not None and not logits.grad.any()


def test_deep_supervision_weighs_the_maps_and_regularises_the_finest() -> None:
    (fine, fine_target, image), (coarse, coarse_target, _) = sample(), sample(1, (2, 2, 2, 2))
    coarse_target[:] = IGNORE
    coarse_target[0, 0, 0, 0] = 1
    seen = []

    def regulariser(probabilities: Tensor, image: Tensor) -> Tensor:
        seen.append(probabilities.shape)
        return probabilities.new_tensor(1.0)

    loss = WeakLoss(PartialCrossEntropyLoss(IGNORE), regulariser, scales=[0.75, 0.25])
    expected = 0.75 * partial(fine, fine_target) + 0.25 * partial(coarse, coarse_target) + 1
    assert torch.allclose(loss([fine, coarse], [fine_target, coarse_target], image), expected, atol=1e-6)
    assert seen == [fine.shape]
    coarse_target[:] = IGNORE
    expected = 0.75 * partial(fine, fine_target) + 1
    assert torch.allclose(loss([fine, coarse], [fine_target, coarse_target], image), expected, atol=1e-6)


def test_half_precision_logits_are_regularised_in_fp32() -> None:
    logits, target, image = sample()
    seen = []

    def regulariser(probabilities: Tensor, image: Tensor) -> Tensor:
        seen.extend([probabilities.dtype, image.dtype])
        return probabilities.sum()

    WeakLoss(PartialCrossEntropyLoss(IGNORE), regulariser)(logits.bfloat16(), target, image.bfloat16())
    assert seen == [torch.float32, torch.float32]


def test_soft_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).T.reshape(1, 2, 2)  # voxel 0: (2, 0); voxel 1: (0, 0)
    wanted = torch.tensor([[0.75, 1.0], [0.25, 0.0]]).reshape(1, 2, 2)
    # voxel 0: -(.75 * -0.126928 + .25 * -2.126928), voxel 1: log 2
    assert float(soft_cross_entropy(logits, wanted)) == pytest.approx((0.626928 + math.log(2)) / 2, abs=1e-6)


@pytest.mark.parametrize("sharpened", [False, True])
def test_mixed_pseudo_labels_by_a_loop_over_voxels(sharpened: bool) -> None:
    (first, target, image), (second, _, _) = sample(), sample(1)
    loss = MixedPseudoLabelLoss(PartialCrossEntropyLoss(IGNORE), 8.0, sharpened)
    loss.ramp = 0.5
    torch.manual_seed(3)
    found = loss((first, second), target, image)
    torch.manual_seed(3)
    share = float(torch.rand(()))
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(4):
                p, q = first[b, :, y, x].softmax(0), second[b, :, y, x].softmax(0)
                wanted = (share * p + (1 - share) * q).detach()
                for logits, probabilities in ((first[b, :, y, x], p), (second[b, :, y, x], q)):
                    judged = probabilities if sharpened else logits
                    total = total - (wanted * judged.log_softmax(0)).sum() / 2
    expected = (partial(first, target) + partial(second, target)) / 2 + 0.5 * 8 * total / 32
    assert torch.allclose(found, expected, atol=1e-5)
    ours = torch.autograd.grad(found, (first, second))
    theirs = torch.autograd.grad(expected, (first, second))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


def test_what_sharpened_means() -> None:
    """Where both decoders say the same, the plain form has no gradient, and the published one makes them surer."""
    torch.manual_seed(0)
    for sharpened in (False, True):
        pair = [torch.tensor([[[0.5], [0.0]]], requires_grad=True) for _ in range(2)]
        loss = MixedPseudoLabelLoss(PartialCrossEntropyLoss(IGNORE), 1.0, sharpened)
        loss(pair, torch.full((1, 1, 1), IGNORE), torch.zeros(1, 1, 1)).backward()
        gradient = pair[0].grad
        assert gradient is not None
        slope = float(gradient[0, 0, 0])
        assert slope < -1e-3 if sharpened else abs(slope) < 1e-7


def test_mixed_pseudo_labels_in_validation_are_the_partial_loss() -> None:
    logits, target, _ = sample()
    loss = MixedPseudoLabelLoss(PartialCrossEntropyLoss(IGNORE))
    assert torch.allclose(loss(logits, target), partial(logits, target), atol=1e-6)


def test_consistency_counts_where_the_teacher_is_sure() -> None:
    teacher = torch.tensor([[0.99, 0.5], [0.01, 0.5]]).reshape(1, 2, 2)
    student = torch.tensor([[0.90, 1.0], [0.10, 0.0]], requires_grad=True).reshape(1, 2, 2)
    assert entropy_of(teacher).flatten().tolist() == pytest.approx([0.0560, 0.6931], abs=1e-4)
    sure = sure_consistency(student, teacher, threshold=0.5)
    assert float(sure.detach()) == pytest.approx(2 * 0.09**2 / 2, abs=1e-6)
    both = sure_consistency(student, teacher, threshold=0.7)
    assert float(both.detach()) == pytest.approx((2 * 0.09**2 + 2 * 0.5**2) / 4, abs=1e-6)
    never = sure_consistency(student, teacher, threshold=0.01)
    assert float(never.detach()) == 0.0 and never.requires_grad
