"""Real images of one subject in several contrasts: train on one contrast, refer to the others.

    python benchmarks/contrasts.py spine_multicontrast     (T1w -> T2w, T2star: one subject, so its T1w was trained on)
    python benchmarks/contrasts.py brain_multicontrast     (trained on one patient's T1; T1 -> T2, FLAIR of the other)

The data sets are folders of ../shared/data (or of $NNUNET_MULTIMODAL_DATA). The contrasts share a
grid; each target is judged by its own label where it has one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from main_job import dice, link, run, set_environment, shrink_plans

DATA = Path(os.environ.get("NNUNET_MULTIMODAL_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
# data set: (organ, reference contrast, target contrasts, training subjects, test subjects, spacing z y x in mm or None)
SETS = {
    # 1.01: the pixels are cubes, and nnU-Net's 2d slices are to be axial
    "spine_multicontrast": ("spinal_cord", "T1w", ("T1w", "T2w", "T2star"), None, None, ("1.01", "1", "1")),
    "brain_multicontrast": ("lesion", "T1", ("T1", "T2", "FLAIR"), ("ms07",), ("ms19",), ("1.5", "1.5", "1.5")),
}


def label(source: Path, subject: str, contrast: str) -> Path:
    """The label of a contrast, or the one that all contrasts of the subject share."""
    own = source / f"labels/{subject}_{contrast}.nii.gz"
    return own if own.exists() else source / f"labels/{subject}.nii.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--work", type=Path, default=Path("contrasts"))
    parser.add_argument("-d", "--dataset", default="611")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=100)
    args = parser.parse_args()
    organ, reference, targets, train, test, spacing = SETS[args.set]
    source = DATA / args.set
    work = (args.work / args.set).resolve()
    set_environment(work)
    subjects = sorted(p.name.removesuffix(f"_{reference}.nii.gz") for p in source.glob(f"images/*_{reference}.nii.gz"))
    for subject in train or subjects:
        link(source / f"images/{subject}_{reference}.nii.gz", work / f"train/images/{subject}.nii.gz")
        link(label(source, subject, reference), work / f"train/labels/{subject}.nii.gz")
    for subject in test or subjects:
        link(label(source, subject, reference), work / f"test/labels/{subject}.nii.gz")
        for contrast in targets:
            link(source / f"images/{subject}_{contrast}.nii.gz", work / f"subjects/{subject}/{contrast}.nii.gz")
        link(source / f"images/{subject}_{reference}.nii.gz", work / f"subjects/{subject}/reference.nii.gz")
    if not list((work / "nnUNet_raw").glob("Dataset*")):
        run("nnunet_multimodal", "convert", "crossmr", "--reference-images", work / "train/images",
            "--labels", work / "train/labels", "-d", args.dataset, "--name", "Contrasts",
            "--label-names", f"{organ}=1")  # fmt: skip
    preprocessed = work / "nnUNet_preprocessed" / f"Dataset{args.dataset}_Contrasts"
    if not (preprocessed / "nnUNetPlansSmall.json").exists():
        coarse = ["-overwrite_target_spacing", *spacing] if spacing else []
        run("nnUNetv2_plan_and_preprocess", "-d", args.dataset, "-c", "2d", "-np", "1", "-npfp", "1",
            "-gpu_memory_target", "1", *coarse)  # fmt: skip
        shrink_plans(preprocessed, args.iterations)
    trainer = f"nnUNetTrainerCrossMR_{args.epochs}epochs"
    model = ["-d", args.dataset, "-c", "2d", "-tr", trainer, "-p", "nnUNetPlansSmall", "-f", "all"]
    if not list((work / "nnUNet_results").glob(f"*/{trainer}__*/fold_all/checkpoint_final.pth")):
        run("nnUNetv2_train", args.dataset, "2d", "all", *model[4:8], "-device", "cpu")
    for subject in test or subjects:
        scribbles = work / f"subjects/{subject}/scribbles.nii.gz"
        if not scribbles.exists():
            run("nnunet_multimodal", "scribbles", "simulate", "--labels", work / "test/labels", "-o",
                work / "scribbles", "--seed", "1")  # fmt: skip
            link(work / f"scribbles/{subject}.nii.gz", scribbles)
    run("nnunet_multimodal", "refer", "--subjects", work / "subjects", "-o", work / "out", *model)

    from common import write_result

    measured = {
        "trained_on": f"{reference} of {', '.join(train or subjects)}",
        "iterations": args.epochs * args.iterations,
        "dice": {
            f"{subject} {reference} -> {contrast}": dice(
                work / f"out/{subject}/{contrast}.nii.gz", label(source, subject, contrast), {organ: 1}
            )[organ]
            for subject in test or subjects
            for contrast in targets
        },
    }
    for pair, value in measured["dice"].items():
        print(f"{pair:32s} {value:.3f}")
    print(write_result(f"contrasts_{args.set}", measured, "2d, fold all, simulated scribbles on every slice"))


if __name__ == "__main__":
    main()
