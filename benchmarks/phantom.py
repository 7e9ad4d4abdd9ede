"""Does the phantom look like an abdomen? A picture, its contrast against what is published and measured, its cost.

    python benchmarks/phantom.py [--subjects 20] [--data ../shared/data]

Measures the mean signal of the organs relative to the liver's in every contrast, and puts beside it (1) what the signal
equations make of the published relaxation times, and (2) where there are real images, the same ratio in those: T2w of
14 patients (T2-SPIR, another echo time: the order of the organs is what can be compared), CT numbers of one patient.
Writes docs/phantom.png and benchmarks/results/phantom.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from common import write_result
from scipy import ndimage

from nnunet_multimodal.data.phantom import CONTRASTS, ORGANS, PhantomOptions, subject_name, write_phantom
from nnunet_multimodal.data.phantom.signal import tissue_signal
from nnunet_multimodal.data.phantom.tissues import TISSUES

REPOSITORY = Path(__file__).resolve().parents[1]
LEVELS = (-45.0, -10.0, 30.0)  # mm along the body that the picture shows
COMPOSITION = {  # what an organ's label is made of, for the expected signal
    "liver": {"liver": 1.0},
    "spleen": {"spleen": 1.0},
    "right_kidney": {"renal_cortex": 0.6, "renal_medulla": 0.4},
    "left_kidney": {"renal_cortex": 0.6, "renal_medulla": 0.4},
}


def organ_means(image: np.ndarray, labels: np.ndarray, numbers: dict[str, int]) -> dict[str, float]:
    """Median inside each organ, two pixels away from its border in the slice."""
    plane = np.ones((5, 5, 1), bool)
    return {
        name: float(np.median(image[ndimage.binary_erosion(labels == number, plane)]))
        for name, number in numbers.items()
    }


def measured(folder: Path, subjects: list[str], contrast: str) -> dict[str, list[float]]:
    """Ratio to the liver of every subject and organ; in CT the difference in HU."""
    ratios: dict[str, list[float]] = {name: [] for name in ORGANS}
    for subject in subjects:
        image, labels = (
            np.asarray(nib.load(folder / kind / contrast / f"{subject}.nii.gz").dataobj)
            for kind in ("images", "labels")
        )
        means = organ_means(image, labels, ORGANS)
        for name, value in means.items():
            ratios[name].append(value if contrast == "CT" else value / means["liver"])
    return ratios


def expected(contrast: str) -> dict[str, float]:
    """The same from the published numbers, without coil, noise and fat-water borders."""
    signals = {
        organ: sum(
            share * abs(tissue_signal(TISSUES[tissue], TISSUES["fat"], CONTRASTS[contrast]))
            * (1 if contrast != "CT" else np.sign(TISSUES[tissue].hu))
            for tissue, share in parts.items()
        )
        for organ, parts in COMPOSITION.items()
    }  # fmt: skip
    return {o: round(s if contrast == "CT" else s / signals["liver"], 3) for o, s in signals.items()}


def real_images(data: Path) -> dict[str, dict[str, str]]:
    """The same in real images, where they are there."""
    found: dict[str, dict[str, str]] = {}
    folder = data / "abdomen_mr_t2"
    if folder.is_dir():
        ratios: dict[str, list[float]] = {name: [] for name in ORGANS}
        for path in sorted((folder / "images").glob("*.nii.gz")):
            means = organ_means(
                np.asarray(nib.load(path).dataobj), np.asarray(nib.load(folder / "labels" / path.name).dataobj), ORGANS
            )
            for name, value in means.items():
                ratios[name].append(value / means["liver"])
        found["T2-SPIR MR, 14 patients, relative to liver"] = {name: spread(v) for name, v in ratios.items()}
    folder = data / "abdomen_ct"
    if folder.is_dir():
        path = sorted((folder / "images").glob("*.nii.gz"))[0]
        numbers = {"liver": 5, "spleen": 1, "right_kidney": 2, "left_kidney": 3}
        means = organ_means(
            np.asarray(nib.load(path).dataobj), np.asarray(nib.load(folder / "labels" / path.name).dataobj), numbers
        )
        found["CT, one patient, HU"] = {name: f"{value:.0f}" for name, value in means.items()}
    return found


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} +- {np.std(values):.2f}"


def picture(folder: Path, subject: str, output: Path) -> None:
    """All contrasts side by side at three levels, and the labels on T1w."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [*CONTRASTS, "labels"]
    figure, axes = plt.subplots(len(LEVELS), len(columns), figsize=(2.1 * len(columns), 1.62 * len(LEVELS)), dpi=100)
    for column, name in enumerate(columns):
        contrast = "T1w" if name == "labels" else name
        image = nib.load(folder / "images" / contrast / f"{subject}.nii.gz")
        labels = np.asarray(nib.load(folder / "labels" / contrast / f"{subject}.nii.gz").dataobj)
        voxels = np.asarray(image.dataobj)
        low, high = (-160, 240) if name == "CT" else (0, np.percentile(voxels, 99.5))
        for row, level in enumerate(LEVELS):
            axis = axes[row, column]
            at = int(np.clip(round((level - image.affine[2, 3]) / image.affine[2, 2]), 0, voxels.shape[2] - 1))
            # the patient's right at the picture's left, front on top
            axis.imshow(voxels[::-1, ::-1, at].T, cmap="gray", vmin=low, vmax=high, aspect="equal")
            if name == "labels":
                shown = np.ma.masked_equal(labels[::-1, ::-1, at].T, 0)
                axis.imshow(shown, cmap="tab10", vmin=1, vmax=10, alpha=0.6, interpolation="nearest")
            axis.set_axis_off()
        axes[0, column].set_title(name, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.94, 0.01, 0.01)
    output.parent.mkdir(exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--show", default="phantom_001", help="subject of the picture")
    args = parser.parse_args()
    options = PhantomOptions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin, processor = time.perf_counter(), sum(os.times()[:4])
        subjects = list(write_phantom(folder, args.subjects, options, args.processes))
        seconds, busy = time.perf_counter() - begin, sum(os.times()[:4]) - processor
        list(write_phantom(folder / "again", 1, options))
        first = subject_name(0)
        same = all(
            hashlib.sha256((folder / p).read_bytes()).digest()
            == hashlib.sha256((folder / "again" / p).read_bytes()).digest()
            for p in (f"{kind}/{contrast}/{first}.nii.gz" for kind in ("images", "labels") for contrast in CONTRASTS)
        )
        table = {}
        for contrast in CONTRASTS:
            ratios = measured(folder, subjects, contrast)
            table[contrast] = {
                organ: {"phantom": spread(values), "equations": expected(contrast)[organ]}
                for organ, values in ratios.items()
            }
        picture(folder, args.show if args.show in subjects else first, REPOSITORY / "docs/phantom.png")
    result = {
        "subjects": args.subjects,
        "contrasts": list(CONTRASTS),
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "processes": args.processes,
        "same_seed_same_bytes": same,
        "organ_signal_relative_to_liver_or_HU": table,
        "real": real_images(args.data),
    }
    for contrast, organs in table.items():
        print(contrast, "  ".join(f"{o} {v['phantom']} (equations {v['equations']})" for o, v in organs.items()))
    for what, values in result["real"].items():
        print(what, values)
    note = "means over subjects +- sd of the median inside each organ, default size, spacing, noise and motion"
    print(f"{seconds:.0f} s, {busy:.0f} s of processor; same bytes: {same};", write_result("phantom", result, note))


if __name__ == "__main__":
    main()
