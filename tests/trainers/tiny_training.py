"""Plans, data set and preprocessed cases made by hand: what an nnU-Net trainer needs, small enough for a test."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_multimodal import trainers
from nnunet_multimodal.registry import TRAINERS
from nnunet_multimodal.trainers.base import MultimodalTrainer

DATASET = "Dataset601_Tiny"
ORGANS = {"liver": 1, "spleen": 2}
CASES = ("case_a", "case_b", "case_c", "case_d", "case_e")
TABLE = {
    "modalities": ["CT", "MR"],
    "case_modality": {case: ("CT", "MR")[number % 2] for number, case in enumerate(CASES)},
}
SMALL = {
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "warmup_iterations": 2,
    "queries": 3,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "layers": 2,
    "levels": 2,
    "max_tokens": 20,
    "vit_width": 16,
    "vit_layers": 1,
    "vit_heads": 2,
    "vit_hidden": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_hidden": 16,
    "prompts": 2,  # openSet: as many as there are organs, so that its batches look like the data set
}

# Their labels are scribbles: what nobody drew is ignored.
WEAK = ("PartialCE", "DMSPS", "USTM", "Scribble2Label", "CmFNet")

VOLUMES_ONLY = ("nnUNetTrainerSegVol",)  # no 2d
WITH_TABLE = ("nnUNetTrainerMulModSeg", "nnUNetTrainerMoA", "nnUNetTrainerContextPrior")
ADAPTING = ("nnUNetTrainerLoRA", "nnUNetTrainerMoA")  # they need a starting model

NAMES = [name for entry in TRAINERS.values() for name in entry.names]
NAMES_2D = [name for name in NAMES if name not in VOLUMES_ONLY]


def channel_names(trainer: str, organs: int) -> list[str]:
    """What the data set of this trainer has for channels."""
    if trainer.startswith("nnUNetTrainerCrossMR"):
        return ["target", "reference", *["noNorm"] * organs]
    if trainer.startswith("nnUNetTrainerCmFNet"):
        return ["CT", "MR"]
    if is_weak(trainer):
        return ["MR"]
    return ["MR", *["noNorm"] * organs] if trainer.startswith("nnUNetTrainerScribble") else ["CT_or_MR"]


def is_weak(trainer: str) -> bool:
    return trainer.removeprefix("nnUNetTrainer").startswith(WEAK)


def tiny_dataset(trainer: str, organs: dict[str, int] = ORGANS, ignore: bool = False) -> dict[str, Any]:
    ignore = ignore or is_weak(trainer)
    labels = {"background": 0, **organs, **({"ignore": len(organs) + 1} if ignore else {})}
    names = channel_names(trainer, len(organs))
    return {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": labels,
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
        **({"nnunet_multimodal": TABLE} if trainer.startswith(WITH_TABLE) else {}),
    }


def tiny_plans(ndim: int, channels: int, section: dict[str, Any] | None = None) -> dict[str, Any]:
    """Two-stage U-Net for 16 x 16 (x 4) patches."""
    configuration: dict[str, Any] = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [4, 16, 16][-ndim:],
        "median_image_size_in_voxels": [4.0, 16.0, 16.0][-ndim:],
        "spacing": [3.0, 1.0, 1.0][-ndim:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 6, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
                "kernel_sizes": [[3] * ndim] * 3,
                "strides": [[1] * ndim, [2] * ndim, [1] * (ndim - 2) + [2, 2]],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": ndim == 2,
        "nnunet_multimodal": SMALL if section is None else section,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 1.0, 1.0],
        "original_median_shape_after_transp": [4, 16, 16],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {configuration_name(ndim): copy.deepcopy(configuration)},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
    }


def configuration_name(ndim: int) -> str:
    return "2d" if ndim == 2 else "3d_fullres"


def save_cases(
    folder: Path, channels: int, organs: int = len(ORGANS), cases: tuple[str, ...] = CASES, scribbles: bool = False
) -> None:
    """Preprocessed cases as nnU-Net stores them: a blob for each organ; scribble channels hold a line of it.

    With ``scribbles`` a column of each organ and two of the background are labelled, and the rest is ignored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "dataset_fingerprint.json").write_text("{}")  # is copied, not read
    labels = list(range(1, organs + 1))
    for number, case in enumerate(cases):
        rng = np.random.default_rng(number)
        segmentation = np.zeros((1, 6, 20, 18), dtype=np.int16)
        for label in labels:
            corner = (label - 1) * 9 + number % 3
            segmentation[0, 1:5, corner : corner + 7, 5:13] = label
        data = rng.normal(0, 0.3, (channels, *segmentation.shape[1:])).astype(np.float32)
        data += segmentation
        data[1:] = data[:1]  # as converted: target and reference are one image, until something is done to them
        for label in labels if channels > organs else []:
            data[channels - organs + label - 1] = 0
            data[channels - organs + label - 1, 2, (label - 1) * 9 + number % 3 + 3, 6:12] = 1
        if scribbles:
            drawn = np.zeros(segmentation.shape, dtype=bool)
            drawn[..., [1, 9, 16]] = True
            segmentation[~drawn] = organs + 1
        everywhere: list[int | tuple[int, ...]] = [*labels, (-1, 0, *labels), (-1, 0, *labels, organs + 1)]
        locations = {k: np.argwhere(np.isin(segmentation, k))[:200] for k in everywhere}
        properties = {"spacing": [3.0, 1.0, 1.0], "class_locations": locations}
        nnUNetDatasetBlosc2.save_case(data, segmentation, properties, str(folder / case))


def make_trainer(
    name: str,
    ndim: int = 2,
    organs: dict[str, int] = ORGANS,
    ignore: bool = False,
    cases: tuple[str, ...] = CASES,
    fold: int = 0,
    **settings: Any,
) -> MultimodalTrainer:
    """A trainer of this name on CPU with its preprocessed data; needs the fixture ``nnunet_folders``."""
    dataset = tiny_dataset(name, organs, ignore)
    channels = len(dataset["channel_names"])
    if name.startswith(ADAPTING):
        if "starting_model" not in settings:
            settings["starting_model"] = str(save_starting_model(ndim, dataset))
        if "MoA" in name:
            settings.setdefault("base_modalities", ["CT"])
    plans = tiny_plans(ndim, channels, {**SMALL, **settings})
    trainer: MultimodalTrainer = getattr(trainers, name)(
        plans, configuration_name(ndim), fold, dataset, torch.device("cpu")
    )
    folder = Path(trainer.preprocessed_dataset_folder)
    if not folder.exists():
        save_cases(folder, channels, len(organs), cases, scribbles=is_weak(name))
    return trainer


def save_starting_model(ndim: int, dataset: dict[str, Any], name: str = "base.pth", **architecture: Any) -> Path:
    """A checkpoint of nnUNetTrainer with random weights, as it saves them."""
    channels = len(dataset["channel_names"])
    plans = tiny_plans(ndim, channels)
    plans["configurations"][configuration_name(ndim)]["architecture"]["arch_kwargs"] |= architecture
    trainer = nnUNetTrainer(plans, configuration_name(ndim), 0, dataset, torch.device("cpu"))
    trainer.print_to_log_file = lambda *args, **kwargs: None
    folder = Path(trainer.preprocessed_dataset_folder)
    if not folder.exists():
        save_cases(folder, channels, len(dataset["labels"]) - 1)
    trainer.initialize()
    path = Path(os.environ["nnUNet_results"], name)
    trainer.save_checkpoint(str(path))
    return path


def log_of(trainer: MultimodalTrainer) -> str:
    return Path(trainer.log_file).read_text(encoding="utf-8")
