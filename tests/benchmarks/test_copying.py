"""The training-free baselines of benchmarks/copying.py, and images that are altered together with their labels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import referring
from copying import (
    copy_by_order,
    copy_by_position,
    exchange,
    exchanged_share,
    fill_slices,
    mirror,
    only_middle_slice,
    other_grid,
    outlined_where_scribbled,
    shift_content,
    walk_slice,
    walk_volume,
)

from nnunet_multimodal.conversion.images import read_labels, read_volume


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.indices(shape)
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def two_discs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy slice with a bright organ 2 and a dark organ 5, a stroke in each, and the truth."""
    truth = 2 * disc((48, 64), (24, 18), 9) + 5 * disc((48, 64), (22, 45), 7)
    image = np.array([0.0, 0, 80, 0, 0, -60])[truth] + np.random.default_rng(0).normal(0, 1, truth.shape)
    scribbles = np.zeros_like(truth)
    scribbles[24, 13:23], scribbles[20:25, 45] = 2, 5
    return image, scribbles, truth


# --- random walker ---------------------------------------------------------------------------------------------------


def test_walk_finds_two_discs_exactly() -> None:
    image, scribbles, truth = two_discs()
    assert np.array_equal(walk_slice(image, scribbles, far=14), truth)


@pytest.mark.parametrize(("gain", "offset"), [(1000.0, 0.0), (0.01, 5.0), (-1.0, 300.0)])
def test_walk_does_not_depend_on_the_units_of_the_image(gain: float, offset: float) -> None:
    image, scribbles, truth = two_discs()
    assert np.array_equal(walk_slice(image * gain + offset, scribbles, far=14), truth)


def test_walk_stays_within_far() -> None:
    scribbles = np.zeros((5, 41), int)
    scribbles[2, 20] = 1
    found = walk_slice(np.random.default_rng(0).normal(size=(5, 41)) * 1e-9, scribbles, far=6)
    assert found[2, 20] == 1
    assert not found[:, :14].any() and not found[:, 27:].any()


def test_walk_keeps_another_organ_out_where_no_edge_does() -> None:
    scribbles = np.zeros((1, 12), int)
    scribbles[0, 2], scribbles[0, 9] = 1, 2
    image = np.ones((1, 12))
    assert walk_slice(image, scribbles, far=100).tolist() == [[1] * 6 + [2] * 6]


def test_walk_without_background_fills_the_slice() -> None:
    scribbles = np.zeros((3, 3), int)
    scribbles[1, 1] = 7
    assert (walk_slice(np.eye(3), scribbles, far=100) == 7).all()


def test_walk_volume_leaves_other_slices_empty() -> None:
    image, scribbles, truth = two_discs()
    empty = np.zeros_like(scribbles)
    found = walk_volume(np.stack([image] * 3), np.stack([empty, scribbles, empty]), far=14)
    assert np.array_equal(found, np.stack([empty, truth, empty]))


# --- copies ----------------------------------------------------------------------------------------------------------


def test_outlines_are_kept_organ_by_organ_on_scribbled_slices() -> None:
    labels = np.array([[[1, 2]], [[1, 2]], [[1, 2]]])
    scribbles = np.array([[[1, 0]], [[0, 0]], [[0, 2]]])
    assert outlined_where_scribbled(labels, scribbles).tolist() == [[[1, 0]], [[0, 0]], [[0, 2]]]


def test_fill_takes_the_nearest_scribbled_slice_within_reach() -> None:
    outlines = np.zeros((7, 1, 3), int)
    outlines[1, 0, 0] = outlines[4, 0, 1] = 1
    scribbles = outlines.copy()
    near = fill_slices(outlines, scribbles, reach=0, thickness=5)[:, 0].tolist()
    assert near == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    far = fill_slices(outlines, scribbles, reach=5, thickness=5)[:, 0].tolist()
    assert far == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_copy_by_position_onto_a_finer_moved_grid() -> None:
    labels = np.array([[[1, 2, 3]]])
    target = np.diag([0.5, 1, 1, 1.0])
    target[0, 3] = 0.75  # centres at .75, 1.25, 1.75, 2.25, 2.75 mm; the source's at 0, 1, 2
    assert copy_by_position(labels, np.eye(4), target, (1, 1, 5)).tolist() == [[[2, 2, 3, 3, 0]]]


def test_copy_by_position_between_opposite_orientations() -> None:
    labels = np.arange(24).reshape(2, 3, 4)
    affine = np.array([[-2.0, 0, 0, 6], [0, -3, 0, 6], [0, 0, 5, 1], [0, 0, 0, 1]])  # stored to the left and back
    target = np.array([[2.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 5, 1], [0, 0, 0, 1]])
    assert np.array_equal(copy_by_position(labels, affine, target, (2, 3, 4)), labels[:, ::-1, ::-1])


def test_copied_image_is_interpolated() -> None:
    image = np.array([[[0, 10, 20]]])
    target = np.eye(4)
    target[0, 3] = 0.25
    assert copy_by_position(image, np.eye(4), target, (1, 1, 3), order=1).tolist() == [[[2.5, 12.5, 20.0]]]


def test_copy_by_order_stretches_slices_and_centres_planes() -> None:
    labels = np.zeros((3, 1, 5), int)
    labels[:, 0, 2] = 1, 2, 3
    labels[:, 0, 3] = 9
    copied = copy_by_order(labels, (5.0, 1.0, 1.0), (5, 1, 7), (8.0, 1.0, 2.0))
    # relative order 0, .5, 1, 1.5, 2, the lower of two equally near; pixels twice as large, the middle stays
    assert copied[:, 0, 3].tolist() == [1, 1, 2, 2, 3]
    assert not copied[:, 0, [0, 1, 5, 6]].any() and not (copied == 9).any()
    assert copy_by_order(labels, (5.0, 1.0, 1.0), (1, 1, 5), (5.0, 1.0, 1.0))[0, 0].tolist() == [0, 0, 2, 9, 0]


# --- altered images --------------------------------------------------------------------------------------------------


def test_shift_moves_image_and_label_alike() -> None:
    image = np.arange(1, 10).reshape(1, 3, 3)
    label = (image == 5) * 4
    assert shift_content(image, (0, 1, -1))[0].tolist() == [[2, 3, 3], [2, 3, 3], [5, 6, 6]]
    assert shift_content(label, (0, 1, -1), fill=0)[0].tolist() == [[0, 0, 0], [0, 0, 0], [4, 0, 0]]
    assert np.array_equal(shift_content(image, (0, 0, 0)), image)


def test_other_grid_has_thicker_slices_begun_half_a_slice_on() -> None:
    affine = np.diag([2.0, 2, 4, 1])
    affine[:3, 3] = 10, 20, 30
    new, shape = other_grid(affine, (7, 5, 6), thickness=1.5, offset=0.5)
    assert shape == (4, 5, 6)
    expected = np.diag([2.0, 2, 6, 1])
    expected[:3, 3] = 10, 20, 33
    np.testing.assert_allclose(new, expected)
    ramp = np.broadcast_to(np.arange(7.0)[:, None, None] * 4 + 30, (7, 5, 6))  # shows its own height in mm
    heights = copy_by_position(ramp, affine, new, shape, order=1)[:, 0, 0]
    np.testing.assert_allclose(heights, [33, 39, 45, 51])
    labels = copy_by_position(np.broadcast_to(np.arange(7)[:, None, None], (7, 5, 6)), affine, new, shape)[:, 0, 0]
    assert labels.tolist() == [1, 2, 4, 5]  # of slices at 30, 34, 38, ...: the nearest to 33, 39, 45, 51


@pytest.mark.parametrize(("turn_axis", "kept"), [(2, 2), (0, 0)])
def test_turned_grid_keeps_centre_axis_and_spacing(turn_axis: int, kept: int) -> None:
    affine = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, -7], [0, 0, 5, 2], [0, 0, 0, 1]])
    new, shape = other_grid(affine, (5, 8, 9), degrees=30, turn_axis=turn_axis)
    centre = np.array([4, 3.5, 2, 1])
    np.testing.assert_allclose(new @ centre, affine @ centre)
    np.testing.assert_allclose(new[:3, kept], affine[:3, kept], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(new[:3, :3], axis=0), [1.5, 1.5, 5])
    moved = 1 if turn_axis == 0 else 0
    cosine = new[:3, moved] @ affine[:3, moved] / 1.5**2
    assert cosine == pytest.approx(np.cos(np.radians(30)))
    assert shape == (5, 8, 9)


def test_turn_is_counter_clockwise_about_the_axis() -> None:
    new, _ = other_grid(np.eye(4), (1, 3, 3), degrees=90)
    np.testing.assert_allclose(new[:3, :3] @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_image_and_label_stay_together_on_a_turned_grid() -> None:
    truth = np.stack([disc((40, 40), (14, 25), 6)] * 3).astype(int)
    new, shape = other_grid(np.diag([1.0, 1, 5, 1]), truth.shape, degrees=20)
    image = copy_by_position(truth * 100, np.diag([1.0, 1, 5, 1]), new, shape, order=1)
    label = copy_by_position(truth, np.diag([1.0, 1, 5, 1]), new, shape)
    assert (label != truth).any()
    assert np.mean((image > 50) != label) < 0.01


@pytest.mark.parametrize("stored_to_the_left", [False, True])
def test_mirror_sends_every_voxel_across_the_plane(stored_to_the_left: bool) -> None:
    affine = np.array([[2.0, 0, 0, -3], [0, 2, 0, 4], [0, 0, 6, 8], [0, 0, 0, 1]])
    if stored_to_the_left:
        affine[0, 0], affine[0, 3] = -2, 11
    label = np.zeros((2, 3, 5), int)
    label[1, 2, 1] = 1
    mirrored, new = mirror(label, affine, plane=10.0)
    before = affine @ [1, 2, 1, 1]
    found = np.argwhere(mirrored)[0][::-1]
    np.testing.assert_allclose(new @ [*found, 1], [20 - before[0], *before[1:]])
    np.testing.assert_array_equal(np.sign(new[:3, :3]), np.sign(affine[:3, :3]))  # the axes still run as they did
    again, back = mirror(mirrored, new, plane=10.0)
    assert np.array_equal(again, label)
    np.testing.assert_allclose(back, affine)


def test_mirrored_contrasts_on_different_grids_still_agree() -> None:
    """A structure at one place in two grids is at one place after both were mirrored at the same plane."""
    labels = np.zeros((1, 1, 20), int)
    labels[0, 0, 4:8] = 3
    affine, other = np.eye(4), np.diag([2.0, 1, 1, 1])
    other[0, 3] = 1.4
    second = copy_by_position(labels, affine, other, (1, 1, 9))
    mirrored, new = mirror(labels, affine, plane=6.0)
    other_mirrored, other_new = mirror(second, other, plane=6.0)
    copied = copy_by_position(mirrored, new, other_new, other_mirrored.shape)
    assert second.any()
    assert np.array_equal(copied, other_mirrored)


def test_mirror_of_a_turned_grid() -> None:
    affine, shape = other_grid(np.diag([2.0, 2, 5, 1]), (2, 4, 5), degrees=15)
    label = np.arange(np.prod(shape)).reshape(shape)
    mirrored, new = mirror(label, affine, plane=-4.0)
    for voxel in ((0, 0, 0), (4, 1, 1)):
        before = affine @ [*voxel, 1]
        found = np.argwhere(mirrored == label[voxel[::-1]])[0][::-1]
        np.testing.assert_allclose((new @ [*found, 1])[:3], [-8 - before[0], before[1], before[2]])


def test_exchange_and_the_share_of_exchanged_voxels() -> None:
    truth = np.array([0, 1, 2, 2, 3, 3, 3])
    assert exchange(truth, [(2, 3)]).tolist() == [0, 1, 3, 3, 2, 2, 2]
    found = np.array([3, 2, 3, 2, 3, 2, 0])  # of five kidney voxels two have the other's label; outside none counts
    assert exchanged_share(found, truth, [(2, 3)]) == pytest.approx(0.4)
    assert np.isnan(exchanged_share(found, np.zeros(7, int), [(2, 3)]))


def test_only_the_middle_scribbled_slice_of_each_organ_is_kept() -> None:
    scribbles = np.zeros((6, 1, 2), int)
    scribbles[[0, 2, 5], 0, 0] = 1
    scribbles[1:5, 0, 1] = 2
    assert only_middle_slice(scribbles)[:, 0].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [0, 0]]


# --- the benchmark's own inputs --------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> referring.Bench:
    """Two subjects with a liver and two kidneys in two contrasts, the second on a moved, finer grid; all scribbled."""
    organs = {"liver": 1, "right_kidney": 2, "left_kidney": 3}
    bench = referring.Bench(
        tmp_path / "phantom", tmp_path / "work", ["a", "b"], ["T1w", "CT"], "T1w", organs, "liver", 30.0, 2000.0
    )
    affine, finer = np.diag([2.0, 2, 6, 1]), np.diag([1.5, 1.5, 4, 1])
    finer[:3, 3] = 0.4, 0.7, 1.0
    for subject, side in (("a", 0), ("b", 2)):
        label = np.zeros((9, 30, 40), np.uint8)
        label[1:8, 4:14, 24 - side : 38 - side] = 1
        label[3:7, 18:25, 26:33] = 2
        label[3:7, 18:25, 7:14] = 3
        scribbles = np.zeros_like(label)
        scribbles[:, 6:12:2], scribbles[:, 21] = label[:, 6:12:2], label[:, 21]
        other = copy_by_position(label, affine, finer, (12, 38, 50))
        for contrast, labels, grid in (("T1w", label, affine), ("CT", other, finer)):
            referring.write(bench.image(contrast, subject), labels.astype(np.int16) * 100 + 7, grid)
            referring.write(bench.label(contrast, subject), labels, grid)
        for every in (1, 3, 5):
            kept = np.isin(np.arange(9), np.arange(4 % every, 9, every))[:, None, None] * scribbles
            referring.write(bench.work / f"scribbles/every_{every}/{subject}.nii.gz", kept, affine)
    return bench


@pytest.mark.parametrize("kind", ["plain", "shift_3", "shift_12", "thick", "turned", "tilted", "mirrored"])
def test_image_and_labels_of_a_target_are_altered_together(bench: referring.Bench, kind: str) -> None:
    images, labels = referring.make_targets(bench, kind, "a")
    for contrast in bench.contrasts:
        image, drawn = read_volume(images[contrast]), read_labels(labels[contrast])
        assert set(np.unique(drawn.data)) == {0, 1, 2, 3}
        np.testing.assert_allclose(image.affine, drawn.affine)
        # an image made of its own labels still shows them, but where it was interpolated at their edges
        share = np.mean(np.abs(image.data - 7 - drawn.data.astype(int) * 100) <= 50)
        assert share == 1 if kind in ("plain", "shift_3", "shift_12", "mirrored") else share > 0.97
        if kind not in ("plain", "turned", "tilted"):  # those look alike in a small picture
            assert not np.array_equal(drawn.data, read_labels(bench.label(contrast, "a")).data)


def test_names_are_exchanged_in_scribbles_and_labels_but_not_in_the_image(bench: referring.Bench) -> None:
    images, labels = referring.make_targets(bench, "exchanged", "a")
    before = read_labels(bench.label("CT", "a")).data
    after = read_labels(labels["CT"]).data
    assert np.array_equal(after == 3, before == 2) and np.array_equal(after == 1, before == 1)
    assert np.array_equal(read_volume(images["CT"]).data, before.astype(int) * 100 + 7)
    prompt = referring.make_prompt(bench, "exchanged", "a")
    drawn, truth = (read_labels(prompt / f"{name}.nii.gz").data for name in ("scribbles", "truth"))
    assert (truth[drawn > 0] == drawn[drawn > 0]).all()
    assert drawn[5, 21, 28] == 3 and drawn[5, 21, 9] == 2


def test_the_mirrored_reference_still_lies_on_the_mirrored_targets(bench: referring.Bench) -> None:
    condition = next(c for c in referring.CONDITIONS if c.name == "mirrored")
    plain = next(c for c in referring.CONDITIONS if c.name == "same")
    mirrored = referring.measure_copies(bench, condition, "b", "b")[referring.TRUTH]
    before = referring.measure_copies(bench, plain, "b", "b")[referring.TRUTH]
    for contrast in bench.contrasts:
        assert mirrored[contrast]["exchanged"] == 0
        for organ, row in mirrored[contrast]["organs"].items():
            assert row["DSC"] == pytest.approx(before[contrast]["organs"][organ]["DSC"], abs=0.03)
    labels = referring.make_targets(bench, "mirrored", "b")[1]
    assert not np.array_equal(read_labels(labels["T1w"]).data, read_labels(bench.label("T1w", "b")).data)


def test_copying_does_as_well_as_it_must_and_no_better(bench: referring.Bench) -> None:
    """What a copy gets is known: everything on the reference itself, less wherever it does not fit."""
    results = {
        c.name: referring.run_condition(bench, c, None, []) for c in referring.CONDITIONS if c.name not in ("tilted",)
    }
    found = {
        name: {
            method: referring.summarise(of["T1w"], ["liver"] if name.startswith("open") else list(bench.organs))["DSC"]
            for method, of in methods.items()
        }
        for name, methods in results.items()
    }
    for name in ("same", "mirrored", "exchanged", "thick", "turned", "open", "open_among"):
        assert found[name][referring.TRUTH] == 1, name
        assert found[name][referring.WALKER] > 0.97, name  # the organs are flat and bright: nothing to go wrong
    assert found["shift_3"][referring.TRUTH] > found["shift_6"][referring.TRUTH] > found["shift_12"][referring.TRUTH]
    assert found["shift_12"][referring.TRUTH] < 0.3
    assert found["other_position"][referring.TRUTH] < 1
    rows = {
        c.name: {
            "part": c.part,
            "says": c.says,
            "methods": {
                method: {contrast: referring.summarise(values, ["liver"]) for contrast, values in of.items()}
                for method, of in results[c.name].items()
            },
        }
        for c in referring.CONDITIONS
        if c.name in results
    }
    text = referring.markdown(rows, bench)
    assert "| the subject's own reference, every slice scribbled | random walker, copied | " in text
    assert "|  | true mask, copied | 1.000 | " in text
    assert "6. An organ that was never labelled in training (liver)" in text
