"""SegVol with the real commands, each in a fresh process: plan, train, continue, predict by text, points and boxes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_end_to_end import AFFINE, CASES, ORGANS, Workshop, check_predictions, make_cases

DATASET = 607
TRAINER = "nnUNetTrainerSegVol"
SETTINGS = {
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "vit_width": 16,
    "vit_layers": 1,
    "vit_heads": 2,
    "vit_hidden": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_hidden": 16,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, str]:
    """A planned and preprocessed data set, and its name."""
    folder = tmp_path_factory.mktemp("segvol")
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    make_cases(folder)
    workshop = Workshop(folder)
    dataset = workshop.prepare("plain", DATASET, "3d_fullres")
    workshop.change_plans(dataset, **SETTINGS, num_epochs=1)
    return workshop, dataset


def world(case: str, workshop: Workshop, organ: int) -> np.ndarray:
    """mm of a voxel in the middle of an organ."""
    (path,) = (workshop.folder / "labels").rglob(f"{case}.nii.gz")
    voxels = np.argwhere(np.asanyarray(nibabel.load(path).dataobj) == organ)
    return (AFFINE @ [*voxels[len(voxels) // 2], 1])[:3]


def test_train_continue_and_predict(plain: tuple[Workshop, str]) -> None:
    workshop, dataset = plain
    output = workshop.train(DATASET, TRAINER, configuration="3d_fullres")
    assert "Epoch 0" in output and "Epoch 1" not in output and "tokens" in output and "Training done." in output
    fold = workshop.fold(dataset, TRAINER, "3d_fullres")
    assert set(json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))["mean"]) == {"1", "2"}
    workshop.change_plans(dataset, **SETTINGS, num_epochs=2)
    output = workshop.train(DATASET, TRAINER, "--c", configuration="3d_fullres")
    assert "Epoch 1" in output and "Epoch 0" not in output

    check_predictions(workshop.predict(dataset, TRAINER, CASES[:2], "3d_fullres"), CASES[:2])

    given = workshop.folder / f"in_{dataset}_{TRAINER}"
    model = ("-m", fold.parent, "-device", "cpu")
    for number, more in enumerate([("--text",), ("--text", "liver", "--zoom")]):
        out = workshop.folder / f"text_{number}"
        workshop.run("nnunet_multimodal", "predict", "-i", given, "-o", out, *model, *more)
        check_predictions(out, CASES[:2])
    prompts = workshop.folder / "prompts.json"
    content = {
        case: {
            organ: {"points": [world(case, workshop, label).tolist()]} for label, organ in enumerate(ORGANS, start=1)
        }
        for case in CASES[:2]
    }
    prompts.write_text(json.dumps({"units": "mm", "cases": content}), encoding="utf-8")
    for number, more in enumerate([(), ("--text", "--zoom")]):
        out = workshop.folder / f"points_{number}"
        workshop.run("nnunet_multimodal", "predict", "-i", given, "-o", out, *model, "--points", prompts, *more)
        check_predictions(out, CASES[:2])
        report = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
        kinds = ["points"] if number == 0 else ["text", "points"]
        assert all(each["prompts"] == kinds for case in report["cases"].values() for each in case["organs"].values())

    labels = workshop.folder / "raw" / dataset / "labelsTr"
    out = workshop.folder / "study"
    said = workshop.run(
        "nnunet_multimodal", "predict", "-i", given, "-o", out, *model, "--box-from-labels", labels,
        "--box-shift", "1", "5",
    )  # fmt: skip
    assert "boxes are those of the labels" in said
    study = json.loads((out / "box_shift.json").read_text(encoding="utf-8"))
    assert [row["shift"] for row in study["mean"] if row["organ"] == "mean"] == [0, 1, 5]
    assert len(study["boxes"]) == 2 * 2 * 3
    assert (out / "box_shift.csv").is_file() and (out / "box_shift.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(out / f"{CASES[0]}.nii.gz").exists()
