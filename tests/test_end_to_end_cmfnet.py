"""CmFNet with the real commands, each in a fresh process: scribbles, plan, train, continue, predict without MR."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_end_to_end import AFFINE, CASES, ORGANS, SHAPE, Workshop, check_predictions

DATASET = 606
TRAINER = "nnUNetTrainerCmFNet"


def make_pairs(folder: Path) -> None:
    """Two blobs in a body in air: bright in the CT, dark in the MR, on one grid."""
    x, y, z = np.indices(SHAPE)
    body = ((x - 15.5) / 15) ** 2 + ((y - 14.5) / 14) ** 2 < 1
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(number)
        labels = np.zeros(SHAPE, dtype=np.uint8)
        for label, centre in enumerate([(10, 14 + number % 3, 2), (22, 15, 3)], start=1):
            distance = ((x - centre[0]) / 5) ** 2 + ((y - centre[1]) / 5) ** 2 + ((z - centre[2]) / 2.2) ** 2
            labels[distance < 1] = label
        noise = rng.normal(0, 8, SHAPE)
        images = {
            "CT": np.where(body, 20.0 + 60 * labels + noise, -1000 + noise),
            "MR": np.where(body, 300.0 - 60 * labels + noise, 0),
        }
        for kind, array in (("labels", labels), *images.items()):
            (folder / kind).mkdir(exist_ok=True)
            array = array if kind == "labels" else array.astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / kind / f"{case}.nii.gz")


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, str]:
    """A planned and preprocessed data set of CT, MR and simulated scribbles, and its name."""
    folder = tmp_path_factory.mktemp("paired")
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    make_pairs(folder)
    workshop = Workshop(folder)
    workshop.run(
        "nnunet_multimodal", "scribbles", "simulate", "--labels", folder / "labels", "--images",
        f"CT={folder / 'CT'}", f"MR={folder / 'MR'}", "-d", str(DATASET), "--name", "Paired",
        "--label-names", *(f"{name}={i}" for i, name in enumerate(ORGANS, start=1)),
    )  # fmt: skip
    dataset = f"Dataset{DATASET}_Paired"
    for configuration in ("2d", "3d_fullres"):
        workshop.run(
            "nnUNetv2_plan_and_preprocess", "-d", str(DATASET), "-c", configuration, "--verify_dataset_integrity",
            "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1",
        )  # fmt: skip
    workshop.change_plans(dataset)
    return workshop, dataset


def predict_without_mr(workshop: Workshop, dataset: str, trainer: str, cases: list[str]) -> Path:
    """Our prediction of a folder that holds the CTs alone."""
    given, out = workshop.folder / f"ct_{trainer}", workshop.folder / f"out_ct_{trainer}"
    given.mkdir()
    for case in cases:
        name = f"{case}_0000.nii.gz"
        os.link(workshop.folder / "raw" / dataset / "imagesTr" / name, given / name)
    command = [
        "nnunet_multimodal", "predict", "-i", given, "-o", out, "-d", str(DATASET), "-c", "2d", "-f", "0",
        "-tr", trainer, "-device", "cpu",
    ]  # fmt: skip
    assert "add --missing MR" in workshop.run(*command, fails=True)
    assert "without MR: the branch of CT answers" in workshop.run(*command, "--missing", "MR")
    return out


@pytest.mark.slow
def test_train_continue_and_predict_with_and_without_mr(paired: tuple[Workshop, str]) -> None:
    workshop, dataset = paired
    workshop.change_plans(dataset, num_epochs=1)
    output = workshop.train(DATASET, TRAINER)
    assert "train_loss is made of ssl" in output and "imr" in output and "imc" in output
    assert "Dense Dice: " in output  # simulate keeps the labels beside the data set
    workshop.change_plans(dataset, num_epochs=2)
    output = workshop.train(DATASET, TRAINER, "--c")
    assert "Epoch 1" in output and "Epoch 0" not in output
    out = workshop.predict(dataset, TRAINER, CASES[:2])
    check_predictions(out, CASES[:2])

    alone = predict_without_mr(workshop, dataset, TRAINER, CASES[:2])
    check_predictions(alone, CASES[:2])
    cases = json.loads((alone / "predictions.json").read_text(encoding="utf-8"))["cases"]
    assert {(entry["branch"], entry["missing"]) for entry in cases.values()} == {("CT", "MR")}
    same = [
        np.array_equal(*(np.asanyarray(nibabel.load(folder / f"{case}.nii.gz").dataobj) for folder in (out, alone)))
        for case in CASES[:2]
    ]
    assert not all(same)


@pytest.mark.slow
def test_in_3d_and_an_ablation(paired: tuple[Workshop, str]) -> None:
    workshop, dataset = paired
    trainer = f"{TRAINER}_noCFF_1epoch"
    workshop.change_plans(dataset)
    workshop.train(DATASET, trainer, configuration="3d_fullres")
    check_predictions(workshop.predict(dataset, trainer, CASES[:1], "3d_fullres"), CASES[:1])
