"""How far may images leave what a model was trained on? ``evaluate --shift`` on phantom subjects that it never saw.

    python benchmarks/shift.py RESULT_FOLDER --work DIR [--levels 3]

RESULT_FOLDER is a 2d model of the phantom's four organs, such as compare.py phantom_table1 leaves. Subjects come from
another seed than its own; of each image the seven slices that show most organs are used, on a grid of 4 mm, so that it
is done in minutes on a CPU. Goes on where it stopped. Writes DIR/out/shift.html and benchmarks/results/shift.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from common import write_result

CONTRASTS = ("T1w", "OpposedPhase")
SLICES = 7
SHIFTS = "gamma,noise,bias,resolution,ghosting"
SEED = 77


def command(*words: str | Path) -> None:
    """``nnunet_multimodal ...``, as a user types it."""
    print("$ nnunet_multimodal", *words, flush=True)
    subprocess.run([sys.executable, "-m", "nnunet_multimodal.cli", *map(str, words)], check=True)


def cut(work: Path, subjects: int) -> None:
    """work/images/SUBJECT__CONTRAST_0000.nii.gz and its label map in work/ref, both of few slices."""
    for number, contrast in [(number, contrast) for number in range(subjects) for contrast in CONTRASTS]:
        name = f"phantom_{number:03d}"
        image, labels = (nib.load(work / f"small/{kind}/{contrast}/{name}.nii.gz") for kind in ("images", "labels"))
        array = np.asarray(labels.dataobj)
        first = max(
            range(array.shape[2] - SLICES + 1),
            key=lambda k: (
                sum(len(np.unique(array[:, :, j])) for j in range(k, k + SLICES)),
                (array[:, :, k : k + SLICES] > 0).sum(),
            ),
        )
        for source, target in ((image, f"images/{name}__{contrast}_0000"), (labels, f"ref/{name}__{contrast}")):
            path = work / f"{target}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                nib.save(source.slicer[:, :, first : first + SLICES], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("shift"))
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--shift", default=SHIFTS)
    parser.add_argument("--levels", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    command("phantom", args.work / "small", "--subjects", str(args.subjects), "--contrasts", *CONTRASTS,
            "--spacing", "4", "4", "6", "--seed", str(SEED), "-j", "1")  # fmt: skip
    cut(args.work, args.subjects)
    command("evaluate", "--shift", args.shift, "--levels", str(args.levels), "-m", args.model,
            "-i", args.work / "images", args.work / "ref", "-o", args.work / "out",
            "--modality-pattern", r"__(?P<modality>\w+)$", "--disable_tta", "-j", "1")  # fmt: skip
    content = json.loads((args.work / "out/shift.json").read_text(encoding="utf-8"))
    curves: dict[str, dict[str, list]] = {}
    for row in content["rows"]:
        if row["scope"] == "modality" and row["organ"] == "all organs":
            point = {"severity": row["severity"], "dsc": round(row["dsc_mean"], 4), "nsd": round(row["nsd_mean"], 4)}
            curves.setdefault(row["shift"], {}).setdefault(row["name"], []).append(point)
    lost = [row for row in content["lost_5_points"] if row["scope"] == "modality"]
    path = write_result(
        "shift",
        {
            "model": content["settings"]["model"],
            "weights": content["settings"]["weights"],
            "cases": content["cases"],
            "seed_of_subjects": SEED,
            "slices": SLICES,
            "labels": content["settings"]["labels"],
            "shifts": content["definitions"]["shifts"],
            "curves": curves,
            "lost_5_points": lost,
        },
        "one model, one run; few subjects and slices: it shows that it works and roughly how much",
    )
    print(path)


if __name__ == "__main__":
    main()
