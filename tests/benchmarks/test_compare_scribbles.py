"""The comparison on real scribbles: who is trained on what, the data of full supervision, scores, table."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import compare_scribbles
import nibabel
import numpy as np
import pytest
from compare_scribbles import ScribbleWorkshop, make_dense, markdown, score, share, summarise
from comparisons_scribbles import SCRIBBLE_COMPARISONS, ScribbleComparison

from nnunet_multimodal import trainers
from nnunet_multimodal.registry import parse_trainer_name

CARDIAC = SCRIBBLE_COMPARISONS["cardiac_scribble"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScribbleWorkshop:
    """Five patients, three of them for training."""
    (tmp_path / "real/cardiac_scribble/images").mkdir(parents=True)
    for name in "abcde":
        (tmp_path / f"real/cardiac_scribble/images/{name}.nii.gz").touch()
    monkeypatch.setenv("NNUNET_MULTIMODAL_DATA", str(tmp_path / "real"))
    comparison = dataclasses.replace(CARDIAC, train_cases=(0, 3), test_cases=(3, 5), label_names={"heart": 1})
    return ScribbleWorkshop(comparison, tmp_path / "work", "cpu", 0)


def test_nobody_is_trained_on_and_tested(shop: ScribbleWorkshop) -> None:
    assert shop.subjects == (["a", "b", "c"], ["d", "e"]) and shop.organs == {"heart": 1}


def test_full_supervision_has_the_same_images_and_no_ignore_label(shop: ScribbleWorkshop) -> None:
    raw = shop.work / "nnUNet_raw/Dataset705_Scribbles"
    for folder, content in (("imagesTr", "image"), ("labelsTr", "scribble"), ("labelsTr_dense", "dense")):
        (raw / folder).mkdir(parents=True)
        (raw / folder / "a.nii.gz").write_text(content, encoding="utf-8")
    labels = {"background": 0, "heart": 1, "ignore": 2}
    (raw / "dataset.json").write_text(json.dumps({"labels": labels, "numTraining": 1}), encoding="utf-8")
    make_dense(shop)
    dense = shop.work / "nnUNet_raw/Dataset706_Dense"
    assert (dense / "labelsTr/a.nii.gz").read_text(encoding="utf-8") == "dense"
    assert (dense / "imagesTr/a.nii.gz").read_text(encoding="utf-8") == "image"
    content = json.loads((dense / "dataset.json").read_text(encoding="utf-8"))
    assert content["labels"] == {"background": 0, "heart": 1}


def save(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values, dtype=np.uint8).reshape(2, 4, 1)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 10, 1])), path)


def test_scores_and_table(shop: ScribbleWorkshop) -> None:
    name = "nnUNetTrainerPartialCE"
    save(shop.work / "truth/d.nii.gz", [1, 1, 1, 1, 0, 0, 0, 0])
    save(shop.work / "truth/e.nii.gz", [1, 1, 1, 1, 0, 0, 0, 0])
    predictions = shop.predictions(name, 0)
    save(
        predictions / "d.nii.gz", [1, 1, 0, 0, 0, 0, 0, 1]
    )  # Dice 4/7, of the largest component 2/3; distances 0 to 2 pixels, not 3 mm
    save(predictions / "e.nii.gz", [0] * 8)  # missed: Dice 0, no distance
    score(shop, name, 0, io.StringIO())
    rows = json.loads((shop.scores(name, 0) / "cases.json").read_text(encoding="utf-8"))
    assert [row["DSC"] for row in rows] == pytest.approx([4 / 7, 0.0])
    assert [row["DSC_largest"] for row in rows] == pytest.approx([2 / 3, 0.0])
    assert rows[0]["HD95_largest"] == pytest.approx(1.85) and rows[1]["HD95"] is None

    plans = {"configurations": {"2d": {"nnunet_multimodal": {"initial_lr": 3e-3}}}}
    path = shop.work / f"nnUNet_preprocessed/Dataset705_Scribbles/nnUNetPlans_{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(plans), encoding="utf-8")
    (predictions / "seconds.json").write_text("1.0", encoding="utf-8")
    shop.fold(name, 0).mkdir(parents=True)
    training = {
        "iterations": 600, "initial_lr": 3e-3, "seconds_per_iteration": 0.1, "parameters": 1, "device": "x",
        "threads": 1,
    }  # fmt: skip
    (shop.fold(name, 0) / "training.json").write_text(json.dumps(training), encoding="utf-8")
    summary = summarise(shop, [0, 1], [name, "nnUNetTrainerDMSPS"])
    assert list(summary) == [name] and list(summary[name]["seeds"]) == ["0"]
    assert summary[name]["seeds"]["0"]["DSC_largest"] == {"organs": {"heart": 0.3333}, "mean": 0.3333}
    table = markdown(shop.comparison, summary, shop.organs)
    assert "| nnUNetTrainerPartialCE | scribbles | 0.286 | 0.286 | - |" in table


def test_near_is_a_box_in_the_slice() -> None:
    truth = np.zeros((60, 50, 4), dtype=int)
    truth[5:20, 20:30, 1:3] = 1
    assert compare_scribbles.near(truth) == (slice(0, 30), slice(10, 40), slice(1, 3))


def test_share_of_full_supervision() -> None:
    entry: dict[str, Any] = {"seeds": {"0": {"DSC": {"mean": 0.8}}, "1": {"DSC": {"mean": 0.9}}}}
    assert share({"full": entry}, "full", [0.68, 0.68]) == "80.0 %"
    assert share({}, "full", [0.68]) == "-" and share({"full": entry}, "full", [None]) == "-"


def test_no_real_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NNUNET_MULTIMODAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="set NNUNET_MULTIMODAL_DATA"):
        compare_scribbles.real_images()


@pytest.mark.parametrize("comparison", SCRIBBLE_COMPARISONS.values(), ids=list(SCRIBBLE_COMPARISONS))
def test_comparisons_are_consistent(comparison: ScribbleComparison) -> None:
    first, last = comparison.test_cases
    assert last > first >= comparison.train_cases[1] and comparison.full in comparison.methods
    for method in comparison.methods.values():
        assert method.data in ("scribbles", "dense") and method.adamw
        if parse_trainer_name(method.trainer):
            known = getattr(trainers, method.trainer).settings_defaults
            assert set(method.settings) | set(comparison.train_options) <= set(known)


def test_tuning_keeps_to_the_training_patients() -> None:
    tuning = SCRIBBLE_COMPARISONS["cardiac_scribble_tuning"]
    assert tuning.test_cases[1] <= CARDIAC.train_cases[1]
