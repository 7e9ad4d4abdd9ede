"""A result folder of a referring trainer with random weights: what refer loads, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

ORGANS = {"liver": 1, "right_kidney": 2, "left_kidney": 3}


def tiny_plans(dimensions: int, organs: int = len(ORGANS)) -> dict[str, Any]:
    """Plans of a two-stage U-Net for 32 x 32 (x 8) patches of 1 mm pixels and 3 mm slices."""
    channels = 2 + organs
    resample = {"force_separate_z": None}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 32, 32][-dimensions:],
        "median_image_size_in_voxels": [8.0, 32.0, 32.0][-dimensions:],
        "spacing": [3.0, 1.0, 1.0][-dimensions:],
        "normalization_schemes": ["ZScoreNormalization"] * 2 + ["NoNormalization"] * organs,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, **resample},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, **resample},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, **resample},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [8, 16, 16],
                "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                "kernel_sizes": [[3] * dimensions] * 3,
                "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
        "nnunet_multimodal": {"width": 16, "heads": 2, "hidden": 16, "layers": 2},
    }
    intensities = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    return {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 1.0, 1.0],
        "original_median_shape_after_transp": [8, 32, 32],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d" if dimensions == 2 else "3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(channels)},
        "continue_training": False,
    }


def tiny_result_folder(dimensions: int, folds: tuple[int, ...] = (0,), name: str = "nnUNetTrainerCrossMR") -> Path:
    """Writes checkpoints, plans.json and dataset.json below nnUNet_results; returns the model's folder."""
    from nnunet_multimodal import trainers

    names = ["target", "reference", *["noNorm"] * len(ORGANS)]
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": {"background": 0, **ORGANS},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    for fold in folds:
        plans = tiny_plans(dimensions)
        configuration = next(iter(plans["configurations"]))
        torch.manual_seed(fold)
        trainer = getattr(trainers, name)(plans, configuration, fold, dataset, torch.device("cpu"))
        trainer.print_to_log_file = lambda *args, **kwargs: None  # type: ignore[method-assign]
        data = Path(trainer.preprocessed_dataset_folder)
        data.mkdir(parents=True, exist_ok=True)
        (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


SHAPE = (6, 40, 36)  # z, y, x
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


def save(path: Path, array_zyx: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array [Z, Y, X] as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array_zyx.transpose(2, 1, 0), AFFINE if affine is None else affine), path)
    return path


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noise that a reader takes for an image."""
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
