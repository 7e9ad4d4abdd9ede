"""Repainting: regions get contrasts of their own, organs stay whole, and nothing else changes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnunet_multimodal.data.pairs import ReferringPair
from nnunet_multimodal.data.repaint import Repaint

SHAPES = [(48, 40), (8, 32, 24)]


def sample(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two organs of the same grey value as what is around them, and noise."""
    rng = np.random.default_rng(0)
    labels = torch.zeros(1, *shape, dtype=torch.int16)
    y, x = shape[-2:]
    labels[..., y // 5 : y // 2, x // 5 : 4 * x // 5] = 1
    labels[..., 3 * y // 5 : 4 * y // 5, x // 4 : 3 * x // 4] = 2
    return {"image": torch.from_numpy(rng.normal(0, 1, (1, *shape))).float(), "segmentation": labels}


@pytest.mark.parametrize("shape", SHAPES)
def test_organs_that_looked_alike_come_apart(shape: tuple[int, ...]) -> None:
    np.random.seed(1)
    given = sample(shape)
    labels = given["segmentation"][0]
    image = given["image"].clone()
    differences = []
    for _ in range(8):
        out = Repaint(1.0)(image=image.clone(), segmentation=given["segmentation"])
        painted = out["image"][0]
        assert painted.shape == shape and painted.dtype == torch.float32
        assert abs(float(painted.mean())) < 1e-4 and abs(float(painted.std()) - 1) < 1e-2
        differences.append(abs(float(painted[labels == 1].mean() - painted[labels == 2].mean())))
    assert abs(float(image[0][labels == 1].mean() - image[0][labels == 2].mean())) < 0.2
    assert max(differences) > 0.5
    assert torch.equal(out["segmentation"][0], labels)


def test_share_of_none_and_same_parameters_same_image() -> None:
    np.random.seed(2)
    given = sample((40, 40))
    untouched = Repaint(0.0)(image=given["image"].clone(), segmentation=given["segmentation"])["image"]
    assert torch.equal(untouched, given["image"])
    transform = pickle.loads(pickle.dumps(Repaint(1.0)))  # as workers get it
    drawn = transform.get_parameters(**given)
    first, second = (
        transform.apply({"image": given["image"].clone(), "segmentation": given["segmentation"]}, **drawn)["image"]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, given["image"])


def test_a_pair_repaints_the_target_only() -> None:
    np.random.seed(3)
    given = sample((40, 40))
    out = ReferringPair([1, 2], None, None, None, repaint=Repaint(1.0))(**given)["image"]
    assert torch.equal(out[1], given["image"][0])
    assert not torch.equal(out[0], given["image"][0])
