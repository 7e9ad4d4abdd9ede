"""Subjects: organs where and as large as they are in people, different in everybody, with an inner structure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_multimodal.data.phantom.anatomy import ORGANS, Anatomy, make_anatomy
from nnunet_multimodal.data.phantom.shapes import ellipsoid, rotation, spline_field, union, without
from nnunet_multimodal.data.phantom.tissues import CODE

SPACING = (3.0, 3.0, 4.0)


def subject(seed: int, lesion: bool = False) -> Anatomy:
    return make_anatomy(np.random.default_rng(seed), (400, 300, 216), SPACING, lesion)


@pytest.fixture(scope="module")
def subjects() -> list[Anatomy]:
    return [subject(seed) for seed in range(4)]


def centre(anatomy: Anatomy, organ: str) -> np.ndarray:
    return anatomy.origin + anatomy.spacing * np.argwhere(anatomy.organ == ORGANS[organ]).mean(0)


def test_volumes_are_those_of_adults(subjects: list[Anatomy]):
    limits = {"liver": (550, 2200), "right_kidney": (60, 260), "left_kidney": (60, 260), "spleen": (40, 350)}
    for anatomy in subjects:
        for organ, (low, high) in limits.items():
            millilitres = (anatomy.organ == ORGANS[organ]).sum() * np.prod(SPACING) / 1000
            assert low < millilitres < high, organ


def test_organs_lie_on_their_sides(subjects: list[Anatomy]):
    for anatomy in subjects:
        assert centre(anatomy, "liver")[0] > 20  # x grows to the patient's right
        assert centre(anatomy, "right_kidney")[0] > 30 > -30 > centre(anatomy, "left_kidney")[0]
        assert centre(anatomy, "spleen")[0] < -60
        assert centre(anatomy, "liver")[2] > centre(anatomy, "right_kidney")[2]  # above
        assert centre(anatomy, "liver")[1] > centre(anatomy, "left_kidney")[1]  # in front


def test_organs_are_nearly_in_one_piece(subjects: list[Anatomy]):
    for anatomy in subjects:
        for organ in ORGANS:
            pieces, _ = ndimage.label(anatomy.organ == ORGANS[organ])
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() > 0.95 * sizes.sum(), organ


def test_no_two_subjects_have_the_same_organs(subjects: list[Anatomy]):
    for number in ORGANS.values():
        a, b = (anatomy.organ == number for anatomy in subjects[:2])
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.93


def test_organs_have_an_inner_structure(subjects: list[Anatomy]):
    for anatomy in subjects:
        kidneys = anatomy.tissue[(anatomy.organ == 2) | (anatomy.organ == 3)]
        medulla = (kidneys == CODE["renal_medulla"]).mean()
        assert 0.15 < medulla < 0.7
        assert (kidneys == CODE["renal_cortex"]).mean() > 0.25
        assert 0.002 < (anatomy.tissue[anatomy.organ == 1] == CODE["liver_vessel"]).mean() < 0.15


def test_there_is_more_than_organs(subjects: list[Anatomy]):
    for anatomy in subjects:
        present = set(np.unique(anatomy.tissue))
        for name in ("air", "fat", "muscle", "lung", "marrow", "cortical_bone", "bowel_wall", "fluid", "blood"):
            assert CODE[name] in present, name


def test_same_state_same_subject_and_lesions_leave_the_rest_alone():
    plain, again, with_lesion = subject(7), subject(7), subject(7, lesion=True)
    np.testing.assert_array_equal(plain.tissue, again.tissue)
    np.testing.assert_array_equal(plain.texture, again.texture)
    new = with_lesion.tissue == CODE["lesion"]
    assert new.any()
    np.testing.assert_array_equal(plain.tissue[~new], with_lesion.tissue[~new])
    assert (plain.organ[new] == ORGANS["liver"]).all()


def test_ellipsoid_and_boolean_solids_by_hand():
    x = np.array([0.0, 4.0, 6.0, 20.0])
    zero = np.zeros(4)
    distance = ellipsoid((x, zero, zero), (0, 0, 0), (5, 10, 10))
    np.testing.assert_allclose(distance, [-5, -1, 1, 15])
    turned = ellipsoid((zero, x, zero), (0, 0, 0), (5, 10, 10), rotation((0, 0, 90)))
    np.testing.assert_allclose(turned, distance, atol=1e-12)
    far = distance + 100
    np.testing.assert_allclose(union(distance, far, 5), distance)
    np.testing.assert_allclose(without(distance, far, 5), distance)
    assert (without(distance, distance, 1e-6) >= -1e-6).all()


def test_spline_field_is_smooth_and_scaled():
    rng = np.random.default_rng(0)
    values = np.stack([spline_field(rng, (20, 24, 16), (4, 5, 3)) for _ in range(60)])
    assert abs(float(values.std()) - 1) < 0.1
    assert abs(float(values.mean())) < 0.1
    assert np.abs(np.diff(values, axis=1)).max() < 1.5
