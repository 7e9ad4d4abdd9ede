"""Training from scribbles with the real commands, each in a fresh process: import, plan, train, continue, predict."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_end_to_end import CASES, ORGANS, Workshop, check_predictions, make_cases, modality_of

DATASET = 605
NOBODY_DREW = 255


def draw(labels: np.ndarray) -> np.ndarray:
    """A line through each organ and two of background in every slice; all else is not drawn."""
    scribble = np.full(labels.shape, NOBODY_DREW, dtype=np.uint8)
    for column in (14, 15, 27):
        scribble[:, column] = labels[:, column]
    return scribble


@pytest.fixture(scope="module")
def scribbled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, str]:
    """A planned and preprocessed data set of scribbles, with dense labels beside it, and its name."""
    folder = tmp_path_factory.mktemp("scribbles")
    for kind in ("raw", "preprocessed", "results", "flat/images", "flat/labels", "flat/scribbles"):
        (folder / kind).mkdir(parents=True)
    make_cases(folder)
    for case in CASES:
        for kind in ("images", "labels"):
            (folder / kind / modality_of(case) / f"{case}.nii.gz").rename(folder / "flat" / kind / f"{case}.nii.gz")
        dense = nibabel.load(folder / "flat/labels" / f"{case}.nii.gz")
        drawn = draw(np.asarray(dense.dataobj))
        nibabel.save(nibabel.Nifti1Image(drawn, dense.affine), folder / "flat/scribbles" / f"{case}.nii.gz")
    workshop, flat = Workshop(folder), folder / "flat"
    workshop.run(
        "nnunet_multimodal", "scribbles", "import", "--images", flat / "images", "--scribbles", flat / "scribbles",
        "--dense", flat / "labels", "--unlabelled", str(NOBODY_DREW), "-d", str(DATASET),
        "--label-names", *(f"{name}={i}" for i, name in enumerate(ORGANS, start=1)),
    )  # fmt: skip
    for configuration in ("2d", "3d_fullres"):
        workshop.run(
            "nnUNetv2_plan_and_preprocess", "-d", str(DATASET), "-c", configuration, "--verify_dataset_integrity",
            "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1",
        )  # fmt: skip
    (name,) = (path.name for path in (folder / "raw").glob(f"Dataset{DATASET}_*"))
    return workshop, name


def check_dense(output: str, fold: Path, cases: list[str]) -> None:
    """The log says what nnU-Net's figure counts, and the true one is in the log and in a file."""
    assert "it counts the voxels that were drawn, and no others" in output
    assert "Dense Dice: " in output
    dense = json.loads((fold / "validation" / "summary_dense.json").read_text(encoding="utf-8"))
    drawn = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert set(dense["mean"]) == set(drawn["mean"]) == {"1", "2"}
    voxels = [sum(case["metrics"]["1"][key] for key in ("TP", "FP", "FN", "TN")) for case in dense["metric_per_case"]]
    assert voxels == [32 * 30 * 6] * len(cases)
    fewer = [sum(case["metrics"]["1"][key] for key in ("TP", "FP", "FN", "TN")) for case in drawn["metric_per_case"]]
    assert fewer == [32 * 3 * 6] * len(cases)


@pytest.mark.slow
def test_import_train_judge_and_predict(scribbled: tuple[Workshop, str]) -> None:
    workshop, dataset = scribbled
    workshop.change_plans(dataset)
    trainer = "nnUNetTrainerPartialCE_CRF_1epochs"
    output = workshop.train(DATASET, trainer)
    splits = json.loads((workshop.folder / "preprocessed" / dataset / "splits_final.json").read_text(encoding="utf-8"))
    check_dense(output, workshop.fold(dataset, trainer), splits[0]["val"])
    check_predictions(workshop.predict(dataset, trainer, CASES[:2]), CASES[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "configuration"),
    [
        ("nnUNetTrainerDMSPS", "3d_fullres"),
        ("nnUNetTrainerUSTM", "2d"),
        ("nnUNetTrainerScribble2Label", "3d_fullres"),
    ],
)
def test_a_training_goes_on_with_what_it_knew(
    scribbled: tuple[Workshop, str], trainer: str, configuration: str
) -> None:
    workshop, dataset = scribbled
    settings = {"ensemble_every": 1, "ensemble_confidence": 0.4, "pseudo_label_start": 0.0, "teacher_passes": 2}
    workshop.change_plans(dataset, num_epochs=1, **settings)
    workshop.train(DATASET, trainer, configuration=configuration)
    workshop.change_plans(dataset, num_epochs=2, **settings)
    output = workshop.train(DATASET, trainer, "--c", configuration=configuration)
    assert "Epoch 1" in output and "Epoch 0" not in output and "Dense Dice: " in output
    check_predictions(workshop.predict(dataset, trainer, CASES[:1], configuration), CASES[:1])


@pytest.mark.slow
def test_a_dense_data_set_is_refused_with_the_command_that_helps(scribbled: tuple[Workshop, str]) -> None:
    workshop, dataset = scribbled
    path = workshop.folder / "preprocessed" / dataset / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        dense = {name: value for name, value in content["labels"].items() if name != "ignore"}
        path.write_text(json.dumps({**content, "labels": dense}), encoding="utf-8")
        command = ["nnUNetv2_train", str(DATASET), "2d", "0", "-tr", "nnUNetTrainerPartialCE", "-device", "cpu"]
        assert "nnunet_multimodal scribbles import" in workshop.run(*command, fails=True)
    finally:
        path.write_text(json.dumps(content), encoding="utf-8")
