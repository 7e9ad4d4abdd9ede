"""MulModSeg's head against slow references: cross-checks 14, 15 and 16 of methods.md."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.networks.dynamic_head import (
    PARAMETERS,
    DynamicHead,
    dynamic_convolutions,
    split_parameters,
)


def slow(feature: Tensor, theta: Tensor) -> Tensor:
    """A loop over samples and classes of three small convolutions."""
    logits = torch.empty(theta.shape[0], theta.shape[1], feature.shape[2])
    for b in range(theta.shape[0]):
        for k in range(theta.shape[1]):
            t = theta[b, k]
            x = feature[b][None]
            x = F.conv1d(x, t[:64].view(8, 8, 1), t[136:144]).relu()
            x = F.conv1d(x, t[64:128].view(8, 8, 1), t[144:152]).relu()
            logits[b, k] = F.conv1d(x, t[128:136].view(1, 8, 1), t[152:153])[0, 0]
    return logits


def grouped(feature: Tensor, theta: Tensor) -> Tensor:
    """The reference code's way: per sample, the feature repeated for each class and three grouped convolutions."""
    classes, of_samples = theta.shape[1], []
    for b in range(theta.shape[0]):
        weights, biases = split_parameters(theta[b])
        x = feature[b].repeat(classes, 1)[None]
        for layer, (weight, bias) in enumerate(zip(weights, biases)):
            x = F.conv1d(x, weight.reshape(-1, 8, 1), bias.reshape(-1), groups=classes)
            x = x.relu() if layer < 2 else x
        of_samples.append(x)
    return torch.cat(of_samples)


@pytest.fixture
def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    feature = torch.randn(2, 8, 35, generator=generator, requires_grad=True)
    theta = torch.randn(2, 5, PARAMETERS, generator=generator).mul(0.4).requires_grad_()
    return feature, theta


@pytest.mark.parametrize("alive", [1, 7 * 80, 10**9], ids=["a voxel at a time", "pieces of 7", "whole"])
@pytest.mark.parametrize("reference", [slow, grouped])
def test_is_three_small_convolutions_per_sample_and_class(example, reference, alive: int) -> None:
    feature, theta = example
    ours, theirs = dynamic_convolutions(feature, theta, alive), reference(feature, theta)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    gradients = torch.autograd.grad((ours * weight).sum(), (feature, theta))
    expected = torch.autograd.grad((theirs * weight).sum(), (feature, theta))
    for found, wanted in zip(gradients, expected):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_without_gradients_the_same(example) -> None:
    feature, theta = example
    with torch.no_grad():
        quiet = dynamic_convolutions(feature, theta, 300)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, dynamic_convolutions(feature, theta, 300), atol=0, rtol=0)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(1, 2, PARAMETERS, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, t: dynamic_convolutions(f, t, 32), (feature, theta))


def test_all_weights_come_first_then_all_biases() -> None:
    assert PARAMETERS == 153
    weights, biases = split_parameters(torch.arange(153))
    assert [(int(part[0]), int(part[-1])) for part in (*weights, *biases)] == [
        (0, 63), (64, 127), (128, 135), (136, 143), (144, 151), (152, 152),
    ]  # fmt: skip


def test_hidden_layers_are_not_kept_for_the_backward_pass() -> None:
    feature = torch.randn(1, 8, 4096, requires_grad=True)
    theta = torch.randn(1, 41, PARAMETERS, requires_grad=True)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dynamic_convolutions(feature, theta, 2**16)
    hidden = 41 * 8 * 4096
    assert kept < hidden / 2


def test_another_modality_changes_only_the_text_half_of_what_the_controller_sees() -> None:
    torch.manual_seed(0)
    head = DynamicHead(bottleneck=12, scales=[6], text=5, ndim=2, width=16).eval()
    seen: list[Tensor] = []
    head.controller.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    pooled, text = head.pool(torch.randn(2, 12, 3, 4)), torch.randn(2, 3, 5)
    head.parameters_of(pooled, text[0].expand(2, -1, -1))
    head.parameters_of(pooled, text[1].expand(2, -1, -1))
    first, second = seen
    assert first.shape == (2, 3, 32)
    assert torch.equal(first[..., :16], second[..., :16]) and torch.equal(first[:, 0, :16], pooled)
    assert not torch.isclose(first[..., 16:], second[..., 16:]).all()
    wanted = F.relu(F.linear(text[1], head.text_to_vision[0].weight, head.text_to_vision[0].bias))
    torch.testing.assert_close(second[0, :, 16:], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [5, 8, 24, 32])
def test_any_number_of_channels_has_groups(channels: int) -> None:
    head = DynamicHead(bottleneck=channels, scales=[channels], text=4, ndim=3)
    theta = head.parameters_of(head.pool(torch.randn(1, channels, 2, 2, 2)), torch.randn(1, 3, 4))
    assert head(torch.randn(1, channels, 2, 3, 4), theta).shape == (1, 3, 2, 3, 4)
