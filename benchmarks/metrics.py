"""DSC, NSD, HD95 and ASD by nnunet_multimodal.evaluation.measure against four stock MONAI calls, and their differences.

Label maps of real abdomens (MR with 4 organs, CT with 61 structures) against copies whose organs were shifted, eroded,
dilated, smoothed or dropped. Both are timed in turn in one process on one thread, each from its own kind of input: ours
from two label maps, MONAI's from two one-hot volumes (making them is not timed).

    python benchmarks/metrics.py [--rounds 3] [--data ../shared/data]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it

import argparse
import warnings
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch
from common import write_result
from monai.metrics import (
    DiceMetric,
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy import ndimage
from tqdm import tqdm

from nnunet_multimodal.conversion.images import read_labels
from nnunet_multimodal.evaluation import measure
from nnunet_multimodal.evaluation.measures import STATES

TOLERANCE = 2.0
METRICS = ("dsc", "nsd", "hd95_mm", "asd_mm")
SETS = ("abdomen_mr_t2", "abdomen_ct")  # all cases, all labels


def perturb(labels: np.ndarray, spacing: tuple[float, ...], dice: np.random.Generator) -> np.ndarray:
    """Every organ is shifted, eroded or dilated by about 4 mm, smoothed, dropped or kept; later ones cover earlier."""
    result = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        mask = labels == value
        match dice.choice(["shift", "erode", "dilate", "smooth", "drop", "keep"], p=[0.25, 0.2, 0.2, 0.2, 0.05, 0.1]):
            case "shift":
                mask = np.roll(mask, np.rint(dice.uniform(-6, 6, 3) / spacing).astype(int), (0, 1, 2))
            case "erode":
                mask = ndimage.distance_transform_edt(mask, sampling=spacing) > 4
            case "dilate":
                mask = ndimage.distance_transform_edt(~mask, sampling=spacing) <= 4
            case "smooth":
                mask = ndimage.gaussian_filter(mask.astype(np.float32), 4 / np.asarray(spacing)) > 0.5
            case "drop":
                mask = np.zeros_like(mask)
        result[mask] = value
    return result


def one_hot(labels: np.ndarray, ids: list[int]) -> torch.Tensor:
    """float32 [1, 1 + K, Z, Y, X], background first."""
    return torch.from_numpy(np.stack([labels == value for value in [0, *ids]])[None].astype(np.float32))


def stock(prediction: torch.Tensor, reference: torch.Tensor, spacing: list[float]) -> np.ndarray:
    """float [K, 4]: DSC, NSD, HD95, ASD, each by MONAI's own call."""
    organs = prediction.shape[1] - 1
    dice = DiceMetric(include_background=False, reduction="none")(prediction, reference)
    nsd = compute_surface_dice(prediction, reference, [TOLERANCE] * organs, spacing=spacing)
    hd95 = compute_hausdorff_distance(prediction, reference, percentile=95, spacing=spacing)
    asd = compute_average_surface_distance(prediction, reference, symmetric=True, spacing=spacing)
    return torch.stack([dice[0], nsd[0], hd95[0], asd[0]], dim=1).double().numpy()


def compare(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], rounds: int) -> dict:
    ids = [int(value) for value in np.unique(reference) if value > 0]
    hot = one_hot(prediction, ids), one_hot(reference, ids)
    times: dict[str, list[float]] = {"ours": [], "monai": []}
    for _ in range(rounds):
        start = thread_time()
        found = measure(prediction, reference, spacing, ids, TOLERANCE)
        times["ours"].append(thread_time() - start)
        start = thread_time()
        expected = stock(*hot, list(spacing))
        times["monai"].append(thread_time() - start)
    ours = np.array([[getattr(found[value], metric) for metric in METRICS] for value in ids])
    both = np.isfinite(ours) & np.isfinite(expected)
    # Where MONAI has no number, neither may we: distances of a missed organ.
    same_gaps = bool((np.isfinite(ours) == np.isfinite(expected)).all())
    difference = np.where(both, np.abs(ours - expected), 0).max(axis=0)
    return {
        "ratio": float(np.median(times["monai"]) / np.median(times["ours"])),
        **{name: float(np.median(values)) for name, values in times.items()},
        "dsc": float(np.mean(ours[:, 0])),
        "difference": difference,
        "same_gaps": same_gaps,
        "compared": int(both.sum()),
        "states": {state: sum(m.status == state for m in found.values()) for state in STATES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    began = perf_counter()
    measured: dict = {"rounds": args.rounds, "tolerance_mm": TOLERANCE, "surface": "border"}
    for name in SETS:
        dice = np.random.default_rng(0)
        cases = []
        for path in tqdm(sorted((args.data / name / "labels").glob("*.nii.gz")), desc=name, disable=None):
            volume = read_labels(path)
            labels = np.ascontiguousarray(volume.data)
            cases.append(compare(labels, perturb(labels, volume.spacing, dice), volume.spacing, args.rounds))
        ratios = [case["ratio"] for case in cases]
        difference = np.max([case["difference"] for case in cases], axis=0)
        measured[name] = {
            "cases": len(cases),
            "monai_over_ours": {
                "median": round(float(np.median(ratios)), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
            },
            "monai_over_ours_in_all": round(sum(c["monai"] for c in cases) / sum(c["ours"] for c in cases), 2),
            "mean_dsc": round(float(np.mean([case["dsc"] for case in cases])), 3),
            "ours_ms": round(1000 * float(np.mean([case["ours"] for case in cases])), 1),
            "monai_ms": round(1000 * float(np.mean([case["monai"] for case in cases])), 1),
            "largest_difference": {metric: float(f"{d:.2g}") for metric, d in zip(METRICS, difference)},
            "values_compared": sum(case["compared"] for case in cases),
            "undefined_in_the_same_places": all(case["same_gaps"] for case in cases),
            "states": {state: sum(case["states"][state] for case in cases) for state in STATES},
        }
        if difference.max() > 1e-4 or not measured[name]["undefined_in_the_same_places"]:
            raise SystemExit(f"not the same as MONAI: {measured[name]}")
    measured["seconds"] = round(perf_counter() - began)
    measured["load_average"] = [round(load, 2) for load in os.getloadavg()]
    note = "processor time of one thread, in turn; a case's time is the median of its rounds; means over cases"
    print(write_result("metrics", measured, note).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
