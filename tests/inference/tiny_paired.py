"""A result folder of CmFNet with random weights on CT and MR of one patient, and such images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import SHAPE, tiny_plans

TRAINER = "nnUNetTrainerCmFNet"
HU = {"mean": 40.0, "std": 200.0, "percentile_00_5": -900.0, "percentile_99_5": 600.0, "median": 40.0, "min": -1024.0,
      "max": 900.0}  # fmt: skip


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """CT in Hounsfield units and MR, float32 [Z, Y, X]: a body in air, which is -1000 in the CT and 0 in the MR."""
    rng = np.random.default_rng(seed)
    body = np.zeros(SHAPE, dtype=bool)
    body[:, 8:33, 6:29] = True
    ct = np.where(body, rng.normal(50, 150, SHAPE), -1000)
    return ct.astype(np.float32), np.where(body, rng.normal(300, 80, SHAPE), 0).astype(np.float32)


def paired_result_folder(names: tuple[str, ...] = ("CT", "MR"), trainer_name: str = TRAINER) -> Path:
    """Writes a checkpoint, plans.json and dataset.json below nnUNet_results; returns the model's folder."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_multimodal import trainers

    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(names)},
        "labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    plans: dict[str, Any] = tiny_plans(2)
    schemes = ["CTNormalization" if name == "CT" else "ZScoreNormalization" for name in names]
    configuration = plans["configurations"]["2d"]
    configuration |= {"normalization_schemes": schemes, "use_mask_for_norm": [False] * len(names)}
    del configuration["nnunet_multimodal"]
    plans["foreground_intensity_properties_per_channel"] = {str(index): HU for index in range(len(names))}
    torch.manual_seed(3)
    trainer_class = nnUNetTrainer if trainer_name == "nnUNetTrainer" else getattr(trainers, trainer_name)
    trainer = trainer_class(plans, "2d", 0, dataset, torch.device("cpu"))
    trainer.print_to_log_file = lambda *args, **kwargs: None  # type: ignore[method-assign]
    data = Path(trainer.preprocessed_dataset_folder)
    data.mkdir(parents=True, exist_ok=True)
    (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder
