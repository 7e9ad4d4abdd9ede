"""A result folder of nnUNetTrainerSegVol with random weights, and networks that answer what they were asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_volumes import volume_plans
from torch import Tensor

from nnunet_multimodal.inference.prompted import Asker
from nnunet_multimodal.networks.segvol import Prompts, SegVolNetwork

TRAINER = "nnUNetTrainerSegVol"
LABELS = {"background": 0, "liver": 1, "spleen": 2}
SMALL = {
    "vit_patch": [4, 8, 4],
    "vit_width": 8,
    "vit_layers": 1,
    "vit_heads": 1,
    "vit_hidden": 8,
    "decoder_depth": 1,
    "decoder_heads": 1,
    "decoder_hidden": 8,
}


def segvol_model(
    folds: tuple[int, ...] = (0,), name: str = TRAINER, top: dict[str, Any] | None = None, **own: Any
) -> Path:
    """Writes a model below nnUNet_results and returns its folder; the window is 8 x 16 x 12 voxels of 2 mm."""
    from nnunet_multimodal import trainers

    dataset = {"channel_names": {"0": "CT_or_MR"}, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"}
    for fold in folds:
        plans = {**volume_plans(3, **own), **(top or {})}
        plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = dict(SMALL)
        torch.manual_seed(fold)
        trainer = getattr(trainers, name)(plans, "3d_fullres", fold, dataset, torch.device("cpu"))
        trainer.print_to_log_file = lambda *args, **kwargs: None
        data = Path(trainer.preprocessed_dataset_folder)
        data.mkdir(parents=True, exist_ok=True)
        (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


def echo(network: SegVolNetwork, features: Tensor, prompts: Prompts) -> Tensor:
    """+5 where it was pointed to and -5 elsewhere: in the box, at positive points; by text alone where it is bright."""
    answers = torch.full((1, 1, *network.window), -5.0)
    if prompts.boxes is not None:
        (first, last) = prompts.boxes[0].long().tolist()
        answers[0, 0, first[0] : last[0] + 1, first[1] : last[1] + 1, first[2] : last[2] + 1] = 5
    if prompts.points is not None and prompts.labels is not None:
        for point, label in zip(prompts.points[0].round().long().tolist(), prompts.labels[0].tolist()):
            if label == 1:
                answers[0, 0, point[0], point[1], point[2]] = 5
    if prompts.boxes is None and prompts.points is None:
        answers[features[:, :1] > 0.5] = 5
    return answers


class Echo(SegVolNetwork):
    """A network that keeps what it was asked, and whose answers are known."""

    def __init__(self, window: tuple[int, int, int] = (4, 6, 8)) -> None:
        super().__init__(window, window, 2, 2, 1, 8, 1, 1, 8, 1, 1, 8)
        self.asked: list[Prompts] = []

    def embed(self, images: Tensor) -> Tensor:
        return images

    def answer(self, features: Tensor, prompts: Prompts) -> Tensor:
        self.asked.append(prompts)
        return echo(self, features, prompts)


def asker(network: SegVolNetwork, folds: int = 1, step_size: float = 0.5) -> Asker:
    predictor: Any = SimpleNamespace(
        network=network, device=torch.device("cpu"), list_of_parameters=[network.state_dict()] * folds
    )
    return Asker(predictor, step_size)
