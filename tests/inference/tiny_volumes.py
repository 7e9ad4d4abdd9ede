"""A result folder of nnUNetTrainerMRSegmentator with random weights, 2d or 3d, for plans of one's choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_model import tiny_plans

TRAINER = "nnUNetTrainerMRSegmentator"
LABELS = {"background": 0, "spine": 1, "left_kidney": 2, "right_kidney": 3, "liver": 4}


def volume_plans(dimensions: int, **configuration: Any) -> dict[str, Any]:
    """Plans for patches of 8 x 16 x 12 voxels of 2 mm, in 2d of 16 x 12."""
    plans = tiny_plans(dimensions)
    own = next(iter(plans["configurations"].values()))
    own |= {
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "patch_size": [8, 16, 12][-dimensions:],
        "spacing": [2.0, 2.0, 2.0][-dimensions:],
        **configuration,
    }
    del own["nnunet_multimodal"]
    own["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    return plans


def volume_model(
    dimensions: int,
    folds: tuple[int, ...] = (0,),
    labels: dict[str, Any] = LABELS,
    name: str = TRAINER,
    top: dict[str, Any] | None = None,
    **configuration: Any,
) -> Path:
    """Writes checkpoints, plans.json and dataset.json below nnUNet_results; returns the model's folder."""
    from nnunet_multimodal import trainers

    dataset = {"channel_names": {"0": "CT_or_MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    regions = [value for value in labels.values() if isinstance(value, list)]
    dataset |= {"regions_class_order": [*range(1, len(labels))]} if regions else {}
    for fold in folds:
        plans = {**volume_plans(dimensions, **configuration), **(top or {})}
        torch.manual_seed(fold)
        key = next(iter(plans["configurations"]))
        trainer = getattr(trainers, name)(plans, key, fold, dataset, torch.device("cpu"))
        trainer.print_to_log_file = lambda *args, **kwargs: None
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
