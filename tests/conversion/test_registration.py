"""The body of an image, and how two of them lie on each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.conversion.images import Volume, read_volume
from nnunet_multimodal.conversion.registration import LOWEST_OVERLAP, body_overlap, main_body


def volume(data: np.ndarray) -> Volume:
    return Volume(Path("image.nii.gz"), data, np.eye(4), (1.0, 1.0, 1.0))


def patient(shift: int = 0, air: float = 0.0, tissue: float = 100.0, noise: float = 0.0) -> np.ndarray:
    """[Z, Y, X]: a body of 30 x 40 pixels with gas in it, a table below, noise in the air."""
    data = np.full((4, 60, 70), air)
    data[:, 10:40, 10 + shift : 50 + shift] = tissue
    data[:, 20:25, 20 + shift : 30 + shift] = air
    data[:, 50, 5:65] = tissue  # a table, one pixel thick
    return data + noise * np.abs(np.random.default_rng(shift).standard_normal(data.shape))


def test_body_with_its_gas_without_the_table() -> None:
    expected = np.zeros((4, 60, 70), dtype=bool)
    expected[:, 10:40, 10:50] = True
    for data in (patient(), patient(air=-1000, tissue=40), patient(noise=3)):
        body = main_body(data)
        assert (body ^ expected).sum() <= 4 * 4  # opening takes the four corners


@pytest.mark.parametrize("shift", [0, 4, 20])
def test_overlap_is_the_dice_of_the_bodies(shift: int) -> None:
    """CT and MR of one body of 40 columns that is moved by some."""
    overlap = body_overlap(volume(patient(air=-1000, tissue=40)), volume(patient(shift, noise=2)))
    assert overlap == pytest.approx((40 - shift) / 40, abs=0.01)


def test_nothing_to_be_seen() -> None:
    empty = volume(np.zeros((2, 5, 5)))
    assert body_overlap(empty, empty) == 0


def test_real_pairs(data_dir: Path) -> None:
    folder = data_dir / "brain_tumour_paired" / "images"
    first = read_volume(folder / "pat0003_Flair.nii.gz")
    assert body_overlap(first, read_volume(folder / "pat0003_T1c.nii.gz")) > 0.97
    moved = read_volume(folder / "pat0003_T1c.nii.gz")
    moved = volume(np.roll(moved.data, 10, axis=2))
    assert body_overlap(first, moved) < LOWEST_OVERLAP
