"""Relabel projects on abdominal MR that start from a model trained on CT, and one that starts from nothing.

    python benchmarks/relabel_transfer.py DATA --work DIR

DATA is the folder of example images. Two models are trained on abdomen_ct: with nnUNetTrainerMRSegmentator, and with
nnUNetTrainerContrastAug, whose augmentation makes CT look like other modalities. Each then starts a project on
abdomen_mr_t2: it proposes the first batch, whose correction is the real label, and gives its weights to the first
training. The third project is given the same first batch as labels. All batches hold the same cases (``--order
first``), so that the projects can be compared. What is finished in DIR stays; run it again and it goes on.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common import write_result
from main_job import run as run_command
from main_job import set_environment
from relabel_project import TRAINER, Simulation, cases_in, shrink

CT_LABELS = {"liver": 5, "right_kidney": 2, "left_kidney": 3, "spleen": 1}
MR_LABELS = ("liver=1", "right_kidney=2", "left_kidney=3", "spleen=4")
# The same for both, so that the networks have the same stages and the weights fit.
PLAN = ("-gpu_memory_target", "1", "-overwrite_target_spacing", "7.7", "3", "3")
DATASET, NAME = "606", "Dataset606_CT"
STARTS = {"from CT": TRAINER, "from CT, ContrastAug": "nnUNetTrainerContrastAug"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ct-epochs", type=int, default=8, help="of the two models on CT")
    parser.add_argument("--iterations", type=int, default=200, help="an epoch")
    args = parser.parse_args()
    work, data = args.work.resolve(), args.data.resolve()
    set_environment(work)
    images, labels = (data / "abdomen_mr_t2" / kind for kind in ("images", "labels"))

    plan_ct(work, data, args.iterations)
    projects = {}
    for name, trainer in STARTS.items():
        model = train_ct(work, f"{trainer}_{args.ct_epochs}epochs")
        projects[name] = ((), model)
    projects["from nothing"] = (cases_in(labels)[: args.batch], None)
    measured = {}
    for name, (first, model) in projects.items():
        folder = work / re.sub(r"\W+", "_", name)
        measured[name] = Simulation(
            images=images, labels=labels, label_names=MR_LABELS, work=folder, first=first, model=model,
            batch=args.batch, cycles=args.cycles, order="first", folds=("all",), epochs=args.epochs,
            iterations=args.iterations, plan=PLAN,
        ).run()  # fmt: skip
        measured[name]["starting_model"] = said_of_the_start(folder)
    for name, result in measured.items():
        for each in result["curve"]:
            print(f"{name:22s} cycle {each['cycle']}: DSC {each['dsc']:.3f}, saved {each['saved']:.0%}")
    measured["steps_on_ct"] = args.ct_epochs * args.iterations
    note = (
        "abdomen_ct (2 volumes, perhaps of one patient, labels a model's output) and abdomen_mr_t2, 2d, 3 mm pixels; a "
        "correction is the real label; small network, short trainings, one run"
    )
    print(write_result("relabel_transfer", measured, note))


def plan_ct(work: Path, data: Path, iterations: int) -> None:
    """The CT data set by the user's commands, planned as the projects will be."""
    if not (work / "nnUNet_raw" / NAME).exists():
        run_command("nnunet_multimodal", "convert", "plain", "--images", data / "abdomen_ct/images", "--labels",
                    data / "abdomen_ct/labels", "-d", DATASET, "--name", "CT", "--channel-name", "CT_or_MR",
                    "--label-names", *(f"{name}={value}" for name, value in CT_LABELS.items()),
                    "--unnamed-to-background")  # fmt: skip
    preprocessed = work / "nnUNet_preprocessed" / NAME
    if not (preprocessed / "nnUNetPlans_2d").exists():
        run_command("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "-np", "1", "-npfp", "1", *PLAN)
        shrink(preprocessed / "nnUNetPlans.json", "2d", iterations)


def train_ct(work: Path, trainer: str) -> Path:
    """Trains on all CT volumes; the result folder."""
    model = work / "nnUNet_results" / NAME / f"{trainer}__nnUNetPlans__2d"
    fold = model / "fold_all"
    if not (fold / "checkpoint_final.pth").exists():
        more = ["--c"] if (fold / "checkpoint_latest.pth").exists() else []
        run_command("nnUNetv2_train", DATASET, "2d", "all", "-tr", trainer, "-device", "cpu", *more)
    return model


def said_of_the_start(folder: Path) -> list[str]:
    """What the first training logged of the model it started from."""
    log = folder / "project" / "logs" / "cycle_001_fold_all.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [line.strip() for line in lines if re.search(r"tensors loaded|^ +(new|skipped|outputs|inputs)\b", line)]


if __name__ == "__main__":
    main()
