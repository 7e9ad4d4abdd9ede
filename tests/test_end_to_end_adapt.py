"""Adapting with the real commands: a CT model, adapt, train, continue, merge, predict with and without the package."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_end_to_end import CASES, Workshop, check_predictions, make_cases, modality_of

BASE, TARGET = 610, 611
PLANS = f"nnUNetPlansFrom{BASE}"
STOCK = "nnUNetTrainerContrastAug_1epoch"  # nnU-Net's network in two steps; its own trainer takes 250
LORA, MOA = "nnUNetTrainerLoRA", "nnUNetTrainerMoA"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A trained model of the CT, and the MR as another data set."""
    folder = tmp_path_factory.mktemp("adapt")
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    make_cases(folder)
    workshop = Workshop(folder)
    for number, modality in ((BASE, "CT"), (TARGET, "MR")):
        workshop.run(
            "nnunet_multimodal", "convert", "plain", "--images", folder / "images" / modality, "--labels",
            folder / "labels" / modality, "-d", str(number), "--name", modality, "--channel-name", "CT_or_MR",
            "--label-names", "liver=1", "spleen=2",
        )  # fmt: skip
    workshop.run(
        "nnUNetv2_plan_and_preprocess", "-d", str(BASE), "-c", "2d", "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1"
    )
    name = f"Dataset{BASE}_CT"
    workshop.change_plans(name)
    split(workshop, name, "CT")
    workshop.train(BASE, STOCK)
    return workshop


def split(workshop: Workshop, name: str, modality: str) -> None:
    """Three cases are fewer than nnU-Net's five folds."""
    cases = [case for case in CASES if modality_of(case) == modality]
    path = workshop.folder / "preprocessed" / name / "splits_final.json"
    path.write_text(json.dumps([{"train": cases, "val": cases[:1]}]), encoding="utf-8")


def lines_of(output: str, workshop: Workshop) -> list[list[str]]:
    """The commands that adapt says to type next."""
    at = next(i for i, line in enumerate(output.splitlines()) if line.startswith("Next:"))
    return [line.removeprefix("Next:").split() for line in output.splitlines()[at:]]


@pytest.mark.slow
def test_what_adapt_says_to_type_next(workshop: Workshop) -> None:
    model = workshop.fold(f"Dataset{BASE}_CT", STOCK).parent
    dataset = f"Dataset{TARGET}_MR"
    preprocessed = workshop.folder / "preprocessed" / dataset
    output = workshop.run("nnunet_multimodal", "adapt", "--from", model, "-d", str(TARGET), "--rank", "2")
    extract, preprocess, train, predict = lines_of(output, workshop)
    workshop.run(*extract, "-np", "1")
    workshop.run(*preprocess, "-np", "1")
    path = preprocessed / f"{PLANS}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    section = plans["configurations"]["2d"]["nnunet_multimodal"]
    short = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    plans["configurations"]["2d"]["nnunet_multimodal"] = section | short
    path.write_text(json.dumps(plans), encoding="utf-8")
    split(workshop, dataset, "MR")
    output = workshop.run(*train, "-device", "cpu")
    assert "starting model: " in output and " 0 skipped" in output and "trainable: " in output

    fold = workshop.folder / "results" / dataset / f"{LORA}__{PLANS}__2d" / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()
    plans["configurations"]["2d"]["nnunet_multimodal"]["num_epochs"] = 2
    path.write_text(json.dumps(plans), encoding="utf-8")
    output = workshop.run(*train, "-device", "cpu", "--c")
    assert "Epoch 1" in output and "Epoch 0" not in output

    given = workshop.folder / "given"
    given.mkdir()
    cases = [case for case in CASES if modality_of(case) == "MR"][:2]
    for case in cases:
        os.link(workshop.folder / "images" / "MR" / f"{case}.nii.gz", given / f"{case}_0000.nii.gz")
    out = [workshop.folder / f"out_{name}" for name in ("ours", "stock")]
    words = [{"IMAGES": str(given), "OUT": str(out[0])}.get(word, word) for word in predict]
    workshop.run(*words, "-device", "cpu")
    merged = workshop.folder / "merged"
    output = workshop.run("nnunet_multimodal", "adapt", "--merge", fold.parent, "-o", merged)
    (stock,) = lines_of(output, workshop)
    words = [{"IMAGES": str(given), "OUT": str(out[1])}.get(word, word) for word in stock]
    workshop.run("env", "-u", "nnUNet_extTrainer", *words, "-device", "cpu", "-npp", "1", "-nps", "1")
    for folder in out:
        check_predictions(folder, cases)
    for case in cases:
        arrays = [np.asanyarray(nibabel.load(folder / f"{case}.nii.gz").dataobj) for folder in out]
        assert (arrays[0] == arrays[1]).mean() > 0.999

    adapter = workshop.folder / "adapter.pt"
    workshop.run("nnunet_multimodal", "adapt", "--export", fold.parent, "-o", adapter)
    workshop.run("nnunet_multimodal", "adapt", "--merge", adapter, "--from", model, "-o", f"{merged}_again")
    assert (Path(f"{merged}_again") / "fold_0/checkpoint_final.pth").is_file()
