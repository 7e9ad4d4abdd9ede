"""Text-conditioned networks: told or found modality, deep supervision, what nnU-Net asks of a network."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_networks import every_kind, make_unet, size_of

from nnunet_multimodal.networks import ModalityHead, TextConditionedNetwork, TextOutput, TextSwinUNETR, TextUNet

MODALITIES = ("CT", "MR", "PET")


def make_text_unet(ndim: int = 2, encoder: str = "plain", deep_supervision: bool = False) -> TextUNet:
    unet = make_unet(ndim, encoder)
    torch.manual_seed(5)
    network = TextUNet(unet, MODALITIES, classes=4, text=6, deep_supervision=deep_supervision)
    network.text_embeddings.copy_(torch.randn(3, 4, 6))
    return network.eval()


@every_kind
def test_gives_logits_of_every_scale_in_training_and_one_at_prediction(ndim: int, encoder: str) -> None:
    size = size_of(ndim)
    network = make_text_unet(ndim, encoder, deep_supervision=True).train()
    network.tell(torch.tensor([1, 2]))
    output = network(torch.randn(2, 1, *size))
    assert isinstance(output, TextOutput)
    assert [each.shape for each in output.segmentation] == [(2, 4, *size), (2, 4, *(axis // 2 for axis in size))]
    assert output.modality_logits.shape == (2, 3) and output.modality.tolist() == [1, 2]
    (sum(each.square().mean() for each in output.segmentation) + output.modality_logits.square().mean()).backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert idle == []  # or distributed training stops
    network.eval().deep_supervision = False
    network.tell(0)
    assert network(torch.randn(1, 1, *size)).shape == (1, 4, *size)


@every_kind
def test_what_it_finds_out_is_what_it_would_be_told(ndim: int, encoder: str) -> None:
    network = make_text_unet(ndim, encoder)
    with torch.no_grad():
        network.modality_head.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
        image = torch.randn(3, 1, *size_of(ndim))
        found = network(image)
        assert network.modality_logits is not None
        assert network.modality_logits.argmax(1).tolist() == [2, 2, 2]
        network.tell(2)
        assert torch.equal(network(image), found)
        network.tell(torch.tensor([2, 0, 2]))
        mixed = network(image)
        network.tell(None)
        assert torch.equal(network(image), found)
    assert torch.equal(mixed[0], found[0]) and torch.equal(mixed[2], found[2])
    assert not torch.allclose(mixed[1], found[1])


def test_each_image_of_a_batch_finds_out_for_itself() -> None:
    network = make_text_unet()
    with torch.no_grad():
        images = torch.cat((torch.randn(1, 1, 16, 8), torch.rand(1, 1, 16, 8).round() * 4))
        network.modality_head.linear.bias.zero_()
        network.modality_head.linear.weight *= 1000
        network(images)
        assert network.modality_logits is not None
        network.modality_head.linear.bias -= network.modality_logits.mean(
            0
        )  # now what is high for one is low for the other
        whole = network(images)
        assert len(set(network.modality_logits.argmax(1).tolist())) == 2
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)


def test_trained_on_one_modality_it_takes_every_image_for_that_one() -> None:
    network = make_text_unet()
    with torch.no_grad():
        network.modality_head.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
        image = torch.randn(2, 1, 16, 8)
        network.tell(1)
        wanted = network(image)
        network.tell(None)
        network.only = 1
        assert torch.equal(network(image), wanted)
        assert network.modality_logits is not None and network.modality_logits.argmax(1).tolist() == [1, 1]
        network.tell(0)
        assert not torch.equal(network(image), wanted)


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_unknown_modality_is_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="3, CT, MR, PET"):
        make_text_unet().tell(wrong)


def test_the_text_is_frozen_and_in_the_checkpoint_and_what_was_told_is_not() -> None:
    network = make_text_unet()
    assert "text_embeddings" not in dict(network.named_parameters())
    network.tell(1)
    state = network.state_dict()
    assert "text_embeddings" in state and not any("told" in name or name == "modality_logits" for name in state)
    other = TextUNet(make_unet(), MODALITIES, classes=4, text=6, deep_supervision=True)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.text_embeddings, network.text_embeddings)


def test_stock_names_so_that_a_stock_checkpoint_fits() -> None:
    stock, ours = make_unet().state_dict(), make_text_unet().state_dict()
    assert {name for name in stock if "seg_layers" not in name} <= ours.keys()


def test_logits_are_kept_where_half_precision_can_sum_them() -> None:
    network = make_text_unet()
    with torch.no_grad():
        network.head.controller.bias.mul_(1e6)
        logits = network(torch.randn(1, 1, 16, 8))
    assert logits.abs().max() == 1000


def test_compiles_once_for_all_modalities() -> None:
    torch._dynamo.reset()
    compiled = 0

    def backend(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    network = make_text_unet(deep_supervision=True).train()
    eager = copy.deepcopy(network)
    fast = torch.compile(network, backend=backend)
    image = torch.randn(2, 1, 16, 8)
    for modality in (0, 1, 2, 1):
        ids = torch.full((2,), modality)
        network.tell(ids)
        eager.tell(ids)
        output, wanted = fast(image), eager(image)
        for ours, theirs in zip(output.segmentation, wanted.segmentation):
            torch.testing.assert_close(ours, theirs)
        assert network.modality_logits is not None
        torch.testing.assert_close(network.modality_logits, wanted.modality_logits)
    assert compiled == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [(64, 32), (40, 24), (32, 33, 20)])
def test_swin_unetr_takes_any_patch(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = TextSwinUNETR(len(size), MODALITIES, classes=4, text=6, feature_size=12)
    network.text_embeddings.normal_()
    assert isinstance(network, TextConditionedNetwork)
    network.tell(1)
    image = torch.randn(1, 1, *size)
    output = network(image)
    assert output.segmentation.shape == (1, 4, *size) and output.modality_logits.shape == (1, 3)
    (output.segmentation.square().mean() + output.modality_logits.square().mean()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert network.eval()(image).shape == (1, 4, *size)


def test_swin_unetr_is_monais_network_up_to_the_head() -> None:
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    ours = TextSwinUNETR(2, MODALITIES, classes=4, text=6, feature_size=12).eval()
    theirs = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2).eval()
    theirs.load_state_dict(ours.backbone.state_dict(), strict=False)
    heads: list[torch.Tensor] = []
    theirs.out.register_forward_hook(lambda module, inputs, output: heads.append(inputs[0]))
    image = torch.randn(1, 1, 64, 32)
    with torch.no_grad():
        theirs(image)
        features = ours.features(image)
    torch.testing.assert_close(features.scales[0], heads[0])
    assert [stage.shape[1] for stage in features.encoder] == [12, 24, 48, 96, 192]
    assert features.encoder[-1].shape == (1, 16 * 12, 2, 1)


# --- telling the modality --------------------------------------------------------------------------------------------


def batches(number: int, batch: int = 4) -> list[tuple[int, list[torch.Tensor]]]:
    """Features of one modality a batch, in turn: a tenth of a deviation apart on a mean ten times as large."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(number):
        means = 10 + 0.2 * (step % 2) + torch.randn(batch, 6, 1, 1, generator=generator) * 0.1
        made.append((step % 2, [means[:, :2] + torch.zeros(1, 1, 4, 4), means[:, 2:] + torch.zeros(1, 1, 2, 2)]))
    return made


def test_the_modality_head_learns_from_batches_of_one_modality() -> None:
    torch.manual_seed(0)
    head = ModalityHead([2, 4], 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for modality, stages in batches(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(stages), torch.full((4,), modality)).backward()
        optimizer.step()
    head.eval()
    right = [float((head(stages).argmax(1) == modality).float().mean()) for modality, stages in batches(40)]
    assert sum(right) / len(right) > 0.97


def test_running_statistics_are_of_all_batches_so_far() -> None:
    head = ModalityHead([2, 4], 2)
    seen = []
    for _, stages in batches(7):
        head(stages)
        seen.append(torch.cat([stage.mean((2, 3)) for stage in stages], dim=1))
    pooled = torch.cat(seen)
    torch.testing.assert_close(head.mean, pooled.mean(0))
    torch.testing.assert_close(head.square - head.mean**2, pooled.var(0, unbiased=False), atol=1e-4, rtol=0)
    before = head.mean.clone()
    head.eval()(batches(1)[0][1])
    assert torch.equal(head.mean, before)


def test_it_reads_the_encoder_and_does_not_shape_it() -> None:
    network = make_text_unet().train()
    network.tell(0)
    network(torch.randn(2, 1, 16, 8)).modality_logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is not None] == [
        "modality_head.linear.weight",
        "modality_head.linear.bias",
    ]
