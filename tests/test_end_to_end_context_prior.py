"""Context priors with the real commands: a data set annotated in part, a CT model, train, continue, predict."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_end_to_end import CASES, MODALITIES, Workshop, check_predictions, make_cases, modality_of

TRAINER = "nnUNetTrainerContextPrior"
BASE, BOTH = 608, 609


def plan(workshop: Workshop, number: int) -> str:
    """Plans and preprocesses; the data set's name."""
    workshop.run(
        "nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", "2d", "--verify_dataset_integrity",
        "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    (name,) = (path.name for path in (workshop.folder / "raw").glob(f"Dataset{number}_*"))
    workshop.change_plans(name, fused_stages=[1, 2])
    return name


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """CT with the liver annotated alone, MR with liver and spleen; and the CT as a data set of its own."""
    folder = tmp_path_factory.mktemp("context prior")
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    make_cases(folder)
    workshop = Workshop(folder)
    workshop.run(
        "nnunet_multimodal", "convert", "plain", "--images", folder / "images" / "CT",
        "--labels", folder / "labels" / "CT", "-d", str(BASE), "--label-names", "liver=1", "spleen=2",
    )  # fmt: skip
    output = workshop.run(
        "nnunet_multimodal", "convert", "mixed", "-d", str(BOTH), "--partial", "--unnamed-to-background",
        "--images", *(f"{name}={folder / 'images' / name}" for name in MODALITIES),
        "--labels", *(f"{name}={folder / 'labels' / name}" for name in MODALITIES),
        "--label-names", "CT:liver=1", "MR:spleen=2", "MR:liver=1",
    )  # fmt: skip
    assert "CT does not annotate spleen" in output
    return workshop


def told(workshop: Workshop, *how: str) -> dict[str, dict[str, object]]:
    """Our prediction of two cases; what predictions.json says of them."""
    given, out = workshop.folder / "given", workshop.folder / f"out{len(how)}"
    given.mkdir(exist_ok=True)
    for case in CASES[:2]:
        name = f"{case}_0000.nii.gz"
        if not (given / name).exists():
            os.link(workshop.folder / "images" / modality_of(case) / f"{case}.nii.gz", given / name)
    workshop.run(
        "nnunet_multimodal", "predict", "-i", given, "-o", out, "-d", str(BOTH), "-c", "2d", "-f", "0",
        "-tr", TRAINER, "-device", "cpu", *how,
    )  # fmt: skip
    check_predictions(out, CASES[:2])
    report: dict[str, dict[str, dict[str, object]]] = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    return report["cases"]


@pytest.mark.slow
def test_from_a_ct_model_to_predictions(workshop: Workshop) -> None:
    base, both = plan(workshop, BASE), plan(workshop, BOTH)
    cts = [case for case in CASES if modality_of(case) == "CT"]  # fewer than nnU-Net's five folds
    splits = json.dumps([{"train": cts, "val": cts[:1]}])
    (workshop.folder / "preprocessed" / base / "splits_final.json").write_text(splits, encoding="utf-8")
    stock = "nnUNetTrainerContrastAug_1epoch"  # nnU-Net's network in two steps; its own trainer takes 250
    workshop.train(BASE, stock)
    model = workshop.fold(base, stock).parent

    workshop.change_plans(both, fused_stages=[1, 2], num_epochs=1, starting_model=str(model))
    output = workshop.train(BOTH, TRAINER)
    assert "starting model: " in output and " 0 skipped" in output and "Epoch 1" not in output
    assert "annotated, of" in output and "Dice of annotated classes: " in output and "Training done." in output
    fold = workshop.fold(both, TRAINER)
    summary = json.loads((fold / "validation" / "summary_annotated.json").read_text(encoding="utf-8"))
    cases = len(json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))["metric_per_case"])
    assert list(summary["classes"]) == ["liver", "spleen"]
    assert summary["classes"]["liver"]["cases"] == cases >= summary["classes"]["spleen"]["cases"]

    workshop.change_plans(both, fused_stages=[1, 2], num_epochs=2, starting_model=str(model))
    output = workshop.train(BOTH, TRAINER, "--c")
    assert "Epoch 1" in output and "Epoch 0" not in output and "tensors loaded" not in output

    check_predictions(workshop.predict(both, TRAINER, CASES[:2]), CASES[:2])
    assert {case["how"] for case in told(workshop).values()} == {"inferred"}
    found = told(workshop, "--modality", "mr")
    assert {(str(case["how"]), str(case["modality"])) for case in found.values()} == {("told", "MR")}


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["multiplicative", "sigmoid"])
def test_hermes_ways(workshop: Workshop, ablation: str) -> None:
    names = [path.name for path in Path(workshop.folder, "preprocessed").glob(f"Dataset{BOTH}_*")]
    both = names[0] if names else plan(workshop, BOTH)
    workshop.change_plans(both, fused_stages=[1, 2])
    trainer = f"{TRAINER}_{ablation}_1epoch"
    assert "Training done." in workshop.train(BOTH, trainer)
    check_predictions(workshop.predict(both, trainer, CASES[:2]), CASES[:2])
