"""nnU-Net's own U-Net opened up: the same numbers as the stock forward (check 23), and prompts that stay binary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from tiny_networks import every_kind, make_unet, size_of
from torch import Tensor

from nnunet_multimodal.networks import PromptedUNet, binary_prompts, decoder_features


@pytest.mark.parametrize("finest", [0, 1, 2])
@every_kind
def test_decoder_features_give_the_stock_logits(ndim: int, encoder: str, finest: int) -> None:
    network = make_unet(ndim, encoder, deep_supervision=True).eval()
    image = torch.randn(2, 1, *size_of(ndim), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = network(image)  # full resolution first; the bottleneck has no head
        features = decoder_features(network.encoder, network.decoder, image, finest)
        heads = network.decoder.seg_layers
        logits = [heads[len(heads) - 1 - stage](features[stage - finest]) for stage in range(finest, 2)]
        bottleneck = network.encoder(image)[-1]
    assert len(features) == 3 - finest
    torch.testing.assert_close(features[-1], bottleneck, atol=1e-5, rtol=0)
    for ours, theirs in zip(logits, stock[finest:]):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert len(logits) == len(stock) - finest


def test_coarse_features_do_not_run_the_fine_stages() -> None:
    network = make_unet(2)
    ran: list[int] = []
    for number, stage in enumerate(network.decoder.stages):
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))
    decoder_features(network.encoder, network.decoder, torch.randn(1, 1, 8, 8), finest_stage=1)
    assert ran == [0]


def test_anisotropic_strides() -> None:
    network = make_unet(3, features=(4, 6, 8), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    features = decoder_features(network.encoder, network.decoder, torch.randn(1, 1, 4, 8, 8))
    assert [tuple(f.shape[2:]) for f in features] == [(4, 8, 8), (4, 4, 4), (2, 2, 2)]


@pytest.mark.parametrize("deep_supervision", [False, True])
@every_kind
def test_prompted_unet_is_the_stock_network_on_binary_prompts(ndim: int, encoder: str, deep_supervision: bool) -> None:
    network = make_unet(ndim, encoder, channels=3, deep_supervision=deep_supervision)
    prompted = PromptedUNet(network, prompt_channels=2)
    assert list(prompted.state_dict()) == list(network.state_dict())  # a stock checkpoint fits
    x = torch.randn(2, 3, *size_of(ndim), generator=torch.Generator().manual_seed(0))
    drawn = x[:, 1:] > 0.5
    faded = x.clone()
    faded[:, 1:] = torch.where(drawn, 0.9, 0.2)
    x[:, 1:] = drawn
    with torch.no_grad():
        expected, found = network(x), prompted(faded)
    if not deep_supervision:
        expected, found = [expected], [found]
    assert len(expected) == len(found) == (2 if deep_supervision else 1)
    for theirs, ours in zip(expected, found):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_binary_prompts_by_hand() -> None:
    channels = {
        "binary": [0.0, 1.0, 1.0, 0.0],
        "ringing": [-0.2, 1.1, 0.4, 0.6],
        "thin": [0.1, 0.15, 0.4, 0.25],
        "elsewhere": [0.05, 0.08, -0.3, 0.02],
        "empty": [0.0, 0.0, 0.0, 0.0],
    }
    expected = {
        "binary": [0, 1, 1, 0],
        "ringing": [0, 1, 0, 1],
        "thin": [0, 0, 1, 1],
        "elsewhere": [0, 0, 0, 0],
        "empty": [0, 0, 0, 0],
    }
    x = torch.tensor(list(channels.values())).view(1, 5, 2, 2)
    found = binary_prompts(x)
    assert found.dtype == torch.bool and found.shape == x.shape
    assert dict(zip(channels, found.view(5, 4).int().tolist())) == expected
    assert torch.equal(binary_prompts(found.float()), found)  # doing it twice changes nothing
    other_entry = torch.cat((x, x * 0.0))
    assert torch.equal(binary_prompts(other_entry)[:1], found)  # entries do not see one another


def line(kind: str, length: int) -> np.ndarray:
    drawn = np.zeros((length, length), dtype=np.float32)
    middle, far = length // 2, 3 * length // 4
    if kind == "row":
        drawn[middle + 1, length // 4 : far] = 1
    elif kind == "diagonal":
        drawn[range(length // 4, far), range(length // 4, far)] = 1
    elif kind == "short":
        drawn[middle, middle : middle + 2] = 1
    else:
        drawn[middle + 1, middle + 3] = 1
    return drawn


@pytest.mark.parametrize("kind", ["row", "diagonal", "short", "pixel"])
@pytest.mark.parametrize("new_length", [40, 100])
def test_no_thin_scribble_is_lost_in_nnunets_resampling(kind: str, new_length: int) -> None:
    drawn = line(kind, 64)
    data = np.stack([drawn, np.zeros_like(drawn)])[:, None]  # a second organ without a scribble
    faded = resample_data_or_seg_to_shape(
        data, (1, new_length, new_length), [3.0, 1.0, 1.0], [3.0, 64 / new_length, 64 / new_length], order=3, order_z=0
    )
    assert np.count_nonzero((faded > 0) & (faded < 1)) > 0  # resampling did what it does
    found = binary_prompts(torch.as_tensor(faded).float().transpose(0, 1))[0]
    assert found[0].any()
    assert not found[1].any()
    # It is the same line: nothing far from it, and no part of it without a pixel nearby.
    old = (np.argwhere(drawn) + 0.5) * new_length / 64 - 0.5
    new = found[0].nonzero().numpy()
    distance = np.abs(old[:, None] - new[None]).max(-1)
    assert distance.min(0).max() <= 1.5 * max(1, new_length / 64)
    assert distance.min(1).max() <= 1.5 * max(1, new_length / 64)


def test_prompts_of_one_patch_need_no_others() -> None:
    """What is drawn depends on the channel's own peak only: a second channel cannot push a faint one away."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = 0.3
    alone: Tensor = binary_prompts(x)[0, 0]
    x[0, 1, 2, :] = 5.0
    assert torch.equal(binary_prompts(x)[0, 0], alone) and alone.sum() == 1
