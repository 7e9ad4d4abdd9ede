"""The styles skeleton and contour, and scribbles on the background: cross-check 13, shapes by hand, real organs."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt, label

from nnunet_multimodal.data.background import BACKGROUNDS, NEAR, background_scribbles
from nnunet_multimodal.data.contour import DEPTH, HALF_WIDTH, contour, smooth_noise
from nnunet_multimodal.data.scribbles import STYLES, simulate_label_scribbles, simulate_scribble
from nnunet_multimodal.data.skeleton import skeleton, thin_out
from nnunet_multimodal.errors import UsageError

EIGHT = np.ones((3, 3))


def disc(radius: float, size: int = 128) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - size // 2) ** 2 + (x - size // 2) ** 2 <= radius**2


def bar(height: int, width: int) -> np.ndarray:
    return np.ones((height, width), dtype=bool)


@pytest.mark.parametrize("style", ["skeleton", "contour"])
@settings(max_examples=100, deadline=None)
@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
)
def test_inside_never_empty_and_deterministic(mask: np.ndarray, style: str, seed: int, scale: float) -> None:
    before = mask.copy()
    drawn = simulate_scribble(mask, seed, style, scale)
    assert drawn.dtype == bool and drawn.shape == mask.shape
    assert not (drawn & ~mask).any()
    assert drawn.any() == mask.any()
    assert np.array_equal(mask, before)
    assert np.array_equal(drawn, simulate_scribble(mask, np.random.default_rng(seed), style, scale))


@pytest.mark.parametrize("style", ["skeleton", "contour"])
def test_another_seed_draws_another_scribble(style: str) -> None:
    organ = np.pad(bar(40, 90), 5)
    assert len({simulate_scribble(organ, seed, style).tobytes() for seed in range(10)}) == 10


# --- skeleton --------------------------------------------------------------------------------------------------------


def test_skeleton_of_a_small_bar_is_its_middle_line_three_wide() -> None:
    """7 x 40 is below both areas: nothing is eroded or moved. Lee's skeleton is the middle row."""
    drawn = skeleton(bar(7, 40), np.random.default_rng(0))
    rows = np.flatnonzero(drawn.any(axis=1))
    assert rows.tolist() == [2, 3, 4]
    assert drawn[3].sum() >= 30 and label(drawn, EIGHT)[1] == 1


def test_branches_are_cut() -> None:
    """A comb with two teeth: the way from the long tooth to the far end of the back is the longest (30 + 38 of 60)."""
    comb = np.zeros((40, 60), dtype=bool)
    comb[30:35] = True
    comb[:30, 20:24] = comb[18:30, 40:44] = True
    drawn = skeleton(comb, np.random.default_rng(0))
    assert not drawn[:24, 38:46].any()  # the short tooth
    assert drawn[4:28, 20:24].any(axis=1).all()
    assert drawn[30:35, 24:55].any(axis=0).all() and not drawn[30:35, :15].any()


def test_a_ring_is_drawn_almost_round() -> None:
    ring = disc(16, 40) & ~disc(12, 40)  # below the area that is eroded
    assert ring.sum() < 900
    drawn = skeleton(ring, np.random.default_rng(1))
    y, x = np.nonzero(drawn)
    sectors = np.unique(np.floor((np.arctan2(y - 20, x - 20) + np.pi) / (2 * np.pi) * 36) % 36)
    assert 32 <= len(sectors) <= 36


def test_a_slender_organ_is_not_eroded_away() -> None:
    """The myocardium: large enough to be eroded, thinner than what is taken off."""
    ring = disc(40) & ~disc(34)
    assert ring.sum() > 900
    for seed in range(20):
        drawn = skeleton(ring, np.random.default_rng(seed))
        assert drawn.sum() > 0.1 * ring.sum()


def test_small_pieces_of_an_organ_get_no_stroke_of_their_own() -> None:
    two = np.zeros((30, 60), dtype=bool)
    two[10:16, 2:40] = True
    two[10:16, 50:56] = True
    drawn = skeleton(two, np.random.default_rng(0))
    assert drawn[:, :40].any() and not drawn[:, 50:].any()


def test_large_strokes_are_moved_as_a_whole() -> None:
    organ = bar(60, 120)
    middles = []
    for seed in range(40):
        drawn = skeleton(organ, np.random.default_rng(seed))
        assert label(drawn, EIGHT)[1] == 1  # turning leaves no holes
        middles.append(np.argwhere(drawn).mean(axis=0))
    spread = np.ptp(np.array(middles), axis=0)
    assert (spread > 4).all() and (spread < 16).all()  # up to 6 pixels to each side


@pytest.mark.parametrize(("scale", "width"), [(0.4, 1), (1.0, 3), (2.0, 5)])
def test_thickness_follows_the_scale(scale: float, width: int) -> None:
    drawn = skeleton(bar(9, 30), np.random.default_rng(0), scale)
    assert np.bincount(drawn.sum(axis=0)).argmax() in (0, width) and drawn.sum(axis=0).max() == width


# --- contour ---------------------------------------------------------------------------------------------------------


def test_contour_keeps_its_distance_from_the_border() -> None:
    organ = np.pad(bar(80, 100), 1)
    depth = distance_transform_edt(organ)
    for seed in range(20):
        drawn = contour(organ, np.random.default_rng(seed))
        reached = depth[drawn]
        assert 0.5 < reached.mean() < DEPTH[1] + 1
        assert np.quantile(reached, 0.95) < DEPTH[1] + HALF_WIDTH + 3  # three times the waver


def test_contour_is_broken_but_goes_round() -> None:
    organ = disc(50)
    pieces, shares, seen = [], [], np.zeros(8, dtype=bool)
    for seed in range(20):
        drawn = contour(organ, np.random.default_rng(seed)) & organ
        y, x = np.nonzero(drawn)
        sectors = np.floor((np.arctan2(y - 64, x - 64) + np.pi) / (2 * np.pi + 1e-9) * 72).astype(int)
        shares.append(len(np.unique(sectors)) / 72)
        pieces.append(label(drawn, EIGHT)[1])
        seen[np.unique(sectors // 9)] = True
    assert 0.35 < np.mean(shares) < 0.75  # about half of the way is gap
    assert np.mean(pieces) > 3
    assert seen.all()


def test_smooth_noise_is_smooth_and_centred() -> None:
    noise = np.stack([smooth_noise((50, 33), 10, np.random.default_rng(seed)) for seed in range(50)])
    assert noise.shape == (50, 50, 33)
    assert abs(noise.mean()) < 0.1
    assert np.abs(np.diff(noise, axis=1)).max() < 6 / 10 + 0.2  # six standard deviations over one grain
    assert noise.std() > 0.5


# --- background ------------------------------------------------------------------------------------------------------


@pytest.fixture
def organs() -> np.ndarray:
    """Two organs on slices 2 to 5 of 8."""
    labels = np.zeros((8, 100, 120), dtype=np.uint8)
    labels[2:6, 40:60, 30:50] = 1
    labels[2:6, 50:70, 80:90] = 2
    return labels


@pytest.mark.parametrize("how", BACKGROUNDS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("axis", [0, 2])
def test_background_is_never_on_an_organ(organs: np.ndarray, how: str, style: str, axis: int) -> None:
    labels = np.moveaxis(organs, 0, axis)
    drawn = background_scribbles(labels, np.random.default_rng(0), how, style, axis=axis)
    assert drawn.shape == labels.shape and drawn.dtype == bool
    assert not drawn[labels > 0].any()
    assert np.moveaxis(drawn, axis, 0).any(axis=(1, 2)).all()
    again = background_scribbles(labels, np.random.default_rng(0), how, style, axis=axis)
    assert np.array_equal(drawn, again)


def test_drawn_background_is_near_the_organs(organs: np.ndarray) -> None:
    drawn = background_scribbles(organs, np.random.default_rng(0), "drawn", "freeform")
    for z in range(2, 6):
        distance = distance_transform_edt(organs[z] == 0)[drawn[z]]
        assert distance.min() >= NEAR[0] and distance.max() <= NEAR[1]


def test_eroded_background_is_a_thin_line(organs: np.ndarray) -> None:
    drawn = background_scribbles(organs, np.random.default_rng(0), "erode")
    assert 0 < drawn[3].mean() < 0.05
    thick = drawn[3, :-1, :-1] & drawn[3, 1:, :-1] & drawn[3, :-1, 1:] & drawn[3, 1:, 1:]
    assert thick.sum() < 0.05 * drawn[3].sum()


def test_slices_body_and_every(organs: np.ndarray) -> None:
    chosen = np.zeros(8, dtype=bool)
    chosen[[0, 3]] = True  # 0 has no organ, so nobody chose it for that
    body = np.zeros(organs.shape, dtype=bool)
    body[:, 20:80, 10:110] = True
    drawn = background_scribbles(organs, np.random.default_rng(0), "drawn", every=3, slices=chosen, body=body)
    assert np.flatnonzero(drawn.any(axis=(1, 2))).tolist() == [
        3,
        6,
    ]  # of 0, 1, 6 and 7 every third, the middle among them
    assert not (drawn & ~body).any()
    assert not background_scribbles(organs, np.random.default_rng(0), body=np.zeros_like(body)).any()
    with pytest.raises(UsageError, match=r"'nobody'\. There is: drawn, erode"):
        background_scribbles(organs, np.random.default_rng(0), "nobody")


def test_thin_out_of_one_pixel() -> None:
    assert thin_out(np.ones((1, 1), dtype=bool), np.random.default_rng(0)).all()


# --- real organs -----------------------------------------------------------------------------------------------------


def test_coverage_of_hearts_is_of_the_size_that_people_leave(data_dir: Path) -> None:
    """ACDC's scribbles cover 8 to 16 % of a class; the skeleton of a round ventricle is a dot, as WSL4MIS's is."""
    labels = [
        np.asanyarray(nibabel.load(path).dataobj).transpose(2, 1, 0)
        for path in sorted((data_dir / "cardiac_scribble" / "labels").glob("*.nii.gz"))[:4]
    ]
    bounds = {"contour": (0.05, 0.35), "skeleton": (0.005, 0.6), "freeform": (0.05, 0.35)}
    for style, (low, high) in bounds.items():
        for organ in (1, 2, 3):
            drawn = [simulate_label_scribbles(volume, [organ], 0, style=style) == organ for volume in labels]
            share = sum(map(np.sum, drawn)) / sum((volume == organ).sum() for volume in labels)
            assert low < share < high, (style, organ, share)
