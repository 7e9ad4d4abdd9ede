"""Time and memory of a training step of LoRA and of a mixture of adapters against full fine-tuning, same batches.

    python benchmarks/lora_step.py 2d --batch 2 --patch 128
    python benchmarks/lora_step.py 3d

Random images and nnU-Net's networks of conditioned_step.py. Full fine-tuning is nnUNetTrainer's step. The trainers take
turns, step by step, in one process; ratios are of medians. Peak memory is that of a process of its own for each. The
prediction of LoRA is timed as it is trained, and merged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from common import write_result
from conditioned_step import SHAPES, build, most_memory, random_batch, seconds_of

from nnunet_multimodal.networks.lora import merge_lora

FULL, PREDICTED, CLASSES = "full", "LoRA r=8", 14  # those two are always among the ways
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    FULL: ("nnUNetTrainer", {}),
    "LoRA r=4": ("nnUNetTrainerLoRA", {"rank": 4}),
    PREDICTED: ("nnUNetTrainerLoRA", {"rank": 8}),
    "LoRA r=16": ("nnUNetTrainerLoRA", {"rank": 16}),
    "LoRA r=8, decoder": ("nnUNetTrainerLoRA", {"rank": 8, "adapted_layers": r"^decoder\.(stages|transpconvs)"}),
    "MoA r=8": ("nnUNetTrainerMoA", {"rank": 8, "base_modalities": ["CT"]}),
}


def make(way: str, shape: dict[str, Any], device: str) -> Any:
    name, settings = WAYS[way]
    return build(name, shape, CLASSES, device, settings)


def batch_of(way: str, trainer: Any, shape: dict[str, Any], number: int) -> dict[str, Any]:
    """The same for all; a mixture adapts MR."""
    torch.manual_seed(number)
    batch = random_batch(trainer, shape, CLASSES, number)
    return batch | {"keys": ["mr"] * shape["batch"]}


def peak(way: str, shape: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the most memory, in bytes, that two steps take beyond what the process had before."""
    before = most_memory()
    trainer = make(way, shape, args.device)
    for number in range(2):
        trainer.train_step(batch_of(way, trainer, shape, number))
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else most_memory() - before)


def peak_of(way: str, args: argparse.Namespace) -> int:
    options = ["--peak-of", way, "--device", args.device, "--threads", str(args.threads)]
    for option, value in (("--batch", args.batch), ("--patch", args.patch)):
        options += [] if value is None else [option, str(value)]
    command = [sys.executable, __file__, args.configuration, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_steps(shape: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each, in turn, and what learns."""
    built = {way: make(way, shape, args.device) for way in args.ways}
    learning = {w: sum(p.numel() for p in t.network.parameters() if p.requires_grad) for w, t in built.items()}
    times: dict[str, list[float]] = {way: [] for way in args.ways}
    for number in range(args.steps + 1):
        for way, trainer in built.items():
            batch = batch_of(way, trainer, shape, number)
            took = seconds_of(lambda trainer=trainer, batch=batch: trainer.train_step(batch), args.device)
            times[way] += [took] if number else []  # the first one also allocates
    image = torch.randn(1, 1, *shape["patch"], device=args.device)
    adapted = built[PREDICTED]
    networks = {FULL: built[FULL].network, PREDICTED: adapted.network}
    of_prediction: dict[str, list[float]] = {}
    with torch.inference_mode():
        for key in (FULL, PREDICTED, f"{PREDICTED}, merged"):
            if key.endswith("merged"):
                networks[key] = merge_lora(adapted.network)
            network = networks[key].eval()
            network.decoder.deep_supervision = False
            values = [seconds_of(lambda network=network: network(image), args.device) for _ in range(3 * args.steps)]
            of_prediction[key] = values[1:]
    median = {way: statistics.median(values) for way, values in times.items()}
    prediction = {key: statistics.median(values) for key, values in of_prediction.items()}
    return {
        "steps": args.steps,
        "step_seconds": {way: round(value, 4) for way, value in median.items()},
        "step_ratio": {way: round(value / median[FULL], 3) for way, value in median.items()},
        "prediction_ratio": {key: round(value / prediction[FULL], 3) for key, value in prediction.items()},
        "trainable": learning,
        "trainable_share": {way: round(count / learning[FULL], 4) for way, count in learning.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", choices=SHAPES)
    parser.add_argument("--batch", type=int, help="instead of the plans' own")
    parser.add_argument("--patch", type=int, metavar="N", help="N voxels along each axis, instead of the plans' own")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="default: all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not {FULL, PREDICTED} <= {*args.ways}:
        parser.error(f"--ways needs {FULL!r} and {PREDICTED!r}")
    torch.set_num_threads(args.threads)
    shape = dict(SHAPES[args.configuration])
    if args.batch is not None:
        shape["batch"] = args.batch
    if args.patch is not None:
        shape["patch"] = [args.patch] * len(shape["patch"])
    if args.peak_of:
        peak(args.peak_of, shape, args)
        return
    result: dict[str, Any] = {"patch": shape["patch"], "batch": shape["batch"], "classes": CLASSES}
    result |= measure_steps(shape, args)
    print(json.dumps(result, indent=2), flush=True)
    peaks = {way: peak_of(way, args) for way in args.ways}
    result["peak_megabytes"] = {way: round(value / 1e6) for way, value in peaks.items()}
    result["peak_ratio"] = {way: round(value / peaks[FULL], 3) for way, value in peaks.items()}
    print(json.dumps(result, indent=2))
    note = (
        "random images without data loading; seconds are processor time on a CPU; peak: of a process of its own beyond "
        "what it had after its imports (on a GPU: of the allocator); full: SGD with momentum, the others AdamW; a "
        "mixture is told that all images are MR, and its base looks at each of them first"
    )
    name = f"lora_step_{args.configuration}"
    print(write_result(name if args.device == "cpu" else f"{name}_{args.device}", result, note))


if __name__ == "__main__":
    main()
