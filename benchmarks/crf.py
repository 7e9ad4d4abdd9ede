"""The CRF losses against the same sum in the way of public code, which unfolds the image: a copy for each neighbour.

    python benchmarks/crf.py [--rounds 5] [--data ../shared/data]

A step is forward and backward, window 11 x 11, on one thread, in 2d [12, C, 256, 256] and in three views
[2, C, 32, 128, 128], C = 4 and 14. Unfolding does not fit a usual machine at these sizes (4 GB and up for each view);
it works on as much as takes one to two GB, and time and memory for each voxel are compared. The two take turns in one
process, and what counts is processor time, for other work on the machine slows both. Peak memory is that of a process
of its own beyond the inputs, gradient included.

Differences in value and gradient are measured, too: against a loop over neighbours in double precision, and, for the
gradient, against unfolding, whose value counts neighbours outside the image as a constant.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time

import nibabel
import torch
from common import write_result
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.losses import GatedCRFLoss, MultiViewCRFLoss

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RADIUS, SIGMA_XY, SIGMA_INTENSITY = 5, 6.0, 0.1
OURS, UNFOLD = "ours", "unfold"
SHAPES = {"2d": (12, 256, 256), "3d": (2, 32, 128, 128)}
UNFOLDED = {
    ("2d", 4): (3, 256, 256),
    ("2d", 14): (1, 256, 256),
    ("3d", 4): (1, 32, 64, 64),
    ("3d", 14): (1, 16, 64, 64),
}
CLASSES = (4, 14)
# uniform: noise in [0, 1]. noise: the same with mean 0 and deviation 1. real: T2 MR, mean 0 and deviation 1 by case
IMAGES = ("uniform", "noise", "real")


def unfold_2d(p: Tensor, image: Tensor) -> Tensor:
    """Sum over ordered pairs in the window of K (1 - p.p), by pixel; what is outside the image has p = 0."""
    batch, _, height, width = p.shape
    side = 2 * RADIUS + 1

    def neighbours(x: Tensor) -> Tensor:
        return F.unfold(x, side, padding=RADIUS).view(batch, x.shape[1], side * side, height, width)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns]).to(p.dtype).expand(batch, -1, -1, -1) / SIGMA_XY
    features = torch.cat([place, image / SIGMA_INTENSITY], 1)
    weight = (-0.5 * (neighbours(features) - features.unsqueeze(2)) ** 2).sum(1, keepdim=True).exp()
    weight[:, :, side * side // 2] = 0
    product = (weight * neighbours(p)).sum(2)
    return (weight.sum() - (product * p).sum()) / (batch * height * width)


def views(x: Tensor) -> list[Tensor]:
    """The axial, coronal and sagittal slices of [B, C, Z, Y, X], each as a batch of images."""
    return [x.movedim(axis, 1).flatten(0, 1) for axis in (2, 3, 4)]


def unfold_step(p: Tensor, image: Tensor) -> None:
    if p.ndim == 4:
        unfold_2d(p, image).backward()
    else:  # view after view, so that only one of three graphs is held
        for n in range(3):
            (unfold_2d(views(p)[n], views(image)[n]) / 3).backward()


def our_step(p: Tensor, image: Tensor) -> None:
    loss = GatedCRFLoss(radius=RADIUS) if p.ndim == 4 else MultiViewCRFLoss(radius=RADIUS)
    loss(p, image).backward()


STEPS: dict[str, Callable[[Tensor, Tensor], None]] = {OURS: our_step, UNFOLD: unfold_step}


def inputs(name: str, way: str, classes: int, kind: str = "uniform", data: Path | None = None) -> tuple[Tensor, Tensor]:
    batch, *size = SHAPES[name] if way == OURS else UNFOLDED[name, classes]
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(batch, classes, *size, generator=draw).softmax(1).requires_grad_()
    if kind == "real":
        return p, real_images(data, batch, size)
    image = torch.rand(batch, 1, *size, generator=draw)
    return p, image if kind == "uniform" else (image - 0.5) * math.sqrt(12)


def real_images(folder: Path, batch: int, size: list[int]) -> Tensor:
    """The middle of the first cases of abdomen_mr_t2, [batch, 1, ...size]: of slices in 2d, of volumes in 3d."""
    images: list[Tensor] = []
    for path in sorted((folder / "abdomen_mr_t2/images").glob("*.nii.gz")):
        volume = torch.from_numpy(nibabel.load(path).get_fdata(dtype="float32")).permute(2, 1, 0)
        volume = (volume - volume.mean()) / volume.std()
        depth = size[0] if len(size) == 3 else 4
        if len(volume) >= depth and len(images) < batch:
            middle = [
                slice((n - want) // 2, (n - want) // 2 + want) for n, want in zip(volume.shape, (depth, *size[-2:]))
            ]
            images += [volume[tuple(middle)]] if len(size) == 3 else volume[tuple(middle)].unbind()
    return torch.stack(images[:batch]).unsqueeze(1).contiguous()


def measure_times(name: str, classes: int, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Nanoseconds of processor time for each voxel, medians, the two in turn; one round before does not count."""
    given = {way: inputs(name, way, classes, kind, args.data) for way in STEPS}
    times: dict[str, list[float]] = {way: [] for way in STEPS}
    for number in range(args.rounds + 1):
        for way, step in STEPS.items():
            p, image = given[way]
            p.grad = None
            begin = process_time()
            step(p, image)
            took = process_time() - begin
            times[way] += [took * 1e9 * classes / p.numel()] if number else []
    ratios = [slow / fast for slow, fast in zip(times[UNFOLD], times[OURS])]
    return {
        **{f"{way}_ns_per_voxel": round(statistics.median(values), 1) for way, values in times.items()},
        "ratio": round(statistics.median(ratios), 1),
        "ratio_min": round(min(ratios), 1),
        "ratio_max": round(max(ratios), 1),
    }


def resident(what: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most it has held, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def print_peak(way: str, name: str, classes: int) -> None:
    """Prints how many bytes a step takes beyond its inputs, as multiple of the probabilities and for each voxel."""
    small = torch.rand(1, classes, *(8 for _ in SHAPES[name][1:])).requires_grad_()
    STEPS[way](small, torch.rand(1, 1, *small.shape[2:]))  # libraries load what they need
    p, image = inputs(name, way, classes)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident("VmRSS")
    STEPS[way](p, image)
    extra = resident("VmHWM") - before
    print(json.dumps({"extra_over_p": extra / (4 * p.numel()), "bytes_per_voxel": extra * classes / p.numel()}))


def measure_memory(name: str, classes: int) -> dict[str, float]:
    result = {}
    for way in STEPS:
        command = [sys.executable, __file__, "--peak-of", way, name, str(classes)]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result |= {f"{way}_{key}": round(value, 2) for key, value in done.items()}
    return result


def largest_differences() -> dict[str, float]:
    """On a small image: of our value and gradient from a loop in double precision, of our gradient from unfolding."""
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(2, 4, 40, 37, generator=draw).softmax(1).requires_grad_()
    image = torch.rand(2, 1, 40, 37, generator=draw)
    loss = GatedCRFLoss(radius=RADIUS)(p, image)
    (ours,) = torch.autograd.grad(loss, p)
    exact, exact_image = p.detach().double().requires_grad_(), image.double()
    total = torch.zeros((), dtype=torch.float64)
    for dy, dx in itertools.product(range(-RADIUS, RADIUS + 1), repeat=2):
        if (dy, dx) != (0, 0):
            here = (..., slice(max(0, -dy), 40 - max(0, dy)), slice(max(0, -dx), 37 - max(0, dx)))
            there = (..., slice(max(0, dy), 40 - max(0, -dy)), slice(max(0, dx), 37 - max(0, -dx)))
            far = (dy**2 + dx**2) / (2 * SIGMA_XY**2)
            step = (exact_image[here] - exact_image[there]) ** 2 / (2 * SIGMA_INTENSITY**2)
            weight = torch.exp(-far - step)
            total = total + (weight * (1 - (exact[here] * exact[there]).sum(1, keepdim=True))).sum()
    total = total / (2 * 40 * 37)
    (slope,) = torch.autograd.grad(total, exact)
    unfolded, with_border = torch.autograd.grad(unfold_2d(p, image), p)[0], unfold_2d(p, image)
    scale = slope.abs().max()
    return {
        "value_relative": abs(loss.item() - total.item()) / total.item(),
        "gradient_over_largest": ((ours - slope).abs().max() / scale).item(),
        "gradient_to_unfold_over_largest": ((ours - unfolded).abs().max() / scale).item(),
        "value": total.item(),
        "value_of_unfold_with_its_border": with_border.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA, help="real images; left out if missing")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        way, name, classes = args.peak_of
        print_peak(way, name, int(classes))
        return
    result: dict[str, object] = {"differences": largest_differences()}
    print(json.dumps(result))
    for name, classes in itertools.product(SHAPES, CLASSES):
        found: dict[str, object] = {"ours": [*SHAPES[name]], "unfold": [*UNFOLDED[name, classes]]}
        kinds = IMAGES if args.data.is_dir() else IMAGES[:2]
        found |= {kind: measure_times(name, classes, kind, args) for kind in kinds}
        found["memory"] = measure_memory(name, classes)
        print(name, classes, json.dumps(found))
        result[f"{name}_{classes}_classes"] = found
    note = (
        "forward and backward, radius 5, one kernel; processor time, in turn; shapes are [B, ...size]; uniform: image "
        "in [0, 1]; noise: the same with mean 0 and deviation 1; real: T2 MR slices, mean 0 and deviation 1 by case; "
        "extra_over_p: peak beyond the inputs, gradient included, as multiple of the probabilities, in a process "
        "of its own"
    )
    print(write_result("crf", result, note))


if __name__ == "__main__":
    main()
