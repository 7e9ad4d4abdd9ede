"""CmFNet: what each branch sees and gives, whatever the plans' strides are; no parameter without a gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nnunet_multimodal.networks import CmFNet
from nnunet_multimodal.networks.cmfnet import levels_of
from nnunet_multimodal.networks.vnet import Layout, ResidualStage, VNetDecoder, VNetEncoder

FEATURES = (4, 6, 8, 10, 12)


def make_layout(strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]] | None = None) -> Layout:
    kernels = kernels or [[3] * len(strides[0])] * len(strides)
    return Layout(FEATURES[: len(strides)], tuple(map(tuple, kernels)), tuple(map(tuple, strides)))


def halving(ndim: int, levels: int) -> Layout:
    return make_layout([[1] * ndim] + [[2] * ndim] * (levels - 1))


def make(layout: Layout | None = None, **settings: Any) -> CmFNet:
    torch.manual_seed(0)
    return CmFNet(layout or halving(2, 4), 3, **{"depths": (2, 3), "dropout": 0.0, **settings})


def image(*size: int, batch: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


LAYOUTS = {
    "2d, the paper's depths": (halving(2, 5), (3, 4), (48, 32)),
    "3d": (halving(3, 4), (2, 3), (16, 24, 16)),
    "thick slices": (
        make_layout([[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]),
        (2, 3),
        (4, 32, 16),
    ),
    "one axis early": (make_layout([[1, 1, 1], [2, 1, 2], [2, 2, 1], [1, 3, 2]]), (2, 3), (8, 12, 12)),
    "2d, an axis that is done": (make_layout([[1, 1], [2, 2], [2, 1]]), (1, 2), (8, 6)),
    "the CT branch is the deep one": (halving(2, 4), (3, 2), (16, 8)),
    "equally deep": (halving(2, 4), (2, 2), (16, 8)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_branch_answers_at_full_resolution(name: str) -> None:
    layout, depths, size = LAYOUTS[name]
    network = make(layout, depths=depths)
    x = image(*size)
    outputs = network(x)
    assert [each.shape for each in outputs] == [(2, 3, *size)] * 3
    network.eval()
    for index, branch in enumerate(("mm", "ct", "mr")):
        network.output_branch = branch
        torch.testing.assert_close(network(x), outputs[index])  # no dropout here, and instance norm has no memory


def test_levels_are_the_papers() -> None:
    """96 x 96 x 16, four halvings: 48, 24, 12 in both, 6 in the MR branch and below the fusion."""
    network = make(halving(3, 5), depths=(3, 4))
    seen: dict[str, torch.Size] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: getattr(o, "shape", None)}))
    network.eval()(image(32, 32, 16, batch=1))
    assert [tuple(seen[f"ct_encoder.stages.{level}"][2:]) for level in range(4)] == [
        (32, 32, 16), (16, 16, 8), (8, 8, 4), (4, 4, 2),
    ]  # fmt: skip
    assert tuple(seen["mr_encoder.stages.4"]) == (1, 12, 2, 2, 1)
    assert [seen[f"mm.fusion.levels.{level}"][1] for level in range(4)] == [4, 6, 8, 10]
    assert tuple(seen["mm.extraction"]) == (1, 12, 2, 2, 1)
    assert "mr_encoder.stages.5" not in seen and "ct_encoder.stages.4" not in seen


@pytest.mark.parametrize(("branch", "unseen"), [("ct", 1), ("mr", 0)])
@pytest.mark.parametrize("channels", [(0, 1), (1, 0)])
def test_a_branch_of_one_modality_does_not_look_at_the_other(
    branch: str, unseen: int, channels: tuple[int, int]
) -> None:
    network = make(channels=channels).eval()
    network.output_branch = branch
    x = image(16, 8)
    expected = network(x)
    other = channels[unseen]
    x[:, other] = float("nan")
    assert torch.equal(network(x), expected)
    x[:, 1 - other] += torch.randn(16, 8)
    assert not torch.equal(network(x), expected)


def test_the_fused_branch_looks_at_both() -> None:
    network = make().eval()
    x = image(16, 8)
    expected = network(x)
    for channel in (0, 1):
        changed = x.clone()
        changed[:, channel] += torch.randn(16, 8)
        assert not torch.allclose(network(changed), expected)


def test_images_of_one_modality_feed_both_branches() -> None:
    network = make(channels=(0, 0))
    x = image(16, 8, channels=1)
    assert [each.shape for each in network(x)] == [(2, 3, 16, 8)] * 3
    same = make(channels=(0, 1))
    for ours, theirs in zip(network(x), same(torch.cat((x, x), dim=1))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ablation", [{}, {"cff": False}, {"cfe": False}, {"cff": False, "cfe": False}])
@pytest.mark.parametrize("depths", [(2, 3), (2, 2), (1, 3)])
def test_every_parameter_has_a_gradient(ablation: dict[str, bool], depths: tuple[int, int]) -> None:
    network = make(halving(2, 4), depths=depths, **ablation)
    sum(each.square().mean() for each in network(image(32, 16))).backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert idle == []  # or distributed training stops
    dead = [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0 and "bias" not in name]
    assert dead == []


def test_what_the_ablations_leave_out() -> None:
    full, no_cff, no_cfe = make(), make(cff=False), make(cfe=False)
    assert no_cff.mm.fusion.channels == [8, 12, 16] and full.mm.fusion.channels == [4, 6, 8]
    assert not list(no_cff.mm.fusion.parameters())
    assert no_cfe.mm.extraction is None and len(full.mm.decoder.up) == len(no_cfe.mm.decoder.up) + 1
    x = image(16, 8)
    encoded = no_cff.ct_encoder(x[:, :1]), no_cff.mr_encoder(x[:, 1:])
    fused = no_cff.mm.fusion(*encoded)
    assert len(fused) == 3  # the levels that both have
    assert torch.equal(fused[1], torch.cat((encoded[0][1], encoded[1][1]), dim=1))


def test_logits_are_kept_where_half_precision_can_sum_them() -> None:
    network = make().eval()
    with torch.no_grad():
        network.mm.decoder.segmentation.bias[0] = 1e6
        assert network(image(16, 8)).max() == 1000


def test_an_unknown_branch_is_refused() -> None:
    network = make().eval()
    network.output_branch = "pet"
    with pytest.raises(ValueError, match="one of mm, ct, mr; found 'pet'"):
        network(image(16, 8))


def test_depths_must_fit_the_layout() -> None:
    assert levels_of((3, 4)) == 5 and levels_of((4, 3)) == 5 and levels_of((3, 3)) == 5
    assert levels_of((3, 3), cfe=False) == 4
    for depths in ((3, 4), (3, 3), (0, 1)):
        with pytest.raises(ValueError, match="levels"):
            make(halving(2, 4), depths=depths)


def test_the_branch_is_no_part_of_the_checkpoint() -> None:
    network = make()
    state = copy.deepcopy(network.state_dict())
    network.output_branch = "ct"
    assert network.state_dict().keys() == state.keys() and not any("branch" in name for name in state)
    make().load_state_dict(state, strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_it_gives_the_same(training: bool) -> None:
    torch._dynamo.reset()
    network = make(halving(3, 3), depths=(1, 2)).train(training)
    fast = torch.compile(network, backend="eager")
    x = image(8, 8, 4)
    for branch in ("mm", "ct", "mr"):
        network.output_branch = branch
        ours, theirs = fast(x), network(x)
        for one, other in zip(ours, theirs) if training else [(ours, theirs)]:
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_stage_is_convolutions_with_a_shortcut_around_them() -> None:
    stage = ResidualStage(halving(2, 4), 1, 6)
    assert [module[0].in_channels for module in stage.convolutions] == [6, 6]
    assert [len(module) for module in stage.convolutions] == [3, 2]  # the last one is activated behind the sum
    x = image(8, 8, channels=6)
    with torch.no_grad():
        for module in stage.convolutions:
            module[1].weight.zero_()
    expected = torch.where(x > 0, x, 0.25 * x)
    torch.testing.assert_close(stage(x, x), expected)


def test_dropout_is_at_the_bottleneck_and_in_training_only() -> None:
    network = make(dropout=0.9)
    x = image(16, 8)
    assert not torch.equal(network(x)[0], network(x)[0])
    network.eval()
    assert torch.equal(network(x), network(x))
    decoder = VNetDecoder(halving(2, 3), (4, 6, 8), 2, 0.5)
    seen: list[torch.Tensor] = []
    decoder.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    decoder([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.ones(2, 8, 2, 2)])
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}  # whole channels
    assert (seen[0] == seen[0][..., :1, :1]).all()


def test_size_beside_the_papers_single_branches() -> None:
    """7.94 M with three down-samplings and 19.57 M with four are the paper's, of whose layers it says too little."""
    layout = Layout((16, 32, 64, 128, 256), ((3, 3, 3),) * 5, ((1, 1, 1),) + ((2, 2, 2),) * 4)
    sizes = []
    for depth in (3, 4):
        parts = VNetEncoder(layout, depth), VNetDecoder(layout, layout.features[: depth + 1], 2, 0.5)
        sizes.append(sum(p.numel() for part in parts for p in part.parameters()) / 1e6)
    assert sizes == pytest.approx([2.43, 10.04], abs=0.01)
