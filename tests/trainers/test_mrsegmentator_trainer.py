"""nnUNetTrainerMRSegmentator: what it refuses, and that it never mirrors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from tiny_training import CASES, TABLE, log_of, make_trainer, save_cases, tiny_dataset, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.errors import DataProblem

NAME = "nnUNetTrainerMRSegmentator"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, nnunet_folders: dict[str, str]) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


def build(dataset: dict[str, Any] | None = None, plans: dict[str, Any] | None = None, **configuration: Any) -> Any:
    whole = {**tiny_plans(2, 1), **(plans or {})}
    whole["configurations"]["2d"] |= configuration
    return getattr(trainers, NAME)(whole, "2d", 0, {**tiny_dataset(NAME), **(dataset or {})}, CPU)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("organs", [{"liver": 1, "spleen": 2}, {"left_kidney": 1, "right_kidney": 2}])
def test_nothing_is_mirrored_whatever_the_labels(ndim: int, organs: dict[str, int]) -> None:
    trainer = make_trainer(NAME, ndim, organs)
    rotation, dummy_2d, patch, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes is None and trainer.inference_allowed_mirroring_axes is None
    transforms = trainer.get_training_transforms(patch, rotation, None, axes, dummy_2d).transforms
    inner = [t.transform if isinstance(t, RandomTransform) else t for t in transforms]
    assert inner and not any(isinstance(transform, MirrorTransform) for transform in inner)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    assert torch.load(path, weights_only=False)["inference_allowed_mirroring_axes"] is None, "nor at prediction"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"dataset": {"channel_names": {"0": "CT", "1": "MR"}}}, r"2 channels \(CT, MR\).*takes one"),
        (
            {"normalization_schemes": ["CTNormalization"]},
            "the plans have CTNormalization; expected ZScoreNormalization",
        ),
        ({"normalization_schemes": ["NoNormalization"]}, "the plans have NoNormalization"),
        ({"plans": {"image_reader_writer": "SimpleITKIO"}}, "the reader SimpleITKIO; expected NibabelIOWithReorient"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(what: dict[str, Any], message: str) -> None:
    with pytest.raises(DataProblem, match=message) as problem:
        build(**what)
    assert "nnunet_multimodal convert" in str(problem.value) and problem.value.exit_code == 4


def test_the_other_reorienting_reader_will_do() -> None:
    assert build(plans={"image_reader_writer": "SimpleITKIOWithReorient"}).settings["initial_lr"] == 1e-2


def test_folds_have_their_share_of_each_modality() -> None:
    cases = tuple(f"case_{i}" for i in range(10))
    table = {"modalities": ["CT", "MR"], "case_modality": {case: ("CT", "MR")[i >= 5] for i, case in enumerate(cases)}}
    trainer = build({"nnunet_multimodal": {**TABLE, **table}})
    save_cases(Path(trainer.preprocessed_dataset_folder), 1, 2, cases)
    train, val = trainer.do_split()
    assert sorted(table["case_modality"][case] for case in val) == ["CT", "MR"] and len(train) == 8
    splits = json.loads((Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json").read_text("utf-8"))
    for split in splits:
        assert sorted(table["case_modality"][case] for case in split["val"]) == ["CT", "MR"]


def test_without_a_table_the_folds_are_nnunets() -> None:
    trainer = build()
    save_cases(Path(trainer.preprocessed_dataset_folder), 1, 2)
    train, val = trainer.do_split()
    assert sorted([*train, *val]) == sorted(CASES) and "stratified" not in log_of(trainer)
