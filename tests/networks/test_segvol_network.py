"""SegVol: shapes, names, prompts against slow references, and a network that learns what a point means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_multimodal.data.prompt_sampling import COMBINATIONS, sample_points
from nnunet_multimodal.losses.prompted import PromptedLoss
from nnunet_multimodal.networks.segvol import (
    NEGATIVE,
    PADDING,
    POSITIVE,
    Attention,
    PromptEncoder,
    Prompts,
    RandomPositions,
    SegVolNetwork,
    TwoWayTransformer,
)
from nnunet_multimodal.networks.segvol.network import patch_for
from nnunet_multimodal.networks.segvol.two_way import TwoWayBlock

WINDOW, PATCH, WIDTH = (8, 16, 12), (4, 4, 6), 16


def tiny(organs: int = 3, as_segvol: bool = False, channels: int = 1, seed: int = 0) -> SegVolNetwork:
    torch.manual_seed(seed)
    network = SegVolNetwork(WINDOW, PATCH, organs, 5, channels, WIDTH, 2, 2, 24, 2, 2, 24, as_segvol)
    network.text_embeddings.copy_(torch.randn(organs, 5))
    return network


def question(kinds: tuple[str, ...], count: int = 2) -> Prompts:
    torch.manual_seed(1)
    size = torch.tensor(WINDOW)
    corner = torch.rand(count, 3) * (size - 1) / 2
    return Prompts(
        torch.arange(count) % 2,
        torch.arange(count) if "text" in kinds else None,
        torch.rand(count, 4, 3) * (size - 1) if "points" in kinds else None,
        torch.tensor([[POSITIVE, NEGATIVE, POSITIVE, PADDING]] * count) if "points" in kinds else None,
        torch.stack([corner, corner + 3], dim=1).round() if "box" in kinds else None,
    )


# --- as a whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_segvol", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_shapes(as_segvol: bool, channels: int) -> None:
    network = tiny(as_segvol=as_segvol, channels=channels)
    images = torch.randn(2, channels, *WINDOW)
    assert network.embed(images).shape == (2, WIDTH, 2, 4, 2)
    answers = network(images, [question(kinds, 3) for kinds in COMBINATIONS])
    assert [answer.shape for answer in answers] == [(3, 1, *WINDOW)] * 6
    assert all(torch.isfinite(answer).all() for answer in answers)


def test_without_questions_every_organ_is_asked_for_by_its_text() -> None:
    network = tiny().eval()
    images = torch.randn(2, 1, *WINDOW)
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (2, 4, *WINDOW) and not logits[:, 0].any()
        for organ in range(3):
            asked = Prompts(torch.tensor([0, 1]), text=torch.tensor([organ, organ]))
            torch.testing.assert_close(network(images, [asked])[0], logits[:, organ + 1 : organ + 2])
    assert not torch.equal(logits[:, 1], logits[:, 2])


def test_logits_that_leave_for_nnunet_are_bounded() -> None:
    network = tiny().eval()
    with torch.no_grad():
        network.mask_decoder.output_hypernetworks_mlps[0].layers[-1].bias.fill_(1e6)
        logits = network(torch.randn(1, 1, *WINDOW))
    assert logits.abs().max() == 1000
    assert network.train()(torch.randn(1, 1, *WINDOW)).abs().max() > 1000  # a loss needs the gradient


def test_a_question_is_about_its_own_image() -> None:
    network = tiny().eval()
    images = torch.randn(2, 1, *WINDOW)
    asked = question(("text", "box"), 3)
    with torch.no_grad():
        before = network(images, [asked])[0]
        images[1] += 1
        after = network(images, [asked])[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_every_parameter_learns_from_the_six_combinations() -> None:
    network = tiny()
    answers = network(torch.randn(2, 1, *WINDOW), [question(kinds) for kinds in COMBINATIONS])
    sum(answer.square().mean() for answer in answers).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_question_needs_something_to_ask() -> None:
    with pytest.raises(ValueError, match="a text, points or a box"):
        Prompts(torch.tensor([0]))
    with pytest.raises(ValueError, match="go together"):
        Prompts(torch.tensor([0]), points=torch.zeros(1, 1, 3))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must divide window"):
        SegVolNetwork((8, 16, 12), (3, 4, 4), 1, 1)
    with pytest.raises(ValueError, match="divisible by 8"):
        SegVolNetwork((8, 8, 8), (4, 4, 4), 1, 1, width=12, layers=1, heads=2, decoder_heads=2)
    with pytest.raises(ValueError, match="3 heads must divide"):
        Attention(16, 3)


def test_the_patch_is_segvols_for_its_window_and_always_divides() -> None:
    assert patch_for((32, 256, 256), (5.0, 0.8, 0.8)) == (4, 16, 16)
    rng = np.random.default_rng(0)
    for _ in range(200):
        window, spacing = rng.integers(1, 200, 3).tolist(), rng.uniform(0.5, 5, 3).tolist()
        patch = patch_for(window, spacing)
        assert all(size % cell == 0 and cell >= min(4, size) for size, cell in zip(window, patch))
        assert math.prod(size // cell for size, cell in zip(window, patch)) <= 2048


# --- names of SegVol's public weights --------------------------------------------------------------------------------

# As in BAAI-DCAI/SegVol: a sample of each part, with its shape at 32 x 256 x 256 and a patch of 4 x 16 x 16.
PUBLIC = {
    "image_encoder.patch_embedding.position_embeddings": (1, 2048, 768),
    "image_encoder.patch_embedding.patch_embeddings.1.weight": (768, 1024),
    "image_encoder.blocks.11.attn.qkv.weight": (2304, 768),
    "image_encoder.blocks.11.mlp.linear1.weight": (3072, 768),
    "image_encoder.norm.bias": (768,),
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (3, 384),
    "prompt_encoder.point_embeddings.3.weight": (1, 768),
    "prompt_encoder.not_a_point_embed.weight": (1, 768),
    "prompt_encoder.no_mask_embed.weight": (1, 768),
    "mask_decoder.transformer.layers.1.self_attn.q_proj.weight": (768, 768),
    "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (768, 384),
    "mask_decoder.transformer.layers.0.mlp.lin2.weight": (768, 2048),
    "mask_decoder.transformer.layers.0.norm4.weight": (768,),
    "mask_decoder.transformer.final_attn_token_to_image.k_proj.bias": (384,),
    "mask_decoder.transformer.norm_final_attn.weight": (768,),
    "mask_decoder.iou_token.weight": (1, 768),
    "mask_decoder.mask_tokens.weight": (4, 768),
    "mask_decoder.output_upscaling.0.weight": (768, 192, 2, 2, 2),
    "mask_decoder.output_upscaling.1.weight": (192, 16, 32, 32),
    "mask_decoder.output_upscaling.3.bias": (96,),
    "mask_decoder.output_hypernetworks_mlps.0.layers.2.weight": (96, 768),
    "mask_decoder.txt_align_upscaled_embedding.weight": (96, 768),
    "text_encoder.dim_align.weight": (768, 512),
}


def test_names_and_shapes_are_segvols() -> None:
    with torch.device("meta"):  # shapes without numbers
        network = SegVolNetwork((32, 256, 256), (4, 16, 16), 1, 512, as_segvol=True)
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: found.get(name) for name in PUBLIC} == PUBLIC
    with torch.device("meta"):
        network = SegVolNetwork((32, 256, 256), (4, 16, 16), 1, 512)
    differ = {n for n, value in network.state_dict().items() if found.get(n) != tuple(value.shape)}
    assert differ == {"mask_decoder.output_upscaling.1.weight", "mask_decoder.output_upscaling.1.bias"}


# --- places ----------------------------------------------------------------------------------------------------------


def slow_code(matrix: torch.Tensor, place: tuple[float, float, float]) -> list[float]:
    """[sin, cos] of 2 pi (2 place - 1) G, number by number."""
    angles = [
        sum(2 * math.pi * (2 * place[axis] - 1) * float(matrix[axis, column]) for axis in range(3))
        for column in range(matrix.shape[1])
    ]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


@pytest.mark.parametrize("as_segvol", [False, True])
def test_the_code_of_a_point(as_segvol: bool) -> None:
    torch.manual_seed(0)
    positions = RandomPositions(8, as_segvol)
    voxel = (2.0, 9.25, 5.0)
    found = positions.points(torch.tensor([voxel]), WINDOW)[0]
    first, second, third = (number + 0.5 for number in voxel)
    if as_segvol:  # its first number over the second axis' size, and the other way round
        place = (first / WINDOW[1], second / WINDOW[0], third / WINDOW[2])
    else:
        place = (second / WINDOW[1], first / WINDOW[0], third / WINDOW[2])
    expected = torch.tensor(slow_code(positions.positional_encoding_gaussian_matrix, place))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("as_segvol", [False, True])
def test_a_point_in_the_middle_of_a_patch_has_the_patchs_code_but_as_segvol(as_segvol: bool) -> None:
    torch.manual_seed(0)
    positions = RandomPositions(8, as_segvol)
    grid = tuple(size // cell for size, cell in zip(WINDOW, PATCH))
    of_patches = positions.grid(grid)
    cells = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), dim=-1)
    middles = (cells + 0.5) * torch.tensor(PATCH) - 0.5
    same = torch.allclose(positions.points(middles, WINDOW).movedim(-1, 0), of_patches, atol=1e-4)
    assert same is not as_segvol


def test_codes_of_the_grid_number_by_number() -> None:
    torch.manual_seed(0)
    positions = RandomPositions(4)
    codes = positions.grid((2, 3, 4))
    assert codes.shape == (4, 2, 3, 4)
    for z, y, x in np.ndindex(2, 3, 4):
        place = ((y + 0.5) / 3, (z + 0.5) / 2, (x + 0.5) / 4)
        expected = torch.tensor(slow_code(positions.positional_encoding_gaussian_matrix, place))
        torch.testing.assert_close(codes[:, z, y, x], expected, atol=1e-4, rtol=0)


def test_half_precision_does_not_reach_the_codes() -> None:
    torch.manual_seed(0)
    positions = RandomPositions(8)
    voxels = torch.rand(5, 3) * 7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grid = positions.points(voxels, WINDOW), positions.grid((2, 3, 4))
    assert torch.equal(found, positions.points(voxels, WINDOW)) and torch.equal(grid, positions.grid((2, 3, 4)))


# --- prompts as tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_segvol", [False, True])
@pytest.mark.parametrize("kinds", COMBINATIONS)
def test_tokens_against_a_slow_reference(kinds: tuple[str, ...], as_segvol: bool) -> None:
    torch.manual_seed(0)
    encoder = PromptEncoder(8, WINDOW, as_segvol)
    asked = question(kinds)
    text = torch.randn(2, 8) if "text" in kinds else None
    with torch.no_grad():
        found = encoder(asked, text)

    def code(voxel: torch.Tensor) -> torch.Tensor:
        return encoder.pe_layer.points(voxel[None], WINDOW)[0]

    learned = [embedding.weight[0] for embedding in encoder.point_embeddings]
    for row in range(2):
        expected = []
        if asked.points is not None and asked.labels is not None:
            for point, label in zip(asked.points[row], asked.labels[row].tolist()):
                if label == PADDING:
                    expected.append(encoder.not_a_point_embed.weight[0])
                else:
                    expected.append(code(point) + learned[1 if label == POSITIVE else 0])
            if asked.boxes is None:
                expected.append(encoder.not_a_point_embed.weight[0])
        if asked.boxes is not None:
            expected += [code(corner) + learned[2 + end] for end, corner in enumerate(asked.boxes[row])]
        if text is not None:
            expected.append(text[row])
        torch.testing.assert_close(found[row], torch.stack(expected))


def test_padding_has_no_place() -> None:
    encoder = PromptEncoder(8, WINDOW)
    labels = torch.tensor([[POSITIVE, PADDING]])
    near, far = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    far[0, 1] = 7
    index = torch.tensor([0])
    with torch.no_grad():
        tokens = [encoder(Prompts(index, points=points, labels=labels), None) for points in (near, far)]
    assert torch.equal(*tokens)


# --- attention -------------------------------------------------------------------------------------------------------


def plain_attention(layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head, with einsum and softmax."""
    q, k, v = layer.q_proj(q), layer.k_proj(k), layer.v_proj(v)
    size = q.shape[-1] // layer.heads
    heads = []
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.einsum("btc,bsc->bts", q[..., part], k[..., part]) / math.sqrt(size)
        heads.append(torch.einsum("bts,bsc->btc", weights.softmax(-1), v[..., part]))
    return layer.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("reduction", [1, 2])
def test_attention_head_by_head(reduction: int) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 4, reduction)
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(q, k, v), plain_attention(layer, q, k, v), atol=1e-5, rtol=1e-5)


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    layer, torchs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        torchs.in_proj_bias.copy_(torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]))
        torchs.out_proj.load_state_dict(layer.out_proj.state_dict())
        q, k = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
        torch.testing.assert_close(layer(q, k, k), torchs(q, k, k, need_weights=False)[0], atol=1e-5, rtol=1e-5)


def plain_block(block: TwoWayBlock, tokens, image, token_places, image_places):
    """SAM's block written out: self-attention, tokens to image, MLP, image to tokens."""
    if block.first:
        tokens = block.norm1(plain_attention(block.self_attn, tokens, tokens, tokens))
    else:
        q = tokens + token_places
        tokens = block.norm1(tokens + plain_attention(block.self_attn, q, q, tokens))
    q, k = tokens + token_places, image + image_places
    tokens = block.norm2(tokens + plain_attention(block.cross_attn_token_to_image, q, k, image))
    hidden = torch.relu(tokens @ block.mlp.lin1.weight.T + block.mlp.lin1.bias)
    tokens = block.norm3(tokens + hidden @ block.mlp.lin2.weight.T + block.mlp.lin2.bias)
    q, k = tokens + token_places, image + image_places
    return tokens, block.norm4(image + plain_attention(block.cross_attn_image_to_token, k, q, tokens))


def test_the_two_way_transformer_written_out() -> None:
    torch.manual_seed(0)
    transformer = TwoWayTransformer(2, 16, 4, 24)
    image, places, tokens = torch.randn(2, 9, 16), torch.randn(1, 9, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        found = transformer(image, places, tokens)
        answered, seen = tokens, image
        for block in transformer.layers:
            answered, seen = plain_block(block, answered, seen, tokens, places)
        last = plain_attention(transformer.final_attn_token_to_image, answered + tokens, seen + places, seen)
        torch.testing.assert_close(found[0], transformer.norm_final_attn(answered + last), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], seen, atol=1e-5, rtol=1e-5)


def test_a_text_adds_its_similarity_map() -> None:
    """m = u·h(t) + u·(W e + b), the second term by itself."""
    network = tiny().eval()
    decoder = network.mask_decoder
    features, places = torch.randn(2, WIDTH, 2, 4, 2), network.prompt_encoder.pe_layer.grid((2, 4, 2))
    tokens, text = torch.randn(2, 3, WIDTH), torch.randn(2, WIDTH)
    seen: list[torch.Tensor] = []
    decoder.output_upscaling.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        with_text, without = (decoder(features, places, tokens, each) for each in (text, None))
        similarity = torch.einsum("pc,pcdhw->pdhw", decoder.txt_align_upscaled_embedding(text), seen[0])[:, None]
    torch.testing.assert_close(with_text, without + similarity, atol=1e-5, rtol=1e-4)
    assert with_text.shape == (2, 1, 8, 16, 8)


# --- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_which_of_two_equal_blobs_a_point_is_on() -> None:
    """Dice above 0.8 for points that it was not shown; the two blobs look the same, so that only the place tells."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    size = (8, 8, 8)
    grid = np.indices(size)
    centres = ((2, 2, 2), (5, 5, 5))
    masks = [sum((axis - at) ** 2 for axis, at in zip(grid, centre)) < 2.3**2 for centre in centres]
    noise = rng.normal(0, 0.3, size)
    image = torch.from_numpy((2.0 * (masks[0] | masks[1]) + noise).astype(np.float32))[None, None]
    network = SegVolNetwork(size, (2, 2, 2), 1, 1, 1, 64, 1, 2, 128, 2, 2, 128)
    steps, loss = 220, PromptedLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    target = torch.from_numpy(np.stack(masks))[:, None]
    index = torch.tensor([0, 0])

    def ask(most: int) -> Prompts:
        points, labels = zip(*(sample_points(mask, rng, most, most) for mask in masks))
        return Prompts(index, points=torch.from_numpy(np.stack(points)), labels=torch.from_numpy(np.stack(labels)))

    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(image, [ask(2)])[0], target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    scores = []
    with torch.no_grad():
        for _ in range(10):
            answer = network(image, [ask(0)])[0] > 0
            overlap = (answer & target).flatten(1).sum(1)
            scores.append(2 * overlap / (answer.flatten(1).sum(1) + target.flatten(1).sum(1)))
    assert (torch.stack(scores).mean(0) > 0.8).all(), torch.stack(scores)
