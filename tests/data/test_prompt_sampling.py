"""Prompts drawn from labels: on the mask, beside it, around it; and volumes made small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nnunet_multimodal.data.prompt_sampling import COMBINATIONS, box_of, grow_box, sample_points, shift_box
from nnunet_multimodal.data.whole import SometimesWhole, resize_image, resize_labels
from nnunet_multimodal.networks.segvol import NEGATIVE, PADDING, POSITIVE


def masks(count: int = 40) -> list[np.ndarray]:
    """Of all kinds: one voxel, scattered, a block at the border, everything."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        shape = tuple(rng.integers(1, 9, 3))
        mask = rng.random(shape) < (0.02, 0.3, 0.9, 1.1)[number % 4]
        mask.flat[rng.integers(mask.size)] = True
        found.append(mask)
    return found


def test_points_lie_where_their_label_says() -> None:
    rng = np.random.default_rng(1)
    positives, negatives = set(), set()
    for mask in masks():
        for positive, negative in ((0, 0), (3, 0), (0, 3), (10, 10)):
            points, labels = sample_points(mask, rng, positive, negative)
            assert points.shape == (1 + positive + negative, 3) and points.dtype == np.float32
            values = mask[tuple(points.astype(int).T)]
            assert values[labels == POSITIVE].all() and not values[labels == NEGATIVE].any()
            assert 1 <= (labels == POSITIVE).sum() <= 1 + positive and (labels == NEGATIVE).sum() <= negative
            assert set(labels.tolist()) <= {POSITIVE, NEGATIVE, PADDING}
            assert (np.diff((labels == PADDING).astype(int)) >= 0).all()  # padding comes last
            if (positive, negative) == (10, 10):
                positives.add(int((labels == POSITIVE).sum()))
                negatives.add(int((labels == NEGATIVE).sum()))
    assert len(positives) > 6 and len(negatives) > 6


def test_points_are_spread_over_the_mask_and_beside_it() -> None:
    mask = np.zeros((4, 6, 8), bool)
    mask[1:3, 1:5, 1:7] = True
    rng = np.random.default_rng(0)
    seen: dict[int, set[tuple[int, ...]]] = {POSITIVE: set(), NEGATIVE: set()}
    for _ in range(300):
        points, labels = sample_points(mask, rng, 10, 10)
        for point, label in zip(points.astype(int).tolist(), labels.tolist()):
            if label != PADDING:
                seen[label].add(tuple(point))
    assert len(seen[POSITIVE]) == mask.sum() and len(seen[NEGATIVE]) > 0.95 * (~mask).sum()


def test_no_negative_point_lies_where_nobody_labelled() -> None:
    mask, labelled = np.zeros((4, 6, 8), bool), np.zeros((4, 6, 8), bool)
    mask[1, 2, 3] = labelled[1, 2, 3:6] = True
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        points, labels = sample_points(mask, rng, 0, 10, labelled)
        seen |= {tuple(point) for point in points[labels == NEGATIVE].astype(int).tolist()}
    assert seen == {(1, 2, 4), (1, 2, 5)}
    _, labels = sample_points(mask, rng, 0, 10, mask)
    assert not (labels == NEGATIVE).any()


def test_an_empty_mask_has_no_point_and_no_box() -> None:
    empty = np.zeros((3, 3, 3), bool)
    with pytest.raises(ValueError, match="empty"):
        sample_points(empty, np.random.default_rng(0), 1, 1)
    assert box_of(empty) is None


def test_a_box_is_the_smallest_and_a_grown_one_holds_it() -> None:
    rng = np.random.default_rng(2)
    for mask in masks():
        voxels = np.argwhere(mask)
        box = box_of(mask)
        assert box is not None and box.tolist() == [voxels.min(0).tolist(), voxels.max(0).tolist()]
        assert grow_box(box, rng, 0, mask.shape).tolist() == box.tolist()
        for share in (0.1, 1.0):
            grown = grow_box(box, rng, share, mask.shape)
            assert (grown[0] <= box[0]).all() and (grown[1] >= box[1]).all()
            assert (grown[0] >= 0).all() and (grown[1] < mask.shape).all()
            assert (box[0] - grown[0] <= np.floor(share * (box[1] - box[0] + 1)) + 1).all()
    box = np.array([[10, 10, 10], [29, 29, 29]])
    reach = np.array([grow_box(box, rng, 0.2, (100, 100, 100)) - box for _ in range(400)])
    assert reach[:, 0].min() == -4 and reach[:, 1].max() == 4 and (reach == 0).any()


def test_a_shifted_box_is_off_by_as_much_as_was_said() -> None:
    rng = np.random.default_rng(3)
    box = np.array([[40, 40, 40], [44, 60, 60]])
    assert shift_box(box, rng, 0, (100, 100, 100)).tolist() == box.tolist()
    off = np.array([shift_box(box, rng, 2, (100, 100, 100)) - box for _ in range(400)])
    assert off.min() == -2 and off.max() == 2 and {-1, 0, 1} <= set(off.flat)
    for _ in range(100):  # far too much for the thin axis and the image
        moved = shift_box(box, rng, 50, (50, 70, 100))
        assert (moved[0] <= moved[1]).all() and (moved >= 0).all() and (moved[1] < (50, 70, 100)).all()


def test_the_six_combinations_of_segevolution() -> None:
    assert len(set(COMBINATIONS)) == 6
    assert {kind for kinds in COMBINATIONS for kind in kinds} == {"text", "points", "box"}
    assert all(1 <= len(kinds) <= 2 for kinds in COMBINATIONS)


# --- volumes made small ----------------------------------------------------------------------------------------------


def test_resizing_keeps_places() -> None:
    """A step along each axis stays at its share of the axis; an image is averaged, labels are not."""
    image = torch.zeros(1, 8, 12, 20)
    image[:, 4:, 6:, 10:] = 1
    assert torch.equal(resize_image(image, (4, 4, 10)), resize_labels(image.int(), (4, 4, 10)).float())
    assert resize_image(torch.arange(4.0).reshape(1, 4, 1, 1), (2, 1, 1)).flatten().tolist() == [0.5, 2.5]
    larger = resize_labels(torch.tensor([1, 5], dtype=torch.int16).reshape(1, 2, 1, 1), (4, 1, 1))
    assert larger.flatten().tolist() == [1, 1, 5, 5] and larger.dtype == torch.int16


class OneCase:
    """nnU-Net's data set, of one volume with a blob near the border."""

    identifiers = ("case",)

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        segmentation = np.full((1, 20, 30, 24), -1, np.int16)
        segmentation[:, 2:] = 0
        segmentation[0, 14:20, 20:30, 18:24] = 2
        data = (segmentation == 2).astype(np.float32)
        return data, segmentation, None, {"class_locations": {1: [], 2: np.argwhere(segmentation == 2)}, "a": 1}


class WithRegions(OneCase):
    """As it is preprocessed where there is an ignore label: places of all that is annotated, too."""

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        data, segmentation, previous, properties = super().load_case(identifier)
        everywhere = dict.fromkeys(((-1, 0, 1, 2), (-1, 0, 1, 2, 3)), np.argwhere(segmentation >= 0))
        return data, segmentation, previous, {"class_locations": {**properties["class_locations"], **everywhere}}


def test_a_share_of_the_cases_is_loaded_whole() -> None:
    np.random.seed(0)
    cases = SometimesWhole(OneCase(), (10, 10, 8), 0.3)
    loaded = [cases.load_case("case") for _ in range(200)]
    whole = [each for each in loaded if each[0].shape == (1, 10, 10, 8)]
    assert 40 < len(whole) < 80
    assert cases.identifiers == ("case",)
    data, segmentation, previous, properties = whole[0]
    assert previous is None and segmentation.shape == (1, 10, 10, 8) and properties["a"] == 1
    assert ((data > 0.5) == (segmentation == 2)).all() and set(np.unique(segmentation)) == {-1, 0, 2}
    assert len(np.argwhere(segmentation == 2)) == 3 * 3 * 2  # six of 20, ten of 30, six of 24
    assert SometimesWhole(OneCase(), (10, 10, 8), 0.0).load_case("case")[0].shape == (1, 20, 30, 24)


def test_nnunets_loader_crops_a_whole_volume_around_its_middle() -> None:
    """Whether it wants foreground or not: nothing of the volume is cut off."""
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = {"background": 0, "a": 1, "b": 2}
    for label_map in (labels, {**labels, "ignore": 3}):
        dataset = SometimesWhole(WithRegions(), (10, 10, 8), 1.0)
        manager = LabelManager(label_map, None)
        np.random.seed(0)
        loader = nnUNetDataLoader(dataset, 4, (15, 14, 11), (10, 10, 8), manager, 0.5)
        for _ in range(5):
            batch = next(loader)
            assert ((batch["target"] == 2).flatten(1).sum(1) == 3 * 3 * 2).all()
            corners = (batch["target"][:, 0] == 2).nonzero()[:, 1:].amax(0) - torch.tensor([9, 9, 7])
            assert (corners - torch.tensor([2, 2, 1])).abs().max() <= 1  # half of what is padded
