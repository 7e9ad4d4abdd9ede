"""Predicting with a mixture of adapters: told, found out by air in Hounsfield units, or assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_mixed import mixed_dataset, mixed_plans
from tiny_model import image, save

from nnunet_multimodal import trainers
from nnunet_multimodal.cli import main
from nnunet_multimodal.networks.lora import LowRank
from nnunet_multimodal.trainers.transfer import starting_model

CPU = torch.device("cpu")


def result_folder(trainer: Any, settings: dict[str, Any], dataset: dict[str, Any]) -> Path:
    """A model as a training leaves it; adapted ones have factors that have learned something."""
    plans = mixed_plans()
    plans["configurations"]["2d"]["nnunet_multimodal"] = settings
    made: Any = trainer(plans, "2d", 0, dataset, CPU)
    made.print_to_log_file = lambda *args, **kwargs: None
    data = Path(made.preprocessed_dataset_folder)
    data.mkdir(parents=True, exist_ok=True)
    (data / "case.b2nd").touch()
    made.initialize()
    if settings:
        made._start_from(starting_model(Path(settings["starting_model"])))
        with torch.no_grad():
            for module in made.network.modules():
                if isinstance(module, LowRank):
                    module.up.weight.normal_(std=0.5)  # type: ignore[operator, union-attr]
    made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    folder = Path(made.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(made.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


@pytest.fixture
def models(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A base model of CT, and a mixture with an adapter for MR, which alone was in its training."""
    monkeypatch.setenv("nnUNet_compile", "f")
    torch.manual_seed(0)
    dataset = mixed_dataset()
    base = result_folder(nnUNetTrainer, {}, dataset)
    dataset["nnunet_multimodal"] = {"modalities": ["MR"], "case_modality": {"a": "MR", "b": "MR"}}
    settings = {"starting_model": str(base), "base_modalities": ["CT"]}
    return base, result_folder(trainers.nnUNetTrainerMoA, settings, dataset)


def predict(model: Path, given: Path, output: Path, *more: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """predictions.json's cases, and the labels."""
    words = ["-m", str(model), "--device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta", *more]
    assert main(["predict", "-i", str(given), "-o", str(output), *words]) == 0
    cases = json.loads((output / "predictions.json").read_text(encoding="utf-8"))["cases"]
    return cases, {case: np.asarray(nib.load(output / f"{case}.nii.gz").dataobj) for case in ("ct", "mr")}


def test_ct_is_the_base_models_and_mr_is_not(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, moa = models
    given = tmp_path / "in"
    body = image(1)
    air = np.where(np.indices(body.shape)[2] < 9, -1000, body).astype(np.float32)
    save(given / "ct_0000.nii.gz", air)
    save(given / "mr_0000.nii.gz", image(2))
    _, plain = predict(base, given, tmp_path / "base")
    cases, found = predict(moa, given, tmp_path / "inferred")
    assert {case: (entry["modality"], entry["how"]) for case, entry in cases.items()} == {
        "ct": ("CT", "inferred"),
        "mr": ("MR", "inferred"),
    }
    assert np.array_equal(found["ct"], plain["ct"])
    assert not np.array_equal(found["mr"], plain["mr"])

    cases, told = predict(moa, given, tmp_path / "told", "--modality", "mr")
    assert {entry["how"] for entry in cases.values()} == {"told"}
    assert np.array_equal(told["mr"], found["mr"]) and not np.array_equal(told["ct"], plain["ct"])
    (tmp_path / "map.json").write_text(json.dumps({"mr": "CT"}), encoding="utf-8")
    _, mapped = predict(moa, given, tmp_path / "mapped", "--modality-map", str(tmp_path / "map.json"))
    assert all(np.array_equal(mapped[case], plain[case]) for case in ("ct", "mr"))
