"""The model of main_job.py on an abdominal MR of another contrast and scanner, where organs are dark and fat is bright.

    python benchmarks/unseen_contrast.py main_job        (the --work folder of benchmarks/main_job.py)

Training saw ten T2-SPIR volumes with bright organs and dark fat. The image is abdomen_mr_small of ../shared/data (or
of $NNUNET_MULTIMODAL_DATA), whose labels are a model's output, not manual truth; its own scribbled slices are the
reference. Writes the picture of the README.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from main_job import dice, run, set_environment

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NNUNET_MULTIMODAL_DATA", ROOT.parent / "shared/data"))
TOTAL_MR = {"liver": 5, "right_kidney": 2, "left_kidney": 3, "spleen": 1}  # ids of TotalSegmentator's total_mr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    set_environment(work)
    model = next(work.glob("nnUNet_results/*/nnUNetTrainerCrossMR*/fold_all/checkpoint_final.pth")).parents[1]
    organs = {k: v for k, v in json.loads((model / "dataset.json").read_text(encoding="utf-8"))["labels"].items() if v}
    folder = work / "unseen"
    folder.mkdir(exist_ok=True)
    image, source = DATA / "abdomen_mr_small/image.nii.gz", nib.load(DATA / "abdomen_mr_small/labels.nii.gz")
    found = np.asarray(source.dataobj).round().astype(int)
    truth = sum(((found == TOTAL_MR[name]) * label for name, label in organs.items()), np.zeros_like(found))
    nib.save(nib.Nifti1Image(truth.astype(np.uint8), source.affine), folder / "labels.nii.gz")
    run("nnunet_multimodal", "scribbles", "simulate", "--labels", folder / "labels.nii.gz", "-o", folder / "scribbles",
        "--seed", "3")  # fmt: skip
    run("nnunet_multimodal", "refer", "--reference", image, "--scribbles", folder / "scribbles/labels.nii.gz",
        "--targets", image, "-o", folder / "out", "-m", model, "-f", "all")  # fmt: skip
    from common import write_result

    of_organs = dice(folder / "out/image.nii.gz", folder / "labels.nii.gz", organs)
    measured = {"model": model.name, "dice": of_organs, "mean": round(float(np.mean(list(of_organs.values()))), 4)}
    print(measured)
    shutil.copy(folder / "out/overlays/image.png", ROOT / "docs/refer.png")
    print(write_result("unseen_contrast", measured, "one MR, labels by TotalSegmentator, simulated scribbles"))


if __name__ == "__main__":
    main()
