from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_multimodal.data.structures import SHARE, blob, find_cells, find_structure


def phantom(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A grey ellipse with two bright discs in noise."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    y, x = axes[-2:]
    image = np.where(y**2 + x**2 < 0.8, 1.0, 0.0)
    image[(y**2 + (x - 0.4) ** 2) < 0.04] = 2.0
    image[(y**2 + (x + 0.4) ** 2) < 0.06] = 3.0
    return image + np.random.default_rng(seed).normal(0, 0.05, shape)


@pytest.mark.parametrize("shape", [(64, 80), (200, 220), (6, 40, 44), (16, 16)])
def test_never_empty_and_never_the_whole_image(shape: tuple[int, ...]) -> None:
    image = phantom(shape)
    cells = find_cells(image, np.random.default_rng(0)) if image.ndim == 2 else None
    for seed in range(40):
        piece = find_structure(image, np.random.default_rng(seed), cells)
        assert piece.shape == shape and piece.dtype == bool
        assert 0 < piece.mean() <= SHARE[1]


@pytest.mark.parametrize(
    "image", [np.zeros((40, 40)), np.full((4, 24, 24), 7.0), np.random.default_rng(0).normal(size=(40, 40))]
)
def test_images_without_structures_have_blobs(image: np.ndarray) -> None:
    for seed in range(10):
        assert 0 < find_structure(image, np.random.default_rng(seed)).mean() < 1


@pytest.mark.parametrize("shape", [(2, 2), (1, 9), (1, 8, 8)])
def test_tiny_images(shape: tuple[int, ...]) -> None:
    piece = find_structure(np.random.default_rng(0).normal(size=shape), np.random.default_rng(1))
    assert piece.shape == shape and piece.any()


def test_one_state_of_the_generator_one_piece() -> None:
    image = phantom((64, 80))
    cells = find_cells(image, np.random.default_rng(3))
    assert np.array_equal(cells, find_cells(image, np.random.default_rng(3)))
    first, again = (find_structure(image, np.random.default_rng(5), cells) for _ in range(2))
    assert np.array_equal(first, again)
    pieces = {find_structure(image, np.random.default_rng(seed), cells).tobytes() for seed in range(20)}
    assert len(pieces) > 10


def test_pieces_follow_the_image() -> None:
    """Many of the pieces that lie in a disc of the phantom are that disc; blobs are not, nor are its parts."""
    image = phantom((80, 80))
    disc = image > 2.5
    cells = find_cells(image, np.random.default_rng(0))
    overlaps = []
    for seed in range(150):
        piece = find_structure(image, np.random.default_rng(seed), cells)
        if 2 * (piece & disc).sum() > piece.sum():
            overlaps.append(2 * (piece & disc).sum() / (piece.sum() + disc.sum()))
    assert len(overlaps) >= 10 and np.quantile(overlaps, 0.75) > 0.9


def test_cells_cover_the_image_and_hold_together() -> None:
    cells = find_cells(phantom((64, 80)), np.random.default_rng(1))
    assert cells.shape == (64, 80) and cells.min() == 0 and len(np.unique(cells)) == cells.max() + 1 > 2
    for number in np.unique(cells):
        assert ndimage.label(cells == number, np.ones((3, 3)))[1] == 1


def test_blobs_are_of_any_dimension() -> None:
    for shape in ((40, 50), (8, 40, 50)):
        assert 0 < blob(shape, np.random.default_rng(2)).mean() < 0.3
