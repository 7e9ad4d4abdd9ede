"""The comparison on unpaired modalities: who is trained on what, what is told, means, table; and all of it, tiny."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import compare_mixed
import pytest
from compare_mixed import INFERRED, RIGHT, WRONG, markdown, recognised, rows_of, summarise, told_modality
from compare_runner import DATASETS, Workshop
from comparisons_mixed import MIXED_COMPARISONS, MixedComparison

from nnunet_multimodal.registry import parse_trainer_name

TINY = MIXED_COMPARISONS["phantom_tiny_mixed"]
NAME = "nnUNetTrainerMulModSeg"
CONTRASTS = ("CT", "T1w", "T2w")


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """A phantom of seven subjects: an odd number of MR subjects shows whether the contrasts take turns."""
    (tmp_path / "phantom").mkdir()
    description = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "subjects": list("abcdefg")}
    (tmp_path / "phantom/phantom.json").write_text(json.dumps(description), encoding="utf-8")
    return Workshop(dataclasses.replace(TINY, subjects_each=3), tmp_path, "cpu", 0)


def put_images(shop: Workshop) -> None:
    for kind in ("images", "labels"):
        for contrast in CONTRASTS:
            folder = shop.work / f"phantom/{kind}/{contrast}"
            folder.mkdir(parents=True)
            for subject in "abcdefg":
                (folder / f"{subject}.nii.gz").write_text(f"{kind} {contrast} {subject}", encoding="utf-8")


def test_each_training_subject_is_seen_in_one_contrast_and_none_is_tested(shop: Workshop) -> None:
    images = compare_mixed.training_images(shop)
    assert images == {
        "CT": [("CT", "a"), ("CT", "b"), ("CT", "c")],
        "MR": [("T1w", "d"), ("T2w", "e"), ("T1w", "f")],
    }
    assert shop.subjects[1] == ["g"]


def test_data_for_training_test_and_what_is_told(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(shop)
    called: list[list[str]] = []
    monkeypatch.setattr(compare_mixed, "call", lambda *words, **_: called.append([str(word) for word in words]))
    monkeypatch.setattr(compare_mixed, "make_phantom", lambda *_: None)
    monkeypatch.setattr(compare_mixed, "plan_and_preprocess", lambda *_: None)
    compare_mixed.prepare(shop, [], None)
    found = {
        path.relative_to(shop.work / "train").as_posix(): path.read_text(encoding="utf-8")
        for path in (shop.work / "train").rglob("*.nii.gz")
    }
    assert len(found) == 12
    assert found["MR/images/e.nii.gz"] == "images T2w e" and found["MR/labels/e.nii.gz"] == "labels T2w e"
    assert sorted(path.name for path in (shop.work / "inputs").iterdir()) == [
        "g__CT_0000.nii.gz",
        "g__T1w_0000.nii.gz",
        "g__T2w_0000.nii.gz",
    ]
    assert (shop.work / "truth/g/T1w.nii.gz").read_text(encoding="utf-8") == "labels T1w g"
    right, wrong = (json.loads((shop.work / f"inputs{way}.json").read_text(encoding="utf-8")) for way in (RIGHT, WRONG))
    assert right == {"g__CT": "CT", "g__T1w": "MR", "g__T2w": "MR"}
    assert wrong == {"g__CT": "MR", "g__T1w": "CT", "g__T2w": "CT"}
    (command,) = called
    assert command[:3] == ["nnunet_multimodal", "convert", "mixed"]
    assert f"MR={shop.work}/train/MR/labels" in command and "spleen=2" in command


def test_a_missing_image_of_the_phantom_is_named(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(shop)
    monkeypatch.setattr(compare_mixed, "make_phantom", lambda *_: None)
    (shop.work / "phantom/labels/T2w/e.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"no labels/T2w/e\.nii\.gz"):
        compare_mixed.prepare(shop, [], None)


def test_a_wrong_modality_is_told_in_turn() -> None:
    three = dataclasses.replace(TINY, modalities={"CT": ("CT",), "MR": ("T1w", "T2w"), "PET": ("PET",)})
    assert [told_modality(three, contrast, WRONG) for contrast in ("CT", "T2w", "PET")] == ["MR", "PET", "CT"]


def test_only_informed_methods_are_told() -> None:
    assert rows_of(TINY, NAME) == [
        (INFERRED, NAME), (RIGHT, f"{NAME}_told_right"), (WRONG, f"{NAME}_told_wrong"),
    ]  # fmt: skip
    assert rows_of(TINY, f"{NAME}_noALT") == [(INFERRED, f"{NAME}_noALT")]


def fake_predict(called: list[list[str]]) -> Any:
    """In place of the commands: `predict` leaves its files."""

    def call(*words: object, **_: object) -> None:
        called.append([str(word) for word in words])
        flat = Path(called[-1][called[-1].index("-o") + 1])
        flat.mkdir()
        for contrast in CONTRASTS:
            (flat / f"g__{contrast}.nii.gz").write_text(contrast, encoding="utf-8")
        (flat / "predictions.json").write_text("{}", encoding="utf-8")

    return call


def test_predicting_inferred_told_and_told_wrong(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(compare_mixed, "call", fake_predict(called))
    compare_mixed.predict(shop, NAME, 0, io.StringIO())
    assert "--modality-map" not in called[0]
    for words, way in zip(called[1:], (RIGHT, WRONG), strict=True):
        assert words[words.index("--modality-map") + 1] == str(shop.work / f"inputs{way}.json")
        folder = shop.predictions(f"{NAME}{way}", 0)
        assert (folder / "g/T2w.nii.gz").read_text(encoding="utf-8") == "T2w"
        assert (folder / "predictions.json").is_file() and not (folder / "flat").exists()
    assert all(words[words.index("-p") + 1] == f"nnUNetPlans_{NAME}" for words in called)
    compare_mixed.predict(shop, NAME, 0, io.StringIO())
    assert len(called) == 3  # what is finished is not done again


def test_a_specialist_is_told_its_own_modality_of_every_image(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(compare_mixed, "call", fake_predict(called))
    compare_mixed.predict(shop, f"{NAME}_MRonly", 0, io.StringIO())
    (words,) = called
    assert words[words.index("--modality") + 1] == "MR" and "--modality-map" not in words


def said(modality: str, inferred: str, agreeing: int = 8) -> dict[str, Any]:
    return {
        "modality": modality, "how": "inferred", "inferred": inferred, "inferred_confidence": 0.75, "tiles": 8,
        "tiles_agreeing": agreeing,
    }  # fmt: skip


def test_modalities_recognised_are_counted_by_contrast() -> None:
    cases = {
        "a__CT": said("CT", "CT"), "b__CT": said("CT", "CT"), "a__T1w": said("MR", "MR", 7), "b__T1w": said("CT", "CT"),
        "a__T2w": said("CT", "MR"), "b__T2w": said("CT", "MR"),  # told wrong: what counts is what the network thinks
    }  # fmt: skip
    found = recognised(TINY, cases)
    assert found is not None
    assert [(found[contrast]["right"], found[contrast]["of"]) for contrast in CONTRASTS] == [(2, 2), (1, 2), (2, 2)]
    assert found["T1w"]["unsure"] == 1 and found["CT"]["lowest_confidence"] == 0.75
    assert recognised(TINY, {"a__CT": {"modality": None, "how": "none"}}) is None


def finish(shop: Workshop, method: str, row: str, seed: int, dsc: dict[str, float | None], opinion: bool) -> None:
    """What a method leaves behind when it is done."""
    fold, found, scores = shop.fold(method, seed), shop.predictions(row, seed), shop.scores(row, seed)
    number, name = DATASETS["mixed"]
    plans = shop.work / f"nnUNet_preprocessed/Dataset{number}_{name}/nnUNetPlans_{method}.json"
    for folder in (fold, found, scores, plans.parent):
        folder.mkdir(parents=True, exist_ok=True)
    section = {"initial_lr": 0.5, "text_source": {"encoder": "one_hot"} if opinion else {}}
    for path in (plans, fold.parent / "plans.json"):
        path.write_text(json.dumps({"configurations": {"2d": {"nnunet_multimodal": section}}}), encoding="utf-8")
    training = {
        "iterations": 4, "optimizer": "AdamW", "initial_lr": 0.5, "seconds_per_iteration": 0.25,
        "parameters": 1_500_000, "device": "a machine", "threads": 1,
    }  # fmt: skip
    (fold / "training.json").write_text(json.dumps(training), encoding="utf-8")
    (found / "seconds.json").write_text("3.5", encoding="utf-8")
    entry = said("CT", "CT") if opinion else {"modality": None, "how": "none"}
    cases = {"cases": {f"g__{contrast}": entry for contrast in dsc}}
    (found / "predictions.json").write_text(json.dumps(cases), encoding="utf-8")
    rows = [
        {"modality": contrast, "organs": {organ: {"dsc": value, "nsd": value} for organ in shop.organs}}
        for contrast, value in dsc.items()
    ]
    (scores / "evaluation.json").write_text(json.dumps({"cases": rows}), encoding="utf-8")


def test_table_of_what_is_finished(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(shop, NAME, NAME, 0, {"CT": 0.9, "T1w": 0.5, "T2w": 0.7}, opinion=True)
    finish(shop, NAME, f"{NAME}_told_wrong", 0, {"CT": 0.8, "T1w": 0.1, "T2w": 0.3}, opinion=True)
    finish(shop, "nnUNetTrainer", "nnUNetTrainer", 0, {"CT": None, "T1w": 0.5, "T2w": None}, opinion=False)
    special = f"{NAME}_CTonly"
    finish(shop, special, special, 0, {"CT": 0.9, "T1w": 0.0, "T2w": 0.0}, opinion=True)
    summary = summarise(shop, [0], TINY.methods)
    assert list(summary) == [NAME, f"{NAME}_told_wrong", "nnUNetTrainer", special]
    assert [entry["modality"] for entry in summary.values()] == ["inferred", "told a wrong one", "inferred", "told CT"]
    assert summary[special]["seeds"]["0"]["recognised"] is None  # it knows but one
    assert summary[NAME]["text"] == {"encoder": "one_hot"} and summary["nnUNetTrainer"]["text"] is None
    assert summary[NAME]["settings"]["initial_lr"] == 0.5
    assert summary[NAME]["seeds"]["0"]["DSC"]["organs"]["MR"] == {"liver": 0.6, "spleen": 0.6}
    comparison = shop.comparison
    assert isinstance(comparison, MixedComparison)
    table = markdown(comparison, summary, shop.organs)
    assert "| DSC | CT | T1w | T2w | MR (T1w, T2w) | mean of CT, MR |" in table
    assert f"| {NAME} | 0.900 | 0.500 | 0.700 | 0.600 | 0.750 |" in table
    assert f"| {NAME}_told_wrong | 0.800 | 0.100 | 0.300 | 0.200 | 0.500 |" in table
    assert "| nnUNetTrainer | - | 0.500 | - | 0.500 | - |" in table  # no mean where a modality is missing
    assert f"| {NAME} | 1 of 1 | 0 of 1 | 0 of 1 |" in table and "| nnUNetTrainer | - | - | - |" in table
    assert f"| {NAME} | 1 | 4 | AdamW 0.5 | 0.250 | 1.50 M |" in table
    assert f"{NAME}_told_wrong | 1 | 4" not in table  # one training, however often it predicts
    monkeypatch.setattr(compare_mixed.common, "RESULTS", tmp_path / "results")
    compare_mixed.write_table(shop, "phantom_tiny_mixed", [0], list(TINY.methods))
    written = json.loads((tmp_path / "results/phantom_tiny_mixed.json").read_text(encoding="utf-8"))
    assert written["measured"]["train_subjects"] == {"CT": {"CT": 3}, "MR": {"T1w": 2, "T2w": 1}}
    assert table in (tmp_path / "results/phantom_tiny_mixed.md").read_text(encoding="utf-8")


def test_epochs_of_every_method_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MixedComparison] = []
    monkeypatch.setattr(compare_mixed, "write_table", lambda shop, *_: seen.append(shop.comparison))
    monkeypatch.setattr(compare.common, "RESULTS", tmp_path)
    words = ["phantom_tiny_mixed", "--work", str(tmp_path), "--results", str(tmp_path), "--only-table"]
    assert compare.main([*words, "--epochs", "7"]) == 0 and compare.main(words) == 0
    assert [comparison.train_options["num_epochs"] for comparison in seen] == [7, 2]


@pytest.mark.parametrize("comparison", MIXED_COMPARISONS.values(), ids=list(MIXED_COMPARISONS))
def test_comparisons_are_consistent(comparison: MixedComparison) -> None:
    contrasts = comparison.contrasts
    assert len(set(contrasts)) == len(contrasts) and len(comparison.modalities) > 1
    assert comparison.subjects_each % max(len(each) for each in comparison.modalities.values()) == 0
    assert set(comparison.informed) | set(comparison.specialists) <= set(comparison.methods)
    assert set(comparison.specialists.values()) <= set(comparison.modalities)
    for method in comparison.methods.values():
        assert method.data == "mixed"
        assert method.trainer == "nnUNetTrainer" or parse_trainer_name(method.trainer)


@pytest.mark.slow
def test_tiny_mixed_comparison_end_to_end(tmp_path: Path) -> None:
    script = Path(compare.__file__)
    command = [sys.executable, str(script), "phantom_tiny_mixed", "--work", str(tmp_path / "w")]
    command += ["--results", str(tmp_path), "--methods", NAME, "nnUNetTrainer"]
    subprocess.run(command, check=True, cwd=tmp_path)
    measured = json.loads((tmp_path / "phantom_tiny_mixed.json").read_text(encoding="utf-8"))["measured"]
    assert set(measured["methods"]) == {NAME, f"{NAME}_told_right", f"{NAME}_told_wrong", "nnUNetTrainer"}
    found = measured["methods"][NAME]["seeds"]["0"]
    assert {contrast: entry["of"] for contrast, entry in found["recognised"].items()} == dict.fromkeys(CONTRASTS, 1)
    assert measured["methods"]["nnUNetTrainer"]["seeds"]["0"]["recognised"] is None
