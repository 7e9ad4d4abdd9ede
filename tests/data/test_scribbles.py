"""Cross-check 13 of methods.md: inside the mask, never empty, the same for the same seed, SEEM's coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import label

from nnunet_multimodal.data import scribbles
from nnunet_multimodal.data.scribbles import (
    PENS,
    coverage,
    freeform,
    scribble_scale,
    simulate_label_scribbles,
    simulate_scribble,
)
from nnunet_multimodal.errors import DataProblem, UsageError


def disc(radius: float, size: int = 256) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - size // 2) ** 2 + (x - size // 2) ** 2 <= radius**2


@settings(max_examples=150, deadline=None)
@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
)
def test_inside_never_empty_and_deterministic(mask: np.ndarray, seed: int, scale: float) -> None:
    before = mask.copy()
    drawn = simulate_scribble(mask, seed, scale=scale)
    assert drawn.dtype == bool and drawn.shape == mask.shape
    assert not (drawn & ~mask).any()
    assert drawn.any() == mask.any()
    assert np.array_equal(mask, before)
    assert np.array_equal(drawn, simulate_scribble(mask, np.random.default_rng(seed), scale=scale))


def test_another_seed_draws_another_scribble() -> None:
    mask = disc(40)
    assert len({simulate_scribble(mask, seed).tobytes() for seed in range(10)}) == 10


@pytest.mark.parametrize(("radius", "pen", "expected"), [(14, 0, 0.34), (14, 1, 0.16), (55, 0, 0.087), (55, 1, 0.038)])
def test_coverage_is_that_of_seem(radius: float, pen: int, expected: float) -> None:
    mask, rng = disc(radius), np.random.default_rng(7)
    shares = [freeform(mask, rng, pen=PENS[pen]).sum() / mask.sum() for _ in range(200)]
    # 200 draws have a standard error of 4 % of the mean; SEEM's own numbers are from 600 draws
    assert np.mean(shares) == pytest.approx(expected, rel=0.15)


def test_both_pens_are_used_equally_often() -> None:
    mask, rng = disc(55), np.random.default_rng(0)
    mean = np.mean([simulate_scribble(mask, rng).sum() / mask.sum() for _ in range(400)])
    assert mean == pytest.approx((0.087 + 0.038) / 2, rel=0.15)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scale_keeps_the_coverage_at_another_image_size(factor: float) -> None:
    size = int(256 * factor)
    mask, rng = disc(40 * factor, size), np.random.default_rng(3)
    scaled = [simulate_scribble(mask, rng, scale=scribble_scale(mask.shape)).sum() / mask.sum() for _ in range(200)]
    original, rng = disc(40), np.random.default_rng(4)
    expected = [simulate_scribble(original, rng).sum() / original.sum() for _ in range(200)]
    assert np.mean(scaled) == pytest.approx(np.mean(expected), rel=0.3)


def test_scale_of_a_shape() -> None:
    assert scribble_scale((30, 320, 512)) == 1.25
    assert scribble_scale((16, 16)) == 0.25
    assert scribble_scale((4096, 4096)) == 2.0


def test_a_scribble_is_connected_strokes_without_holes_between_points() -> None:
    """One horizontal line of width 3 in a straight walk: every pixel of the bar is set."""
    vertices = np.array([[[10.0, 5.0], [10.0, 30.0]]])
    drawn = scribbles._draw((21, 40), vertices, np.array([2]), np.array([3]))
    expected = np.zeros((21, 40), dtype=bool)
    expected[9:12, 5:31] = True
    assert np.array_equal(drawn, expected)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 9])
def test_slanted_lines_have_no_holes(width: int) -> None:
    """In one piece; every pixel well inside the rectangle of a slanted line is set, and none far outside it is."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[:60, :60]
    for _ in range(50):
        angle = rng.uniform(0, 2 * np.pi)
        start = rng.uniform(28, 32, 2)
        end = start + rng.uniform(10, 18) * np.array([np.sin(angle), np.cos(angle)])
        drawn = scribbles._draw((60, 60), np.array([[start, end]]), np.array([2]), np.array([width]))
        length = np.linalg.norm(end - start)
        along = (end - start) / length
        offset = np.stack([y, x], axis=-1) - start
        forward, sideways = offset @ along, np.abs(offset @ [-along[1], along[0]])
        between = (forward >= width / 2) & (forward <= length - width / 2)  # the ends are cut along an axis
        assert label(drawn, np.ones((3, 3)))[1] == 1
        assert drawn[between & (sideways <= width / 2 - 1)].all()
        assert not drawn[(sideways > width / 2 + 1) | (forward < -width) | (forward > length + width)].any()
        # away from the ends and their discs, as thick as it should be to half a pixel
        assert (drawn & between).sum() == pytest.approx((length - width) * width, abs=length / 2 + width)


def test_vertices_carry_a_filled_disc() -> None:
    """Width 9: radius 9 // 2 - 1 = 3 around the only vertex, 29 pixels (counted on paper)."""
    drawn = scribbles._draw((21, 21), np.array([[[10.0, 10.0]]]), np.array([1]), np.array([9]))
    assert drawn.sum() == 29
    assert drawn[7, 10] and drawn[10, 13] and not drawn[7, 13]


def test_fallback_is_the_deepest_pixel_and_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scribbles.STYLES, "freeform", lambda mask, rng, scale: np.zeros_like(mask))
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    expected = np.zeros_like(mask)
    expected[[4, 3, 5, 4, 4], [4, 4, 4, 3, 5]] = True
    assert np.array_equal(simulate_scribble(mask, 0), expected)
    lonely = np.zeros((3, 3), dtype=int)
    lonely[1, 1] = 5
    assert np.array_equal(simulate_scribble(lonely, 0), lonely > 0)


def test_volume_gets_a_scribble_on_every_slice_with_foreground() -> None:
    mask = np.zeros((5, 64, 64), dtype=np.int16)
    mask[1, 10:50, 10:50] = 1
    mask[3, 20:30, 20:30] = 2
    drawn = simulate_scribble(mask, 0)
    assert drawn.any(axis=(1, 2)).tolist() == [False, True, False, True, False]
    assert not drawn[mask == 0].any()
    assert simulate_scribble(np.zeros((0, 4, 4)), 0).shape == (0, 4, 4)


def test_bad_arguments_are_explained() -> None:
    with pytest.raises(UsageError, match="freeform"):
        simulate_scribble(np.ones((4, 4)), 0, style="zigzag")
    with pytest.raises(UsageError, match="above 0"):
        simulate_scribble(np.ones((4, 4)), 0, scale=0)
    with pytest.raises(DataProblem, match="2 or 3 dimensions"):
        simulate_scribble(np.ones(4), 0)
    with pytest.raises(UsageError, match="at least 1"):
        simulate_label_scribbles(np.ones((4, 4)), [1], 0, every=0)


@pytest.fixture
def volume() -> np.ndarray:
    """Organ 1 on slices 2..8 (7 of them), organ 2 on slice 5 only, along axis 0."""
    labels = np.zeros((12, 48, 48), dtype=np.int16)
    labels[2:9, 4:24, 4:24] = 1
    labels[5, 30:44, 30:44] = 2
    return labels


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_label_scribbles_along_any_axis(volume: np.ndarray, axis: int) -> None:
    labels = np.moveaxis(volume, 0, axis)
    drawn = simulate_label_scribbles(labels, [1, 2, 3], 0, axis=axis)
    assert drawn.shape == labels.shape and drawn.dtype == labels.dtype
    for organ in (1, 2):
        assert (labels[drawn == organ] == organ).all()
        slices = np.flatnonzero(np.moveaxis(drawn == organ, axis, 0).any(axis=(1, 2)))
        assert slices.tolist() == ([2, 3, 4, 5, 6, 7, 8] if organ == 1 else [5])
    assert not (drawn == 3).any()


@pytest.mark.parametrize(("every", "expected"), [(2, [3, 5, 7]), (3, [2, 5, 8]), (100, [5])])
def test_every_nth_slice_with_the_middle_one(volume: np.ndarray, every: int, expected: list[int]) -> None:
    drawn = simulate_label_scribbles(volume, [1, 2], 0, every=every)
    assert np.flatnonzero((drawn == 1).any(axis=(1, 2))).tolist() == expected
    assert np.flatnonzero((drawn == 2).any(axis=(1, 2))).tolist() == [5]


def test_label_scribbles_on_a_slice(volume: np.ndarray) -> None:
    drawn = simulate_label_scribbles(volume[5], [2], np.random.default_rng(1))
    assert set(np.unique(drawn)) == {0, 2}
    assert (volume[5][drawn == 2] == 2).all()


def test_coverage_counts_only_the_right_label() -> None:
    labels = np.array([[1, 1, 1, 1, 2, 2, 0]])
    drawn = np.array([[1, 0, 2, 0, 2, 2, 1]])
    assert coverage(drawn, labels, [1, 2, 3]) == {1: 0.25, 2: 1.0, 3: 0.0}
