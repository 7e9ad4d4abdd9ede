"""The main job on one's own images, by the commands a user types, and how well it did.

    python benchmarks/main_job.py IMAGES LABELS [--small]

IMAGES and LABELS are folders with one NIfTI file per patient, of one contrast, under the same names. The last patients
(in the order of their names) are kept for testing. Trains nnUNetTrainerCrossMR on the others, then segments the kept
ones three ways: with nnUNetv2_predict on prepared channels, with `refer` by each patient's own simulated scribbles, and
with `refer` by the scribbled image of another patient. What is there from an earlier run is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

BIN = Path(sys.executable).parent
ENDING = ".nii.gz"


def run(*command: object) -> None:
    """A command of this Python environment, shown before it is run."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run([str(BIN / words[0]), *words[1:]], check=True)


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(source.resolve())


def set_environment(work: Path) -> None:
    for name in ("raw", "preprocessed", "results"):
        folder = work / f"nnUNet_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    from nnunet_multimodal.environment import use_own_trainers

    use_own_trainers()
    os.environ.setdefault("nnUNet_compile", "f")
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    os.environ.setdefault("nnUNet_def_n_proc", "2")


def shrink_plans(folder: Path, iterations: int) -> None:
    """Half of nnU-Net's features and a batch of 6: a size that two CPU cores can train."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = "nnUNetPlansSmall"
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = 6
    architecture = configuration["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [min(128, n // 2) for n in architecture["features_per_stage"]]
    configuration["nnunet_multimodal"] = {"num_iterations_per_epoch": iterations, "num_val_iterations_per_epoch": 8}
    (folder / "nnUNetPlansSmall.json").write_text(json.dumps(plans, indent=2))


def dice(first: Path, second: Path, organs: dict[str, int]) -> dict[str, float]:
    a, b = (np.asarray(nib.load(path).dataobj).round() for path in (first, second))
    result = {}
    for name, label in organs.items():
        total = (a == label).sum() + (b == label).sum()
        result[name] = round(float(2 * ((a == label) & (b == label)).sum() / total), 4) if total else float("nan")
    return result


def mean_dice(predictions: Path, truth: Path, cases: list[str], organs: dict[str, int]) -> dict[str, object]:
    of_cases = {case: dice(predictions / f"{case}{ENDING}", truth / f"{case}{ENDING}", organs) for case in cases}
    means = {name: round(float(np.nanmean([d[name] for d in of_cases.values()])), 4) for name in organs}
    return {"mean": round(float(np.mean(list(means.values()))), 4), "organs": means, "cases": of_cases}


def refer(work: Path, name: str, pairs: dict[str, str], images: Path, model: list[object], *more: str) -> Path:
    """Segments each case by the scribbled image of another (or the same) one."""
    output = work / name
    if (output / "refer.json").exists():
        return output / "all"
    subjects = work / f"{name}_subjects"
    for case, reference in pairs.items():
        link(images / f"{reference}{ENDING}", subjects / case / f"reference{ENDING}")
        link(work / "scribbles" / f"{reference}{ENDING}", subjects / case / f"scribbles{ENDING}")
        link(images / f"{case}{ENDING}", subjects / case / f"{case}{ENDING}")
    run("nnunet_multimodal", "refer", "--subjects", subjects, "-o", output, *model, *more)
    (output / "all").mkdir()
    for case in pairs:
        shutil.copy(output / case / f"{case}{ENDING}", output / "all")
    return output / "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--label-names", nargs="+", default=[], metavar="NAME=ID")
    parser.add_argument("--work", type=Path, default=Path("main_job"))
    parser.add_argument("-d", "--dataset", default="601")
    parser.add_argument("--test", type=int, default=4, help="patients kept for testing")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=100, help="per epoch, with --small")
    parser.add_argument("--small", action="store_true", help="2.5 mm pixels and a small network, for a CPU")
    parser.add_argument("-device", "--device", default="cpu")
    args = parser.parse_args()
    work = args.work.resolve()
    set_environment(work)

    cases = sorted(path.name.removesuffix(ENDING) for path in args.images.glob(f"*{ENDING}"))
    train, test = cases[: -args.test], cases[-args.test :]
    for part, names in (("train", train), ("test", test)):
        for case in names:
            for kind, source in (("images", args.images), ("labels", args.labels)):
                link(source / f"{case}{ENDING}", work / part / kind / f"{case}{ENDING}")

    raw = work / "nnUNet_raw"
    if not list(raw.glob(f"Dataset{args.dataset}_*")):
        names = ["--label-names", *args.label_names] if args.label_names else []
        run("nnunet_multimodal", "convert", "crossmr", "--reference-images", work / "train/images", "--labels",
            work / "train/labels", "-d", args.dataset, "--name", "MainJob", *names)  # fmt: skip
    dataset = next(raw.glob(f"Dataset{args.dataset}_*"))
    organs = {
        k: v for k, v in json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["labels"].items() if v
    }
    preprocessed = work / "nnUNet_preprocessed" / dataset.name
    if not (preprocessed / "nnUNetPlans_2d").exists():
        coarse = []
        if args.small:
            thickness = nib.load(next(iter((work / "train/images").iterdir()))).header.get_zooms()[2]
            coarse = ["-gpu_memory_target", "1", "-overwrite_target_spacing", f"{thickness:.2f}", "2.5", "2.5"]
        run("nnUNetv2_plan_and_preprocess", "-d", args.dataset, "-c", "2d", "-np", "2", "-npfp", "2",
            "--verify_dataset_integrity", *coarse)  # fmt: skip
    plans = "nnUNetPlansSmall" if args.small else "nnUNetPlans"
    if args.small and not (preprocessed / "nnUNetPlansSmall.json").exists():
        shrink_plans(preprocessed, args.iterations)
    trainer = f"nnUNetTrainerCrossMR_{args.epochs}epochs"
    fold = work / "nnUNet_results" / dataset.name / f"{trainer}__{plans}__2d" / "fold_all"
    if not (fold / "checkpoint_final.pth").exists():
        run("nnUNetv2_train", args.dataset, "2d", "all", "-tr", trainer, "-p", plans, "-device", args.device,
            *(["--c"] if (fold / "checkpoint_latest.pth").exists() else []))  # fmt: skip

    images, truth = work / "test/images", work / "test/labels"
    if not (work / "scribbles").exists():
        run("nnunet_multimodal", "scribbles", "simulate", "--labels", truth, "-o", work / "scribbles", "--seed", "1")
    model = ["-d", args.dataset, "-c", "2d", "-tr", trainer, "-p", plans, "-f", "all"]
    if not (work / "stock").exists():
        for case in test:
            image, scribbles = images / f"{case}{ENDING}", work / "scribbles" / f"{case}{ENDING}"
            run("nnunet_multimodal", "convert", "channels", "--reference", image, "--scribbles", scribbles,
                "--targets", image, "-o", work / "channels", "-d", args.dataset)  # fmt: skip
        run("nnUNetv2_predict", "-i", work / "channels", "-o", work / "stock", *model, "-device", args.device,
            "-npp", "1", "-nps", "1")  # fmt: skip
    own = refer(work, "refer", {case: case for case in test}, images, model)
    others = dict(zip(test, test[1:] + test[:1]))
    other = refer(work, "refer_other_patient", others, images, model, "--matching", "order")

    from common import write_result

    measured = {
        "train_cases": train,
        "test_cases": test,
        "iterations": args.epochs * (args.iterations if args.small else 250),
        "dice_nnUNetv2_predict": mean_dice(work / "stock", truth, test, organs),
        "dice_refer": mean_dice(own, truth, test, organs),
        "agreement_of_the_two": mean_dice(work / "stock", own, test, organs),
        "dice_refer_other_patient": mean_dice(other, truth, test, organs),
    }
    for key, value in measured.items():
        if isinstance(value, dict):
            print(f"{key:28s} {value['mean']:.3f}  " + "  ".join(f"{k} {v:.3f}" for k, v in value["organs"].items()))
    note = f"images {args.images.resolve().parent.name}, simulated scribbles on every slice, fold all, 2d"
    print(write_result("main_job", measured, note))


if __name__ == "__main__":
    main()
