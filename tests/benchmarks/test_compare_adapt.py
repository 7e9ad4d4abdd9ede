"""The comparison of adapting: who is trained on what, folds by number of cases, means, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare
import compare_adapt
import nibabel as nib
import numpy as np
import pytest
from compare_adapt import BASE, AdaptWorkshop, markdown, row_and_count, same_as, splits, summarise
from comparisons_adapt import ADAPT_COMPARISONS, AdaptComparison

from nnunet_multimodal.cli import main
from nnunet_multimodal.registry import parse_trainer_name

TINY, REAL = ADAPT_COMPARISONS["phantom_tiny_adapt"], ADAPT_COMPARISONS["abdomen_adapt"]


@pytest.fixture
def shop(tmp_path: Path) -> AdaptWorkshop:
    """Four phantoms to train on and one to test."""
    (tmp_path / "phantom").mkdir()
    description = {"labels": {"background": 0, "liver": 1}, "subjects": list("abcde")}
    (tmp_path / "phantom/phantom.json").write_text(json.dumps(description), encoding="utf-8")
    return AdaptWorkshop(TINY, tmp_path, "cpu", 0)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdaptWorkshop:
    """Two CT and fourteen MR, of which only the labels are files."""
    for folder, count in (("abdomen_ct", 2), ("abdomen_mr_t2", 14)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / folder / kind).mkdir(parents=True)
            for number in range(count):
                path = tmp_path / "data" / folder / kind / f"{folder}_{number:02}.nii.gz"
                nib.save(nib.Nifti1Image(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.eye(4)), path)
    monkeypatch.setenv("NNUNET_MULTIMODAL_DATA", str(tmp_path / "data"))
    return AdaptWorkshop(REAL, tmp_path / "work", "cpu", 0)


@pytest.mark.parametrize("comparison", ADAPT_COMPARISONS.values())
def test_every_row_is_a_trainer_that_is_there_and_options_that_adapt_takes(
    comparison: AdaptComparison, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.KINDS[type(comparison)] == (compare_adapt, AdaptWorkshop)
    assert all(parse_trainer_name(method.trainer) is not None for method in comparison.methods.values())
    assert main(["adapt", "--help"]) == 0
    known = capsys.readouterr().out
    assert set(comparison.adapt) <= set(comparison.rows)
    for options in comparison.adapt.values():
        assert all(word in known for word in options if word.startswith("--"))
    names = [f"{row}-{'all' if count is None else count}" for row in comparison.rows for count in comparison.counts]
    assert list(comparison.methods) == [BASE, *names]
    assert all(row_and_count(name)[0] in comparison.rows for name in names)


def test_nobody_is_trained_on_twice_or_tested_after_training(shop: AdaptWorkshop) -> None:
    assert shop.parts == (["a", "b"], ["c", "d"], [("e", "CT"), ("e", "T2w")])
    assert splits(shop) == [{"train": ["c", "d"], "val": ["c"]}, {"train": ["c"], "val": ["c"]}]
    folders = [shop.fold(name, 3) for name in ("LoRA_r8-all", "LoRA_r8-1")]
    assert [folder.name for folder in folders] == ["fold_0", "fold_1"]
    assert folders[0].parent == folders[1].parent
    assert folders[0].parents[1:3] == (shop.work / "results/seed_3/Dataset708_Adapt", shop.work / "results/seed_3")
    assert shop.fold(BASE, 3) == shop.work / (
        "results/seed_0/Dataset707_Base/nnUNetTrainerMRSegmentator__nnUNetPlans_base__2d/fold_all"
    )


def test_real_images_have_common_labels(real: AdaptWorkshop) -> None:
    base, new, tested = real.parts
    assert base == ["abdomen_ct_00"] and len(new) == 10
    assert tested == [
        ("abdomen_ct_01", "abdomen_ct"),
        *((f"abdomen_mr_t2_{number}", "abdomen_mr_t2") for number in (10, 11, 12, 13)),
    ]
    assert real.organs == {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    for case, folder, expected in (
        ("abdomen_ct_00", "abdomen_ct", [0, 4, 2, 3, 0, 1, 0, 0]),  # ids 1 spleen 2, 3 kidneys 5 liver
        ("abdomen_mr_t2_10", "abdomen_mr_t2", [0, 1, 2, 3, 4, 0, 0, 0]),
    ):
        target = real.work / f"{case}.nii.gz"
        compare_adapt.put(real, "labels", case, folder, target)
        assert np.asarray(nib.load(target).dataobj).ravel().tolist() == expected


def finish(shop: AdaptWorkshop, name: str, ct: float, mr: float, labels: int, adapter: int | None = None) -> None:
    """The files that a finished method leaves."""
    cases = [
        {"modality": contrast, "organs": {"liver": {"dsc": value, "nsd": value / 2}}}
        for contrast, value in (("CT", ct), ("T2w", mr))
    ]
    scores, predictions, fold = shop.scores(name, 0), shop.predictions(name, 0), shop.fold(name, 0)
    for folder in (scores, predictions / "e", fold):
        folder.mkdir(parents=True, exist_ok=True)
    (scores / "evaluation.json").write_text(json.dumps({"cases": cases}), encoding="utf-8")
    training: dict[str, Any] = {
        "parameters": 1000, "trainable_parameters": 30, "iterations": 2, "seconds_per_iteration": 0.5,
        "device": "a CPU", "threads": 1, "initial_lr": 0.1,
    }  # fmt: skip
    (fold / "training.json").write_text(json.dumps(training), encoding="utf-8")
    section = {"rank": 8, "starting_model": "/somewhere"}
    plans = json.dumps({"configurations": {"2d": {"nnunet_multimodal": section}}})
    (fold.parent / "plans.json").write_text(plans, encoding="utf-8")
    preprocessed = shop.work / "nnUNet_preprocessed/Dataset707_Base"
    preprocessed.mkdir(parents=True, exist_ok=True)
    (preprocessed / "nnUNetPlans_base.json").write_text(plans, encoding="utf-8")
    (predictions / "seconds.json").write_text("3", encoding="utf-8")
    array = np.zeros((2, 2, 2), np.uint8)
    array.ravel()[:labels] = 1
    nib.save(nib.Nifti1Image(array, np.eye(4)), predictions / "e/CT.nii.gz")
    if adapter is not None:
        (predictions / "adapter.pt").write_bytes(b"." * adapter)


def test_the_table(shop: AdaptWorkshop) -> None:
    finish(shop, BASE, 0.9, 0.2, 2)
    finish(shop, "LoRA_r8-all", 0.5, 0.8, 4, adapter=120_000)
    finish(shop, "LoRA_r8-1", 0.6, 0.7, 3)
    assert same_as(shop, shop.predictions("LoRA_r8-all", 0), shop.predictions(BASE, 0)) == 0.75
    summary = summarise(shop, [0], list(TINY.methods))
    assert list(summary) == [BASE, "LoRA_r8-all", "LoRA_r8-1"]
    assert summary["LoRA_r8-1"]["settings"] == {"rank": 8}, "no path of this machine"
    table = markdown(shop, summary).splitlines()
    assert table[0] == "| DSC | T2w, 2 cases | T2w, 1 cases | CT, 2 cases | CT, 1 cases |"
    assert table[2] == "| base | 0.200 | 0.200 | 0.900 | 0.900 |"
    assert "| LoRA_r8 | 0.800 | 0.700 | 0.500 | 0.600 |" in table
    assert "| LoRA_r8 | 0.400 | 0.350 | 0.250 | 0.300 |" in table
    assert not any("MoA_r8" in line for line in table), "a row of which nothing is there is left out"
    assert "| base | 0.000 M | 0.0 % | - | 100.000 % | 2 | 0.500 |" in table
    assert "| LoRA_r8 | 0.000 M | 3.0 % | 0.12 MB | 75.000 % | 2 | 0.500 |" in table
