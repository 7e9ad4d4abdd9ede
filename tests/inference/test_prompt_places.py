"""Prompts of users: their files and options, and where they lie in whatever way an image is stored."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_volumes import LABELS, volume_plans

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.inference.prompted import on_image, to_labels
from nnunet_multimodal.inference.prompts import (
    Asked,
    Located,
    locate,
    parse_box,
    parse_coordinates,
    preprocessed,
    read_prompts,
    resized,
    within,
)

AFFINE = np.array([[1.5, 0, 0, -10], [0, 2.0, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
SHAPE = (7, 9, 11)  # x, y, z
READERS = [NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient]
ORIENTATIONS = [
    "".join(each) for axes in itertools.permutations(("LR", "PA", "IS")) for each in itertools.product(*axes)
]


def store(path: Path, array: np.ndarray, orientation: str = "RAS") -> nib.Nifti1Image:
    """array [X, Y, Z] in RAS, stored in another order of axes."""
    image = nib.Nifti1Image(array, AFFINE)
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(tuple(orientation)))
    turned = image.as_reoriented(turn)
    nib.save(turned, path)
    return turned


def millimetres(voxel: tuple[float, ...]) -> tuple[float, ...]:
    return tuple((AFFINE @ [*voxel, 1])[:3].tolist())


# --- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_mm_and_voxels_in_all_48_orders_of_storage(tmp_path: Path, reader: Any) -> None:
    """A voxel and a box of the patient are the same ones, however the file is stored and whoever reads it."""
    assert len(set(ORIENTATIONS)) == 48
    voxel, first, last = (5, 2, 7), (1, 3, 2), (4, 3, 9)
    array = np.zeros(SHAPE, np.float32)
    array[voxel] = 1
    array[tuple(slice(a, b + 1) for a, b in zip(first, last))] += 2
    for orientation in ORIENTATIONS:
        path = tmp_path / f"{orientation}.nii.gz"
        stored = store(path, array, orientation)
        images, properties = reader().read_images((str(path),))
        data = np.asanyarray(stored.dataobj)
        own = [tuple(map(int, np.argwhere(np.isin(data, (1, 3)))[0]))]
        inside = np.argwhere(data >= 2)
        corners = (tuple(inside.min(0).tolist()), tuple(inside.max(0).tolist()))
        by_mm = Asked("liver", False, (millimetres(voxel),), (), (millimetres(first), millimetres(last)))
        by_mm = Asked("liver", False, (millimetres(voxel),), (), _thick(first, last))
        by_voxel = Asked("liver", False, (own[0],), (), corners, "voxels")
        for asked in (by_mm, by_voxel):
            found = locate(asked, "case", path, properties, images.shape[1:])
            np.testing.assert_allclose(found.points, np.argwhere(np.isin(images[0], (1, 3))), atol=1e-3)
            expected = np.argwhere(images[0] >= 2)
            assert found.box is not None
            assert found.box.tolist() == [expected.min(0).tolist(), expected.max(0).tolist()], orientation
            assert found.labels.tolist() == [1]


def _thick(first: tuple[int, ...], last: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Corners in mm just inside the outer borders of two voxels."""
    return millimetres(tuple(v - 0.4 for v in first)), millimetres(tuple(v + 0.4 for v in last))


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, dict, tuple[int, ...]]:
    store(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.float32))
    images, properties = NibabelIOWithReorient().read_images((str(tmp_path / "a.nii.gz"),))
    return tmp_path / "a.nii.gz", properties, images.shape[1:]


def ask(**what: Any) -> Asked:
    return Asked("liver", where="prompts.json", **what)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ask(positive=((-11.0, 20.0, -30.0),)),
            r"case a: point of liver \(prompts.json\) \(-11, 20, -30\) lies outside",
        ),
        (
            ask(negative=((0.0, 0.0, 0.0),)),
            r"negative point of liver .* x -10.75 to -0.25, y 19 to 37, z -31.5 to 1.5 mm",
        ),
        (ask(positive=((7, 0, 0),), units="voxels"), r"x -0.5 to 6.5, y -0.5 to 8.5, z -0.5 to 10.5 voxels as stored"),
        (
            ask(box=((100.0, 100.0, 100.0), (110.0, 110.0, 110.0))),
            r"box of liver .*\(100, 100, 100\) to \(110, 110, 110\)",
        ),
        (ask(box=((-8.0, 22.0, -20.0), (-5.0, 22.0, -10.0))), "has no volume"),
    ],
)
def test_what_lies_outside(image: tuple[Path, dict, tuple[int, ...]], asked: Asked, message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        locate(asked, "a", *image)


def test_a_box_may_reach_out_of_the_image_and_a_point_lie_on_its_border(
    image: tuple[Path, dict, tuple[int, ...]],
) -> None:
    found = locate(ask(box=((2, 2, 2), (-50, 400, 3)), units="voxels"), "a", *image)
    assert found.box is not None and found.box.tolist() == [[2, 2, 0], [3, 8, 2]]
    found = locate(ask(positive=((-0.5, 8.5, 10.5),), units="voxels"), "a", *image)
    assert found.points.tolist() == [[10, 8, 0]]


def test_a_picture_without_a_place_has_voxels_only() -> None:
    asked = ask(positive=((1.0, 2.0, 0.0),))
    with pytest.raises(DataProblem, match="voxel indices"):
        locate(asked, "a", Path("a.png"), {"spacing": [999, 1, 1]}, (1, 5, 5))
    by_text = locate(ask(text=True), "a", Path("a.png"), {"spacing": [999, 1, 1]}, (1, 5, 5))
    assert not len(by_text.points) and by_text.box is None
    found = locate(
        ask(positive=((1.0, 2.0, 0.0),), units="voxels"), "a", Path("a.png"), {"spacing": [1, 1, 1]}, (1, 5, 5)
    )
    assert found.points.tolist() == [[0, 2, 1]]


# --- through preprocessing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_a_point_and_a_box_stay_on_what_they_mark(tmp_path: Path, transpose: list[int]) -> None:
    """Transposed, cropped and resampled by nnU-Net; then the answer back on the image."""
    array = np.zeros((40, 30, 20), np.float32)
    array[4:36, 3:28, 2:19] = np.random.default_rng(0).uniform(50, 60, (32, 25, 17))  # 0 around it is cropped
    blob = (slice(20, 28), slice(8, 14), slice(9, 13))
    array[blob] = 400
    store(tmp_path / "a.nii.gz", array)
    reader = NibabelIOWithReorient()
    images, properties = reader.read_images((str(tmp_path / "a.nii.gz"),))
    content = volume_plans(3)
    backward = [transpose.index(axis) for axis in range(3)]
    content |= {"transpose_forward": transpose, "transpose_backward": backward}
    plans = PlansManager(content)
    configuration = plans.get_configuration("3d_fullres")
    dataset = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
    data, _, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
        images, None, properties, plans, configuration, dataset
    )
    shape = data.shape[1:]
    corners = tuple(
        tuple(float(getattr(part, end) + off) for part in blob) for end, off in (("start", 0), ("stop", -1))
    )
    middle = tuple(float(v) for v in np.mean(corners, axis=0))
    asked = ask(positive=(middle,), box=corners, units="voxels")
    located = locate(asked, "a", tmp_path / "a.nii.gz", properties, images.shape[1:])
    found = preprocessed(located, properties, transpose, shape, "case a, liver")
    bright = data[0] > 0.5 * (data[0].max() + np.median(data[0]))
    voxels = np.argwhere(bright)
    np.testing.assert_allclose(found.points[0], voxels.mean(0), atol=0.6)
    assert found.box is not None
    assert np.abs(found.box - [voxels.min(0), voxels.max(0)]).max() <= 1

    logits = np.full((1, *shape), -5.0, np.float32)
    logits[0][bright] = 5
    labels = to_labels(torch.from_numpy(logits), [2], properties, plans, configuration)
    expected = images[0] == 400
    assert labels.shape == images.shape[1:] and labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 2}
    overlap = 2 * (expected & (labels == 2)).sum() / (expected.sum() + (labels == 2).sum())
    assert overlap > 0.8
    outside = on_image(torch.from_numpy(logits + 20), properties, plans, configuration)[0] < 0
    assert (outside == (images[0] == 0)).all()  # what nnU-Net cropped away was never asked about


def test_where_two_organs_are_found_the_surest_is_written() -> None:
    logits = torch.tensor([[3.0, 3.0, -1.0, -2.0], [1.0, 4.0, 2.0, -1.0]]).reshape(2, 1, 1, 4)
    plans = PlansManager(volume_plans(3))
    size = (1, 1, 4)
    properties = {
        "spacing": [2.0, 2.0, 2.0],
        "shape_after_cropping_and_before_resampling": size,
        "shape_before_cropping": size,
        "bbox_used_for_cropping": [[0, length] for length in size],
    }
    found = to_labels(logits, [1, 300], properties, plans, plans.get_configuration("3d_fullres"))
    assert found.tolist() == [[[1, 300, 300, 0]]] and found.dtype == np.uint16


def test_what_nnunet_cuts_off() -> None:
    properties = {"bbox_used_for_cropping": [[2, 8], [0, 6], [0, 4]]}
    located = Located(np.array([[3.0, 1, 1], [0.0, 0, 0]]), np.array([1, 0]), np.array([[0, 1, 1], [4, 2, 2]]))
    found = preprocessed(located, properties, [0, 1, 2], (12, 6, 4), "case a, liver")
    assert found.points.tolist() == [[2.5, 1, 1]] and found.labels.tolist() == [1]  # the negative one is gone
    assert found.box is not None and found.box.tolist() == [[0, 1, 1], [5, 2, 2]]
    with pytest.raises(DataProblem, match="case a, liver: a point lies where the image is 0 everywhere"):
        preprocessed(Located(np.array([[0.0, 0, 0]]), np.array([1])), properties, [0, 1, 2], (6, 6, 4), "case a, liver")
    with pytest.raises(DataProblem, match="the box lies where"):
        preprocessed(Located(box=np.array([[0, 0, 0], [1, 1, 1]])), properties, [0, 1, 2], (6, 6, 4), "case a, liver")


def test_resized_boxes_keep_all_that_they_touch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        old, new = rng.integers(1, 30, 3), rng.integers(1, 30, 3)
        ends = np.sort(rng.integers(0, old, (2, 3)), axis=0)
        found = resized(Located(ends.astype(float), np.array([1, 1]), ends), old, new)
        assert found.box is not None
        low, high = found.box[0] / new, (found.box[1] + 1) / new
        assert (low <= ends[0] / old + 1e-9).all() and (high >= (ends[1] + 1) / old - 1e-9).all()
        assert (found.box >= 0).all() and (found.box < new).all()
        assert (found.points >= 0).all() and (found.points <= new - 1).all()
    same = resized(
        Located(np.array([[1.0, 2, 3]]), np.array([1]), np.array([[0, 1, 2], [3, 4, 5]])), (4, 5, 6), (4, 5, 6)
    )
    assert same.points.tolist() == [[1, 2, 3]] and same.box is not None and same.box.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_lies_in_a_window() -> None:
    located = Located(np.array([[1.0, 1, 1], [5, 5, 5]]), np.array([1, 0]), np.array([[0, 0, 0], [3, 9, 9]]))
    found = within(located, (2, 2, 2), (4, 4, 4))
    assert found.points.tolist() == [[3, 3, 3]] and found.labels.tolist() == [0] and found.box is not None
    assert found.box.tolist() == [[0, 0, 0], [1, 3, 3]] and found.shows
    outside = within(located, (4, 0, 0), (2, 9, 9))
    assert outside.box is None and outside.points.tolist() == [[1, 5, 5]] and not outside.shows
    assert within(located, (-1, -1, -1), (3, 3, 3)).points.tolist() == [[2, 2, 2]]  # a window that begins in padding


# --- what a user writes ----------------------------------------------------------------------------------------------


def test_a_file_of_prompts() -> None:
    content = {"units": "voxels", "cases": {"a": {"liver": {"points": [[1, 2, 3]], "box": [[0, 0, 0], [4, 5, 6]]}}}}
    (asked,) = read_prompts(content, "p.json")["a"].values()
    assert asked == Asked("liver", False, ((1, 2, 3),), (), ((0, 0, 0), (4, 5, 6)), "voxels", "p.json")
    del content["units"]
    assert read_prompts(content, "p.json")["a"]["liver"].units == "mm"
    assert read_prompts(content, "p.json", "voxels")["a"]["liver"].units == "voxels"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"p.json: expected \{\"units\""),
        ({"a": {"liver": {}}}, "found 'a'"),
        ({"units": "cm", "cases": {"a": {}}}, '"units" is \'cm\', expected "mm" or "voxels"'),
        ({"cases": {"a": {}}}, "a has no organs"),
        ({"cases": {"a": {"liver": {}}}}, "p.json, a, liver: expected one or more of points"),
        ({"cases": {"a": {"liver": {"point": [[1, 2, 3]]}}}}, r"found \['point'\]"),
        (
            {"cases": {"a": {"liver": {"points": [1, 2, 3]}}}},
            r"liver, points: expected three numbers \[x, y, z\], found 1",
        ),
        ({"cases": {"a": {"liver": {"points": [[1, 2, "3"]]}}}}, "found .1, 2, '3'."),
        ({"cases": {"a": {"liver": {"points": [[1, 2, float("nan")]]}}}}, "not finite"),
        ({"cases": {"a": {"liver": {"box": [[1, 2, 3]]}}}}, "expected two corners, found 1"),
        (
            {"cases": {"a": {"liver": {"negative_points": [[1, 2, 3]]}, "spleen": {"points": [[1, 2, 3]]}}}},
            "p.json, a, liver: nothing says where it is, only where it is not",
        ),
    ],
)
def test_files_of_another_form(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(content, "p.json")


def test_coordinates_of_the_command_line() -> None:
    assert parse_coordinates(" -1, 2.5,3 ; 4,5,6;", "--points") == ((-1, 2.5, 3), (4, 5, 6))
    assert parse_box("1,2,3;4,5,6") == ((1, 2, 3), (4, 5, 6))
    for text in ("1,2", "a,b,c", "1,2,3,4", "1 2 3"):
        with pytest.raises(UsageError, match=rf"--points '{text}': expected x,y,z .* --points=-12,3,40"):
            parse_coordinates(text, "--points")
    with pytest.raises(UsageError, match="expected two corners x,y,z;x,y,z, found 1"):
        parse_box("1,2,3")
    with pytest.raises(UsageError, match="not finite"):
        parse_coordinates("1,2,inf", "--points")
    for text in ("", " ; "):
        with pytest.raises(UsageError, match=f"--points '{text}' holds no point"):
            parse_coordinates(text, "--points")
