from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_multimodal.data.contrast import ReferenceContrast, TargetContrast
from nnunet_multimodal.data.open_set import MADE_UP, REAL, REPAINTED, BendingJitter, OpenSetPair
from nnunet_multimodal.errors import DataProblem

SHAPES = [(48, 56), (6, 32, 36)]


def sample(shape: tuple[int, ...] = SHAPES[0]) -> dict[str, torch.Tensor]:
    """Two organs of other brightness in a noisy body; the last columns were padded."""
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.int16)
    labels[..., 8:20, 8:20], labels[..., 24:31, 22:34] = 1, 2
    image = rng.normal(0, 0.2, shape) + labels + 1
    labels[..., -3:], image[..., -3:] = -1, 0
    return {
        "image": torch.from_numpy(image.astype(np.float32))[None],
        "segmentation": torch.from_numpy(labels)[None],
    }


def pair(**options: Any) -> OpenSetPair:
    return OpenSetPair([1, 2], TargetContrast(), ReferenceContrast(), BendingJitter(), **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"made_up": 1.0}, {"made_up": 0.0, "repainted": 1.0}, {"structures": 0.0}])
def test_scribbles_lie_in_what_they_ask_for(shape: tuple[int, ...], options: dict[str, float]) -> None:
    np.random.seed(0)
    for _ in range(8):
        made = pair(prompts=3, **options)(**sample(shape))
        image, numbers = made["image"], made["segmentation"]
        assert image.shape == (5, *shape) and image.dtype == torch.float32 and torch.isfinite(image).all()
        assert numbers.shape == (2, *shape)
        assert set(numbers.unique().tolist()) <= {0, 1, 2, 3} and 1 in numbers[0]
        for number, drawn in enumerate(image[2:], start=1):
            assert set(drawn.unique().tolist()) <= {0.0, 1.0}
            assert not (drawn.bool() & (numbers[1] != number)).any(), "drawn on the reference"
            assert drawn.any() == (numbers[1] == number).any()


def test_organs_alone_if_wanted() -> None:
    np.random.seed(1)
    for _ in range(5):
        things = pair(structures=0.0, made_up=0.0)(**sample())["segmentation"][0]
        labels = sample()["segmentation"][0]
        for number in things.unique()[1:]:
            inside = labels[things == number].unique().tolist()
            if number <= 2:  # the first are organs, in any order; then they are used up
                assert inside in ([1], [2])


def test_which_prompt_is_which_organ_is_drawn() -> None:
    np.random.seed(2)
    first = set()
    for _ in range(20):
        things = pair(structures=0.0, made_up=0.0)(**sample())["segmentation"][0]
        first.add(int(sample()["segmentation"][0][things == 1].unique()[0]))
    assert first == {1, 2}


def test_mask_prompts_show_all_of_it() -> None:
    np.random.seed(0)
    made = pair(mask_prompts=1.0)(**sample())
    for number, drawn in enumerate(made["image"][2:], start=1):
        assert torch.equal(drawn == 1, made["segmentation"][1] == number)
    share = [float((pair(mask_prompts=0.0)(**sample())["image"][2:] > 0).float().mean()) for _ in range(5)]
    assert max(share) < 0.1


def test_padding_stays_zero() -> None:
    np.random.seed(0)
    for options in ({}, {"made_up": 1.0}):
        image = pair(**options)(**sample())["image"]
        assert (image[0, :, -3:] == 0).all() and not (image[0, :, :-3] == 0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_numpys_seed_decides_everything(shape: tuple[int, ...]) -> None:
    """Torch's generator is the same in all of nnU-Net's workers."""
    transform = pickle.loads(pickle.dumps(pair()))
    made = []
    for torch_seed in range(2):
        np.random.seed(5)
        torch.manual_seed(torch_seed)
        made.append([transform(**sample(shape)) for _ in range(4)])
    for first, again in zip(*made):
        assert torch.equal(first["image"], again["image"]) and torch.equal(first["segmentation"], again["segmentation"])


def test_parameters_are_drawn_once_and_applied_as_often_as_one_likes() -> None:
    np.random.seed(0)
    transform = pair()
    drawn = transform.get_parameters(**sample())
    state = np.random.get_state()[1].tolist()
    first, again = transform.apply(sample(), **drawn), transform.apply(sample(), **drawn)
    assert np.random.get_state()[1].tolist() == state
    assert torch.equal(first["image"], again["image"])


def test_shares_of_the_kinds() -> None:
    np.random.seed(0)
    transform = pair(made_up=0.3, repainted=0.2)
    kinds = [transform.get_parameters(**sample())["kind"] for _ in range(600)]
    for kind, share in ((MADE_UP, 0.3), (REPAINTED, 0.2), (REAL, 0.5)):
        assert kinds.count(kind) / 600 == pytest.approx(share, abs=0.06)


def test_an_image_without_organs_is_asked_for_structures() -> None:
    np.random.seed(0)
    empty = sample()
    empty["segmentation"][:] = 0
    for _ in range(5):
        assert (
            pair(structures=0.0, made_up=0.0)(**{k: v.clone() for k, v in empty.items()})["segmentation"][0] > 0
        ).any()


def test_two_images_are_refused() -> None:
    twice = sample()
    twice["image"] = torch.cat([twice["image"]] * 2)
    with pytest.raises(DataProblem, match="one image channel, found 2"):
        pair()(**twice)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bend_moves_image_and_labels_alike(shape: tuple[int, ...]) -> None:
    np.random.seed(3)
    jitter = BendingJitter(rotation=0, translation=0, scaling=0, bend=0.05, p_bend=1)
    square = sample(shape)["segmentation"].clamp(min=0)
    moved = jitter(image=(square == 1).float(), segmentation=square)
    assert moved["segmentation"].dtype == square.dtype and not torch.equal(moved["segmentation"], square)
    agree = ((moved["image"] > 0.5) == (moved["segmentation"] == 1)).float().mean()
    assert agree > 0.98
    still = BendingJitter(rotation=0, translation=0, scaling=0, bend=0, p_bend=1)
    assert torch.equal(still(image=square.float(), segmentation=square)["segmentation"], square)
