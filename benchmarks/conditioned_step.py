"""Time and memory of nnUNetTrainerMulModSeg, or another trainer, against stock nnUNetTrainer, same plans and batches.

    python benchmarks/conditioned_step.py 2d
    python benchmarks/conditioned_step.py 3d
    python benchmarks/conditioned_step.py 128 --classes 41 --only-memory
    python benchmarks/conditioned_step.py 2d --trainer nnUNetTrainerContextPrior --batch 4 --steps 3

Random images, 14 classes, nnU-Net's network for 256x256 (batch 12), 64x96x96 (batch 2) or 128x128x128 (batch 1). The
trainers take turns, step by step, in one process; ratios are of medians. Peak memory is that of a process of its own
for each trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["nnUNet_raw"] = os.environ["nnUNet_preprocessed"] = os.environ["nnUNet_results"] = tempfile.mkdtemp()
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ.setdefault("nnUNet_compile", "f")

import numpy as np
import torch
from common import write_result
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_multimodal import trainers

# As nnU-Net's planner makes them for patches of these sizes: features, strides
SHAPES: dict[str, dict[str, Any]] = {
    "2d": {"patch": [256, 256], "batch": 12, "features": [32, 64, 128, 256, 512, 512, 512]},
    "3d": {"patch": [64, 96, 96], "batch": 2, "features": [32, 64, 128, 256, 320]},
    "128": {"patch": [128, 128, 128], "batch": 1, "features": [32, 64, 128, 256, 320, 320]},
}
STOCK, OURS = "nnUNetTrainer", "nnUNetTrainerMulModSeg"


def make_plans(shape: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    ndim, stages = len(shape["patch"]), len(shape["features"])
    configuration = {
        "data_identifier": "random",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": shape["batch"],
        "patch_size": shape["patch"],
        "median_image_size_in_voxels": shape["patch"],
        "spacing": [1.0] * ndim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": shape["features"],
                "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
                "kernel_sizes": [[3] * ndim] * stages,
                "strides": [[1] * ndim] + [[2] * ndim] * (stages - 1),
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": ndim == 2,
        "nnunet_multimodal": settings,
    }
    return {
        "dataset_name": "Dataset999_Random",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "NibabelIOWithReorient",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"benchmark": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "continue_training": False,
    }


def build(name: str, shape: dict[str, Any], classes: int, device: str, settings: dict[str, Any]) -> Any:
    case = Path(os.environ["nnUNet_preprocessed"], "Dataset999_Random", "random", "case")
    if not case.parent.exists():
        case.parent.mkdir(parents=True)
        nothing = np.zeros((1, 4, 4, 4), np.float32)
        nnUNetDatasetBlosc2.save_case(nothing, nothing.astype(np.int16), {}, str(case))
    dataset = {
        "channel_names": {"0": "CT_or_MR"},
        "labels": {"background": 0, **{f"organ {k}": k for k in range(1, classes)}},
        "file_ending": ".nii.gz",
        "nnunet_multimodal": {"modalities": ["CT", "MR"], "case_modality": {"ct": "CT", "mr": "MR"}},
    }
    cls = nnUNetTrainer if name == STOCK else getattr(trainers, name)
    plans = make_plans(shape, settings if name != STOCK else {})
    trainer = cls(plans, "benchmark", 0, dataset, torch.device(device))
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer.initialize()
    trainer.network.train()
    trainer.lr_scheduler.step(0)
    return trainer


def random_batch(trainer: Any, shape: dict[str, Any], classes: int, number: int) -> dict[str, Any]:
    size = shape["patch"]
    data = torch.randn(shape["batch"], 1, *size)
    scales = trainer._get_deep_supervision_scales()
    target = [
        torch.randint(0, classes, (shape["batch"], 1, *(round(s * f) for s, f in zip(size, scale)))) for scale in scales
    ]
    return {"data": data, "target": target, "keys": [("ct", "mr")[number % 2]] * shape["batch"]}


def seconds_of(work: Any, device: str) -> float:
    """Processor time on a CPU, which other processes beside this one do not change; wall time on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def most_memory() -> int:
    """Peak of this process in bytes; getrusage would start with that of the process that began it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak(name: str, args: argparse.Namespace) -> None:
    """Prints the most memory, in bytes, that two steps of this trainer take beyond what its process had before."""
    shape = shape_of(args)
    torch.set_num_threads(args.threads)
    before = most_memory()
    trainer = build(name, shape, args.classes, args.device, {})
    for number in range(2):
        trainer.train_step(random_batch(trainer, shape, args.classes, number))
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(most_memory() - before)


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[args.configuration]
    return shape if args.batch is None else {**shape, "batch": args.batch}


def peak_of(name: str, args: argparse.Namespace) -> int:
    options = [
        "--peak-of",
        name,
        "--device",
        args.device,
        "--classes",
        str(args.classes),
        "--threads",
        str(args.threads),
        "--trainer",
        args.trainer,
        *([] if args.batch is None else ["--batch", str(args.batch)]),
    ]
    command = [sys.executable, __file__, args.configuration, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_times(shape: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step and of a prediction, the trainers in turn."""
    torch.set_num_threads(args.threads)
    built = {name: build(name, shape, args.classes, args.device, {}) for name in (STOCK, args.trainer)}
    times: dict[str, list[float]] = {name: [] for name in built}
    predictions: dict[str, list[float]] = {name: [] for name in built}
    for number in range(args.steps + 2):
        batch = random_batch(built[STOCK], shape, args.classes, number)
        for name, trainer in built.items():
            took = seconds_of(lambda trainer=trainer, batch=batch: trainer.train_step(batch), args.device)
            times[name] += [took] if number >= 2 else []
    image = torch.randn(1, 1, *shape["patch"], device=args.device)
    for trainer in built.values():
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
    built[args.trainer].tell(None)
    with torch.inference_mode():
        for number in range(3 * args.steps + 2):
            for name, trainer in built.items():
                took = seconds_of(lambda trainer=trainer: trainer.network(image), args.device)
                predictions[name] += [took] if number >= 2 else []
    median = {name: statistics.median(values) for name, values in times.items()}
    of_prediction = {name: statistics.median(values) for name, values in predictions.items()}
    return {
        "steps": args.steps,
        "step_seconds": {name: round(value, 4) for name, value in median.items()},
        "step_ratio": round(median[args.trainer] / median[STOCK], 3),
        "prediction_seconds": {name: round(value, 4) for name, value in of_prediction.items()},
        "prediction_ratio": round(of_prediction[args.trainer] / of_prediction[STOCK], 3),
        "parameters": {
            name: sum(parameter.numel() for parameter in trainer.network.parameters())
            for name, trainer in built.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", choices=SHAPES)
    parser.add_argument("--trainer", default=OURS)
    parser.add_argument("--batch", type=int, help="instead of the plans' own")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        peak(args.peak_of, args)
        return
    shape = shape_of(args)
    result: dict[str, Any] = {"patch": shape["patch"], "batch": shape["batch"], "classes": args.classes}
    result |= {} if args.only_memory else measure_times(shape, args)
    print(json.dumps(result))
    peaks = {name: peak_of(name, args) for name in (STOCK, args.trainer)}
    result["peak_megabytes"] = {name: round(value / 1e6) for name, value in peaks.items()}
    result["peak_ratio"] = round(peaks[args.trainer] / peaks[STOCK], 3)
    print(json.dumps(result, indent=2))
    note = (
        "random images without data loading; seconds are processor time on a CPU; peak: of a process of its own beyond "
        "what it had after its imports (on a GPU: of the allocator); prediction: "
        "network alone, one patch, modality found out by the network"
    )
    kind = "conditioned" if args.trainer == OURS else args.trainer.removeprefix("nnUNetTrainer")
    name = f"{kind}_step_{args.configuration}" + ("" if args.classes == 14 else f"_{args.classes}classes")
    print(write_result(name if args.device == "cpu" else f"{name}_{args.device}", result, note))


if __name__ == "__main__":
    main()
