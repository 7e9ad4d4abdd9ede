"""LoRA: identity at first, merged exactly, aliases, what is frozen, files of what was learned (cross-check 18)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_multimodal.networks.lora import (
    LoRALayer,
    LowRank,
    base_fingerprint,
    count_parameters,
    inject_lora,
    keep_statistics,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    plain_names,
)

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=(2, 1), padding="same"), (2, 4, 9, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 8)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 4, 3, 6, 8)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 5, 4)),
    "transposed 2d groups": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 4)),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=(0, 1, 1), bias=False),
        (2, 4, 3, 4, 5),
    ),
    "linear": (lambda: nn.Linear(5, 7), (2, 3, 5)),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def unet(kind: str, ndim: int, **options: Any) -> Any:
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    arguments: dict[str, Any] = {
        "input_channels": 2, "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": conv, "kernel_sizes": [3] * 3,
        "strides": [1, 2, 2], "num_classes": 3, "n_conv_per_stage_decoder": [1, 1], "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU, "deep_supervision": False, **options,
    }  # fmt: skip
    if kind == "plain":
        return PlainConvUNet(n_conv_per_stage=[2, 1, 1], **arguments)
    return ResidualEncoderUNet(n_blocks_per_stage=[1, 2, 1], **arguments)


def learn_something(network: nn.Module) -> None:
    """Factors as after a training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, LowRank):
                nn.init.normal_(module.up.weight, std=0.3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_layer_begins_as_it_was_and_its_correction_is_one_of_its_weight(name: str, rank: int) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    adapted = LoRALayer(layer, rank, scale=1.7)
    assert torch.equal(adapted(x), before)
    learn_something(adapted)
    assert adapted.lora.delta().shape == layer.weight.shape
    weight = adapted.weight.detach()
    changed = adapted(x)
    assert (changed - before).abs().max() > 0.1
    with torch.no_grad():
        layer.weight.copy_(weight)
    torch.testing.assert_close(layer(x), changed, atol=2e-6, rtol=2e-6)


def test_the_output_size_of_a_transposed_convolution_reaches_both() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(1, 4, 5, 5)
    adapted = LoRALayer(layer, 2, 1.0)
    learn_something(adapted)
    found = adapted(x, output_size=[10, 9])
    assert found.shape[2:] == (10, 9)
    with torch.no_grad():
        layer.weight.copy_(adapted.weight)
    torch.testing.assert_close(layer(x, output_size=[10, 9]), found, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_the_two_scales(stabilised: bool, scale: float) -> None:
    network = inject_lora(nn.Sequential(nn.Linear(8, 8, bias=False)), rank=4, alpha=6, rank_stabilised=stabilised)
    learn_something(network)
    layer: Any = network[0]  # type: ignore[index]
    x = torch.randn(3, 8)
    expected = x @ (layer.base.weight + scale * layer.lora.up.weight @ layer.lora.down.weight).T
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


def test_a_rank_above_the_layers_own_is_cut() -> None:
    assert LowRank(nn.Conv2d(1, 32, 3), 16, 1.0).rank == 9  # 1 x 3 x 3 numbers make each output
    assert LowRank(nn.Conv2d(8, 8, 3, groups=8), 4, 1.0).rank == 1


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_whole_network_of_nnunet_is_adapted_and_merged(kind: str, ndim: int) -> None:
    network, x = unet(kind, ndim), torch.randn(2, 2, *[16] * ndim)
    keys, before = list(network.state_dict()), network(x)
    assert inject_lora(network, rank=2, alpha=2) is network
    assert torch.equal(network(x), before)
    assert set(plain_names(network).values()) == set(keys)
    learn_something(network)
    changed = network(x)
    assert (changed - before).abs().max() > 0.1
    assert merge_lora(network) is network
    assert list(network.state_dict()) == keys
    assert not any(isinstance(module, LoRALayer) for module in network.modules())
    torch.testing.assert_close(network(x), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_layer_of_several_names_is_replaced_once_and_everywhere(kind: str) -> None:
    network = unet(kind, 2)
    convolutions = {id(m) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    inject_lora(network, rank=2)
    adapted = [module for module in network.modules() if isinstance(module, LoRALayer)]
    assert len(adapted) == len(convolutions) - len(network.decoder.seg_layers)
    assert {id(layer.base) for layer in adapted} <= convolutions
    block = next(m for m in network.modules() if hasattr(m, "all_modules"))
    assert block.all_modules[0] is block.conv and isinstance(block.conv, LoRALayer)
    assert network.decoder.encoder is network.encoder


@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, False), (False, True)])
def test_what_is_frozen_is_the_same_after_a_step(norm: bool, bias: bool) -> None:
    network = inject_lora(unet("plain", 2), rank=2, train_norm=norm, train_bias=bias)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # the factors A move once B is no longer zero
        optimizer.zero_grad()
        network(torch.randn(2, 2, 16, 16)).square().mean().backward()
        optimizer.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    # Layers' biases are taken out again by the normalisation behind them: their gradient may be nothing.
    assert changed <= learning and {name for name in learning if ".lora." in name} <= changed
    assert any("seg_layers" in name for name in changed)
    assert any(".norm." in name for name in changed) == norm
    assert any(name.endswith("base.bias") for name in learning) == bias


def test_frozen_statistics_stay() -> None:
    network = unet("plain", 2, norm_op=nn.BatchNorm2d)
    inject_lora(network, rank=2)
    before = {name: value.clone() for name, value in network.named_buffers()}
    assert before
    network.train()
    keep_statistics(network)
    network(torch.randn(2, 2, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_layers_are_chosen_by_their_names() -> None:
    network = inject_lora(unet("plain", 2), rank=2, layers=r"^encoder\.stages\.[12]", trained="")
    names = {name for name, module in network.named_modules() if isinstance(module, LoRALayer)}
    assert names == {f"encoder.stages.{stage}.0.convs.0.conv" for stage in (1, 2)}
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        f"{name}.lora.{part}.weight" for name in names for part in ("down", "up")
    }


def test_a_layer_whose_weight_is_used_without_calling_it() -> None:
    """nn.MultiheadAttention's output projection is such a one; it is a class of its own and left alone."""
    attention = nn.MultiheadAttention(8, 2)
    network = inject_lora(nn.ModuleDict({"attention": attention, "layer": nn.Linear(8, 8)}), rank=2)
    assert isinstance(network["layer"], LoRALayer) and not isinstance(attention.out_proj, LoRALayer)  # type: ignore[index]
    x = torch.randn(3, 1, 8)
    attention(x, x, x)
    learn_something(network)
    layer: Any = network["layer"]  # type: ignore[index]
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": "transformer"},
            "no convolution or linear layer has a name with 'transformer' in it; there are: enc",
        ),
        ({"layers": "("}, "is no regular expression"),
        ({"rank": 0}, "rank is 0, expected 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        inject_lora(unet("plain", 2), **options)


def test_adapted_twice_or_a_layer_of_another_kind_is_refused() -> None:
    network = inject_lora(unet("plain", 2), rank=2)
    with pytest.raises(ValueError, match="adapted already"):
        inject_lora(network, rank=2)
    with pytest.raises(TypeError, match="InstanceNorm2d cannot have low-rank factors"):
        LowRank(nn.InstanceNorm2d(3), 2, 1.0)


def test_what_was_learned_goes_into_another_copy_of_the_base() -> None:
    first, x = unet("plain", 2), torch.randn(1, 2, 16, 16)
    base = {name: value.clone() for name, value in first.state_dict().items()}
    inject_lora(first, rank=2, train_norm=True)
    begun = base_fingerprint(first)
    learn_something(first)
    with torch.no_grad():
        first.decoder.seg_layers[-1].bias += 1
    tensors = lora_state_dict(first)
    assert {name for name in tensors if "encoder.stages.0.0.convs.0" in name} == {
        f"encoder.stages.0.0.convs.0.{part}"
        for part in ("conv.lora.down.weight", "conv.lora.up.weight", "norm.weight", "norm.bias")
    }, "each tensor once"
    second = unet("plain", 2)
    second.load_state_dict(base)
    inject_lora(second, rank=2, train_norm=True)
    assert base_fingerprint(second) == base_fingerprint(first) == begun
    assert not torch.equal(second(x), first(x))
    load_lora_state_dict(second, tensors)
    assert torch.equal(second(x), first(x))

    with torch.no_grad():
        second.encoder.stages[0][0].convs[0].conv.base.weight[0, 0, 0, 0] += 1e-6
    assert base_fingerprint(second) != begun
    with pytest.raises(ValueError, match="does not fit the network"):
        load_lora_state_dict(inject_lora(unet("plain", 2), rank=3, train_norm=True), tensors)


def test_an_adapter_of_nnunets_usual_networks_is_a_few_per_cent() -> None:
    """Its 2d network for 256 x 256, and its 3d one for 128 x 128 x 128; r = 8."""
    for ndim, features in ((2, [32, 64, 128, 256, 512, 512, 512]), (3, [32, 64, 128, 256, 320, 320])):
        stages = len(features)
        with torch.device("meta"):
            network = PlainConvUNet(
                1, stages, features, nn.Conv2d if ndim == 2 else nn.Conv3d, [3] * stages, [1] + [2] * (stages - 1),
                [2] * stages, 5, [2] * (stages - 1), conv_bias=True,
                norm_op=nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d, norm_op_kwargs={"affine": True},
                nonlin=nn.LeakyReLU,
            )  # fmt: skip
        original = sum(p.numel() for p in network.parameters())
        trainable, counted = count_parameters(inject_lora(network, rank=8))
        assert counted == original > 3e7
        assert 0.01 < trainable / original < 0.05
