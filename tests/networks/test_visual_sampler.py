"""Which points become tokens, and what is read there (methods.md 6, check 12); the position code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_multimodal.networks.position import sine_position
from nnunet_multimodal.networks.visual_sampler import VisualSampler, mean_feature, pick_points, sample_features

SIZES = [(6, 9), (3, 5, 4)]


def scribbles_of(size: tuple[int, ...], counts: list[list[int]], seed: int = 0) -> Tensor:
    """bool [B, K, ...] with so many scattered pixels for each entry and organ."""
    rng = np.random.default_rng(seed)
    pixels = int(np.prod(size))
    drawn = torch.zeros(len(counts), len(counts[0]), pixels, dtype=torch.bool)
    for entry, organ in np.ndindex(drawn.shape[:2]):
        drawn[entry, organ, rng.choice(pixels, counts[entry][organ], replace=False)] = True
    return drawn.view(len(counts), len(counts[0]), *size)


def index_of(coordinates: Tensor, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Array indices of points [T, ndim] given as x, y(, z) in [-1, 1] at pixel centres; not a hair beside them."""
    lengths = torch.tensor(size[::-1], dtype=torch.float64)
    place = (coordinates.double() + 1) / 2 * lengths - 0.5
    assert (place - place.round()).abs().max() < 1e-3
    return [tuple(point) for point in place.round().long().flip(-1).tolist()]


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
@pytest.mark.parametrize("random", [True, False])
def test_points_lie_in_the_scribble_without_duplicates_and_in_equal_number(size: tuple[int, ...], random: bool) -> None:
    counts = [[30, 2, 0], [8, 40, 1]]
    scribbles = scribbles_of(size, counts)
    coordinates, valid = pick_points(scribbles, 8, random)
    assert coordinates.shape == (2, 3, 8, len(size)) and coordinates.dtype == torch.float32
    assert valid.sum(-1).tolist() == [[min(8, n) for n in row] for row in counts]
    for entry, organ in np.ndindex(2, 3):
        points = index_of(coordinates[entry, organ][valid[entry, organ]], size) if valid[entry, organ].any() else []
        assert len(set(points)) == len(points)
        assert all(scribbles[(entry, organ, *point)] for point in points)


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
def test_more_points_wanted_than_pixels(size: tuple[int, ...]) -> None:
    pixels = int(np.prod(size))
    scribbles = torch.ones(1, 1, *size, dtype=torch.bool)
    coordinates, valid = pick_points(scribbles, pixels + 100, random=False)
    assert coordinates.shape[2] == pixels and valid.all()
    assert set(index_of(coordinates[0, 0], size)) == set(np.ndindex(*size))


def test_prediction_picks_the_same_points_each_time_and_training_does_not() -> None:
    scribbles = scribbles_of((32, 32), [[200]])
    torch.manual_seed(0)
    first, _ = pick_points(scribbles, 20, random=False)
    again, _ = pick_points(scribbles, 20, random=False)
    assert torch.equal(first, again)
    drawn = {tuple(map(tuple, pick_points(scribbles, 20, random=True)[0][0, 0].tolist())) for _ in range(4)}
    assert len(drawn) == 4


def test_prediction_picks_points_along_the_whole_scribble() -> None:
    """A line of 1000 pixels, 20 points: no gap much longer than even steps would leave (50)."""
    scribbles = torch.zeros(1, 1, 4, 1000, dtype=torch.bool)
    scribbles[..., 2, :] = True
    coordinates, _ = pick_points(scribbles, 20, random=False)
    columns = sorted(x for _, x in index_of(coordinates[0, 0], (4, 1000)))
    assert np.diff([0, *columns, 999]).max() <= 100


def test_training_draws_each_pixel_equally_often() -> None:
    scribbles = scribbles_of((4, 4), [[8]])
    torch.manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(800):
        coordinates, _ = pick_points(scribbles, 2, random=True)
        for point in index_of(coordinates[0, 0], (4, 4)):
            counts[point] += 1
    assert (counts[~scribbles[0, 0]] == 0).all()
    drawn = counts[scribbles[0, 0]]
    assert drawn.sum() == 1600
    assert (drawn - 200).abs().max() < 60  # five standard deviations


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
def test_at_pixel_centres_sampling_is_indexing(size: tuple[int, ...]) -> None:
    features = torch.rand(2, 5, *size, generator=torch.Generator().manual_seed(0))
    scribbles = scribbles_of(size, [[7, 7], [7, 7]])
    coordinates, valid = pick_points(scribbles, 7, random=False)
    sampled = sample_features(features, coordinates)
    assert sampled.shape == (2, 2, 7, 5) and valid.all()
    for entry, organ in np.ndindex(2, 2):
        for point, vector in zip(index_of(coordinates[entry, organ], size), sampled[entry, organ]):
            torch.testing.assert_close(vector, features[(entry, slice(None), *point)], atol=1e-6, rtol=0)


def test_coarser_features_are_read_at_the_same_place() -> None:
    """Features that are the pixel's own coordinate: the coarse map must answer with the fine pixel's coordinate."""
    fine, coarse = (16, 12), (8, 6)
    axes = [(torch.arange(n) + 0.5) / n for n in coarse]
    features = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    scribbles = torch.zeros(1, 1, *fine, dtype=torch.bool)
    scribbles[..., 3:13, 2:10] = True  # the border is clamped, inside interpolation is exact
    coordinates, _ = pick_points(scribbles, 80, random=False)
    expected = torch.tensor([[(y + 0.5) / 16, (x + 0.5) / 12] for y, x in index_of(coordinates[0, 0], fine)])
    torch.testing.assert_close(sample_features(features, coordinates)[0, 0], expected, atol=1e-6, rtol=0)


def test_tokens_are_the_projected_features_plus_the_indicator_and_zero_where_there_is_no_point() -> None:
    sampler = VisualSampler(4, 2)
    torch.nn.init.normal_(sampler.indicator)
    levels = [torch.randn(1, 4, 3, 3), torch.randn(1, 4, 6, 6)]
    coordinates, valid = pick_points(scribbles_of((6, 6), [[5, 0]]), 8, random=False)
    tokens = sampler(levels, coordinates, valid)
    for level in range(2):
        sampled = sample_features(levels[level], coordinates)
        expected = sampled @ sampler.projections[level].weight.T + sampler.indicator
        torch.testing.assert_close(tokens[level][valid], expected[valid])
        assert (tokens[level][~valid] == 0).all()
    assert valid.sum() == 5 and (~valid).sum() == 11


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
def test_mean_feature_is_the_mean_over_the_scribble_and_zero_without_one(size: tuple[int, ...]) -> None:
    features = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    scribbles = scribbles_of(size, [[9, 0], [1, 20]])
    mean = mean_feature(features, *pick_points(scribbles, 30, random=True))
    for entry, organ in np.ndindex(2, 2):
        drawn = scribbles[entry, organ]
        expected = features[entry][:, drawn].mean(1) if drawn.any() else torch.zeros(3)
        torch.testing.assert_close(mean[entry, organ], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("size", "width"), [((5, 3), 12), ((2, 3, 4), 16), ((4,), 6)])
def test_sine_position_equals_a_slow_loop(size: tuple[int, ...], width: int) -> None:
    code = sine_position(size, width)
    share = width // len(size) // 2 * 2
    assert code.shape == (int(np.prod(size)), width)
    for row, place in enumerate(np.ndindex(*size)):
        expected = [0.0] * width
        for axis, (at, length) in enumerate(zip(place, size)):
            for i in range(share // 2):
                angle = 2 * math.pi * (at + 0.5) / length / 10000 ** (2 * i / share)
                expected[axis * share + i] = math.sin(angle)
                expected[axis * share + share // 2 + i] = math.cos(angle)
        assert code[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert len({tuple(row) for row in code.tolist()}) == code.shape[0]  # every place has its own code
