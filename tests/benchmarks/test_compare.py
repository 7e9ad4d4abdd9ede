"""The comparison's runner: plans of a method, means, table, what is not done again; and all of it on a tiny phantom."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import compare_runner
import nibabel as nib
import numpy as np
import pytest
from compare_contrasts import STEPS, markdown, split_scribbles, summarise
from compare_runner import DATASETS, Workshop, cell, mean_over, write_plans
from comparisons import COMPARISONS, Comparison, Method

from nnunet_multimodal.registry import parse_trainer_name

TINY = COMPARISONS["phantom_tiny"]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    (tmp_path / "phantom").mkdir()
    description = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "subjects": ["c", "a", "b"]}
    (tmp_path / "phantom/phantom.json").write_text(json.dumps(description))
    return Workshop(TINY, tmp_path, "cpu", 0)


def test_means_are_over_images_then_over_organs_and_leave_out_what_is_undefined() -> None:
    rows = [
        {"organ": "liver", "DSC": 0.9},
        {"organ": "liver", "DSC": 0.8},
        {"organ": "liver", "DSC": None},
        {"organ": "spleen", "DSC": 0.0},  # missed: counts
    ]
    assert mean_over(rows, "DSC", ["liver", "spleen", "kidney"]) == 0.425
    assert mean_over(rows, "DSC", ["kidney"]) is None


def test_cells() -> None:
    assert cell([0.5]) == "0.500"
    assert cell([0.5, 0.7, 0.6]) == "0.600 ± 0.100"
    assert cell([]) == cell([None]) == "-"


def test_test_subjects_were_not_trained_on(shop: Workshop) -> None:
    assert shop.subjects == (["a", "b"], ["c"])
    with pytest.raises(SystemExit, match="3 subjects, 4 are needed"):
        _ = dataclasses.replace(shop, comparison=dataclasses.replace(TINY, test_subjects=2)).subjects


def test_a_method_has_its_own_plans_and_they_do_not_change_unseen(shop: Workshop) -> None:
    folder = shop.work / "nnUNet_preprocessed/Dataset703_CrossMR"
    folder.mkdir(parents=True)
    network = {"arch_kwargs": {"features_per_stage": [8, 16, 512]}}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"2d": {"batch_size": 40, "architecture": network}}}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    write_plans(shop, "nnUNetTrainerCrossMR")
    path = folder / "nnUNetPlans_nnUNetTrainerCrossMR.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["plans_name"] == path.stem
    configuration = written["configurations"]["2d"]
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 8]
    assert configuration["batch_size"] == 2 and configuration["nnunet_multimodal"]["initial_lr"] == 1e-3
    write_plans(shop, "nnUNetTrainerCrossMR")  # the same again
    other = dataclasses.replace(TINY, batch_size=3)
    with pytest.raises(SystemExit, match="other settings of nnUNetTrainerCrossMR"):
        write_plans(dataclasses.replace(shop, comparison=other), "nnUNetTrainerCrossMR")


def test_scribbles_of_the_target_become_a_channel_for_each_organ(tmp_path: Path) -> None:
    drawn = np.zeros((4, 3, 2), np.uint8)
    drawn[1, 1, 0], drawn[2, 2, 1] = 2, 5
    affine = np.diag([1.5, 2.0, 6.0, 1.0])
    nib.save(nib.Nifti1Image(drawn, affine), tmp_path / "a__T2w.nii.gz")
    split_scribbles(tmp_path / "a__T2w.nii.gz", tmp_path, [2, 5])
    for channel, place in (("0001", (1, 1, 0)), ("0002", (2, 2, 1))):
        image = nib.load(tmp_path / f"a__T2w_{channel}.nii.gz")
        assert np.argwhere(np.asarray(image.dataobj)).tolist() == [list(place)]
        assert np.array_equal(image.affine, affine)


def finish(shop: Workshop, name: str, seed: int, dsc: dict[str, float | None]) -> None:
    """What a method leaves behind when it is done."""
    fold, found, scores = shop.fold(name, seed), shop.predictions(name, seed), shop.scores(name, seed)
    for folder in (fold, found, scores):
        folder.mkdir(parents=True)
    training = {
        "iterations": 4,
        "optimizer": "SGD",
        "initial_lr": 0.01,
        "seconds_per_iteration": 0.25,
        "parameters": 1_500_000,
    }
    (fold / "training.json").write_text(json.dumps(training))
    (fold / "checkpoint_final.pth").touch()
    (found / "seconds.json").write_text("3.5")
    cases = [
        {"modality": contrast, "organs": {organ: {"dsc": value, "nsd": value} for organ in shop.organs}}
        for contrast, value in dsc.items()
    ]
    (scores / "evaluation.json").write_text(json.dumps({"cases": cases}))


def test_table_of_what_is_finished(shop: Workshop) -> None:
    finish(shop, "nnUNetTrainer", 0, {"T1w": 0.9, "T2w": 0.5, "CT": None})
    finish(shop, "nnUNetTrainer", 1, {"T1w": 0.8, "T2w": 0.3, "CT": None})
    summary = summarise(shop, [0, 1], TINY.methods)
    assert list(summary) == ["nnUNetTrainer"]
    assert summary["nnUNetTrainer"]["seeds"]["0"]["DSC"]["organs"]["unseen"] == {"liver": 0.5, "spleen": 0.5}
    table = markdown(TINY, summary, shop.organs)
    assert "| DSC | T1w | T2w | CT | mean of T2w |" in table
    assert "| nnUNetTrainer | 0.850 ± 0.071 | 0.400 ± 0.141 | - | 0.400 ± 0.141 |" in table
    assert "| nnUNetTrainer | 2 | 4 | SGD 0.01 | 0.250 | 1.50 M |" in table
    json.dumps(summary, allow_nan=False)


def test_what_is_finished_is_not_done_again(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compare_runner, "call", lambda *words, **_: called.append(words))
    finish(shop, "nnUNetTrainer", 0, {"T1w": 0.9})
    assert compare_runner.run_unit(shop, "nnUNetTrainer", 0, STEPS) is None and called == []
    compare_runner.train(shop, "nnUNetTrainer", 1, io.StringIO())
    assert called[0][called[0].index("--seed") + 1] == 1 and "nnUNetPlans_nnUNetTrainer" in called[0]


def test_a_failed_unit_is_named_and_the_others_go_on(shop: Workshop) -> None:
    tried: list[str] = []

    def fail_for_one(_: Workshop, name: str, seed: int, log: Any) -> None:
        tried.append(f"{name} {seed}")
        if name == "a":
            raise subprocess.CalledProcessError(1, ["nnUNetv2_predict"])

    assert compare_runner.run_units(shop, [("a", 0), ("b", 0)], 1, [fail_for_one] * 3) == ["a seed 0"]
    assert tried == ["a 0", "b 0", "b 0", "b 0"]


def test_stopping_ends_what_runs_and_starts_nothing_more(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_runner, "stopping", type(compare_runner.stopping)())
    monkeypatch.setattr(compare_runner, "call", lambda *_, **__: pytest.fail("started"))
    compare_runner.stop_all()
    assert compare_runner.run_unit(shop, "nnUNetTrainer", 0, STEPS) is None


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=list(COMPARISONS))
def test_comparisons_are_consistent(comparison: Comparison) -> None:
    assert comparison.reference in comparison.contrasts
    assert set(comparison.unseen) < set(comparison.contrasts) - {comparison.reference}
    for method in comparison.methods.values():
        assert isinstance(method, Method) and method.data in DATASETS
        assert method.trainer in ("nnUNetTrainer", "nnUNetTrainerNoMirroring") or parse_trainer_name(method.trainer)


@pytest.mark.slow
def test_tiny_comparison_end_to_end(tmp_path: Path) -> None:
    script = Path(compare.__file__)
    command = [sys.executable, str(script), "phantom_tiny", "--work", str(tmp_path / "w"), "--results", str(tmp_path)]
    subprocess.run([*command, "--methods", "nnUNetTrainerScribble", "nnUNetTrainerCrossMR"], check=True, cwd=tmp_path)
    measured = json.loads((tmp_path / "phantom_tiny.json").read_text(encoding="utf-8"))["measured"]
    assert set(measured["methods"]) == {"nnUNetTrainerScribble", "nnUNetTrainerCrossMR"}
    assert "| nnUNetTrainerCrossMR |" in (tmp_path / "phantom_tiny.md").read_text(encoding="utf-8")
