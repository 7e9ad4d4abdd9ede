"""Averages of predictions over a training, and the labels made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.data.pseudo_labels import PseudoLabels


def one_voxel(*probabilities: float) -> np.ndarray:
    return np.array(probabilities, dtype=np.float32).reshape(-1, 1, 1, 1)


def test_the_average_and_its_labels_by_hand(tmp_path: Path) -> None:
    store = PseudoLabels(tmp_path / "pseudo", share=0.2, confidence=0.8, ignore_label=2)
    assert store.add("a", one_voxel(0.3, 0.7)) == 0.0  # not sure
    assert store.labels("a", (1, 1, 1)).item() == 2
    assert store.add("a", one_voxel(0.0, 1.0)) == 0.0  # 0.2 * 1 + 0.8 * 0.7 = 0.76
    assert np.load(tmp_path / "pseudo/a.average.npy")[1].item() == pytest.approx(0.76, abs=1e-3)
    assert store.add("a", one_voxel(0.0, 1.0)) == 1.0  # 0.2 + 0.8 * 0.76 = 0.808
    assert store.labels("a", (1, 1, 1)).item() == 1


def test_a_case_of_which_nothing_is_known_is_ignored_everywhere(tmp_path: Path) -> None:
    store = PseudoLabels(tmp_path / "pseudo", 0.2, 0.8, ignore_label=7)
    blank = store.labels("a", (2, 3, 4))
    assert blank.shape == (2, 3, 4) and blank.dtype == np.int16 and (blank == 7).all()
    assert not store.folder.exists()


def test_averages_of_other_plans_are_begun_anew(tmp_path: Path) -> None:
    store = PseudoLabels(tmp_path / "pseudo", 0.2, 0.5, 2)
    store.add("a", np.ones((2, 1, 1, 2), dtype=np.float32))
    store.add("a", one_voxel(1.0, 0.0))
    assert store.labels("a", (1, 1, 1)).item() == 0
    assert (store.labels("a", (9, 9, 9)) == 2).all()


def test_files_are_replaced_whole_and_forgotten_together(tmp_path: Path) -> None:
    store = PseudoLabels(tmp_path / "pseudo", 0.2, 0.5, 2)
    store.add("a", one_voxel(1.0, 0.0))
    reading = store.labels("a", (1, 1, 1))
    store.add("a", one_voxel(0.0, 1.0))
    assert reading.item() == 0  # a worker that has it open reads on
    assert sorted(path.name for path in store.folder.iterdir()) == ["a.average.npy", "a.labels.npy"]
    store.clear()
    store.clear()
    assert not store.folder.exists()
