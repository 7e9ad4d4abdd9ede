"""Shifts of an image: each against numbers computed by hand, the same for the same seed and case."""

from __future__ import annotations

import doctest
import pickle

import numpy as np
import pytest

from nnunet_multimodal.data import shifts
from nnunet_multimodal.data.shifts import (
    SHIFTS,
    Change,
    add_ghosts,
    add_noise,
    change_gamma,
    coil_field,
    multiply,
    parse_shifts,
    phase_axis,
    slice_axis,
    thicken,
)
from nnunet_multimodal.errors import UsageError

SPACING = (6.0, 1.5, 1.5)


def volume(seed: int = 0, channels: int = 1) -> np.ndarray:
    """[C, 6, 10, 12]; a bright block on a dark ground."""
    image = np.random.default_rng(seed).normal(20, 3, (channels, 6, 10, 12)).astype(np.float32)
    image[:, 1:5, 3:8, 4:9] += 100
    return image


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(shifts).failed == 0


def test_gamma_keeps_the_range_of_hounsfield_units() -> None:
    image = np.array([[[-1000.0, -200.0, 600.0]]])
    assert change_gamma(image, 2.0) == pytest.approx(np.array([[[-1000.0, -600.0, 600.0]]]))
    assert change_gamma(image, 0.5) == pytest.approx(np.array([[[-1000.0, -1000 + 1600 * 0.5**0.5, 600.0]]]))
    assert change_gamma(np.full((1, 1, 3), 7.0), 2.0).tolist() == [[[7.0, 7.0, 7.0]]]


def test_noise_is_a_share_of_the_foregrounds_deviation() -> None:
    image = np.array([0.0, 0.0, 0.0, 10.0, 10.0, 16.0])  # mean 6; above it 10, 10, 16: deviation sqrt(8)
    assert add_noise(image, 0.25, np.ones(6)) - image == pytest.approx(np.full(6, 0.25 * 8**0.5))
    assert add_noise(np.full(3, 5.0), 1.0, np.ones(3)).tolist() == [5.0, 5.0, 5.0], "nothing stands out: no deviation"


def test_noise_is_as_strong_as_it_says() -> None:
    image = volume()
    found = Change("noise", 0.5, 0, (0,))(image, SPACING, "case") - image
    deviation = image[image > image.mean()].std()
    assert found.std() == pytest.approx(0.5 * deviation, rel=0.1) and abs(found.mean()) < 0.1 * deviation


def test_the_coil_field_spans_the_ratio_and_leaves_air_alone() -> None:
    quadratic = np.zeros((4, 4, 4))
    quadratic[2, 0, 0] = -1  # 1 - z^2: bright in the middle
    quadratic[0, 0, 0] = 5
    field = coil_field((5, 1, 2), quadratic, 9.0)
    expected = [9 ** (share - 0.5) for share in (0, 0.75, 1, 0.75, 0)]
    assert field[:, 0, 0] == pytest.approx(expected) and field[:, 0, 1] == pytest.approx(expected)
    image = np.array([-1000.0, 0.0, 200.0])
    assert multiply(image, np.array([3.0, 3.0, 0.5])).tolist() == [-1000.0, 2000.0, -400.0]
    assert (coil_field((1, 1, 1), quadratic, 9.0) == 1).all()


def test_the_coil_field_spans_the_ratio_inside_the_body() -> None:
    linear = np.zeros((4, 4, 4))
    linear[0, 0, 1] = 1
    body = np.array([[[False, True, True, True, False]]])
    assert coil_field((1, 1, 5), linear, 4.0, body)[0, 0] == pytest.approx([0.5, 0.5, 1, 2, 2])
    assert (coil_field((1, 1, 5), linear, 4.0, np.zeros((1, 1, 5), bool)) == 1).all()
    flat = np.where(volume() > 60, 100.0, 1.0).astype(np.float32)
    flat[0, 0, 0, 0] = 0  # the minimum, from which the signal is counted
    body = flat[0] > flat.mean()
    found = Change("bias", 9.0, 0, (0,))(flat, SPACING, "case")[0][body]
    assert found.max() / found.min() == pytest.approx(9, rel=1e-4)


def test_thick_slices_of_a_width_that_does_not_divide() -> None:
    """1.5 voxels: slices over [0, 1.5), [1.5, 3), [3, 4), middles at 0.25, 1.75, 3.25."""
    image = np.array([3.0, 6.0, 9.0, 12.0])
    first, second, third = (3 + 0.5 * 6) / 1.5, (0.5 * 6 + 9) / 1.5, 12.0
    expected = [first, first + (second - first) * 0.5, second + (third - second) * 0.25 / 1.5]
    assert thicken(image, 1.5, 0)[:3] == pytest.approx(expected)
    assert thicken(image, 1.5, 0)[3] == pytest.approx(second + (third - second) * 1.25 / 1.5)
    assert thicken(image, 1.0, 0) == pytest.approx(image)
    assert thicken(np.full((5, 2), 4.0), 2.3, 0) == pytest.approx(np.full((5, 2), 4.0)), "a constant stays"
    assert thicken(image, 9.0, 0) == pytest.approx(np.full(4, 7.5)), "one slice: the mean"


def test_ghosts_are_shifted_copies() -> None:
    line = np.random.default_rng(0).normal(size=16)
    copies = sum(np.roll(line, 4 * step) for step in range(4))
    assert add_ghosts(line, 0.1, 0) == pytest.approx(line - 0.1 * copies + 0.4 * line.mean())
    image = np.stack([line, 2 * line])
    assert add_ghosts(image, 0.1, 1)[1] == pytest.approx(2 * add_ghosts(line, 0.1, 0))
    assert add_ghosts(line, 0.25, 0).mean() == pytest.approx(line.mean())


def test_axes() -> None:
    assert slice_axis((9, 9, 9), (6, 1, 1)) == 0 and phase_axis((9, 9, 9), (6, 1, 1)) == 1
    assert slice_axis((9, 9, 9), (1, 1, 6)) == 2 and phase_axis((9, 9, 9), (1, 1, 6)) == 0
    assert slice_axis((9, 9, 9), (1, 1, 1.0001)) == 0, "what differs by less than a micrometre is the same"
    assert slice_axis((1, 9, 9), (999, 1, 1)) == 1 and phase_axis((1, 9, 9), (999, 1, 1)) == 1, "a picture"


# --- levels ----------------------------------------------------------------------------------------------------------


def test_levels_go_from_nothing_to_the_strongest() -> None:
    assert [SHIFTS["noise"].severity(level, 5) for level in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [SHIFTS["bias"].severity(level, 2) for level in range(3)] == pytest.approx([1, 3, 9])
    assert [SHIFTS["resolution"].severity(level, 4) for level in range(5)] == pytest.approx([1, 2, 3, 4, 5])
    assert SHIFTS["gamma"].severity(1, 2) == pytest.approx(2.5**0.5)


@pytest.mark.parametrize("name", SHIFTS)
def test_level_0_changes_nothing_and_more_is_more(name: str) -> None:
    image, shift = volume(), SHIFTS[name]
    changes = [
        Change(name, shift.severity(level, 5), 3, (0,))(image, SPACING, "case") - image.astype(np.float32)
        for level in range(6)
    ]
    sizes = [float(np.abs(change).mean()) for change in changes]
    assert sizes[0] < 1e-4 and sizes[1] > 0.1
    if name == "resolution":  # how thick slices fall on a block of four is chance
        assert sizes[1] < min(sizes[2:])
    else:
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", SHIFTS)
def test_same_seed_and_case_same_image(name: str) -> None:
    image = volume()
    before = image.copy()
    change = Change(name, SHIFTS[name].severity(3, 5), 1, (0,))
    first = change(image, SPACING, "case")
    np.random.seed(5)
    assert np.array_equal(pickle.loads(pickle.dumps(change))(image, SPACING, "case"), first)
    assert np.array_equal(image, before) and first.dtype == np.float32 and first.shape == image.shape
    if name in ("noise", "bias"):
        assert not np.array_equal(change(image, SPACING, "other"), first)
        assert not np.array_equal(Change(name, change.severity, 2, (0,))(image, SPACING, "case"), first)


def test_what_is_drawn_is_the_same_at_every_level() -> None:
    image = volume()
    noise = [Change("noise", share, 0, (0,))(image, SPACING, "a").astype(float) - image for share in (0.2, 0.8)]
    assert noise[1] == pytest.approx(4 * noise[0], abs=1e-3)
    logs = [np.log(multiply_field("a", ratio)) for ratio in (2.0, 8.0)]
    assert logs[1] == pytest.approx(3 * logs[0], abs=1e-3)


def multiply_field(case: str, ratio: float) -> np.ndarray:
    """The field that a case gets, read from two flat parts of an image above its minimum."""
    image = np.full((1, 4, 5, 6), 100.0, np.float32)
    image[0, 0, 0, 0] = 0
    found = Change("bias", ratio, 0, (0,))(image, SPACING, case)
    return found[0].ravel()[1:] / 100


def test_gamma_goes_both_ways_and_stays_on_its_side() -> None:
    image = volume()
    means = {
        case: [Change("gamma", gamma, 0, (0,))(image, SPACING, case).mean() - image.mean() for gamma in (1.2, 2.5)]
        for case in map(str, range(12))
    }
    assert {np.sign(first) for first, _ in means.values()} == {-1, 1}
    assert all(np.sign(first) == np.sign(second) for first, second in means.values())


@pytest.mark.parametrize("name", SHIFTS)
def test_channels_of_one_scan_are_shifted_alike_and_prompts_not_at_all(name: str) -> None:
    image = np.concatenate([volume(), 3 * volume(), (volume() > 60).astype(np.float32)])
    found = Change(name, SHIFTS[name].severity(4, 5), 0, (0, 1))(image, SPACING, "case")
    assert np.array_equal(found[2], image[2]) and not np.array_equal(found[0], image[0])
    if name == "noise":
        noise = [(found[channel] - image[channel]).ravel() for channel in (0, 1)]
        assert abs(np.corrcoef(*noise)[0, 1]) < 0.2, "noise is each channel's own"
    else:
        assert found[1] == pytest.approx(3 * found[0], rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("name", SHIFTS)
def test_pictures_and_odd_images(name: str) -> None:
    """One slice, one voxel, constant, with a NaN: no error, and the same shape."""
    change = Change(name, SHIFTS[name].strongest, 0, (0,))
    for image in (volume()[:, :1], np.ones((1, 1, 1, 1)), np.zeros((1, 4, 4, 4)), np.full((1, 2, 3, 4), np.nan)):
        found = change(image, (999.0, 1.0, 1.0), "case")
        assert found.shape == image.shape
        assert np.isfinite(found).all() or np.isnan(image).any()


# --- names -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert parse_shifts("gamma, Noise,gamma") == ["gamma", "noise"]
    assert parse_shifts("all") == [*SHIFTS] == ["gamma", "noise", "bias", "resolution", "ghosting"]
    with pytest.raises(UsageError, match=r"no shift is called 'gama'\. Did you mean gamma"):
        parse_shifts("noise,gama")
    with pytest.raises(UsageError, match=r"'xyz'\. There are: gamma, noise"):
        parse_shifts("xyz")
    with pytest.raises(UsageError, match="names none"):
        parse_shifts(" ,")
