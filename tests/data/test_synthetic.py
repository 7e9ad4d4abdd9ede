from __future__ import annotations

import numpy as np
import pytest

from nnunet_multimodal.data.synthetic import paint, random_regions


@pytest.mark.parametrize("shape", [(48, 64), (6, 32, 40)])
def test_a_body_of_regions(shape: tuple[int, ...]) -> None:
    regions = random_regions(shape, np.random.default_rng(0))
    assert regions.shape == shape and regions.min() == 0
    assert 0.2 < (regions > 0).mean() < 0.9 and len(np.unique(regions)) > 8
    assert np.array_equal(regions, random_regions(shape, np.random.default_rng(0)))
    assert not np.array_equal(regions, random_regions(shape, np.random.default_rng(1)))


def test_paintings_of_the_same_regions_show_them_in_other_contrasts() -> None:
    regions = random_regions((64, 80), np.random.default_rng(0))
    numbers = np.unique(regions[regions > 0])
    means, noise = [], []
    for seed in range(2):
        image = paint(regions, np.random.default_rng(seed))
        assert image.dtype == np.float32 and image.shape == regions.shape
        assert abs(image.mean()) < 1e-4 and image.std() == pytest.approx(1, abs=1e-3)
        means.append([image[regions == n].mean() for n in numbers])
        noise.append(np.mean([image[regions == n].std() for n in numbers]))
    assert np.std(means[0]) > noise[0] * 0.8  # regions differ more than what is in them
    assert abs(np.corrcoef(*means)[0, 1]) < 0.7


def test_painting_over_an_image_keeps_its_details() -> None:
    rng = np.random.default_rng(0)
    regions, image = random_regions((64, 80), rng), rng.normal(size=(64, 80))
    kept = [
        abs(np.corrcoef(paint(regions, np.random.default_rng(s), image).ravel(), image.ravel())[0, 1]) for s in range(8)
    ]
    assert min(kept) > 0.1 and max(kept) < 0.95
    flat = paint(np.zeros((8, 8), int), np.random.default_rng(0), np.zeros((8, 8)))
    assert np.isfinite(flat).all()
