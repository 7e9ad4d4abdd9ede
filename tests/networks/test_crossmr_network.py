"""The referring network: what it answers, what organs may see of each other, and that all of it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import every_kind, make_referring, make_unet, size_of, stacked
from torch import Tensor, nn

from nnunet_multimodal.losses import ReferringLoss
from nnunet_multimodal.networks import ReferringOutput, binary_prompts
from nnunet_multimodal.networks.crossmr import (
    ABSENT,
    ABSENT_IN_TILE,
    LOGIT_LIMIT,
    attended_area,
    mask_logits,
    pool_over_batch,
)
from nnunet_multimodal.networks.query_decoder import Attention, QueryLayer

ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cross first": {"tokens_first": False},
    "noVisualTokens": {"visual_tokens": False},
    "noOrganMatch": {"organ_queries": False},
    "visualAcrossBatch": {"pool_batch_tokens": True},
    "cross sample": {"cross_sample": 1.0},
}
every_ablation = pytest.mark.parametrize("settings", list(ABLATIONS.values()), ids=list(ABLATIONS))


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 2)], ids=["2d", "3d"])
def test_mask_logits_equal_a_nested_loop(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 3, 4, 6, generator=generator)
    features = torch.randn(2, 5, *size, generator=generator)
    masks = mask_logits(embedding, features)
    assert masks.shape == (2, 3, 4, *size)
    for b, k, i in np.ndindex(2, 3, 4):
        for place in np.ndindex(*size):
            expected = embedding[b, k, i, 5].item()  # the bias
            for c in range(5):
                expected += embedding[b, k, i, c].item() * features[(b, c, *place)].item()
            assert masks[(b, k, i, *place)].item() == pytest.approx(expected, abs=1e-5)


def test_mask_logits_are_fp32_under_autocast() -> None:
    embedding = torch.full((1, 2, 5), 40.0)
    features = torch.full((1, 4, 2, 2), 50.0)
    with torch.autocast("cpu", torch.float16):
        masks = mask_logits(embedding.half(), features.half())
    assert masks.dtype == torch.float32
    assert (masks == 40 * 50 * 4 + 40).all()


def test_attended_area_by_hand() -> None:
    """Halved: a cell is seen where the mean logit is not negative; an empty mask sees everything."""
    mask = torch.full((4, 4), 2.0)
    mask[:2, :2] = torch.tensor([[3.0, -1.0], [-1.0, -1.0]])  # mean 0: still seen
    mask[:2, 2:] = -5.0
    mask[2:, :2] = torch.tensor([[-9.0, 1.0], [1.0, 1.0]])
    empty = torch.full((4, 4), -1.0)
    area = attended_area(torch.stack((mask, empty)).view(1, 1, 2, 4, 4), torch.Size((2, 2)))
    assert area.dtype == torch.bool
    assert area.tolist() == [[[[True, False, False, True], [True] * 4]]]


def test_attended_area_in_3d_at_its_own_size() -> None:
    masks = torch.randn(2, 3, 4, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    area = attended_area(masks, torch.Size((2, 3, 4)))
    assert area.shape == (2, 3, 4, 24)
    assert torch.equal(area, masks.flatten(3) >= 0)  # none of them is empty


def test_attention_equals_torchs_own() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        projections = (ours.to_query, ours.to_key, ours.to_value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.to_output.state_dict())
        query, key, value = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8)
        visible = torch.rand(3, 5, 7) < 0.5
        visible[..., 0] = True
        expected, _ = theirs(query, key, value, attn_mask=~visible.repeat_interleave(2, 0))
        torch.testing.assert_close(ours(query, key, value, visible), expected, atol=1e-6, rtol=1e-5)


def slow_attention(module: Attention, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One query [d] on keys and values [S, d], of which only the visible ones exist."""
    heads, width = module.heads, query.shape[0]
    q, k, v = module.to_query(query), module.to_key(key[visible]), module.to_value(value[visible])
    mixed = []
    for part in torch.arange(width).view(heads, -1):
        weight = (k[:, part] @ q[part] / len(part) ** 0.5).softmax(0)
        mixed.append(weight @ v[:, part])
    return module.to_output(torch.cat(mixed))


@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_layer_equals_a_loop_over_its_queries(tokens_first: bool) -> None:
    """Pre-norm; positions on queries and keys, not on values; the tokens carry none."""
    torch.manual_seed(0)
    layer = QueryLayer(8, 2, 12, tokens_first)
    for norm in (layer.self_norm, layer.cross_norm, layer.feed_norm, layer.token_norm, layer.target_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    queries, position, tokens = torch.randn(2, 2, 3, 8), torch.randn(3, 8), torch.randn(2, 2, 4, 8)
    target, target_position = torch.randn(2, 5, 8), torch.randn(5, 8)
    tokens_visible, seen = torch.rand(2, 2, 4) < 0.6, torch.rand(2, 2, 3, 5) < 0.5
    seen[..., 0] = True

    def attend_organ(state: Tensor) -> Tensor:
        moved = torch.zeros_like(state)
        for b, k, i in np.ndindex(2, 2, 3):
            own = layer.self_norm(state[b, k])
            given = layer.token_norm(tokens[b, k])
            keys, values = torch.cat((own + position, given)), torch.cat((own, given))
            visible = torch.cat((torch.ones(3, dtype=torch.bool), tokens_visible[b, k]))
            moved[b, k, i] = slow_attention(layer.self_attention, (own + position)[i], keys, values, visible)
        return state + moved

    def attend_target(state: Tensor) -> Tensor:
        moved = torch.zeros_like(state)
        for b, k, i in np.ndindex(2, 2, 3):
            image = layer.target_norm(target[b])
            query = layer.cross_norm(state[b, k, i]) + position[i]
            moved[b, k, i] = slow_attention(layer.cross_attention, query, image + target_position, image, seen[b, k, i])
        return state + moved

    with torch.no_grad():
        steps = (attend_organ, attend_target) if tokens_first else (attend_target, attend_organ)
        expected = steps[1](steps[0](queries))
        expected = expected + layer.feed_forward(layer.feed_norm(expected))
        found = layer(queries, position, tokens, tokens_visible, target, target_position, seen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_layers_go_from_coarse_to_fine_and_look_where_the_last_mask_was() -> None:
    network = make_referring(2, features=(4, 6, 8, 8), layers=4, levels=3, mask_stage=0).eval()
    calls: list[tuple[Any, ...]] = []
    for layer in network.layers:
        layer.register_forward_hook(lambda _, arguments, __: calls.append(arguments))
    x = stacked(2)
    with torch.no_grad():
        prompt = network.prompt(x[:, 1:2], x[:, 2:] > 0)
        output = network.refer(x[:, :1], prompt)
    sizes = [torch.Size((2, 1)), torch.Size((4, 2)), torch.Size((8, 4)), torch.Size((2, 1))]
    for number, (_, _, tokens, _, target, position, seen) in enumerate(calls):
        assert target.shape[1] == position.shape[0] == sizes[number].numel()
        assert torch.equal(tokens, prompt.tokens[number % 3])
        if number == 0:
            assert seen is None
        else:
            assert torch.equal(seen, attended_area(output.masks[number - 1], sizes[number]))


def test_pooled_tokens_are_the_organs_own_tokens_of_any_entry() -> None:
    batch, organs, count = 3, 2, 4
    own = torch.arange(batch * organs * count).view(batch, organs, count)
    tokens = own.unsqueeze(-1).float()
    visible = torch.zeros(batch, organs, count, dtype=torch.bool)
    visible[0, 0, :3] = visible[2, 0, :2] = True  # organ 0: five tokens in all, organ 1: one
    visible[1, 1, 2] = True
    torch.manual_seed(0)
    (pooled, again), seen = pool_over_batch([tokens, tokens + 100], visible)
    assert pooled.shape == tokens.shape and seen.shape == visible.shape
    assert torch.equal(again, pooled + 100)  # the same draw at each level
    assert seen.sum(-1).tolist() == [[4, 1]] * 3
    for organ in range(organs):
        allowed = set(own[:, organ][visible[:, organ]].tolist())
        for entry in range(batch):
            drawn = pooled[entry, organ][seen[entry, organ]].flatten().tolist()
            assert len(set(drawn)) == len(drawn) and set(drawn) <= allowed
    draws = {tuple(pool_over_batch([tokens], visible)[0][0][0, 0].flatten().tolist()) for _ in range(20)}
    assert len(draws) > 1


# --- answers ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("features", [(4, 6), (4, 6, 8)], ids=["2 stages", "3 stages"])
def test_prediction_gives_nnunets_logits(ndim: int, encoder: str, features: tuple[int, ...]) -> None:
    network = make_referring(ndim, encoder, features, organs=3).eval()
    x = stacked(ndim, organs=3)
    with torch.no_grad():
        logits = network(x)
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 4, *size_of(ndim)) and logits.dtype == torch.float32
    assert torch.isfinite(logits).all() and (logits[:, 0] == 0).all()
    assert (logits[:, 1:].flatten(2).std(-1) > 0).all()  # masks, not constants


@every_kind
@every_ablation
def test_training_gives_what_the_loss_needs(ndim: int, encoder: str, settings: dict[str, Any]) -> None:
    network = make_referring(ndim, encoder, organs=3, mask_stage=1, **settings).train()
    output = network(stacked(ndim, organs=3))
    assert isinstance(output, ReferringOutput)
    coarse = tuple(n // 2 for n in size_of(ndim))
    assert [mask.shape for mask in output.masks] == [(2, 3, 3, *coarse)] * 3  # B, K, N after each of three layers
    assert output.scores.shape == (2, 3, 9 if settings.get("organ_queries") is False else 3)
    assert output.answer.shape == (2, 3, *size_of(ndim))
    assert output.present.shape == (2, 3) and output.present.dtype == torch.bool


def test_a_mask_stage_deeper_than_the_network_is_the_deepest() -> None:
    output = make_referring(2, features=(4, 6), mask_stage=5, levels=3).train()(stacked(2))
    assert output.masks[0].shape[3:] == tuple(n // 2 for n in size_of(2))


@pytest.mark.parametrize("ndim", [2, 3])
def test_organs_without_a_scribble_never_win(ndim: int) -> None:
    network = make_referring(ndim, organs=3).eval()
    x = stacked(ndim, organs=3)
    x[0, 3] = 0  # entry 0: the second organ is not scribbled
    x[1, 2:] = 0  # entry 1: none is
    with torch.no_grad():
        logits = network(x)
        prompt = network.prompt(x[:, 1:2], x[:, 2:] > 0.5)
        kept = network.segment(x[:, :1], prompt)
    assert (logits[0, 2] == ABSENT_IN_TILE).all() and (logits[1, 1:] == ABSENT_IN_TILE).all()
    assert (kept[0, 2] == ABSENT).all() and (kept[1, 1:] == ABSENT).all()
    torch.testing.assert_close(kept[0, [1, 3]], logits[0, [1, 3]])
    labels = logits.argmax(1)
    assert not (labels[0] == 2).any() and (labels[1] == 0).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_logits_stay_in_the_range_that_nnunet_can_add_up(ndim: int) -> None:
    network = make_referring(ndim).eval()
    with torch.no_grad():
        for parameter in network.answer_embedding.parameters():
            parameter.mul_(100)
        logits = network(stacked(ndim))
    assert torch.isfinite(logits).all()
    assert logits[:, 1:].abs().max() == LOGIT_LIMIT  # else the weights were not large enough to show it
    assert torch.isfinite(logits.half() * 10).all()


def test_the_answer_is_the_weighted_mean_of_the_queries_masks() -> None:
    network = make_referring(2).eval()
    torch.manual_seed(0)
    queries, features = torch.randn(2, 2, 3, 8), torch.randn(2, 4, 5, 5)
    scores = torch.randn(2, 2, 3)
    with torch.no_grad():
        masks = mask_logits(network.answer_embedding(queries), features)  # [B, K, N, ...]
        expected = (scores.softmax(-1)[..., None, None] * masks).sum(2)
        answer = mask_logits(network._mixed_answer(queries, scores), features)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def test_without_organ_queries_every_organ_chooses_among_all() -> None:
    network = make_referring(2, organ_queries=False).eval()
    torch.manual_seed(0)
    queries, signature = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8)
    with torch.no_grad():
        scores = network._scores(queries, signature)
        keys, wanted = network.query_key(queries), network.signature_key(signature)
        mixed = network._mixed_answer(queries, scores)
        embedding = network.answer_embedding(queries)
    for organ, owner, query in np.ndindex(2, 2, 3):
        expected = (keys[0, owner, query] @ wanted[0, organ]).item() / 8**0.5
        assert scores[0, organ, owner * 3 + query].item() == pytest.approx(expected, abs=1e-5)
    expected_mix = torch.stack([
        sum(scores[0, organ].softmax(0)[owner * 3 + query] * embedding[0, owner, query]
            for owner, query in np.ndindex(2, 3))
        for organ in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(mixed[0], expected_mix, atol=1e-5, rtol=1e-5)


# --- what organs see of each other (check 11) ------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_an_organs_scribble_changes_no_other_organ(ndim: int, tokens_first: bool) -> None:
    network = make_referring(ndim, organs=3, tokens_first=tokens_first).eval()
    x = stacked(ndim, organs=3)
    moved = x.clone()
    moved[:, 3] = moved[:, 3].flip(-2).roll(2, -1)
    with torch.no_grad():
        before, after = network(x), network(moved)
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert not torch.equal(before[:, 2], after[:, 2])


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"visual_tokens": False}, {"organ_queries": False}], ids=str)
def test_the_order_of_the_organs_is_the_order_of_the_answers(ndim: int, settings: dict[str, bool]) -> None:
    network = make_referring(ndim, organs=3, **settings).eval()
    x = stacked(ndim, organs=3)
    order = [2, 0, 1]
    with torch.no_grad():
        before = network(x)
        after = network(torch.cat((x[:, :2], x[:, 2:][:, order]), 1))
    torch.testing.assert_close(after[:, 1:], before[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    if settings.get("organ_queries", True):
        assert (before[:, 1] - before[:, 2]).abs().max() > 1e-4  # organs do differ, so the order can be seen


def test_entries_of_a_batch_do_not_see_each_other() -> None:
    network = make_referring(2, organs=2).eval()
    x = stacked(2)
    with torch.no_grad():
        both, alone = network(x), network(x[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_without_visual_tokens_the_scribble_reaches_the_scores_only() -> None:
    network = make_referring(2, visual_tokens=False).train()
    x = stacked(2)
    moved = x.clone()
    moved[:, 2:] = moved[:, 2:].roll(5, -2)
    with torch.no_grad():
        before, after = network(x), network(moved)
    assert all(torch.equal(a, b) for a, b in zip(before.masks, after.masks))
    assert not torch.equal(before.scores, after.scores)
    with torch.no_grad():
        network.visual_tokens = True
        before, after = network(x), network(moved)
    assert not torch.equal(before.masks[-1], after.masks[-1])


# --- a kept prompt ---------------------------------------------------------------------------------------------------


@every_kind
def test_a_kept_prompt_gives_what_stacked_channels_give(ndim: int, encoder: str) -> None:
    network = make_referring(ndim, encoder).eval()
    x = stacked(ndim, batch=1)
    targets = torch.randn(3, 1, *size_of(ndim), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        prompt = network.prompt(x[:, 1:2], binary_prompts(x[:, 2:]))
        together = network.segment(targets, prompt)
        for target, found in zip(targets, together):
            expected = network(torch.cat((target[None], x[:, 1:]), 1))
            torch.testing.assert_close(found[None], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network.segment(targets[:1], prompt), together[:1], atol=1e-5, rtol=1e-5)
    assert together.shape == (3, 3, *size_of(ndim))


def test_target_and_reference_may_differ_in_size() -> None:
    network = make_referring(2).eval()
    x = stacked(2, batch=1)
    with torch.no_grad():
        logits = network.segment(torch.randn(1, 1, 24, 12), network.prompt(x[:, 1:2], x[:, 2:] > 0))
    assert logits.shape == (1, 3, 24, 12) and torch.isfinite(logits).all()


def test_prompts_are_made_once_the_reference_is_encoded_down_to_the_mask_stage_only() -> None:
    network = make_referring(2, mask_stage=1).eval()
    ran: list[int] = []
    for number, stage in enumerate(network.decoder.stages):
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))
    x = stacked(2)
    with torch.no_grad():
        prompt = network.prompt(x[:, 1:2], x[:, 2:] > 0)
        assert ran == [0]
        network.segment(x[:, :1], prompt)
    assert ran == [0, 0, 1]


def test_cross_sample_swaps_whole_prompts() -> None:
    network = make_referring(2, organs=2, cross_sample=1.0).train()
    x = stacked(2, batch=6)
    x[::2, 3] = 0  # every other entry has only the first organ
    swapped = kept = 0
    torch.manual_seed(0)
    with torch.no_grad():
        own = network.prompt(x[:, 1:2], binary_prompts(x[:, 2:]))
        for _ in range(5):
            taken = network._swap_prompts(own)
            for entry in range(6):
                same = [torch.equal(taken.signature[entry], own.signature[other]) for other in range(6)]
                other = same.index(True)
                assert torch.equal(taken.present[entry], own.present[other])
                assert torch.equal(taken.visible[entry], own.visible[other])
                assert all(torch.equal(t[entry], o[other]) for t, o in zip(taken.tokens, own.tokens))
                swapped, kept = swapped + (other != entry), kept + (other == entry)
    assert swapped > kept
    network.cross_sample = 0.0
    with torch.no_grad():
        assert torch.equal(network._swap_prompts(own).signature, own.signature)


# --- training --------------------------------------------------------------------------------------------------------


def train_once(network: nn.Module, x: Tensor, settings: dict[str, Any]) -> Tensor:
    targets = torch.rand(x.shape[0], x.shape[1] - 2, *x.shape[2:], generator=torch.Generator().manual_seed(1)) < 0.4
    output = network.train()(x)
    loss = ReferringLoss(organ_match=settings.get("organ_queries", True))(*output, targets)
    loss.backward()
    return loss


@every_ablation
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("features", [(4, 6), (4, 6, 8)], ids=["2 stages", "3 stages"])
def test_every_parameter_gets_a_gradient(settings: dict[str, Any], ndim: int, features: tuple[int, ...]) -> None:
    network = make_referring(ndim, features=features, **settings)
    train_once(network, stacked(ndim), settings)
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without  # distributed training stops on these
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    if settings.get("visual_tokens", True):
        still = [name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()]
        # A bias before instance norm is taken out again, and one added to all keys alike leaves a softmax as it is.
        assert [name for name in still if not name.endswith("bias")] == []


@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_gets_a_gradient_with_fewer_layers_than_levels(layers: int) -> None:
    network = make_referring(2, features=(4, 6, 8, 8), layers=layers, levels=3)
    train_once(network, stacked(2), {})
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_ablation
@pytest.mark.parametrize("ndim", [2, 3])
def test_every_parameter_gets_a_gradient_when_nothing_is_scribbled(settings: dict[str, Any], ndim: int) -> None:
    network = make_referring(ndim, **settings)
    x = stacked(ndim)
    x[:, 2:] = 0
    loss = train_once(network, x, settings)
    assert loss.item() == 0
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert all((p.grad == 0).all() for p in network.parameters() if p.grad is not None)


def test_it_learns_what_the_scribble_says() -> None:
    """One image, two organs, the scribbles exchanged or not: only who looks at them can tell the two answers apart."""
    network = make_referring(2, layers=2, width=16, hidden=32).train()
    image = torch.zeros(16, 16)
    image[2:8, 2:8], image[9:14, 6:15] = 1.0, 2.0
    masks = torch.stack((image == 1, image == 2))
    scribbles = torch.zeros(2, 16, 16)
    scribbles[0, 4, 3:7], scribbles[1, 11, 8:12] = 1, 1
    x = torch.stack([torch.cat((image[None], image[None], s)) for s in (scribbles, scribbles.flip(0))])
    targets = torch.stack((masks, masks.flip(0)))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    loss_function = ReferringLoss()
    for _ in range(150):
        optimizer.zero_grad()
        loss_function(*network(x), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        found = network.eval()(x)[:, 1:] > 0
    dice = 2 * (found & targets).flatten(2).sum(-1) / (found.flatten(2).sum(-1) + targets.flatten(2).sum(-1))
    assert dice.min() > 0.8, dice


def test_no_stock_head_is_left_without_a_gradient() -> None:
    network = make_referring(2)
    assert len(network.decoder.seg_layers) == 0
    assert not any("seg_layers" in key for key in network.state_dict())
    stock = make_unet(2, classes=1).state_dict()
    assert {key for key in stock if "seg_layers" not in key} <= set(network.state_dict())  # a stock model can be loaded


@pytest.mark.parametrize("ndim", [2, 3])
def test_compiled_is_equal(ndim: int) -> None:
    torch._dynamo.reset()
    network = make_referring(ndim).eval()
    x = stacked(ndim)
    with torch.no_grad():
        expected = network(x)
        found = torch.compile(network, backend="eager")(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_compiled_training_is_equal() -> None:
    torch._dynamo.reset()
    network = make_referring(2, max_tokens=1000).train()  # all points are taken, so their random order does not matter
    x = stacked(2)
    with torch.no_grad():
        expected = network(x)
        found = torch.compile(network, backend="eager")(x)
    assert isinstance(found, ReferringOutput)
    torch.testing.assert_close(found.answer, expected.answer, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.present, expected.present)
