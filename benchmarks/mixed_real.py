"""Real CT and MR in one network, by the commands a user types: it goes through, and recognises the modality.

    python benchmarks/mixed_real.py DATA --work DIR

DATA is the folder of example images (abdomen_ct and abdomen_mr_t2; others below it are only asked for their modality).
Trains nnUNetTrainerMulModSeg in 2d on the first CT and the first MR patients, then predicts the kept ones with
nnUNetv2_predict and with `nnunet_multimodal predict`, inferred and told. The two CT volumes may be of one patient, and
their labels are another model's output: the figures of CT show that real CT goes through, not how good the method is.
What is there from an earlier run is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from common import write_result
from main_job import ENDING, link, mean_dice, run, set_environment, shrink_plans

DATASET, NAME = "602", "Dataset602_Mixed"
TRAINER, PLANS = "nnUNetTrainerMulModSeg", "nnUNetPlansSmall"
LABELS = {
    "CT": {"liver": 5, "right_kidney": 2, "left_kidney": 3, "spleen": 1},
    "MR": {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4},
}
ORGANS = {organ: value for value, organ in enumerate(LABELS["CT"], start=1)}
SOURCES = {"CT": "abdomen_ct", "MR": "abdomen_mr_t2"}
# Never trained on, of other scanners and labels: only whether the modality is recognised.
OTHERS = {"spleen_ct": "CT", "abdomen_mr_small": "MR"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("mixed_real"))
    parser.add_argument("--test", type=int, default=4, help="MR patients kept for testing; of CT, one")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=100, help="per epoch")
    args = parser.parse_args()
    work, data = args.work.resolve(), args.data.resolve()
    set_environment(work)

    train, test = split(data, args.test)
    for modality, cases in train.items():
        for case in cases:
            for kind in ("images", "labels"):
                link(data / SOURCES[modality] / kind / f"{case}{ENDING}", work / modality / kind / f"{case}{ENDING}")
    modality_of = {case: modality for modality, cases in test.items() for case in cases}
    for case, modality in modality_of.items():
        link(data / SOURCES[modality] / "images" / f"{case}{ENDING}", work / "inputs" / f"{case}_0000{ENDING}")
        renumber(data / SOURCES[modality] / "labels" / f"{case}{ENDING}", LABELS[modality], work / "truth")

    plan(work, args.iterations)
    fold = work / "nnUNet_results" / NAME / f"{TRAINER}_{args.epochs}epochs__{PLANS}__2d" / "fold_all"
    trainer = f"{TRAINER}_{args.epochs}epochs"
    if not (fold / "checkpoint_final.pth").exists():
        run("nnUNetv2_train", DATASET, "2d", "all", "-tr", trainer, "-p", PLANS, "-device", "cpu",
            *(["--c"] if (fold / "checkpoint_latest.pth").exists() else []))  # fmt: skip
    model = ("-d", DATASET, "-c", "2d", "-tr", trainer, "-p", PLANS, "-f", "all", "-device", "cpu")
    (work / "told.json").write_text(json.dumps(modality_of), encoding="utf-8")
    wrong = {case: "MR" if modality == "CT" else "CT" for case, modality in modality_of.items()}
    (work / "told_wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    if not (work / "stock/predict_from_raw_data_args.json").exists():
        run("nnUNetv2_predict", "-i", work / "inputs", "-o", work / "stock", *model, "-npp", "1", "-nps", "1")
    for output, more in {
        "inferred": (),
        "told": ("--modality-map", work / "told.json"),
        "told_wrong": ("--modality-map", work / "told_wrong.json"),
    }.items():
        run("nnunet_multimodal", "predict", "-i", work / "inputs", "-o", work / output, *model,
            "--continue_prediction", *more)  # fmt: skip

    # All real images: those trained on, those kept, and those of other sources.
    everything = {case: modality for cases in (train, test) for modality, names in cases.items() for case in names}
    for case, modality in everything.items():
        link(data / SOURCES[modality] / "images" / f"{case}{ENDING}", work / "all" / f"{case}_0000{ENDING}")
    for folder, modality in OTHERS.items():
        image = next((path for path in sorted((data / folder).rglob(f"*{ENDING}")) if "label" not in str(path)), None)
        if image is not None:
            link(image, work / "all" / f"{folder}_0000{ENDING}")
            everything[folder] = modality
    run("nnunet_multimodal", "predict", "-i", work / "all", "-o", work / "all_found", *model, "--continue_prediction",
        "--disable_tta")  # fmt: skip

    found = json.loads((work / "all_found/predictions.json").read_text(encoding="utf-8"))["cases"]
    recognised = {
        case: {
            "is": modality,
            "inferred": found[case]["modality"],
            "confidence": found[case]["confidence"],
            "network alone": found[case]["network"],
            "trained on": case in [name for names in train.values() for name in names],
        }
        for case, modality in sorted(everything.items())
    }
    measured = {
        "train_cases": train,
        "test_cases": test,
        "steps": args.epochs * args.iterations,
        **{
            f"dice_{output}": {
                modality: mean_dice(work / output, work / "truth", cases, ORGANS) for modality, cases in test.items()
            }
            for output in ("stock", "inferred", "told", "told_wrong")
        },
        "modality_recognised": share_right(recognised, "inferred"),
        "by_the_network_alone": share_right(recognised, "network alone"),
        "images": recognised,
    }
    for output in ("stock", "inferred", "told", "told_wrong"):
        for modality, value in measured[f"dice_{output}"].items():
            organs = "  ".join(f"{k} {v:.3f}" for k, v in value["organs"].items())
            print(f"{output:10s} {modality}  {value['mean']:.3f}  {organs}")
    print("modality recognised:", measured["modality_recognised"], "by the network alone:",
          measured["by_the_network_alone"])  # fmt: skip
    note = (
        "abdomen_ct and abdomen_mr_t2, 2d, 3 mm pixels, half of nnU-Net's features, batch 6, fold all; one-hot text. "
        "stock: nnUNetv2_predict. The CT volumes may be of one patient and their labels are a model's output"
    )
    print(write_result("mixed_real", measured, note))


def split(data: Path, kept: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Cases to train on and to test, by modality."""
    train, test = {}, {}
    for modality, folder in SOURCES.items():
        cases = sorted(path.name.removesuffix(ENDING) for path in (data / folder / "images").glob(f"*{ENDING}"))
        last = 1 if modality == "CT" else kept
        train[modality], test[modality] = cases[:-last], cases[-last:]
    return train, test


def share_right(images: dict[str, dict[str, object]], key: str) -> str:
    return f"{sum(image['is'] == image[key] for image in images.values())} of {len(images)}"


def renumber(source: Path, labels: dict[str, int], folder: Path) -> None:
    """The data set's labels in place of the source's."""
    target = folder / source.name
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.load(source)
    data = np.asarray(image.dataobj)
    new = np.zeros(data.shape, np.uint8)
    for organ, value in labels.items():
        new[data == value] = ORGANS[organ]
    nib.save(nib.Nifti1Image(new, image.affine), target)


def plan(work: Path, iterations: int) -> None:
    """One data set, planned at 3 mm, with a network that two CPU cores can train."""
    if not (work / "nnUNet_raw" / NAME).exists():
        names = [f"{modality}:{organ}={value}" for modality, of in LABELS.items() for organ, value in of.items()]
        folders = ([f"{modality}={work / modality / kind}" for modality in SOURCES] for kind in ("images", "labels"))
        images, labels = folders
        run("nnunet_multimodal", "convert", "mixed", "--images", *images, "--labels", *labels, "-d", DATASET,
            "--label-names", *names, "--unnamed-to-background")  # fmt: skip
    preprocessed = work / "nnUNet_preprocessed" / NAME
    if not (preprocessed / "nnUNetPlans_2d").exists():
        run("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "-np", "2", "-npfp", "2",
            "--verify_dataset_integrity", "-gpu_memory_target", "1",
            "-overwrite_target_spacing", "5", "3", "3")  # fmt: skip
    if not (preprocessed / f"{PLANS}.json").exists():
        shrink_plans(preprocessed, iterations)


if __name__ == "__main__":
    main()
