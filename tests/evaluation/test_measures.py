"""measure(): by hand, against brute force, against MONAI and against the formulas of Google's surface-distance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.evaluation import measure
from nnunet_multimodal.evaluation.measures import Measures

VALUES = ("dsc", "nsd", "hd95_mm", "asd_mm")


def values(measures: Measures) -> list[float]:
    return [getattr(measures, name) for name in VALUES]


def blobs(seed: int, shape: tuple[int, ...] = (14, 17, 12), labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two similar random label maps that reach the edge of the image on all sides."""
    dice = np.random.default_rng(seed)
    base = dice.standard_normal((labels + 1, *shape))
    noise = dice.standard_normal((labels + 1, *shape))
    smooth = [ndimage.gaussian_filter(field, (0, *[2] * len(shape))) for field in (base, base + 0.5 * noise)]
    maps = [field.argmax(axis=0).astype(np.uint8) for field in smooth]
    return maps[0], maps[1]


def ball(radius: float, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    centre = [(n - 1) / 2 * mm for n, mm in zip(shape, spacing)]
    grid = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing)), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre)) <= radius**2


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_two_voxels_have_the_distance_between_their_centres():
    prediction, reference = np.zeros((2, 9, 9, 9), np.uint8)
    prediction[2, 2, 2], reference[3, 4, 5] = 1, 1
    distance = math.sqrt(2**2 + 6**2 + 15**2)  # one voxel of 2 mm, two of 3 mm, three of 5 mm
    for tolerance, nsd in ((16.0, 0), (17.0, 1)):
        found = measure(prediction, reference, (2, 3, 5), {"a": 1}, tolerance)["a"]
        assert values(found) == pytest.approx([0, nsd, distance, distance])
    assert found.volume_ref_ml == pytest.approx(0.03) and found.volume_pred_ml == pytest.approx(0.03)


def test_shifted_box():
    """A 4x4x4 box moved by one voxel of 3 mm: by counting, 4*4*3 of 64 voxels are shared."""
    reference = np.zeros((8, 8, 8), np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    prediction = np.roll(reference, 1, axis=2)
    found = measure(prediction, reference, (1, 1, 3), {"box": 1}, 1.0)["box"]
    # Of 56 surface voxels 36 lie on the other surface too: the rims of three layers. The outer layer's 16 are 1 to the
    # side of the other box: the 12 of its rim 3 mm from the last layer, its 4 inner ones as well (in front of them is
    # surface). The last layer's 4 inner voxels are within the other box, 1 mm from its rim.
    assert found.dsc == 0.75
    assert found.nsd == pytest.approx(40 / 56)
    assert found.hd95_mm == 3
    assert found.asd_mm == pytest.approx((36 * 0 + 16 * 3 + 4 * 1) / 56)


@pytest.mark.parametrize("surface", ["border", "area"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.0, 0.8)])
def test_concentric_balls_are_as_far_apart_as_their_radii(surface, spacing):
    shape = tuple(round(44 / mm) for mm in spacing)
    small, large = (ball(radius, shape, spacing).astype(np.uint8) for radius in (12, 17))
    found = measure(small, large, spacing, {"ball": 1}, 3.0, surface)["ball"]
    assert found.dsc == pytest.approx(2 * 12**3 / (12**3 + 17**3), abs=0.02)
    # The pieces of "area" fill a layer of one voxel, so the nearest are closer together by up to that.
    assert found.asd_mm == pytest.approx(5, abs=0.5 if surface == "border" else 0.75)
    assert found.hd95_mm == pytest.approx(5, abs=1.5)
    assert found.volume_ref_ml == pytest.approx(4 / 3 * math.pi * 1.7**3, rel=0.02)
    assert measure(small, large, spacing, {"ball": 1}, 7.0, surface)["ball"].nsd == 1


@pytest.mark.parametrize("surface", ["border", "area"])
def test_equal_maps_are_perfect(surface):
    found = measure(*[blobs(0)[0]] * 2, (5, 0.8, 0.8), [1, 2, 3], 0.0, surface)
    assert [values(m) for m in found.values()] == [[1, 1, 0, 0]] * 3


def test_distance_of_exactly_the_tolerance_is_within_it():
    """0.7 mm times 3 is 2.0999999999999996, and 17 * 0.7 - 14 * 0.7 is 2.1000000000000014."""
    for start in range(12):
        prediction, reference = np.zeros((2, 20, 3, 3), np.uint8)
        prediction[start, 1, 1] = reference[start + 3, 1, 1] = 1
        assert measure(prediction, reference, (0.7, 1, 1), [1], 2.1)[1].nsd == 1


# --- every state -----------------------------------------------------------------------------------------------------


def test_empty_masks_are_told_apart():
    prediction, reference = np.zeros((2, 6, 6, 6), np.uint8)
    reference[1:3, 1:3, 1:3], prediction[4:, 4:, 4:] = 1, 2
    found = measure(prediction, reference, (1, 1, 1), {"missed": 1, "extra": 2, "absent": 3})
    assert [m.status for m in found.values()] == ["missed", "false_positive", "both_empty"]
    assert values(found["missed"]) == [0, 0, math.inf, math.inf]
    assert values(found["extra"])[:2] == [0, 0] and np.isnan(values(found["extra"])[2:]).all()
    assert np.isnan(values(found["absent"])).all()
    assert (found["missed"].volume_ref_ml, found["extra"].volume_pred_ml) == (0.008, 0.008)


def test_nothing_at_all_in_either_map():
    found = measure(*np.zeros((2, 5, 5, 5), np.uint8), (1, 1, 1), [1])
    assert found[1].status == "both_empty"


def test_ignored_voxels_count_in_neither_map():
    prediction, reference = blobs(1)
    reference = reference.copy()
    reference[:5] = 9
    found = measure(prediction, reference, (2, 1, 1), [1, 2], ignore=9)
    cut = measure(prediction[5:], reference[5:], (2, 1, 1), [1, 2])
    assert found == cut


def test_a_region_is_the_union_of_its_labels():
    prediction, reference = blobs(2)
    found = measure(prediction, reference, (2, 1, 1), {"whole": [1, 3], "part": 2})
    merged = [np.where(array == 3, 1, array) for array in (prediction, reference)]
    assert found == {**measure(*merged, (2, 1, 1), {"whole": 1, "part": 2})}


@pytest.mark.parametrize("surface", ["border", "area"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_measured_as_a_picture(surface, axis):
    prediction, reference = blobs(3, (20, 25))
    flat = measure(prediction, reference, (1.5, 0.5), [1, 2], surface=surface)
    spacing = [1.5, 0.5]
    spacing.insert(axis, 10.0)
    volume = measure(*(np.expand_dims(a, axis) for a in (prediction, reference)), spacing, [1, 2], surface=surface)
    assert [values(m) for m in volume.values()] == [values(m) for m in flat.values()]
    assert volume[1].volume_ref_ml == pytest.approx((reference == 1).sum() * 7.5 / 1000)


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint16, np.int64, np.float32, np.float64])
def test_any_number_type_will_do(kind):
    prediction, reference = (array == 1 for array in blobs(4))
    expected = measure(prediction.astype(np.uint8), reference.astype(np.uint8), (1, 1, 1), [1])
    assert measure(prediction.astype(kind), reference.astype(kind), (1, 1, 1), [1]) == expected


def test_high_negative_and_undeclared_values_do_not_disturb():
    prediction, reference = (array.astype(np.int64) for array in blobs(5))
    expected = measure(prediction, reference, (1, 1, 1), [1, 2])
    renamed = [np.select([a == 1, a == 2, a == 3], [10**9, 70000, -7], a) for a in (prediction, reference)]
    found = measure(*renamed, (1, 1, 1), [10**9, 70000])
    assert [*found.values()] == [*expected.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surface": "mesh"}, "border or area"),
        ({"spacing": (1, 1)}, "3 positive numbers"),
        ({"spacing": (1, 0, 1)}, "3 positive numbers"),
        ({"tolerances": -1.0}, "tolerance of 1"),
        ({"tolerances": {2: 1.0}}, "tolerance of 1"),
        ({"labels": [0]}, "1 or more"),
        ({"prediction": np.zeros((4, 4, 5))}, "of one shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"prediction": np.zeros((4, 4, 4)), "reference": np.zeros((4, 4, 4)), "spacing": (1, 1, 1), "labels": [1]}
    with pytest.raises(UsageError, match=message):
        measure(**{**good, **change})


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", ["border", "area"])
def test_the_room_around_the_organs_changes_nothing(surface):
    prediction, reference = blobs(6)
    small = measure(prediction, reference, (2.5, 1, 0.7), [1, 2, 3], 1.0, surface)
    room = [(3, 20), (0, 7), (11, 0)]
    large = measure(np.pad(prediction, room), np.pad(reference, room), (2.5, 1, 0.7), [1, 2, 3], 1.0, surface)
    for label in (1, 2, 3):
        assert values(large[label]) == pytest.approx(values(small[label]), rel=1e-6)


@pytest.mark.parametrize("surface", ["border", "area"])
@pytest.mark.parametrize("axes", [*itertools.permutations(range(3))])
def test_the_order_of_axes_changes_nothing(surface, axes):
    prediction, reference = blobs(7)
    spacing = (2.5, 1.0, 0.7)
    expected = measure(prediction, reference, spacing, [1, 2], 1.0, surface)
    turned = [array.transpose(axes) for array in (prediction, reference)]
    found = measure(*turned, [spacing[axis] for axis in axes], [1, 2], 1.0, surface)
    for label in (1, 2):
        assert values(found[label]) == pytest.approx(values(expected[label]), rel=1e-6)


# --- against slow references -----------------------------------------------------------------------------------------


def border_by_hand(mask: np.ndarray) -> np.ndarray:
    """Coordinates of voxels with a face neighbour outside the mask or the image, one voxel at a time."""
    places = []
    for place in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            other = place.copy()
            other[axis] += step
            if not (0 <= other[axis] < mask.shape[axis]) or not mask[tuple(other)]:
                places.append(place)
                break
    return np.array(places)


@pytest.mark.parametrize("shape", [(9, 10, 8), (15, 18)])
@pytest.mark.parametrize("seed", range(4))
def test_border_against_brute_force(seed, shape):
    prediction, reference = blobs(seed, shape, labels=2)
    spacing = (3.0, 1.0, 0.6)[: len(shape)]
    found = measure(prediction, reference, spacing, [1, 2], 1.2)
    for label in (1, 2):
        p, r = prediction == label, reference == label
        distances = cdist(border_by_hand(p) * spacing, border_by_hand(r) * spacing)
        there, back = distances.min(axis=1), distances.min(axis=0)
        both = np.concatenate([there, back])
        expected = [
            2 * (p & r).sum() / (p.sum() + r.sum()),
            (both <= 1.2 + 1e-6).mean(),
            max(np.percentile(there, 95), np.percentile(back, 95)),
            both.mean(),
        ]
        assert values(found[label]) == pytest.approx(expected, abs=1e-5)


def google(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> list[float]:
    """NSD, HD95 and ASD as surface-distance 0.1 computes them (compute_surface_distances and what uses it).

    Surface pieces sit at the corners of voxels; a corner's code has a bit for each of the voxels around it, the piece's
    area is looked up by code, and distances come from a distance transform. Only the table is taken from MONAI, whose
    own table is theirs.
    """
    from monai.metrics.utils import get_code_to_measure_table

    table = np.asarray(get_code_to_measure_table(spacing)[0], dtype=float)
    kernel = np.array([128, 64, 32, 16, 8, 4, 2, 1]).reshape(2, 2, 2)
    surfaces = []
    for mask in (prediction, reference):
        # The package pads at the far end only; `constant` puts background before the near end.
        code = ndimage.correlate(np.pad(mask, (0, 1)).astype(np.uint8), kernel, mode="constant", cval=0)
        surfaces.append(((code != 0) & (code != 255), table[code]))
    (on_p, area_p), (on_r, area_r) = surfaces
    pairs = []
    for start, areas, goal in ((on_p, area_p, on_r), (on_r, area_r, on_p)):
        distance = ndimage.distance_transform_edt(~goal, sampling=spacing)[start]
        order = np.argsort(distance)
        pairs.append((distance[order], areas[start][order]))
    total = sum(areas.sum() for _, areas in pairs)
    percentiles = []
    for distance, areas in pairs:
        place = np.searchsorted(np.cumsum(areas) / areas.sum(), 0.95)
        percentiles.append(distance[min(place, len(distance) - 1)])
    return [
        sum(areas[distance <= tolerance + 1e-6].sum() for distance, areas in pairs) / total,
        max(percentiles),
        sum((distance * areas).sum() for distance, areas in pairs) / total,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_area_against_the_formulas_of_surface_distance(seed):
    prediction, reference = blobs(seed + 20)
    spacing = (3.0, 1.0, 1.3)
    found = measure(prediction, reference, spacing, [1, 2, 3], 1.2, "area")
    for label in (1, 2, 3):
        expected = google(prediction == label, reference == label, spacing, 1.2)
        assert values(found[label])[1:] == pytest.approx(expected, abs=1e-5)


def test_area_of_a_flat_surface_is_its_area():
    """Two half-spaces of 10 x 12 voxels, 2 voxels apart: nearly all of the surface is the flat part."""
    from nnunet_multimodal.evaluation.surfaces import surface_distances

    mask = np.zeros((30, 30, 30), bool)
    mask[10:20, 5:25, 5:25] = True
    there, _ = surface_distances(mask, mask, (2.0, 0.5, 1.5), "area")
    sides = np.array([10 * 2.0, 20 * 0.5, 20 * 1.5])
    box = 2 * (sides[0] * sides[1] + sides[0] * sides[2] + sides[1] * sides[2])
    assert there.weight.sum() == pytest.approx(box, rel=0.08)  # the rounded edges of the box take a little off


# --- against MONAI ---------------------------------------------------------------------------------------------------


def monai(prediction: np.ndarray, reference: np.ndarray, spacing: list[float], labels: int, tolerance: float):
    """float [K, 4]: DSC, NSD, HD95, ASD of one-hot volumes; and NSD [K] with subvoxels."""
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    hot = [
        torch.from_numpy(np.stack([array == k for k in range(labels + 1)])[None].astype(np.float32))
        for array in (prediction, reference)
    ]
    tolerances = [tolerance] * labels
    stacked = torch.stack(
        [
            compute_dice(*hot, include_background=False)[0],
            compute_surface_dice(*hot, tolerances, spacing=spacing)[0],
            compute_hausdorff_distance(*hot, percentile=95, spacing=spacing)[0],
            compute_average_surface_distance(*hot, symmetric=True, spacing=spacing)[0],
        ],
        dim=1,
    )
    return stacked.numpy(), compute_surface_dice(*hot, tolerances, spacing=spacing, use_subvoxels=True)[0].numpy()


@pytest.mark.parametrize(
    ("shape", "spacing"), [((14, 17, 12), (1.0, 1.0, 1.0)), ((9, 30, 26), (7.7, 1.25, 1.25)), ((40, 33), (0.7, 2.1))]
)
@pytest.mark.parametrize("seed", [30, 31])
def test_the_same_as_uncropped_monai(seed, shape, spacing):
    prediction, reference = blobs(seed, shape)
    assert all((reference.take(end, axis) > 0).any() for axis in range(len(shape)) for end in (0, -1))  # at the edges
    expected, subvoxel_nsd = monai(prediction, reference, list(spacing), 3, 2.1)
    border = measure(prediction, reference, spacing, [1, 2, 3], 2.1)
    area = measure(prediction, reference, spacing, [1, 2, 3], 2.1, "area")
    np.testing.assert_allclose([values(m) for m in border.values()], expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose([m.nsd for m in area.values()], subvoxel_nsd, rtol=2e-6, atol=2e-6)


def test_balls_as_monai_and_surface_distance():
    """Check 29 of methods.md."""
    spacing = (1.5, 1.0, 0.8)
    prediction, reference = (ball(radius, (26, 40, 50), spacing).astype(np.uint8) for radius in (12, 14.5))
    expected, subvoxel_nsd = monai(prediction, reference, [*spacing], 1, 2.0)
    border = measure(prediction, reference, spacing, [1], 2.0)[1]
    area = measure(prediction, reference, spacing, [1], 2.0, "area")[1]
    np.testing.assert_allclose(values(border), expected[0], rtol=1e-5)
    np.testing.assert_allclose(values(area)[1:], google(prediction > 0, reference > 0, spacing, 2.0), rtol=1e-5)
    assert area.nsd == pytest.approx(subvoxel_nsd[0], abs=1e-6) and 0.05 < area.nsd < 0.95


def test_a_mask_that_fills_the_image_has_the_images_edge_as_its_surface():
    reference = np.ones((5, 6, 7), np.uint8)
    prediction = reference.copy()
    prediction[:, :, -1] = 0
    expected, subvoxel_nsd = monai(prediction, reference, [1.0, 1.0, 2.0], 1, 1.0)
    found = measure(prediction, reference, (1, 1, 2), [1], 1.0)[1]
    np.testing.assert_allclose(values(found), expected[0], rtol=1e-6)
    assert measure(prediction, reference, (1, 1, 2), [1], 1.0, "area")[1].nsd == pytest.approx(subvoxel_nsd[0])
