"""A result folder of a text-conditioned trainer whose network tells CT (spots) from MR (noise), without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import SHAPE, tiny_plans

MODALITIES = ("CT", "MR")
TRAINER = "nnUNetTrainerMulModSeg"


def picture(modality: str, seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """float32 [Z, Y, X]: a grid of bright spots for CT, noise for MR; both with mean 0 and a spread of 100."""
    noise = np.random.default_rng(seed).normal(0, 1, shape)
    if modality == "CT":
        _, y, x = np.indices(shape)
        noise = (
            np.exp(4 * np.cos(np.pi / 4 * (y + 0.5)) + 4 * np.cos(np.pi / 4 * (x + 0.5))) + 5 * noise
        )  # mirrored the same
        noise -= noise.mean()
    return (100 * noise / noise.std()).astype(np.float32)


def mixed_plans() -> dict[str, Any]:
    plans = tiny_plans(2)
    configuration = plans["configurations"]["2d"]
    configuration |= {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    del configuration["nnunet_multimodal"]
    return plans


def mixed_dataset(harmonise: str | None = None) -> dict[str, Any]:
    table = {"modalities": list(MODALITIES), "case_modality": {"a": "CT", "b": "MR"}}
    return {
        "channel_names": {"0": "CT_or_MR"},
        "labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "nnunet_multimodal": table | ({"harmonise": harmonise} if harmonise else {}),
    }


def mixed_result_folder(
    name: str = TRAINER,
    folds: tuple[int, ...] = (0,),
    harmonise: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Writes checkpoints, plans.json and dataset.json below nnUNet_results; returns the model's folder."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_multimodal import trainers

    dataset = mixed_dataset(harmonise)
    for fold in folds:
        plans = mixed_plans()
        if settings:
            plans["configurations"]["2d"]["nnunet_multimodal"] = settings
        torch.manual_seed(fold + 1)
        trainer_class = nnUNetTrainer if name == "nnUNetTrainer" else getattr(trainers, name)
        trainer = trainer_class(plans, "2d", fold, dataset, torch.device("cpu"))
        trainer.print_to_log_file = lambda *args, **kwargs: None  # type: ignore[method-assign]
        data = Path(trainer.preprocessed_dataset_folder)
        data.mkdir(parents=True, exist_ok=True)
        (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
        trainer.initialize()
        trainer.inference_allowed_mirroring_axes = (0, 1)
        if getattr(trainer.network, "modality_head", None) is not None:
            teach(trainer.network)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


@torch.no_grad()
def teach(network: Any) -> None:
    """The modality head's last layer becomes the plane that parts CT and MR tiles best (Fisher's)."""
    network.eval()
    layer = network.modality_head.linear
    seen: list[torch.Tensor] = []  # what the layer is given, [tiles, channels] of each modality
    listener = layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    for modality in MODALITIES:
        tiles = torch.from_numpy(picture(modality, 7, (50, 40, 36)) / 100)[:, None]
        network(torch.cat([tiles[..., y : y + 32, x : x + 32] for y in (0, 8) for x in (0, 4)]))
    listener.remove()
    ct, mr = (features.mean(0) for features in seen)
    spread = sum(features.T.cov() for features in seen)
    plane = torch.linalg.solve(spread + 1e-3 * spread.trace() / len(ct) * torch.eye(len(ct)), ct - mr)
    plane *= 20 / (plane @ (ct - mr))
    offset = plane @ (ct + mr) / 2
    layer.weight.copy_(torch.stack((plane, -plane)) / 2)
    layer.bias.copy_(torch.stack((-offset, offset)) / 2)
    if hasattr(network, "head"):
        for weights in (network.head.controller.weight, network.head.text_to_vision[0].weight):
            weights.mul_(4)  # random weights of nnU-Net's size give each voxel the same class
    network.train()
