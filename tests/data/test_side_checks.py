"""Left and right: findings and corrections on made-up bodies whose answer is known (cross-check 25)."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_multimodal.data.label_maps import LABEL_MAPS, MRSEGMENTATOR
from nnunet_multimodal.data.side_checks import check_sides, find_pairs, midline_of
from nnunet_multimodal.data.side_fix import fix_sides

NAMES = {"spine": 1, "left_kidney": 2, "right_kidney": 3, "left_lung": 4, "right_lung": 5, "liver": 6}
AFFINE = np.array([[2.0, 0, 0, -40], [0, 2, 0, -20], [0, 0, 4, 10], [0, 0, 0, 1]])  # x grows towards the right
MIDDLE = 2 * 19.5 - 40  # mm; the body is 40 voxels wide


def body() -> np.ndarray:
    """uint8 [Z, Y, X] = [10, 20, 40], symmetric: spine, kidneys, and lungs that touch each other."""
    labels = np.zeros((10, 20, 40), np.uint8)
    labels[:, 14:17, 18:22] = 1
    labels[1:4, 8:13, 8:13], labels[1:4, 8:13, 27:32] = 2, 3
    labels[6:9, 4:12, 6:20], labels[6:9, 4:12, 20:34] = 4, 5
    return labels


def exchanged(labels: np.ndarray, *organs: str) -> np.ndarray:
    result = labels.copy()
    for organ in organs:
        left, right = NAMES[f"left_{organ}"], NAMES[f"right_{organ}"]
        result[labels == left], result[labels == right] = right, left
    return result


def kinds(labels: np.ndarray, names: dict = NAMES, affine: np.ndarray = AFFINE) -> list[tuple[str, str]]:
    return [(finding.kind, finding.left) for finding in check_sides(labels, names, affine)]


# --- the check -------------------------------------------------------------------------------------------------------


def test_a_sound_body_has_no_finding() -> None:
    assert kinds(body()) == []
    pairs = find_pairs(body(), NAMES, AFFINE)
    assert [pair.midline for pair in pairs] == [MIDDLE, None], "the lungs touch: they do not tell where the middle is"
    assert midline_of(body(), NAMES, AFFINE, pairs) == MIDDLE


def test_exchanged_organs_are_found_with_the_distance() -> None:
    (finding,) = check_sides(exchanged(body(), "kidney"), NAMES, AFFINE)
    assert (finding.kind, finding.left, finding.right) == ("exchanged", "left_kidney", "right_kidney")
    assert finding.text == "left_kidney lies to the right of right_kidney (by 38 mm)"  # 19 voxels of 2 mm
    assert finding.as_json()["kind"] == "exchanged"


def test_storage_does_not_matter() -> None:
    """All 48 ways to store the volume, with the affine that says so."""
    for permutation in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            to = np.column_stack((permutation, flips))
            for labels, expected in ((body(), []), (exchanged(body(), "kidney"), [("exchanged", "left_kidney")])):
                stored = nib.Nifti1Image(labels.transpose(2, 1, 0), AFFINE).as_reoriented(to)
                array = np.asarray(stored.dataobj).transpose(2, 1, 0)
                assert kinds(array, NAMES, stored.affine) == expected, to


def test_a_large_piece_on_the_other_side_is_astray_and_a_speck_is_not() -> None:
    labels = body()
    labels[1:4, 8:13, 27:29] = 2  # 30 of its 105 voxels
    (astray, pieces) = check_sides(labels, NAMES, AFFINE)
    assert astray.text == "a piece of left_kidney (29 %) lies on the patient's right"
    assert pieces.text == "left_kidney is in 2 pieces (71 %, 29 %)"
    labels = body()
    labels[1, 8, 27:29] = 2
    assert kinds(labels) == []


def test_one_organ_under_both_names_is_found() -> None:
    """Half of the right kidney is called left, nothing is left over of the true left one."""
    labels = body()
    labels[labels == 2] = 0
    labels[1:4, 8:13, 30:32] = 2
    assert ("exchanged", "left_kidney") in kinds(labels)


def test_volumes_are_compared_unless_the_image_cuts_an_organ() -> None:
    labels = body()
    labels[labels == 3] = 0
    labels[1:3, 8:12, 28:30] = 3  # 16 voxels, the other has 75
    (finding,) = check_sides(labels, NAMES, AFFINE)
    assert finding.text == "left_kidney is 4.7 times as large as right_kidney"
    assert kinds(labels[1:]) == [], "the image ends in the kidneys"


def test_an_absent_organ_is_no_finding() -> None:
    labels = body()
    labels[labels == 3] = 0
    assert kinds(labels) == []
    assert kinds(np.zeros((3, 4, 5), np.uint8)) == [] and check_sides(body(), {"liver": 6}, AFFINE) == []


def test_regions_and_large_or_float_values() -> None:
    names = {"left_kidney": [2, 7], "right_kidney": [3, 8], "spine": 1}
    labels = exchanged(body(), "kidney").astype(np.int64)
    labels[1, 8:13, 8:13], labels[0, 0, 0], labels[0, 0, 1] = 8, 2**31, -5
    assert kinds(labels, names) == [("exchanged", "left_kidney")]
    assert kinds(exchanged(body(), "kidney").astype(np.float32)) == [("exchanged", "left_kidney")]


# --- the correction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("organs", [("kidney",), ("lung",), ("kidney", "lung")])
def test_exchanged_organs_are_put_right_exactly(organs: tuple[str, ...]) -> None:
    wrong = exchanged(body(), *organs)
    before = wrong.copy()
    fixed = fix_sides(wrong, NAMES, AFFINE)
    assert np.array_equal(fixed.labels, body()) and fixed.labels.dtype == np.uint8
    assert np.array_equal(wrong, before), "the input is left alone"
    assert [(entry["from"], entry["to"], entry["pieces"]) for entry in fixed.changed] == [
        (f"{here}_{organ}", f"{there}_{organ}", 1)
        for organ in organs
        for here, there in (("left", "right"), ("right", "left"))
    ]
    assert fixed.ambiguous == [] and kinds(fixed.labels) == []


@pytest.mark.parametrize("name", ["left_kidney", "right_kidney"])
def test_both_called_the_same(name: str) -> None:
    """What stock nnU-Net did after mirroring in training (design.md, contract 8); no spine helps."""
    labels = body()
    labels[(labels == 2) | (labels == 3)] = NAMES[name]
    labels[labels == 1] = 0
    expected = np.where(body() == 1, 0, body())
    fixed = fix_sides(labels, NAMES, AFFINE)
    assert np.array_equal(fixed.labels, expected)
    assert fixed.changed[0]["voxels"] == 75


def test_an_organ_of_both_names_becomes_one() -> None:
    labels = body()
    labels[1:4, 8:13, 27:30] = 2
    labels[1:4, 8:10, 8:13] = 3
    fixed = fix_sides(labels, NAMES, AFFINE)
    assert np.array_equal(fixed.labels, body()) and len(fixed.changed) == 2


def test_a_single_kidney_takes_its_side_from_the_spine_and_stays_without_one() -> None:
    labels = body()
    labels[labels == 2] = 0
    labels[labels == 3] = 2
    fixed = fix_sides(labels, NAMES, AFFINE)
    assert (fixed.labels == 3).sum() == 75 and not (fixed.labels == 2).any()
    alone = np.where(labels == 2, labels, 0)
    fixed = fix_sides(alone, NAMES, AFFINE)
    assert np.array_equal(fixed.labels, alone) and fixed.changed == []
    assert fixed.ambiguous == [
        {"organ": "left_kidney", "pieces": 1, "voxels": 75, "why": "no organ tells where the midline is"}
    ]


def test_what_straddles_the_midline_stays_and_is_named() -> None:
    labels = body()
    labels[labels == 5] = 4  # the left lung covers both
    fixed = fix_sides(labels, NAMES, AFFINE)
    assert np.array_equal(fixed.labels, labels)
    assert fixed.ambiguous == [
        {"organ": "left_lung", "pieces": 1, "voxels": 672, "why": "on both sides of the midline"}
    ]
    assert json.loads(json.dumps(fixed.as_json())) == {"changed": [], "ambiguous": fixed.ambiguous}


def test_a_network_that_has_learned_nothing_is_no_trial_of_patience() -> None:
    """Tens of thousands of specks; each takes its side."""
    labels = np.random.default_rng(0).integers(0, 40, (60, 60, 60)).astype(np.uint8)
    labels = np.where((labels == 2) | (labels == 3), labels, 0).astype(np.uint8)
    labels[:, 58:] = 0
    labels[:, 59, 29:31] = 1  # the spine
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    started = time.process_time()
    fixed = fix_sides(labels, NAMES, affine)
    check_sides(labels, NAMES, affine)
    assert time.process_time() - started < 5
    changed = fixed.labels != labels
    assert changed.sum() == sum(entry["voxels"] for entry in fixed.changed) > 4000
    left = np.broadcast_to(np.arange(60) < 29.5, labels.shape)
    assert (fixed.labels[changed & left] == 2).mean() > 0.9


def test_pieces_one_above_the_other_are_no_pair() -> None:
    """A kidney that broke in two must not be taken for two kidneys with the midline between them."""
    labels = np.zeros((20, 20, 40), np.uint8)
    labels[2:6, 8:13, 8:13], labels[12:16, 8:13, 9:14] = 2, 2
    assert np.array_equal(fix_sides(labels, NAMES, AFFINE).labels, labels)


def test_right_things_stay_as_they_are() -> None:
    fixed = fix_sides(body(), NAMES, AFFINE)
    assert np.array_equal(fixed.labels, body()) and fixed.changed == fixed.ambiguous == []


def test_a_tilted_patient() -> None:
    """Ten degrees about the long axis, stored obliquely: the axis is the patient's, not the array's."""
    angle = np.radians(10)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ AFFINE
    assert kinds(body(), NAMES, affine) == []
    assert np.array_equal(fix_sides(exchanged(body(), "kidney"), NAMES, affine).labels, body())


# --- real label maps -------------------------------------------------------------------------------------------------


def real_maps(data_dir: Path) -> list[tuple[Path, dict]]:
    organs = {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    maps = [(path, organs) for path in sorted((data_dir / "abdomen_mr_t2/labels").glob("*.nii.gz"))]
    ct, mr = (LABEL_MAPS[f"totalsegmentator_{kind}"].ids() for kind in ("ct", "mr"))
    maps += [(path, ct) for path in sorted((data_dir / "abdomen_ct/labels").glob("*.nii.gz"))]
    return [*maps, (data_dir / "abdomen_mr_small/labels.nii.gz", mr)]


def test_real_patients_have_no_finding_and_exchanged_ones_have(data_dir: Path) -> None:
    from nnunet_multimodal.conversion.images import read_labels

    assert len(real_maps(data_dir)) == 17
    for path, names in real_maps(data_dir):
        volume = read_labels(path)
        assert check_sides(volume.data, names, volume.affine) == [], path
        flat = {name: ids if isinstance(ids, int) else ids[0] for name, ids in names.items()}
        labels = volume.data
        for ids in names.values():
            if not isinstance(ids, int):
                labels = np.where(np.isin(labels, ids), ids[0], labels)
        fixed = fix_sides(labels, flat, volume.affine)
        # In two patients, a few voxels beside one kidney have the other one's name.
        slips = {"mr34.nii.gz": [6], "mr36.nii.gz": [8]}
        assert [entry["voxels"] for entry in fixed.changed] == slips.get(path.name, []), path
        labels = fixed.labels
        wrong = labels.copy()
        left, right = flat["left_kidney"], flat["right_kidney"]
        wrong[labels == left], wrong[labels == right] = right, left
        assert [finding.kind for finding in check_sides(wrong, names, volume.affine)] == ["exchanged"], path
        assert np.array_equal(fix_sides(wrong, flat, volume.affine).labels, labels), path


def test_the_forty_classes_have_twelve_pairs() -> None:
    from nnunet_multimodal.data.sides import sided_pairs

    assert len(sided_pairs([*MRSEGMENTATOR])) == 12
