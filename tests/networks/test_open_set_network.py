from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_multimodal.losses import OpenSetLoss
from nnunet_multimodal.networks import OpenSetNetwork
from nnunet_multimodal.networks.crossmr import ABSENT, ABSENT_IN_TILE
from nnunet_multimodal.networks.open_set import OpenSetOutput, read_stages

SIZE = {2: (24, 32), 3: (8, 16, 16)}


def network(ndim: int = 2, seed: int = 0, stages: int = 4, **options: Any) -> OpenSetNetwork:
    torch.manual_seed(seed)
    channels = [4, 8, 8, 8][:stages]
    strides = [[1] * ndim, *[[2] * ndim] * (stages - 1)]
    if ndim == 3:
        strides[-1] = [1, 2, 2]
    unet = PlainConvUNet(
        1, stages, channels, nn.Conv2d if ndim == 2 else nn.Conv3d, [[3] * ndim] * stages, strides, [1] * stages, 1,
        [1] * (stages - 1), True, nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d, {"affine": True}, None, None,
        nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
    return OpenSetNetwork(unet, channels, [2.0] * ndim, list(SIZE[ndim]), width=8, key_width=8, **options)


def sample(ndim: int = 2, organs: int = 3, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Target and reference noise; organ k is scribbled in a corner of its own."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.zeros(batch, 2 + organs, *SIZE[ndim])
    x[:, :2] = torch.randn(batch, 2, *SIZE[ndim], generator=draw)
    for k in range(organs):
        x[:, 2 + k, ..., 3 + 5 * k : 6 + 5 * k, 8:11] = 1
    return x


@pytest.mark.parametrize("ndim", [2, 3])
def test_logits_at_prediction(ndim: int) -> None:
    """Contract 9: background first, finite, small enough for sums in fp16."""
    net = network(ndim).eval()
    x = sample(ndim)
    with torch.no_grad():
        logits = net(x)
        net.head.weight.mul_(1e6)
        large = net(x)
    assert logits.shape == (2, 4, *SIZE[ndim]) and logits.dtype == torch.float32
    assert (logits[:, 0] == 0).all() and torch.isfinite(large).all() and large.abs().max() <= 1000


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_answers_some_of_the_organs(ndim: int) -> None:
    net = network(ndim, answers=2).train()
    x = sample(ndim)
    x[1, 3:] = 0  # the second sample has one organ only
    output = net(x)
    assert isinstance(output, OpenSetOutput)
    assert output.answer.shape == (2, 2, *SIZE[ndim])
    assert output.organ[0].unique().numel() == 2 and output.organ[1, 0] == 0
    assert output.present.tolist() == [[True, True], [True, False]]
    assert output.reference.shape[:2] == (2, 2) and len(output.carried) == len(net.read_stages)
    for carried in output.carried:
        assert carried.shape[:2] == (2, 2) and carried.min() >= 0 and carried.max() <= 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_parameter_is_trained(ndim: int) -> None:
    """DDP stops on parameters without a gradient."""
    net = network(ndim).train()
    output = net(sample(ndim))
    masks = torch.zeros_like(output.answer)
    OpenSetLoss()(output.answer, output.reference, output.carried, output.present, masks, masks).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_an_answer_is_the_same_whoever_else_is_asked_for_without_negative_prompts() -> None:
    net = network(negative_prompts=False).eval()
    x = sample()
    with torch.no_grad():
        three, one = net(x), net(x[:, :3])
        moved = x.clone()
        moved[:, 4] = x[:, 4].flip(-1)
        other = net(moved)
    assert torch.equal(three[:, 1], one[:, 1])
    assert torch.equal(three[:, :3], other[:, :3]) and not torch.equal(three[:, 3], other[:, 3])


def test_negative_prompts_tell_an_organ_where_the_others_are() -> None:
    net = network().eval()
    x = sample()
    with torch.no_grad():
        assert not torch.equal(net(x)[:, 1], net(x[:, :3])[:, 1])


def test_order_of_the_organs_is_the_order_of_the_answers() -> None:
    net = network().eval()
    x = sample()
    with torch.no_grad():
        expected, found = net(x), net(x[:, [0, 1, 4, 2, 3]])
    torch.testing.assert_close(found, expected[:, [0, 3, 1, 2]])


def test_an_organ_that_is_not_scribbled_is_not_found() -> None:
    net = network().eval()
    x = sample()
    x[0, 3] = 0
    with torch.no_grad():
        logits = net(x)
        kept = net.segment(x[:1, :1], net.prompt(x[:1, 1:2], x[:1, 2:] > 0.5))
        x[:, 2:] = 0
        nothing = net(x)
    assert (logits[0, 2] == ABSENT_IN_TILE).all() and (kept[0, 2] == ABSENT).all()
    assert not (logits[1, 2] == ABSENT_IN_TILE).any() and not (logits[0, 1] == ABSENT_IN_TILE).any()
    assert (nothing[:, 1:] == ABSENT_IN_TILE).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_kept_memory_serves_targets_of_another_size(ndim: int) -> None:
    net = network(ndim).eval()
    x = sample(ndim)
    with torch.no_grad():
        memory = net.prompt(x[:1, 1:2], x[:1, 2:] > 0.5)
        same = net.segment(x[:1, :1], memory)
        assert torch.equal(same[:, 1:], net(x[:1])[:, 1:])
        both = net.segment(x[:, :1], memory)
        torch.testing.assert_close(both[:1], same)
        larger = torch.randn(1, 1, *(size + 8 for size in SIZE[ndim]))
        assert net.segment(larger, memory).shape == (1, 4, *larger.shape[2:])


def test_a_place_is_sought_where_it_is_in_mm() -> None:
    """Where likeness says nothing, the reference's mask is carried as it lies, and moves with the target's places."""
    net = network(stages=3).eval()
    net.readers[-1].log_temperature.data.fill_(-3)  # likeness says little
    with torch.no_grad():
        net.readers[-1].log_sigma.fill_(-4)  # 1 mm; places are 4 mm apart
    x = sample(batch=1)
    places = net.grid_places(x)
    seen = []
    with torch.no_grad():
        memory = net.prompt(x[:, 1:2], x[:, 2:] > 0.5, places)
        near = (torch.arange(memory.places[-1].shape[2]) % 3 == 0).float()  # a mask of which every third place is
        memory.values[-1][..., -1] = near.view(1, 1, -1, 1)
        for shift in (0, 1):
            moved = places.clone()
            moved[:, 1] += shift * 8
            skips = net.encoder(x[:, :1])
            seen.append(net._answer(skips, net._keys(skips), memory, moved)[1][-1][0, 0])
    assert (seen[0] - near.view(seen[0].shape)).abs().max() < 0.1
    torch.testing.assert_close(seen[1][:, :-3], seen[0][:, 2:-1], atol=0.1, rtol=0)


def test_the_steps_stages_follow_the_patch() -> None:
    strides = [[1, 1], *[[2, 2]] * 4]
    assert read_stages([96, 96], strides, 4096) == [3, 2]
    assert read_stages([512, 512], strides, 4096) == [3]
    assert read_stages([96, 96], strides[:3], 4096) == [1]
    assert read_stages([64, 128, 128], [[1, 1, 1], *[[2, 2, 2]] * 5], 4096) == [4, 3]


def test_training_lowers_the_loss_on_one_batch() -> None:
    net, loss_of = network(answers=2).train(), OpenSetLoss()
    x = sample(organs=2)
    masks = torch.zeros(2, 2, *SIZE[2])
    for k in range(2):
        masks[:, k, 2 + 5 * k : 7 + 5 * k, 6:13] = 1
        x[:, :2] += 2 * (k + 1) * masks[:, k : k + 1]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output = net(x)
        wanted = masks.gather(1, output.organ[..., None, None].expand(-1, -1, *SIZE[2]))
        loss = loss_of(output.answer, output.reference, output.carried, output.present, wanted, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_weights_do_not_depend_on_the_number_of_organs() -> None:
    net = network()
    assert copy.deepcopy(net).eval()(sample(organs=7)).shape[1] == 8
