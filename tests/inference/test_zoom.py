"""Windows and zooming with networks whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_segvol import Echo, asker

from nnunet_multimodal.inference.prompted import ABSENT, Question
from nnunet_multimodal.inference.prompts import Located
from nnunet_multimodal.inference.zoom import found_region, zoom
from nnunet_multimodal.networks.segvol import SegVolNetwork

WINDOW = (4, 6, 8)


def at(*points: tuple[int, ...], labels: tuple[int, ...] | None = None, box: object = None) -> Located:
    return Located(
        np.array(points, dtype=float).reshape(-1, 3),
        np.array(labels or [1] * len(points), dtype=np.int64),
        None if box is None else np.array(box),
    )


def only(*voxels: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


# --- window by window ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 8), (9, 13, 17), (3, 5, 7), (2, 20, 8)])
@pytest.mark.parametrize("folds", [1, 2])
def test_a_point_stays_where_it_is(shape: tuple[int, ...], folds: int) -> None:
    """In any window that holds it, padded or not; windows without it are not even encoded."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        point = tuple(rng.integers(0, shape).tolist())
        one = asker(Echo(), folds)
        logits, asked = one.sliding(torch.zeros(1, *shape), [Question(None, at(point))])
        assert torch.equal(logits[0] > 0, only(point, shape=shape))
        assert asked[0][point] and (logits[0][~asked[0]] == ABSENT).all()
        assert one.windows % folds == 0 and one.windows <= 8 * folds


def test_a_box_over_many_windows_is_asked_for_in_parts() -> None:
    network = Echo()
    shape, box = (9, 13, 17), [[1, 2, 3], [7, 10, 15]]
    logits, _ = asker(network).sliding(torch.zeros(1, *shape), [Question(None, at(box=box))])
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[1:8, 2:11, 3:16] = True
    assert torch.equal(logits[0] > 0, expected)
    assert len(network.asked) > 8
    for prompts in network.asked:
        assert prompts.boxes is not None
        assert (prompts.boxes >= 0).all() and (prompts.boxes[0, 1] < torch.tensor(WINDOW)).all()


def test_a_text_is_asked_everywhere_and_windows_are_encoded_once_for_all_questions() -> None:
    image = torch.zeros(1, 9, 13, 17)
    image[0, 2:5, 3:9, 4:12] = 1
    questions = [Question(0, at()), Question(None, at((8, 12, 16))), Question(1, at())]
    one = asker(Echo())
    logits, asked = one.sliding(image, questions)
    assert torch.equal(logits[0] > 0, image[0] > 0.5) and torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1] > 0, only((8, 12, 16), shape=(9, 13, 17)))
    assert asked[0].all() and asked[2].all() and not asked[1].all()
    assert one.windows == 4 * 4 * 4  # half a window apart


def test_negative_points_alone_ask_for_nothing() -> None:
    assert not Question(None, at((1, 1, 1), labels=(0,))).asks
    assert Question(0, at((1, 1, 1), labels=(0,))).asks
    network = Echo()
    logits, asked = asker(network).sliding(torch.zeros(1, *WINDOW), [Question(None, at((1, 1, 1), labels=(0,)))])
    assert not network.asked and not asked.any() and (logits == ABSENT).all()


def test_a_real_network_is_asked_window_by_window_as_by_hand() -> None:
    """One window: the same as asking the network itself."""
    torch.manual_seed(0)
    network = SegVolNetwork((4, 8, 8), (4, 4, 4), 2, 2, 1, 8, 1, 2, 8, 1, 2, 8).eval()
    image = torch.randn(1, 4, 8, 8)
    question = Question(1, at((1, 2, 3), (0, 7, 7), labels=(1, 0)))
    with torch.no_grad():
        expected = network(image[None], [question.prompts(torch.device("cpu"))])[0][0, 0]
    one = asker(network)
    torch.testing.assert_close(one.sliding(image, [question])[0][0], expected)
    torch.testing.assert_close(one.whole(image, [question])[0], expected)
    torch.testing.assert_close(
        zoom(one, image, Question(1, at())).logits, one.sliding(image, [Question(1, at())])[0][0]
    )


# --- zooming ---------------------------------------------------------------------------------------------------------


def test_the_region_holds_what_was_found_is_a_window_at_least_and_lies_in_the_volume() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(rng.integers(2, 20, 3).tolist())
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(1, 4)):
            mask[tuple(rng.integers(0, shape))] = True
        region = found_region(mask, WINDOW)
        assert region is not None
        assert mask[region].sum() == mask.sum()
        voxels = np.argwhere(mask)
        extent = voxels.max(0) - voxels.min(0) + 1
        for part, size, length, wide in zip(region, shape, extent.tolist(), WINDOW):
            assert 0 <= part.start < part.stop <= size
            assert part.stop - part.start == min(max(length + 2 * (math.ceil(size / wide) - 1), wide), size)
    assert found_region(np.zeros((5, 5, 5), bool), WINDOW) is None


def test_a_small_thing_is_found_from_afar_and_seen_closely() -> None:
    """From afar it is a block of averaged voxels, up close it is itself; elsewhere what was seen from afar stays."""
    image = torch.zeros(1, 16, 24, 32)
    image[0, 8:12, 12:18, 16:24] = 1
    image[0, 8, 12, 16] = 0  # too small to be seen from afar
    one = asker(Echo())
    coarse = one.whole(image, [Question(0, at())])[0]
    found = zoom(one, image, Question(0, at()))
    assert torch.equal(found.logits > 0, image[0] > 0.5)
    assert not torch.equal(coarse > 0, image[0] > 0.5)
    assert found.region is not None
    outside = torch.ones(16, 24, 32, dtype=torch.bool)
    outside[found.region] = False
    assert torch.equal(found.logits[outside], coarse[outside])
    plain = asker(Echo())
    plain.sliding(image, [Question(0, at())])
    assert one.windows < plain.windows / 4


def test_nothing_found_from_afar_is_the_result() -> None:
    image = torch.zeros(1, 16, 24, 32)
    image[0, 3, 3, 3] = 1  # vanishes when the volume is made small
    one = asker(Echo())
    found = zoom(one, image, Question(0, at()))
    assert found.region is None and one.windows == 1
    torch.testing.assert_close(found.logits, one.whole(image, [Question(0, at())])[0])
    assert not (found.logits > 0).any()


def test_a_volume_of_one_window_is_seen_as_it_is() -> None:
    """The region is the volume: pasting changes nothing."""
    image = (torch.rand(1, *WINDOW, generator=torch.Generator().manual_seed(0)) > 0.6).float()
    one = asker(Echo())
    found = zoom(one, image, Question(0, at()))
    assert found.region == tuple(slice(0, size) for size in WINDOW)
    torch.testing.assert_close(found.logits, one.sliding(image, [Question(0, at())])[0][0])


def test_up_close_points_come_with_the_box_of_what_was_found() -> None:
    network = Echo()
    found = zoom(asker(network), torch.zeros(1, 16, 24, 32), Question(None, at((9, 13, 18))))
    afar, *close = network.asked
    assert afar.points is not None and afar.boxes is None
    np.testing.assert_allclose(afar.points[0, 0], (np.array((9, 13, 18)) + 0.5) / 4 - 0.5)
    assert found.region is not None and close
    assert any(prompts.points is not None for prompts in close)
    for prompts in close:  # a window beside the point may hold a part of what was found
        assert prompts.boxes is not None
        low, high = prompts.boxes[0]
        assert (low <= high).all() and (low >= 0).all() and (high < torch.tensor(WINDOW)).all()
        if prompts.points is not None:
            assert (low <= prompts.points[0, 0]).all() and (high >= prompts.points[0, 0]).all()
    assert found.logits[9, 13, 18] > 0


def test_up_close_a_box_is_itself_in_one_window_and_what_was_found_in_several() -> None:
    network = Echo()
    volume = torch.zeros(1, 4, 6, 20)  # 2.5 windows long
    found = zoom(asker(network), volume, Question(None, at(box=[[1, 1, 9], [2, 3, 10]])))
    assert found.region == (slice(0, 4), slice(0, 6), slice(6, 14))
    asked = [prompts.boxes for prompts in network.asked]
    assert all(box is not None for box in asked)
    assert [box.tolist() for box in asked if box is not None] == [[[[1, 1, 3], [2, 3, 4]]]] * 2

    network = Echo()
    box = [[1, 2, 3], [13, 20, 28]]
    found = zoom(asker(network), torch.zeros(1, 16, 24, 32), Question(None, at(box=box)))
    assert len(network.asked) > 8
    assert (found.logits[1:14, 2:21, 3:29] > 0).all()


def test_a_window_with_nothing_to_ask_keeps_what_was_seen_from_afar() -> None:
    """Two far voxels found: the windows between them hold no part of either."""
    network = Echo()
    image = torch.zeros(1, 4, 6, 64)
    found = zoom(asker(network), image, Question(None, at((1, 1, 2), (1, 1, 61))))
    assert found.region is not None
    coarse = asker(Echo()).whole(image, [Question(None, at((1, 1, 2), (1, 1, 61)))])[0]
    middle = (slice(None), slice(None), slice(24, 40))
    assert torch.equal(found.logits[middle], coarse[middle]) and not (coarse[middle] > 0).any()
    assert found.logits[1, 1, 2] > 0 and found.logits[1, 1, 61] > 0
