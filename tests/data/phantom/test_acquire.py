"""Scans: geometry, partial volume, noise, and what must not change anything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nnunet_multimodal.data.phantom import CONTRASTS, PhantomOptions, scan_subject
from nnunet_multimodal.data.phantom.acquire import Position, acquire
from nnunet_multimodal.data.phantom.anatomy import Anatomy
from nnunet_multimodal.data.phantom.signal import Contrast
from nnunet_multimodal.data.phantom.tissues import CODE, TISSUES

COARSE = PhantomOptions(spacing=(5.0, 5.0, 12.0))
STILL = Position(np.eye(3), np.zeros(3), np.zeros((3, 4, 4, 4)), np.zeros(3))
PLAIN_CT = Contrast("ct", snr=10)


def layered() -> Anatomy:
    """Liver in the lower, fat in the upper half, without texture; voxels of 2 mm centred at the origin."""
    tissue = np.full((30, 30, 30), CODE["liver"], np.uint8)
    tissue[:, :, 15:] = CODE["fat"]
    organ = (tissue == CODE["liver"]).astype(np.uint8)
    return Anatomy(tissue, organ, np.zeros(tissue.shape, np.float32), np.full(3, -29.0), np.full(3, 2.0))


def scan(contrast: Contrast, position: Position = STILL, noise: float = 0.0, seed: int = 0, spacing=(2.0, 2.0, 6.0)):
    rng = np.random.default_rng(seed)
    return acquire(layered(), contrast, position, TISSUES, (40, 40, 30), spacing, rng, noise)


def test_affine_spacing_and_numbers_of_tissue():
    image, organs, affine = scan(PLAIN_CT)
    assert image.shape == organs.shape == (20, 20, 5)
    np.testing.assert_allclose(np.diag(affine), (2, 2, 6, 1))
    np.testing.assert_allclose(affine[:3, 3], (-19, -19, -12))  # the middle of the grid is the origin
    assert (image[:, :, 0] == 58).all()
    assert (image[:, :, 4] == -100).all()
    assert (organs[:, :, 0] == 1).all() and not organs[:, :, 4].any()


def test_a_thick_slice_across_a_border_is_the_mean_of_its_parts():
    image, organs, _ = scan(PLAIN_CT)
    # the slice at 0 has sub-slices at -2, 0, 2 mm: liver, half way (fat from 1, liver to -1 mm), fat
    assert (image[:, :, 2] == np.round((58 - 21 - 100) / 3)).all()
    assert organs[:, :, 2].max() <= 1


def test_shift_moves_image_and_labels_together():
    moved = dataclasses.replace(STILL, shift=np.array([0.0, 0.0, 6.0]))
    image, organs, _ = scan(PLAIN_CT)
    after, organs_after, _ = scan(PLAIN_CT, moved)
    np.testing.assert_array_equal(after[:, :, :4], image[:, :, 1:])
    np.testing.assert_array_equal(organs_after[:, :, :4], organs[:, :, 1:])


def test_opposed_phase_is_dark_at_the_border_of_fat_and_water():
    in_phase = Contrast("gradient_echo", tr=130, te=1.2, flip=65)
    opposed = dataclasses.replace(in_phase, fat=-1.0)
    bright, _, _ = scan(in_phase)
    dark, _, _ = scan(opposed)
    assert dark[:, :, 2].mean() < 0.7 * min(dark[:, :, 0].mean(), dark[:, :, 4].mean())
    assert bright[:, :, 2].mean() > 0.9 * min(bright[:, :, 0].mean(), bright[:, :, 4].mean())


def test_noise_in_air_is_rician():
    anatomy = layered()
    anatomy.tissue[:, :15] = CODE["air"]
    contrast = Contrast("spin_echo", tr=2000, te=20, snr=20)
    image, _, _ = acquire(anatomy, contrast, STILL, TISSUES, (56, 56, 56), (1, 1, 1), np.random.default_rng(1), 1.0)
    air = image[:, :24].astype(float)
    assert air.min() >= 0
    assert air.mean() / air.std() == pytest.approx(np.sqrt(np.pi / 2) / np.sqrt(2 - np.pi / 2), rel=0.03)  # Rayleigh


def test_which_contrasts_are_asked_for_changes_none_of_them():
    both = {name: rest for name, *rest in scan_subject(0, dataclasses.replace(COARSE, contrasts=("T1w", "CT")))}
    alone = {name: rest for name, *rest in scan_subject(0, dataclasses.replace(COARSE, contrasts=("CT",)))}
    for a, b in zip(both["CT"], alone["CT"]):
        np.testing.assert_array_equal(a, b)


def test_dual_echo_is_one_session_and_others_have_their_own_grid():
    scans = {name: (labels, affine) for name, _, labels, affine in scan_subject(1, COARSE)}
    np.testing.assert_array_equal(scans["InPhase"][0], scans["OpposedPhase"][0])
    np.testing.assert_array_equal(scans["InPhase"][1], scans["OpposedPhase"][1])
    grids = {name: tuple(affine.ravel()) for name, (_, affine) in scans.items() if name != "OpposedPhase"}
    assert len(set(grids.values())) == len(CONTRASTS) - 1


def test_on_the_same_grid_all_contrasts_are_registered():
    options = dataclasses.replace(COARSE, same_grid=True)
    scans = [(name, image, labels, affine) for name, image, labels, affine in scan_subject(1, options)]
    assert [name for name, *_ in scans] == [*CONTRASTS]
    for _, image, labels, affine in scans[1:]:
        np.testing.assert_array_equal(labels, scans[0][2])
        np.testing.assert_array_equal(affine, scans[0][3])
        assert not np.array_equal(image, scans[0][1])
    np.testing.assert_allclose(np.diag(scans[0][3])[:3], options.spacing)


def test_without_motion_all_contrasts_agree_about_the_organs():
    options = dataclasses.replace(COARSE, contrasts=("T1w", "T2w"), motion=0.0)
    volumes = {
        name: np.bincount(labels.ravel(), minlength=5)[1:5] * abs(np.linalg.det(affine[:3, :3]))
        for name, _, labels, affine in scan_subject(2, options)
    }
    np.testing.assert_allclose(volumes["T1w"], volumes["T2w"], rtol=0.2)


def test_beyond_what_was_drawn_there_is_air():
    opposed = Contrast("gradient_echo", tr=130, te=1.2, flip=65, fat=-1.0)
    away = dataclasses.replace(STILL, shift=np.array([0.0, 0.0, 500.0]))
    assert scan(opposed, away)[0].max() == 0
    assert (scan(PLAIN_CT, away)[0] == -1000).all()


def test_size_in_voxels_is_kept():
    for count in (43, 81, 86, 162):
        image, _, _ = acquire(
            layered(), PLAIN_CT, STILL, TISSUES, (count * 1.6, 8, 8), (1.6, 4, 4), np.random.default_rng(0), 0.0
        )
        assert image.shape[0] == count
