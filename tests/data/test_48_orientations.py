"""Left is the patient's left in all 48 ways to store a volume: what is checked, put right, measured and accepted."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_multimodal.conversion.images import read_labels, write_like
from nnunet_multimodal.data.side_checks import check_sides
from nnunet_multimodal.data.side_fix import fix_sides
from nnunet_multimodal.evaluation.cases import Case, Settings, evaluate_case
from nnunet_multimodal.evaluation.labels import labels_from
from nnunet_multimodal.inference.position import affine_of

NAMES = {"spine": 1, "left_kidney": 2, "right_kidney": 3}
SHAPE = (9, 12, 20)  # z, y, x: all different, as are the spacings
# Tilted by five degrees about two axes: no axis of the file lies on one of the patient's.
TILT = np.array([[0.9925, -0.0872, 0.0857, 0], [0.0868, 0.9962, 0.0075, 0], [-0.086, 0.0, 0.9963, 0], [0, 0, 0, 1]])
UPRIGHT = np.array([[1.5, 0, 0, -14], [0, 2, 0, -11], [0, 0, 3, 7], [0, 0, 0, 1]])
ORIENTATIONS = [
    np.column_stack((axes, flips))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def body(exchanged: bool = False) -> np.ndarray:
    """uint8 [Z, Y, X]: x grows towards the patient's right, so the left kidney lies at small x."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, 8:11, 9:11] = 1
    labels[2:7, 3:7, 2:6], labels[2:7, 3:8, 14:18] = (3, 2) if exchanged else (2, 3)
    return labels


def stored(labels: np.ndarray, affine: np.ndarray, orientation: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(labels.transpose(2, 1, 0), affine).as_reoriented(orientation)


@pytest.fixture(params=["upright", "tilted"])
def affine(request: pytest.FixtureRequest) -> np.ndarray:
    orthonormal = np.eye(4)
    left, _, right = np.linalg.svd(TILT[:3, :3])
    orthonormal[:3, :3] = left @ right
    return UPRIGHT if request.param == "upright" else orthonormal @ UPRIGHT


def test_there_are_48() -> None:
    axes = {"".join(nib.aff2axcodes(stored(body(), UPRIGHT, to).affine)) for to in ORIENTATIONS}
    assert len(axes) == 48 and {"RAS", "LPS", "SAL", "PIR"} <= axes


def test_sides_are_checked_and_put_right_in_the_array_as_stored(affine: np.ndarray) -> None:
    for to in ORIENTATIONS:
        good, bad = (stored(body(exchanged), affine, to) for exchanged in (False, True))
        arrays = [np.asarray(image.dataobj).transpose(2, 1, 0) for image in (good, bad)]
        assert check_sides(arrays[0], NAMES, good.affine) == [], to.tolist()
        kinds = [(finding.kind, finding.left) for finding in check_sides(arrays[1], NAMES, bad.affine)]
        assert kinds == [("exchanged", "left_kidney")], to.tolist()
        for array in arrays:
            assert np.array_equal(fix_sides(array, NAMES, good.affine).labels, arrays[0]), to.tolist()


def test_files_are_read_as_one_array_and_written_as_they_were(affine: np.ndarray, tmp_path: Path) -> None:
    for to in ORIENTATIONS:
        image = stored(body(), affine, to)
        nib.save(image, tmp_path / "a.nii.gz")
        volume = read_labels(tmp_path / "a.nii.gz")
        assert np.array_equal(volume.data, body()) and volume.spacing == pytest.approx((3, 2, 1.5), abs=1e-4)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        write_like(tmp_path / "b.nii.gz", body(exchanged=True), volume)
        written = nib.load(tmp_path / "b.nii.gz")
        np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(stored(body(True), affine, to).dataobj))


def test_evaluate_compares_patients_and_not_arrays(affine: np.ndarray, tmp_path: Path) -> None:
    """Reference in one order, prediction in each: Dice is exact, and only exchanged kidneys are odd."""
    settings = Settings(labels_from(NAMES, "the test"), dict.fromkeys(NAMES, 2.0))
    nib.save(stored(body(), affine, ORIENTATIONS[29]), tmp_path / "reference.nii.gz")
    for exchanged, to in itertools.product((False, True), ORIENTATIONS):
        nib.save(stored(body(exchanged), affine, to), tmp_path / "prediction.nii.gz")
        result = evaluate_case(Case("a", tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz"), settings)
        assert result.failed is None and result.organs["spine"].dsc == 1
        kidneys = [result.organs[name].dsc for name in ("left_kidney", "right_kidney")]
        assert kidneys == ([0, 0] if exchanged else [1, 1]), to.tolist()
        assert [each["kind"] for each in result.sides] == (["exchanged"] if exchanged else []), to.tolist()


def test_every_reader_of_nnunet_says_where_its_array_lies(affine: np.ndarray, tmp_path: Path) -> None:
    """What predict --fix-sides stands on: the network's array and its affine agree on left and right."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

    for to in ORIENTATIONS:
        nib.save(stored(body(exchanged=True), affine, to), tmp_path / "a.nii.gz")
        for reader in (NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient):
            image, properties = reader().read_images((str(tmp_path / "a.nii.gz"),))
            labels = image[0].astype(np.uint8)
            place = affine_of(properties)
            assert place is not None
            where = np.argwhere(labels == 1).mean(axis=0)[::-1]
            expected = affine[:3] @ [*np.argwhere(body() == 1).mean(axis=0)[::-1], 1]
            np.testing.assert_allclose(place[:3] @ [*where, 1], expected, atol=1e-3, err_msg=reader.__name__)
            fixed = fix_sides(labels, NAMES, place).labels
            left = np.argwhere(fixed == 2).mean(axis=0)[::-1]
            assert np.array_equal(np.sort(fixed.ravel()), np.sort(body().ravel())), reader.__name__
            assert (place[:3] @ [*left, 1])[0] < expected[0], (reader.__name__, to.tolist())
