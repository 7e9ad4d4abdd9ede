"""The comparison on registered pairs: who is trained and tested, what is missing in a prediction, means, table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import compare
import compare_paired
import numpy as np
import pytest
from compare_paired import PairedWorkshop, markdown, rows_of, summarise
from comparisons_paired import PAIRED_COMPARISONS, PairedComparison

from nnunet_multimodal.registry import parse_trainer_name

TINY = PAIRED_COMPARISONS["phantom_tiny_paired"]
REAL = PAIRED_COMPARISONS["brain_tumour_paired"]
NAME = "nnUNetTrainerCmFNet"
FULL = TINY.full


@pytest.fixture
def shop(tmp_path: Path) -> PairedWorkshop:
    """Two phantoms to train on and one to test."""
    (tmp_path / "phantom").mkdir()
    description = {"labels": {"background": 0, "liver": 1}, "subjects": ["a", "b", "c"]}
    (tmp_path / "phantom/phantom.json").write_text(json.dumps(description), encoding="utf-8")
    for kind in ("images", "labels"):
        for contrast in ("CT", "T2w"):
            folder = tmp_path / f"phantom/{kind}/{contrast}"
            folder.mkdir(parents=True)
            for subject in "abc":
                (folder / f"{subject}.nii.gz").write_text(f"{kind} {contrast} {subject}", encoding="utf-8")
    return PairedWorkshop(TINY, tmp_path, "cpu", 0)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairedWorkshop:
    """Four patients of a real data set, without images."""
    folder = tmp_path / "data/brain_tumour_paired/labels"
    folder.mkdir(parents=True)
    for patient in ("p4", "p1", "p3", "p2"):
        (folder / f"{patient}.nii.gz").touch()
    monkeypatch.setenv("NNUNET_MULTIMODAL_DATA", str(tmp_path / "data"))
    return PairedWorkshop(REAL, tmp_path / "work", "cpu", 0)


@pytest.mark.parametrize("comparison", PAIRED_COMPARISONS.values())
def test_every_method_is_one_that_is_there(comparison: PairedComparison) -> None:
    for method in comparison.methods.values():
        assert (
            method.trainer in ("nnUNetTrainer", "nnUNetTrainerNoMirroring")
            or parse_trainer_name(method.trainer) is not None
        )
        assert method.data in ("scribbles", "dense")
    assert comparison.full in comparison.methods and set(comparison.missing) <= set(comparison.methods)
    assert compare.KINDS[type(comparison)] == (compare_paired, PairedWorkshop)


def test_a_phantom_is_trained_whole_and_tested_on_others(shop: PairedWorkshop) -> None:
    assert shop.subjects == (["a", "b"], ["c"])
    assert shop.tested(0) == shop.tested(3) == ["c"] and shop.fold_of(3) == "all"
    assert shop.fold(NAME, 0).name == "fold_all"


def test_each_real_patient_is_left_out_once(real: PairedWorkshop) -> None:
    assert [real.tested(seed) for seed in range(4)] == [["p1"], ["p2"], ["p3"], ["p4"]]
    assert real.fold(NAME, 2).name == "fold_2"
    folder = real.work / "nnUNet_preprocessed/Dataset705_Scribbles"
    folder.mkdir(parents=True)
    compare_paired.leave_one_out(real, "scribbles")
    splits = json.loads((folder / "splits_final.json").read_text(encoding="utf-8"))
    assert [split["val"] for split in splits] == [["p1"], ["p2"], ["p3"], ["p4"]]
    assert splits[1]["train"] == ["p1", "p3", "p4"]


def test_images_for_training_and_test(shop: PairedWorkshop, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(compare_paired, "call", lambda *words, **_: called.append([str(word) for word in words]))
    for name in ("make_phantom", "make_dense", "plan_and_preprocess", "unmask"):
        monkeypatch.setattr(compare_paired, name, lambda *_: None)
    compare_paired.prepare(shop, [], None)
    text = {path.relative_to(shop.work).as_posix(): path.read_text() for path in shop.work.glob("inputs/*/*")}
    assert text == {"inputs/c/c_0000.nii.gz": "images CT c", "inputs/c/c_0001.nii.gz": "images T2w c"}
    assert sorted(path.name for path in (shop.work / "train/MR").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert (shop.work / "train/MR/a.nii.gz").read_text() == "images T2w a"
    assert (shop.work / "pairs/labels/c.nii.gz").exists() and not (shop.work / "train/labels/c.nii.gz").exists()
    (simulate,) = called
    assert simulate[:3] == ["nnunet_multimodal", "scribbles", "simulate"]
    assert simulate[simulate.index("--images") + 1 :][:2] == [f"CT={shop.work}/train/CT", f"MR={shop.work}/train/MR"]


def test_masks_of_normalisation_are_taken_back(shop: PairedWorkshop, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(compare_paired, "call", lambda *words, **_: called.append([str(word) for word in words]))
    path = shop.work / "nnUNet_preprocessed/Dataset705_Scribbles/nnUNetPlans.json"
    path.parent.mkdir(parents=True)
    for masks in ([True, False], [False, False]):
        path.write_text(json.dumps({"configurations": {"2d": {"use_mask_for_norm": masks}}}), encoding="utf-8")
        compare_paired.unmask(shop, "scribbles")
        plans = json.loads(path.read_text(encoding="utf-8"))
        assert plans["configurations"]["2d"]["use_mask_for_norm"] == [False, False]
    assert called == [["nnUNetv2_preprocess", "-d", "705", "-c", "2d", "-np", "2"]]  # once: where there was one


def test_what_is_missing_is_a_row_of_its_own() -> None:
    assert rows_of(TINY, NAME) == [(None, NAME), ("CT", f"{NAME}_without_CT"), ("MR", f"{NAME}_without_MR")]
    assert rows_of(TINY, FULL) == [(None, FULL)]


def test_means_and_table(shop: PairedWorkshop) -> None:
    two = dataclasses.replace(TINY, label_names={"liver": 1, "spleen": 2})
    shop = dataclasses.replace(shop, comparison=two)
    training = {
        "iterations": 4, "initial_lr": 0.003, "optimizer": "AdamW", "seconds_per_iteration": 0.1,
        "parameters": 2_500_000, "device": "2 CPU cores, x86_64", "threads": 1,
    }  # fmt: skip

    def finished(name: str, row: str, dice: list[float], asd: list[Any]) -> None:
        fold = shop.fold(name, 0)
        fold.mkdir(parents=True, exist_ok=True)
        (fold / "training.json").write_text(json.dumps(training), encoding="utf-8")
        plans = shop.work / f"nnUNet_preprocessed/{fold.parents[1].name}/nnUNetPlans_{name}.json"
        plans.parent.mkdir(parents=True, exist_ok=True)
        content = {"configurations": {"2d": {"nnunet_multimodal": {"ramp_up": 0.5}}}}
        plans.write_text(json.dumps(content), encoding="utf-8")
        for folder in (shop.scores(row, 0), shop.predictions(row, 0)):
            folder.mkdir(parents=True)
        rows = [
            {"case": "c", "organ": organ, "DSC": d, "ASD": a, "DSC_largest": d / 2, "ASD_largest": a and a / 2}
            for organ, d, a in zip(("liver", "spleen"), dice, asd)
        ]
        (shop.scores(row, 0) / "cases.json").write_text(json.dumps(rows), encoding="utf-8")
        (shop.predictions(row, 0) / "seconds.json").write_text("3.5", encoding="utf-8")

    finished(FULL, FULL, [0.8, 0.8], [1.0, 3.0])
    finished(NAME, NAME, [0.9, 0.5], [2.0, None])
    finished(NAME, f"{NAME}_without_MR", [0.4, 0.0], [None, None])
    summary = summarise(shop, [0, 1], list(two.methods))
    assert list(summary) == [FULL, NAME, f"{NAME}_without_MR"]
    assert summary[NAME]["seeds"]["0"]["DSC"] == {"organs": {"liver": 0.9, "spleen": 0.5}, "mean": 0.7}
    assert summary[f"{NAME}_without_MR"]["missing"] == "MR"
    lines = markdown(two, summary, shop.organs).splitlines()
    assert lines[0] == "| DSC | trained on | liver | spleen | mean | of full supervision |"
    assert f"| {NAME} | scribbles | 0.900 | 0.500 | 0.700 | 87.5 % |" in lines
    assert f"| {NAME} | scribbles | 2.000 | - | 2.000 |" in lines
    assert f"| {NAME} | scribbles | 0.450 | 0.250 | 0.350 | 87.5 % |" in lines  # of the largest component
    assert f"| {NAME} | scribbles | 1.000 | - | 1.000 |" in lines
    assert sum(line.startswith(f"| {NAME}_without_MR") for line in lines) == 4  # it has no training of its own


def test_one_piece_of_each_label() -> None:
    found = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [2, 0, 2, 2]])[..., None]
    kept = compare_paired.largest_components(found)
    assert kept[..., 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 2]]
