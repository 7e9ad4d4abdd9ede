"""What simulated scribbles and the contrast chains cost beside nnU-Net's own training augmentation.

Four scribbles on a slice of real organs against one stock 2d augmentation sample, and TargetContrast and
ReferenceContrast against the stock intensity transforms, timed in turn in one process on one thread. What counts is the
processor time of that thread, so that a busy machine slows all of them alike. A ratio is one of means: what a transform
costs differs from draw to draw.

    python benchmarks/scribbles.py [--rounds 400] [--data ../shared/data]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it

import argparse
from collections.abc import Callable
from pathlib import Path
from time import thread_time

import nibabel
import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from common import write_result
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tqdm import tqdm

from nnunet_multimodal.data.contrast import ReferenceContrast, TargetContrast
from nnunet_multimodal.data.pairs import ReferenceJitter, ReferringPair
from nnunet_multimodal.data.scribbles import simulate_scribble

ORGANS = (1, 2, 3, 4)  # liver, right kidney, left kidney, spleen
PATCH = (256, 256)
ROTATION = (-np.pi, np.pi)  # nnU-Net's for a square 2d patch
INTENSITY = slice(1, 8)  # of the stock transforms: from noise to gamma, after the spatial one
INTENSITY_SHAPES = ((256, 256), (96, 96), (64, 128, 128))
BLOCKS = 20  # the rounds are cut into so many, and the ratio of each is one measurement


def stock_transforms(patch: tuple[int, ...]) -> ComposeTransforms:
    """nnU-Net's training transforms with the deep supervision of a small 2d network."""
    scales = [[1 / 2**level] * len(patch) for level in range(6)]
    return nnUNetTrainer.get_training_transforms(np.array(patch), ROTATION, scales, tuple(range(len(patch))), False)


def stock_intensity(patch: tuple[int, ...]) -> ComposeTransforms:
    """Those of them that change intensities."""
    return ComposeTransforms(stock_transforms(patch).transforms[INTENSITY])


def real_slices(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, labels) of every slice [256, 256] that holds all four organs, the image z-scored by case."""
    slices = []
    for path in sorted((folder / "labels").glob("*.nii.gz")):
        image = nibabel.load(folder / "images" / path.name).get_fdata(dtype=np.float32)
        labels = np.asanyarray(nibabel.load(path).dataobj).astype(np.int16)
        image = (image - image.mean()) / image.std()
        for z in range(labels.shape[2]):
            if set(ORGANS) <= set(np.unique(labels[..., z])):
                slices.append((image[..., z].T.copy(), labels[..., z].T.copy()))
    return slices


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int, title: str) -> dict[str, np.ndarray]:
    """Processor milliseconds [rounds] of each task, taken in turn; the first tenth only warms up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds + rounds // 10), desc=title, leave=False):
        for name, task in tasks.items():
            start = thread_time()
            task()
            times[name].append(1000 * (thread_time() - start))
    return {name: np.array(values[rounds // 10 :]) for name, values in times.items()}


def summary(times: dict[str, np.ndarray], against: str) -> dict[str, dict[str, float]]:
    """Mean and median time of each task, and the median over blocks of its mean time relative to ``against``."""

    def blocks(values: np.ndarray) -> np.ndarray:
        return np.array([block.mean() for block in np.array_split(values, BLOCKS)])

    return {
        name: {
            "mean_ms": round(float(values.mean()), 4),
            "median_ms": round(float(np.median(values)), 4),
            "ratio_median": round(float(np.median(blocks(values) / blocks(times[against]))), 3),
        }
        for name, values in times.items()
    }


def scribble_cost(slices: list[tuple[np.ndarray, np.ndarray]], rounds: int) -> dict:
    dice = np.random.default_rng(0)
    stock, contrast = stock_transforms(PATCH), stock_transforms(PATCH)
    contrast.transforms[INTENSITY] = [TargetContrast()]
    pair = ReferringPair(ORGANS, TargetContrast(), ReferenceContrast(), ReferenceJitter())
    # nnU-Net loads more than the patch, so that rotated and zoomed patches are filled
    initial = get_patch_size(PATCH, ROTATION, ROTATION, ROTATION, (0.85, 1.25))
    margin = [((n - 256) // 2, n - 256 - (n - 256) // 2) for n in initial]
    padded = [(np.pad(image, margin), np.pad(labels, margin)) for image, labels in slices]

    def one(source: list) -> tuple[np.ndarray, np.ndarray]:
        return source[dice.integers(len(source))]

    def scribbles() -> None:
        labels = one(slices)[1]
        for organ in ORGANS:
            simulate_scribble(labels == organ, dice)

    def sample(transform, source: list) -> None:
        image, labels = one(source)
        transform(image=torch.from_numpy(image.copy())[None], segmentation=torch.from_numpy(labels.copy())[None])

    times = interleaved(
        {
            "stock 2d augmentation sample": lambda: sample(stock, padded),
            "the same with TargetContrast instead of its intensities": lambda: sample(contrast, padded),
            "four scribbles": scribbles,
            "referring pair (jitter, two chains, four scribbles)": lambda: sample(pair, slices),
        },
        rounds,
        "scribbles",
    )
    return {"initial_patch_size": [int(n) for n in initial], **summary(times, "stock 2d augmentation sample")}


def chain_cost(shape: tuple[int, ...], rounds: int) -> dict:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32))
    chains = {
        "stock intensity chain": stock_intensity(shape),
        "TargetContrast": TargetContrast(),
        "ReferenceContrast": ReferenceContrast(),
    }
    tasks = {name: (lambda chain=chain: chain(image=image.clone())) for name, chain in chains.items()}
    return summary(interleaved(tasks, rounds, f"chains {shape}"), "stock intensity chain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)

    slices = real_slices(args.data / "abdomen_mr_t2")
    measured = {
        "slices": len(slices),
        "rounds": args.rounds,
        "scribbles": scribble_cost(slices, args.rounds),
        "chains": {
            "x".join(map(str, shape)): chain_cost(shape, args.rounds if len(shape) == 2 else args.rounds // 4)
            for shape in INTENSITY_SHAPES
        },
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    note = "processor time of one thread, tasks in turn; ratio_median: of 20 blocks, mean / mean of the stock"
    print(write_result("scribbles", measured, note).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
