"""Memory and time of predict --slabs against the whole, and whether the labels are the same: 512 x 512 x 400 voxels.

A made-up body (a subject of the phantom, enlarged) is predicted by a tiny network with random weights and 15 classes,
so that the logits need the memory, not the features. Each prediction is a command of its own, one after the other, on
one thread; its peak is the system's (maximum resident set size). "prepare" is the same command's reading and nnU-Net's
preprocessing alone: no way to predict needs less.

    nice python benchmarks/slabs.py --work DIR [--slabs 2 4 8] [--shape 512 512 400]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from common import write_result
from scipy import ndimage

from nnunet_multimodal.environment import extension_value

CLASSES = 15  # background and 14 organs
SPACING = (0.8, 0.8, 1.5)  # mm along x, y, z of the image
NETWORK_SPACING, PATCH, FEATURES = [2.0, 2.0, 2.0], [96, 96, 96], [4, 8, 8]
GIB = 1024**3


def make_image(path: Path, shape: tuple[int, ...]) -> None:
    """A subject's CT, int16, at 4 mm, enlarged linearly to [X, Y, Z] voxels, with noise."""
    from nnunet_multimodal.data.phantom import PhantomOptions, scan_subject

    options = PhantomOptions(contrasts=("CT",), spacing=(4.0, 4.0, 4.0))
    _, small, _, _ = next(iter(scan_subject(0, options)))
    rng = np.random.default_rng(0)
    image = np.empty(shape, dtype=np.int16)
    places = [np.linspace(0, length - 1, wanted) for length, wanted in zip(small.shape, shape)]
    for z, place in enumerate(places[2]):  # slice by slice, to stay small
        below = int(place)
        part = small[..., min(below + 1, small.shape[2] - 1)] * (place - below) + small[..., below] * (
            1 - (place - below)
        )
        grid = np.meshgrid(places[0], places[1], indexing="ij")
        image[..., z] = ndimage.map_coordinates(part, grid, order=1) + rng.normal(0, 15, shape[:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, np.diag([*SPACING, 1.0])), path)


def plans() -> dict[str, Any]:
    """As nnU-Net's planner writes them, for a three-stage network of few features."""
    probabilities = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": [200.0, 200.0, 200.0],
        "spacing": NETWORK_SPACING,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": {**probabilities, "order": 3},
        "resampling_fn_seg_kwargs": {**probabilities, "is_seg": True},
        "resampling_fn_probabilities_kwargs": probabilities,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": FEATURES,
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * 3,
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    names = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    return {
        "dataset_name": "Dataset001_Slabs",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 2.0, 2.0],
        "original_median_shape_after_transp": [200, 200, 200],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": dict.fromkeys(names, 1.0)},
        "continue_training": False,
    }


def make_model() -> Path:
    """A result folder of nnUNetTrainerMRSegmentator with random weights; the model's folder."""
    from nnunet_multimodal import trainers

    organs = {f"organ_{number}": number for number in range(1, CLASSES)}
    dataset = {
        "channel_names": {"0": "CT_or_MR"},
        "labels": {"background": 0, **organs},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    torch.manual_seed(0)
    trainer = trainers.nnUNetTrainerMRSegmentator(plans(), "3d_fullres", 0, dataset, torch.device("cpu"))
    data = Path(trainer.preprocessed_dataset_folder)
    data.mkdir(parents=True, exist_ok=True)
    (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
    trainer.initialize()
    with torch.no_grad():  # random weights of nnU-Net's size give nearly every voxel the same class
        for head in trainer.network.decoder.seg_layers:
            head.weight.mul_(30)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


PREPARE = """
import sys
from pathlib import Path
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunet_multimodal.evaluation.labels import read_json
from nnunet_multimodal.inference.folder import Preparation, prepare
from nnunet_multimodal.inference.images import Case
model, image = Path(sys.argv[1]), Path(sys.argv[2])
plans = PlansManager(str(model / "plans.json"))
data, _, _ = prepare(
    Case("a", (image,)), Preparation(), plans, plans.get_configuration("3d_fullres"), read_json(model / "dataset.json")
)
print("x".join(map(str, data.shape[1:])))
"""


def measure(kept: Path, words: list[str]) -> dict[str, Any]:
    """Runs a program; its peak of memory, processor seconds, and what it said. What was measured is kept in a file."""
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    began = time.perf_counter()
    # A machine that is told never to give memory back (MALLOC_TRIM_THRESHOLD_ and the like) shows no peak but a sum.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {said}")
    found = {
        "peak_gib": round(usage.ru_maxrss * 1024 / GIB, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
        "wall_seconds": round(time.perf_counter() - began),
        "said": said.strip().splitlines()[-1] if said.strip() else "",
    }
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def differing(first: Path, second: Path) -> tuple[int, int, int]:
    """Voxels that differ, voxels in all, labels in the first."""
    a, b = (np.asarray(nib.load(path).dataobj) for path in (first, second))
    return int((a != b).sum()), a.size, len(np.unique(a))


def tiles(model: Path, shape: list[int], slabs: int, step_size: float = 0.5) -> int:
    """How many tiles are predicted."""
    from nnunet_multimodal.inference.modality import ModalityPredictor
    from nnunet_multimodal.inference.slabs import plan_work, tiles_to_predict

    predictor = ModalityPredictor(step_size, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    return tiles_to_predict(*plan_work(predictor, torch.zeros(1, *shape), slabs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the volume and the predictions")
    parser.add_argument("--slabs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400], metavar="N", help="x, y, z")
    parser.add_argument("--step-size", type=float, default=0.5, help="of a tile: 1 is faster and needs the same memory")
    args = parser.parse_args()
    for name in ("raw", "preprocessed", "results"):
        folder = args.work.resolve() / f"nnUNet_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    (args.work / "nnUNet_raw/Dataset001_Slabs").mkdir(exist_ok=True)
    os.environ |= {"nnUNet_compile": "f", "nnUNet_extTrainer": extension_value(), "nnUNet_def_n_proc": "1"}
    image = args.work / "images/a_0000.nii.gz"
    if not image.exists():
        make_image(image, tuple(args.shape))
    model = make_model()
    command = ["-m", "nnunet_multimodal.cli", "predict", "-i", str(image.parent), "-m", str(model), "-device", "cpu"]
    command += ["-step_size", str(args.step_size)]

    measured: dict[str, Any] = {"image": args.shape, "classes": CLASSES, "patch": PATCH, "step_size": args.step_size}
    measured["prepare"] = measure(args.work / "prepare.json", ["-c", PREPARE, str(model), str(image)])
    shape = [int(length) for length in measured["prepare"].pop("said").split("x")]
    measured["preprocessed"] = shape
    logits = 2 * CLASSES * float(np.prod(shape)) / GIB, 2 * CLASSES * float(np.prod(args.shape)) / GIB
    measured["logits_gib"] = {"preprocessed": round(logits[0], 2), "image": round(logits[1], 2)}
    parts = {slabs: args.work / f"slabs_{slabs}" for slabs in args.slabs}
    runs = {
        slabs: measure(args.work / f"slabs_{slabs}.json", [*command, "-o", str(out), "--slabs", str(slabs)])
        for slabs, out in sorted(parts.items(), reverse=True)  # what needs least comes first
    }
    measured["whole"] = measure(args.work / "whole.json", [*command, "-o", str(args.work / "whole")])
    measured["whole"]["tiles"] = tiles(model, shape, 1, args.step_size)
    for slabs, out in parts.items():
        wrong, voxels, labels = differing(args.work / "whole/a.nii.gz", out / "a.nii.gz")
        counts = {"voxels_that_differ": wrong, "voxels": voxels, "labels": labels}
        measured[f"slabs_{slabs}"] = {**runs[slabs], "tiles": tiles(model, shape, slabs, args.step_size), **counts}
    for value in measured.values():
        if isinstance(value, dict):
            value.pop("said", None)
    measured["load_average"] = [round(load, 2) for load in os.getloadavg()]
    note = "one run each; peak is the maximum resident set size of the command's process, preprocessing included"
    print(write_result("slabs", measured, note).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
