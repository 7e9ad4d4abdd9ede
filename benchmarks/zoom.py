"""Zoom-out-zoom-in against plain sliding windows on a large phantom volume, and how well a box has to be drawn.

A small SegVol network (nnUNetTrainerSegVol) is trained for minutes on CT of made-up patients at 5 mm, then predicts two
others whose files are finer, by text, by one point and by a box, window by window and zooming. Each prediction is a
command of its own. Points and boxes are taken from the labels: the point deepest inside the organ, the box around it.
The study moves each of a box's six numbers by chance. About five processor minutes in all.

    nice python benchmarks/zoom.py --work DIR [--steps 1000]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from common import write_result
from scipy import ndimage
from slabs import measure

from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.inference.box_study import dice_of

BIN = Path(sys.executable).parent
DATASET, NAME = "709", "Dataset709_Zoom"
TRAIN, TEST = 12, 2
TRAIN_SPACING, TEST_SPACING = ("3", "3", "3"), ("1.9", "1.9", "1.9")
NETWORK_SPACING = ("5", "5", "5")  # all that minutes on one core allow
WINDOW = [16, 20, 24]  # a volume is about 3 x 3 x 3 of it
EPOCH = 50  # steps
SETTINGS: dict[str, Any] = {
    "num_iterations_per_epoch": EPOCH,
    "num_val_iterations_per_epoch": 2,
    "initial_lr": 1e-3,  # small networks bear, and need, more than SegVol's 1e-4
    "warmup_epochs": 2,
    "organs_per_image": 2,
    "combinations_per_step": 3,
    "vit_patch": [4, 4, 4],
    "vit_width": 96,
    "vit_layers": 4,
    "vit_heads": 4,
    "vit_hidden": 192,
    "decoder_heads": 4,
    "decoder_hidden": 128,
}
PROMPTS = {"text": ["--text"], "point": ["--points", "points.json"], "box": ["--box-from-labels", "labels"]}
SHIFTS = ["1", "5", "10", "50"]


def run(*words: str | Path) -> None:
    """A command, its output in the log."""
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, words))}", flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {result.returncode}:\n{result.stdout[-4000:]}")


def prepare(work: Path) -> None:
    """Phantoms, the data set, and plans with our window."""
    if (work / "prepared").exists():
        return
    for kind, subjects, seed, spacing in (
        ("train", TRAIN, 0, TRAIN_SPACING),
        ("test", TEST, 1000, TEST_SPACING),
    ):
        run(
            "nnunet_multimodal", "phantom", work / kind, "--subjects", str(subjects), "--seed", str(seed),
            "--contrasts", "CT", "--spacing", *spacing, "-j", "1",
        )  # fmt: skip
    plans = work / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    labels = json.loads((work / "train/phantom.json").read_text(encoding="utf-8"))["labels"]
    if not (work / "nnUNet_raw" / NAME).exists():
        run(
            "nnunet_multimodal", "convert", "plain", "--images", work / "train/images/CT", "--labels",
            work / "train/labels/CT", "-d", DATASET, "--name", "Zoom", "--label-names",
            *(f"{name}={value}" for name, value in labels.items() if value),
        )  # fmt: skip
    run("nnUNetv2_extract_fingerprint", "-d", DATASET, "-np", "1")
    run("nnUNetv2_plan_experiment", "-d", DATASET, "-overwrite_target_spacing", *NETWORK_SPACING)
    content = json.loads(plans.read_text(encoding="utf-8"))
    content["configurations"]["3d_fullres"] |= {"patch_size": WINDOW, "batch_size": 2, "nnunet_multimodal": SETTINGS}
    plans.write_text(json.dumps(content, indent=2), encoding="utf-8")
    run("nnUNetv2_preprocess", "-d", DATASET, "-c", "3d_fullres", "-np", "1")
    (work / "prepared").touch()


def train(work: Path, steps: int) -> tuple[Path, dict[str, Any]]:
    """The model's folder, and what training it took."""
    trainer = f"nnUNetTrainerSegVol_{steps // EPOCH}epochs"
    folder = work / "nnUNet_results" / NAME / f"{trainer}__nnUNetPlans__3d_fullres"
    kept = work / f"train_{steps}.json"
    if not kept.exists():
        os.environ["nnUNet_n_proc_DA"] = "0"
        measure(kept, [str(BIN / "nnUNetv2_train"), DATASET, "3d_fullres", "0", "-tr", trainer, "-device", "cpu"])
    found = json.loads(kept.read_text(encoding="utf-8"))
    found.pop("said", None)
    return folder, {"steps": steps, **found}


def deepest(mask: np.ndarray) -> list[int]:
    """Voxel that is farthest from the border of a mask."""
    inside = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    return [int(index) for index in np.unravel_index(inside.argmax(), mask.shape)]


def prepare_test(work: Path, organs: dict[str, int]) -> Path:
    """imagesTs, labels and points.json, as a user would have them."""
    root = work / "predict"
    if (root / "points.json").exists():
        return root
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    cases = {}
    for path in sorted((work / "test/labels/CT").glob("*.nii.gz")):
        case = path.name.removesuffix(".nii.gz")
        shutil.copy(work / "test/images/CT" / path.name, root / f"images/{case}_0000.nii.gz")
        shutil.copy(path, root / f"labels/{case}.nii.gz")
        image = nib.load(path)
        labels = np.asanyarray(image.dataobj)
        cases[case] = {
            organ: {"points": [(image.affine @ [*deepest(labels == value), 1])[:3].tolist()]}
            for organ, value in organs.items()
        }
    (root / "points.json").write_text(json.dumps({"units": "mm", "cases": cases}), encoding="utf-8")
    return root


def scores(root: Path, out: Path, organs: dict[str, int]) -> dict[str, float]:
    """Mean Dice of each organ, and of all."""
    found: dict[str, list[float]] = {organ: [] for organ in organs}
    for path in sorted((root / "labels").glob("*.nii.gz")):
        labels, predicted = (np.asanyarray(nib.load(each).dataobj) for each in (path, out / path.name))
        for organ, value in organs.items():
            found[organ].append(dice_of(predicted == value, labels == value))
    means = {organ: round(float(np.mean(values)), 4) for organ, values in found.items()}
    return {**means, "mean": round(float(np.mean([*means.values()])), 4)}


def predict(root: Path, model: Path, organs: dict[str, int]) -> dict[str, Any]:
    """Every kind of prompt, window by window and zooming."""
    command = ["-m", "nnunet_multimodal.cli", "predict", "-m", str(model), "-f", "0", "-device", "cpu", "-i"]
    command += [str(root / "images")]
    measured: dict[str, Any] = {}
    for prompt, words in PROMPTS.items():
        own = [str(root / word) if (root / word).exists() else word for word in words]
        for mode, more in (("sliding", []), ("zoom", ["--zoom"])):
            out = root / f"{prompt}_{mode}"
            found = measure(root / f"{out.name}.json", [*command, "-o", str(out), *own, *more])
            found.pop("said", None)
            report = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
            cases = report["cases"].values()
            found["windows"] = sum(case["windows"] for case in cases)
            found["predicting_seconds"] = round(sum(case["seconds"] for case in cases), 1)
            if mode == "zoom":
                found["not_found_from_afar"] = sum(
                    not organ["found_from_afar"] for case in cases for organ in case["organs"].values()
                )
            measured[f"{prompt}, {mode}"] = {"dice": scores(root, out, organs), **found}
    return measured


def study(root: Path, model: Path) -> dict[str, Any]:
    """The box study, window by window and zooming: shift -> Dice, and of the boxes themselves."""
    command = ["-m", "nnunet_multimodal.cli", "predict", "-m", str(model), "-f", "0", "-device", "cpu", "-i"]
    command += [str(root / "images"), "--box-from-labels", str(root / "labels"), "--draws", "3", "--box-shift", *SHIFTS]
    measured = {}
    for mode, more in (("sliding", []), ("zoom", ["--zoom"])):
        out = root / f"study_{mode}"
        measure(root / f"study_{mode}.json", [*command, "-o", str(out), *more])
        table = json.loads((out / "box_shift.json").read_text(encoding="utf-8"))["mean"]
        measured[mode] = {
            str(row["shift"]): {key: round(row[key], 4) for key in ("dice", "box_alone")}
            for row in table
            if row["organ"] == "mean"
        }
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, model and predictions")
    parser.add_argument("--steps", type=int, default=1000, help="of training, a multiple of 50 (default: %(default)s)")
    parser.add_argument("--only-prepare", action="store_true", help="stop before training")
    parser.add_argument("--only-train", action="store_true", help="stop before predicting")
    args = parser.parse_args()
    work = args.work.resolve()
    for kind in ("raw", "preprocessed", "results"):
        (work / f"nnUNet_{kind}").mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(work / f"nnUNet_{kind}")
    os.environ |= {"nnUNet_compile": "f", "nnUNet_extTrainer": extension_value(), "nnUNet_def_n_proc": "1"}
    os.environ["nnUNet_n_proc_DA"] = "1"
    prepare(work)
    if args.only_prepare:
        return
    model, training = train(work, args.steps)
    if args.only_train:
        return
    labels = json.loads((work / "train/phantom.json").read_text(encoding="utf-8"))["labels"]
    organs = {name: value for name, value in labels.items() if value}
    root = prepare_test(work, organs)
    shapes = [list(nib.load(path).shape) for path in sorted((root / "images").glob("*.nii.gz"))]
    measured = {
        "training": {"cases": TRAIN, "window": WINDOW, "settings": SETTINGS, **training},
        "images": {"spacing": list(TEST_SPACING), "shapes_xyz": shapes, "network_spacing": list(NETWORK_SPACING)},
        "predictions": predict(root, model, organs),
        "box_study": {"shifts_in_image_voxels": study(root, model)},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    note = (
        "two test volumes, one training, one run of each command; seconds and peak of memory are of the whole command, "
        "imports and preprocessing included; predicting_seconds without imports; windows are all that were encoded. "
        "Points and boxes come from the labels"
    )
    print(write_result("zoom", measured, note).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
