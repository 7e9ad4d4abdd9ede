"""Mixtures of adapters: the identity changes no bit, each image has its own gate, merged ones are plain (check 19)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_multimodal.losses.load_balance import LoadBalanceLoss, imbalance
from nnunet_multimodal.networks.adapters import Gates, MixtureHead, MixtureLayer, inject_adapters, merge_adapter
from nnunet_multimodal.networks.lora import LowRank, base_fingerprint, lora_state_dict, plain_names
from nnunet_multimodal.networks.mixture import (
    GatedOutput,
    LearnedMixture,
    ModalityMixture,
    start_heads,
    top_shares,
    unlikely,
)
from nnunet_multimodal.networks.text_conditioned import TextOutput

MODALITIES = ("CT", "MR", "PET")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def unet(kind: str = "plain", ndim: int = 2) -> Any:
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    arguments: dict[str, Any] = {
        "input_channels": 1, "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": conv, "kernel_sizes": [3] * 3,
        "strides": [1, 2, 2], "num_classes": 3, "n_conv_per_stage_decoder": [1, 1], "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU, "deep_supervision": False,
    }  # fmt: skip
    if kind == "plain":
        return PlainConvUNet(n_conv_per_stage=[2, 1, 1], **arguments)
    return ResidualEncoderUNet(n_blocks_per_stage=[1, 2, 1], **arguments)


def learn_something(network: nn.Module) -> None:
    """Factors and heads as after a training, different ones for each adapter."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, LowRank):
                nn.init.normal_(module.up.weight, std=0.3)  # type: ignore[arg-type]
            if isinstance(module, MixtureHead):
                for parameter in module.heads.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)


def mixture(kind: str = "plain", ndim: int = 2, trained: str | None = None) -> tuple[Any, Any]:
    """An untouched base network, and a mixture of the same weights with adapters for MR and PET."""
    base, network = unet(kind, ndim), unet(kind, ndim)
    network.load_state_dict(base.state_dict())
    gates = inject_adapters(network, ("MR", "PET"), rank=2)
    mixed = ModalityMixture(network, gates, MODALITIES, ("MR", "PET"), trained)
    start_heads(mixed, [])
    learn_something(mixed)
    return base.eval(), mixed.eval()


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_identity_is_the_base_bit_by_bit(kind: str, ndim: int) -> None:
    base, mixed = mixture(kind, ndim)
    x = torch.randn(2, 1, *[16] * ndim)
    mixed.tell(0)
    with torch.no_grad():
        assert torch.equal(mixed(x), base(x))
        mixed.tell(1)
        assert (mixed(x) - base(x)).abs().max() > 0.05


def test_each_image_of_a_batch_has_its_own_adapter() -> None:
    base, mixed = mixture()
    x = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        alone = []
        for modality in range(3):
            mixed.tell(modality)
            alone.append(mixed(x))
        mixed.tell(torch.tensor([1, 0, 2, 1]))
        together = mixed(x)
        assert torch.equal(together[1], base(x)[1])
    for image, modality in enumerate([1, 0, 2, 1]):
        torch.testing.assert_close(together[image], alone[modality][image], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("modality", range(3))
def test_merged_it_is_a_plain_network_that_answers_as_one_modality(kind: str, modality: int) -> None:
    base, mixed = mixture(kind)
    x = torch.randn(1, 1, 16, 16)
    mixed.tell(modality)
    with torch.no_grad():
        expected = mixed(x)
        merge_adapter(mixed, None if modality == 0 else MODALITIES[modality])
        plain = unet(kind).eval()
        own = plain.state_dict()
        plain.load_state_dict({key: value for key, value in mixed.state_dict().items() if key in own})
        torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)
    if modality == 0:
        assert all(torch.equal(value, base.state_dict()[key]) for key, value in plain.state_dict().items())


def test_training_reaches_the_told_adapter_alone_and_leaves_the_base() -> None:
    _, mixed = mixture()
    before = {name: p.detach().clone() for name, p in mixed.named_parameters()}
    optimizer = torch.optim.SGD([p for p in mixed.parameters() if p.requires_grad], lr=0.1)
    mixed.train().tell(torch.tensor([1, 0]))
    output = mixed(torch.randn(2, 1, 16, 16))
    assert isinstance(output, TextOutput) and output.modality.tolist() == [1, 0]
    (output.segmentation.square().mean() + output.modality_logits.square().mean()).backward()
    without = {name for name, p in mixed.named_parameters() if p.requires_grad and p.grad is None}
    assert all("seg_layers.0" in name for name in without), "distributed training wants all that this step may use"
    optimizer.step()
    changed = {name for name, p in mixed.named_parameters() if not torch.equal(p, before[name])}
    assert any(".adapters.MR." in name for name in changed) and any(".heads.MR." in name for name in changed)
    assert not any("PET" in name or ".base." in name for name in changed)
    assert all(".MR." in name or name.startswith("modality_head") for name in changed)


def test_a_batch_of_one_modality_leaves_no_adapter_without_a_gradient() -> None:
    """Distributed training stops at the next step where something had none."""
    _, mixed = mixture()
    mixed.train().tell(1)
    mixed(torch.randn(2, 1, 16, 16)).segmentation.square().mean().backward()
    for part in (".adapters.PET.", ".heads.PET."):
        learning = [p for name, p in mixed.named_parameters() if part in name and "seg_layers.0" not in name]
        assert learning and all(p.grad is not None and (p.grad == 0).all() for p in learning)


def test_of_images_of_the_base_nothing_is_learned_but_the_modality() -> None:
    _, mixed = mixture()
    mixed.train().tell(0)
    output = mixed(torch.randn(2, 1, 16, 16))
    output.segmentation.square().mean().backward()
    assert all((p.grad == 0).all() for p in mixed.parameters() if p.grad is not None)


def test_nobody_says_it_and_the_head_decides_before_anything_is_adapted() -> None:
    base, mixed = mixture()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        mixed.modality_head.linear.weight.zero_()
        for modality in range(3):
            mixed.modality_head.linear.bias.copy_(torch.eye(3)[modality] * 9)
            mixed.tell(None)
            found = mixed(x)
            mixed.tell(modality)
            assert torch.equal(mixed(x), found)
            assert mixed.modality_logits.argmax(1).tolist() == [modality] * 2
        skips = base.encoder(x)
        seen: list[Tensor] = []
        mixed.modality_head.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0]))
        mixed(x)
        assert all(torch.equal(a, b) for a, b in zip(seen, skips)), "the base's features, whatever was told"


def test_the_only_trained_modality_is_assumed_without_a_head() -> None:
    base, mixed = mixture(trained="MR")
    x = torch.randn(1, 1, 16, 16)
    assert mixed.modality_head is None
    with torch.no_grad():
        found = mixed(x)
        assert mixed.modality_logits.argmax(1).tolist() == [1]
        shares = mixed.modality_logits.softmax(1)[0]
        assert 0.4 < shares[1] < 0.6, "so that air in Hounsfield units decides against it"
        mixed.tell(1)
        assert torch.equal(mixed(x), found)
        mixed.tell(0)
        assert torch.equal(mixed(x), base(x))


def test_a_modality_that_training_does_not_see_is_not_ruled_out() -> None:
    """Of MR and PET alone a head learns that nothing is CT; air in Hounsfield units must be able to say that it is."""
    logits = torch.tensor([[-9.0, 5.0, 1.0], [-9.0, 0.0, 3.0]], requires_grad=True)
    assert unlikely(logits, []) is logits
    found = unlikely(logits, [0])
    torch.testing.assert_close(found[:, 1:], logits[:, 1:])
    torch.testing.assert_close(found[:, 0], torch.tensor([4.3, 2.3]))
    loss = nn.functional.cross_entropy(unlikely(50 * logits, [0]), torch.tensor([1, 2]))
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-4, "what is known is not driven on"

    base, network = unet(), unet()
    network.load_state_dict(base.state_dict())
    gates = inject_adapters(network, ("MR", "PET"), rank=2)
    mixed: Any = ModalityMixture(network, gates, MODALITIES, ("MR", "PET"), None, ["CT"]).eval()
    learn_something(mixed)
    with torch.no_grad():
        mixed.modality_head.linear.weight.zero_()
        mixed.modality_head.linear.bias.copy_(torch.tensor([-9.0, 1.0, 9.0]))
        mixed(torch.randn(2, 1, 16, 16))
    shares = mixed.modality_logits.softmax(1)
    assert (shares.argmax(1) == 2).all() and (shares[:, 0] > 0.3).all()


def test_a_class_that_the_base_does_not_know_is_never_its_answer() -> None:
    base, network = unet(), unet()
    network.load_state_dict(base.state_dict())
    mixed: Any = ModalityMixture(network, inject_adapters(network, ("MR",), rank=2), ("CT", "MR"), ("MR",)).eval()
    heads = [module for module in mixed.modules() if isinstance(module, MixtureHead)]
    fresh = [head.base.weight[2].clone() for head in heads]
    start_heads(mixed, [2])
    for head, row in zip(heads, fresh):
        assert torch.equal(head.heads["MR"].weight[2], row) and row.abs().sum() > 0  # type: ignore[index]
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        mixed.tell(0)
        logits = mixed(x)
        assert torch.equal(logits[:, :2], base(x)[:, :2]) and (logits[:, 2] == -100).all()
        mixed.tell(1)
        torch.testing.assert_close(mixed(x), base(x))


def test_what_an_adapter_file_holds_and_stands_on() -> None:
    _, mixed = mixture()
    tensors, before = lora_state_dict(mixed), base_fingerprint(mixed)
    assert {"modality_head.mean", "modality_head.square", "modality_head.linear.bias"} <= tensors.keys()
    assert not any(".base." in name for name in tensors)
    mixed.train().tell(0)
    mixed(torch.randn(2, 1, 16, 16))  # statistics of the modality head move
    assert base_fingerprint(mixed) == before
    assert set(plain_names(mixed).values()) >= set(unet().state_dict())


def test_a_mixture_layer_against_its_formula() -> None:
    gates = Gates()
    layer = MixtureLayer(nn.Linear(5, 4), ("a", "b"), 2, 0.7, gates)
    learn_something(layer)
    x, weights = torch.randn(3, 5), torch.tensor([[0.2, 0.5], [0.0, 1.0], [0.0, 0.0]])
    gates.open(weights)
    expected = []
    for image, (first, second) in zip(x, weights):
        a, b = (layer.adapters[name].delta() for name in ("a", "b"))  # type: ignore[operator]
        expected.append(layer.base(image) + first * a @ image + second * b @ image)
    torch.testing.assert_close(layer(x), torch.stack(expected))
    assert torch.equal(layer(x)[2], layer.base(x)[2])
    gates.open(torch.zeros(3, 2))
    assert gates.active == () and torch.equal(layer(x), layer.base(x))


def test_a_learned_gate_mixes_and_learns() -> None:
    base, network = unet(), unet()
    network.load_state_dict(base.state_dict())
    gates = inject_adapters(network, ("expert_1", "expert_2"), rank=2)
    mixed: Any = LearnedMixture(network, gates, 2).eval()
    start_heads(mixed, [])
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), base(x), atol=1e-5, rtol=1e-5)  # B is zero: whatever the shares
        learn_something(mixed)
        mixed.gate.linear.weight.zero_()
        mixed.gate.linear.bias.copy_(torch.tensor([1000.0, 0, 0]))
        assert torch.equal(mixed(x), base(x)), "the identity alone"
        mixed.gate.linear.bias.zero_()
        assert (mixed(x) - base(x)).abs().max() > 0.05
    output = mixed.train()(x)
    assert isinstance(output, GatedOutput) and output.gates.shape == (2, 3)
    torch.testing.assert_close(output.gates.sum(1), torch.ones(2))
    output.segmentation.square().mean().backward()
    assert mixed.gate.linear.weight.grad.abs().sum() + mixed.gate.linear.bias.grad.abs().sum() > 0


def test_shares_of_the_highest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    torch.testing.assert_close(top_shares(logits, 0), logits.softmax(1))
    e = np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum()
    np.testing.assert_allclose(top_shares(logits, 2)[0].numpy(), [0, *e], rtol=1e-6)
    assert top_shares(logits, 1).tolist() == [[0, 1, 0]]


def test_the_balance_by_hand() -> None:
    gates = torch.tensor([[0.5, 0.5], [1.0, 0.0]])  # importance 1.5 and 0.5: mean 1, deviation 0.5
    assert float(imbalance(gates)) == pytest.approx(0.25)
    assert float(imbalance(torch.full((3, 4), 0.25))) == 0
    loss = LoadBalanceLoss(nn.MSELoss(), weight=2.0)
    output, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    assert float(loss(output, target)) == 5.0
    assert float(loss(GatedOutput(output, gates), target)) == pytest.approx(5.5)


@pytest.mark.parametrize(("rank", "adapters"), [(0, ("MR",)), (2, ())])
def test_no_adapter_is_refused(rank: int, adapters: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        inject_adapters(unet(), adapters, rank=rank)
