"""Context priors: the bidirectional block, tokens, prototypes, and what nnU-Net asks of the network."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_networks import every_kind, make_unet, size_of
from torch import Tensor, nn

from nnunet_multimodal.losses import MarginalLoss
from nnunet_multimodal.networks import ContextOutput, ContextPriorUNet, ToldNetwork
from nnunet_multimodal.networks.context_prior import PriorTokens, TokenPool, fused_stages
from nnunet_multimodal.networks.prior_fusion import CrossAttention, PriorFusion, StageFusion, heads_of
from nnunet_multimodal.networks.prototypes import AdditivePrototypes, MultiplicativePrototypes

MODALITIES = ("CT", "MR", "PET")


def make(ndim: int = 2, encoder: str = "plain", deep_supervision: bool = False, **settings: Any) -> ContextPriorUNet:
    unet = make_unet(ndim, encoder, deep_supervision=deep_supervision)
    torch.manual_seed(5)
    chosen: dict[str, Any] = {"modalities": MODALITIES, "stages": [1, 2], "modality_tokens": 2, **settings}
    return ContextPriorUNet(unet, tasks=3, deep_supervision=deep_supervision, **chosen).eval()


def disturbed(network: nn.Module, seed: int = 3) -> Any:
    """What begins at zero no longer is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


# --- the bidirectional block (cross-check 20) ------------------------------------------------------------------------


def plain_attention(layer: CrossAttention, asking: Tensor, asked: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head, as it is written in the papers."""
    channels, heads = asking.shape[2], layer.heads
    w_k, w_v = layer.key_value.weight.split(channels)
    q, k, v = (
        torch.einsum("bnc,dc->bnd", tokens, weights).unflatten(2, (heads, channels // heads))
        for tokens, weights in ((asking, layer.query.weight), (asked, w_k), (asked, w_v))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(channels / heads)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(3), v).flatten(2)
    return torch.einsum("bnc,dc->bnd", mixed, layer.out.weight) + layer.out.bias


def test_the_block_is_what_its_equation_says() -> None:
    torch.manual_seed(0)
    block = disturbed(PriorFusion(64)).double()
    f, p = torch.randn(2, 11, 64).double(), torch.randn(2, 5, 64).double()
    norms = block.norms
    with torch.no_grad():
        p1 = p + plain_attention(block.prior_attention, norms[0](p), norms[1](f))
        p2 = p1 + block.prior_feed(norms[2](p1))
        f1 = f + plain_attention(block.feature_attention, norms[3](f), norms[4](p2))
        f2 = f1 + block.feature_feed(norms[5](f1))
        features, priors = block(f, p)
    torch.testing.assert_close(priors, p2, atol=1e-5, rtol=0)
    torch.testing.assert_close(features, f2, atol=1e-5, rtol=0)
    assert (features - f).abs().max() > 0.1 and (priors - p).abs().max() > 0.1


@pytest.mark.parametrize("channels", [8, 64, 96])
def test_attention_is_torchs_multihead_attention(channels: int) -> None:
    torch.manual_seed(0)
    ours = CrossAttention(channels)
    theirs = nn.MultiheadAttention(channels, ours.heads, batch_first=True)
    asking, asked = torch.randn(2, 7, channels), torch.randn(2, 13, channels)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((ours.query.weight, ours.key_value.weight)))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
        torch.testing.assert_close(ours(asking, asked), theirs(asking, asked, asked)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("channels", "heads"), [(4, 1), (32, 1), (48, 1), (64, 2), (100, 2), (320, 10), (512, 16), (73, 1)]
)
def test_heads(channels: int, heads: int) -> None:
    assert heads_of(channels) == heads


@pytest.mark.parametrize("size", [(4, 6), (2, 3, 4)])
def test_a_new_stage_leaves_the_features_as_they_are_and_moves_the_priors(size: tuple[int, ...]) -> None:
    stage = StageFusion(8, blocks=2)
    features, priors = torch.randn(2, 8, *size), torch.randn(2, 5, 8)
    found, moved = stage(features, priors)
    assert torch.equal(found, features) and found.stride() == features.stride()
    assert (moved - priors).abs().max() > 0.01
    assert not torch.allclose(disturbed(stage)(features, priors)[0], features)


def test_voxels_do_not_see_one_another_but_through_the_priors() -> None:
    """Features attend to priors alone: with the priors held, a voxel's answer depends on that voxel."""
    block = disturbed(PriorFusion(8))
    features, priors = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    nn.init.zeros_(block.prior_attention.out.weight)
    other = features.clone()
    other[:, 3] += 1
    with torch.no_grad():
        changed = (block(features, priors)[0] != block(other, priors)[0]).any(2)
    assert changed.tolist() == [[False, False, False, True, False, False]]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_of_all_tasks_then_of_the_modality() -> None:
    pool = TokenPool(6, tasks=3, modalities=2, of_modality=4)
    assert pool.task.shape == (4, 6) and pool.modality is not None and pool.modality.shape == (3, 4, 6)
    asked = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    tokens = pool(asked, torch.tensor([1, -1, 0]), 3)
    assert tokens.shape == (3, 3 + 4, 6)
    null = pool.task[3]
    for entry, rows in enumerate([[0, 3, 2], [0, 1, 2], [3, 3, 3]]):
        assert torch.equal(tokens[entry, :3], torch.stack([pool.task[row] for row in rows]))
    assert torch.equal(tokens[1, 0], pool.task[0]) and torch.equal(tokens[2, 0], null)
    for entry, row in enumerate([1, 2, 0]):  # -1, unknown, is the last row
        assert torch.equal(tokens[entry, 3:], pool.modality[row])
    assert torch.equal(pool(None, None, 2), pool.task[:3].expand(2, 3, 6))


def test_a_shared_pool_is_seen_through_a_linear_layer() -> None:
    pool = TokenPool(6, tasks=3, modalities=2, of_modality=4)
    stage = PriorTokens(10, 3, 2, 4, pool)
    assert [name for name, _ in stage.named_parameters()] == ["project.weight", "project.bias"]
    modality = torch.tensor([0])
    assert torch.equal(stage(pool, None, modality, 1), stage.project(pool(None, modality, 1)))


# --- prototypes ------------------------------------------------------------------------------------------------------


def test_hermes_posterior_is_34_b_wide() -> None:
    """Cross-check 22: stages of 4b, 8b, 10b, 8b, 4b channels give posterior tokens of 34b."""
    b = 2
    unet = make_unet(features=(b, 2 * b, 4 * b, 8 * b, 10 * b), strides=[1, 2, 2, 2, 2])
    network = ContextPriorUNet(unet, MODALITIES, 3, [2, 3, 4], False, multiplicative=True)
    assert network.ways == ["down_2", "down_3", "down_4", "up_3", "up_2"]
    seen: list[Tensor] = []
    network.prototypes.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network.eval()(torch.randn(2, 1, 32, 16))
    assert seen[0].shape == (2, 3, 34 * b)
    assert [tuple(layer.weight.shape) for layer in network.prototypes.hidden if isinstance(layer, nn.Linear)] == [
        (34 * b, 34 * b),
        (b, 34 * b),
    ]


def test_additive_prototypes_move_the_weights_of_the_convolution() -> None:
    torch.manual_seed(0)
    prototypes = disturbed(AdditivePrototypes(40, [4, 6]))
    convolution = nn.Conv2d(6, 3, 1)
    posterior, features = torch.randn(2, 3, 40), torch.randn(2, 6, 5, 4)
    with torch.no_grad():
        hidden = prototypes(posterior)
        found = prototypes.logits(hidden, features, 1, convolution(features))
        for entry in range(2):
            moved = convolution.weight[:, :, 0, 0] + 0.1 * prototypes.outs[1](hidden[entry])
            wanted = torch.einsum("kc,cyx->kyx", moved, features[entry]) + convolution.bias[:, None, None]
            torch.testing.assert_close(found[entry], wanted, atol=1e-5, rtol=0)


def test_multiplicative_prototypes_are_the_weights() -> None:
    torch.manual_seed(0)
    prototypes = MultiplicativePrototypes(40, [4, 6])
    posterior, features = torch.randn(2, 3, 40), torch.randn(2, 6, 5, 4)
    with torch.no_grad():
        hidden = prototypes(posterior)
        found = prototypes.logits(hidden, features, 1)
        weights = prototypes.outs[1](hidden)
    torch.testing.assert_close(found, torch.einsum("btc,bcyx->btyx", weights, features), atol=1e-5, rtol=0)


# --- the network -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shared", [False, True])
def test_a_new_network_answers_as_the_base_does(ndim: int, encoder: str, shared: bool) -> None:
    """Cross-check 22: posterior at zero, base logits, bit by bit; at all scales, whatever the modality."""
    base = make_unet(ndim, encoder, deep_supervision=True).eval()
    network = make(ndim, encoder, deep_supervision=True, shared_tokens=shared)
    fitting = network.load_state_dict(base.state_dict(), strict=False)
    assert not fitting.unexpected_keys and not any("coder." in key for key in fitting.missing_keys)
    image = torch.randn(2, 1, *size_of(ndim))
    with torch.no_grad():
        wanted = base(image)
        for told in (None, 0, 2, -1):
            network.tell(told)
            found = network(image)
            assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
        disturbed(network)
        assert not torch.allclose(network(image)[0], wanted[0])


@every_kind
@pytest.mark.parametrize("multiplicative", [False, True])
def test_gives_logits_of_every_scale_in_training_and_one_at_prediction(
    ndim: int, encoder: str, multiplicative: bool
) -> None:
    size = size_of(ndim)
    network = make(ndim, encoder, True, multiplicative=multiplicative).train()
    assert isinstance(network, ToldNetwork)
    network.tell(torch.tensor([1, -1]))
    output = network(torch.randn(2, 1, *size))
    assert isinstance(output, ContextOutput)
    assert [each.shape for each in output.segmentation] == [(2, 3, *size), (2, 3, *(axis // 2 for axis in size))]
    assert output.modality_logits.shape == (2, 3) and output.modality.tolist() == [1, -1]
    (sum(each.square().mean() for each in output.segmentation) + output.modality_logits.square().mean()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []  # or DDP stops
    network.eval().deep_supervision = False
    network.tell(0)
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_what_begins_at_zero_learns() -> None:
    """After two steps every parameter that a base does not have has moved."""
    network = make(deep_supervision=True).train()
    network.tell(torch.tensor([0, 1]))
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    image = torch.randn(2, 1, 16, 8)
    for _ in range(3):
        optimizer.zero_grad()
        output = network(image)
        sum(((each - 1) ** 2).mean() for each in output.segmentation).backward()
        optimizer.step()
    still = [
        name
        for name, parameter in network.named_parameters()
        if torch.equal(before[name], parameter) and not name.startswith("modality_head")
    ]
    assert still == []


@every_kind
def test_what_it_finds_out_is_what_it_would_be_told(ndim: int, encoder: str) -> None:
    network = disturbed(make(ndim, encoder))
    with torch.no_grad():
        network.modality_head.linear.weight.zero_()
        network.modality_head.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
        image = torch.randn(3, 1, *size_of(ndim))
        found = network(image)
        assert network.modality_logits.argmax(1).tolist() == [2, 2, 2]
        network.tell(2)
        assert torch.equal(network(image), found)
        network.tell(torch.tensor([2, 0, 2]))
        mixed = network(image)
        network.tell(-1)
        unknown = network(image)
        network.tell(None)
        assert torch.equal(network(image), found)
    assert torch.equal(mixed[0], found[0]) and torch.equal(mixed[2], found[2])
    assert not torch.allclose(mixed[1], found[1]) and not torch.allclose(unknown, found)


def test_samples_of_a_batch_do_not_mix() -> None:
    network = disturbed(make())
    images = torch.randn(3, 1, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            network(images), torch.cat([network(image[None]) for image in images]), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("multiplicative", [False, True])
def test_mixed_precision(multiplicative: bool) -> None:
    network = disturbed(make(deep_supervision=True, multiplicative=multiplicative)).train()
    image = torch.randn(2, 1, 16, 8)
    network.tell(0)
    wanted = network(image).segmentation[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = network(image)
        loss = sum(each.float().square().mean() for each in output.segmentation)
    loss.backward()
    assert output.segmentation[0].dtype == torch.bfloat16
    torch.testing.assert_close(output.segmentation[0].float(), wanted, atol=0.1 * float(wanted.abs().max()), rtol=0)
    assert all(p.grad.isfinite().all() for name, p in network.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("wrong", [3, -2])
def test_a_modality_that_does_not_exist_is_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="3, CT, MR, PET"):
        make().tell(wrong)


def test_without_modalities_there_is_nothing_to_tell() -> None:
    network = make(modalities=()).train()
    assert network.modality_head is None
    assert network(torch.randn(2, 1, 16, 8)).shape == (2, 3, 16, 8)
    assert not any("modality" in name for name in network.state_dict())


def test_a_task_that_is_not_asked_for_leaves_no_trace_of_itself() -> None:
    """Its token has no gradient from an image that does not ask for it: the null token stands in its place."""
    network = disturbed(make(modalities=())).train()
    network.ask(torch.tensor([[True, False, True]]))
    network(torch.randn(1, 1, 16, 8))[:, [0, 2]].square().sum().backward()
    for tokens in network.tokens.values():
        gradient = tokens.pool.task.grad.abs().sum(1)
        assert gradient[1] == 0 and (gradient[[0, 2, 3]] > 0).all()
    assert network.decoder.seg_layers[-1].weight.grad[1].abs().sum() == 0
    network.ask(None)
    network(torch.randn(1, 1, 16, 8))[:, [0, 2]].square().sum().backward()
    assert network.tokens["down_1"].pool.task.grad[1].abs().sum() > 0  # then the features have looked at it


def test_sigmoids_of_one_argmax() -> None:
    """Less the background, argmax is what it was, and each other channel is a task of its own with its 0.5 at 0."""
    network, image = make(), torch.randn(2, 1, 16, 8)
    with torch.no_grad():
        plain = network(image)
        network.subtract_background = True
        found = network(image)
    assert not found[:, 0].any() and torch.equal(found.argmax(1), plain.argmax(1))
    torch.testing.assert_close(found[:, 1:], plain[:, 1:] - plain[:, :1])


def test_logits_are_kept_where_half_precision_can_sum_them() -> None:
    network = make(multiplicative=True)
    with torch.no_grad():
        network.prototypes.outs[0][2].weight.mul_(1e6)
        logits = network(torch.randn(1, 1, 16, 8))
    assert logits.abs().max() == 1000 and torch.isfinite(logits).all()


def test_what_was_told_and_asked_is_not_in_the_checkpoint() -> None:
    network = make()
    network.tell(1)
    network.ask(torch.ones(1, 3, dtype=torch.bool))
    state = network.state_dict()
    assert not any(key.startswith(("told", "asked")) for key in state)
    make(deep_supervision=True).load_state_dict(state, strict=True)


def test_compiles_once_for_all_modalities_and_tasks() -> None:
    torch._dynamo.reset()
    compiled = 0

    def backend(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    network = disturbed(make(deep_supervision=True)).train()
    eager = copy.deepcopy(network)
    fast = torch.compile(network, backend=backend)
    image = torch.randn(2, 1, 16, 8)
    for modality in (0, 1, -1):
        for each in (network, eager):
            each.tell(torch.full((2,), modality))
            each.ask(torch.tensor([[True, modality > 0, True], [True, True, modality == 0]]))
        output, wanted = fast(image), eager(image)
        for ours, theirs in zip(output.segmentation, wanted.segmentation):
            torch.testing.assert_close(ours, theirs)
    assert compiled == 1
    torch._dynamo.reset()


# --- where priors are fused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "strides", "limit", "stages"),
    [
        ([256, 256], [1, 2, 2, 2, 2, 2, 2], 32768, [2, 3, 4]),
        ([128, 128, 128], [1, 2, 2, 2, 2, 2], 32768, [2, 3, 4]),
        ([28, 256, 224], [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], 32768, [3, 4, 5]),
        ([16, 16], [1, 2, 2], 32768, [2]),
        ([16, 16], [1, 2], 32768, [1]),  # none is coarse enough: the bottleneck
        ([512, 512], [1, 2, 2, 2], 10, [3]),  # all are too large: the bottleneck
    ],
)
def test_stages(patch: list[int], strides: list[Any], limit: int, stages: list[int]) -> None:
    assert fused_stages(patch, strides, limit) == stages


@pytest.mark.parametrize("stages", [[], [0, 1], [3], [1, 1]])
def test_stages_that_cannot_be(stages: list[int]) -> None:
    with pytest.raises(ValueError, match="stages 1 to 2, once each; found"):
        make(stages=stages)


def test_another_network() -> None:
    with pytest.raises(ValueError, match="found Sequential"):
        ContextPriorUNet(nn.Sequential(), MODALITIES, 3, [1], False)


# --- learning --------------------------------------------------------------------------------------------------------


def toy_batch(generator: torch.Generator, entries: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 1, 16, 16] of two organs, labels, and the modality: every other image is striped."""
    modality, labels = torch.arange(entries) % 2, torch.zeros(entries, 1, 16, 16)
    for entry in range(entries):
        for organ, (y, x) in enumerate(torch.randint(0, 4, (2, 2), generator=generator).tolist(), start=1):
            labels[entry, 0, (organ - 1) * 8 + y : (organ - 1) * 8 + y + 5, x + 2 : x + 9] = organ
    stripes = 0.7 * torch.cos(torch.arange(16) * math.pi / 2)
    image = labels + 0.4 * torch.randn(labels.shape, generator=generator) + stripes * modality.view(-1, 1, 1, 1)
    return (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True), labels, modality


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True], ids=["taught as background", "told that it is not annotated"])
def test_an_organ_is_found_in_a_modality_in_which_it_was_never_annotated(told: bool) -> None:
    torch.manual_seed(0)
    network = ContextPriorUNet(make_unet(features=(8, 12, 16)), ("CT", "MR"), 3, [1, 2], False, modality_tokens=2)
    loss = MarginalLoss(batch_dice=True)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        image, labels, modality = toy_batch(generator)
        without = modality == 0
        annotated = torch.ones(4, 3, dtype=torch.bool)
        annotated[without, 2] = False
        labels[without] = labels[without].where(labels[without] != 2, 0)
        loss.annotated = annotated if told else None
        network.tell(modality)
        optimizer.zero_grad()
        loss(network(image).segmentation, labels).backward()
        optimizer.step()
    network.eval()
    image, labels, modality = toy_batch(torch.Generator().manual_seed(2), 32)
    network.tell(modality)
    with torch.no_grad():
        predicted = network(image).argmax(1, keepdim=True)
    found, there = ((each == 2)[modality == 0] for each in (predicted, labels))
    dice = float(2 * (found & there).sum() / (found.sum() + there.sum()))
    assert dice > 0.8 if told else dice < 0.4
