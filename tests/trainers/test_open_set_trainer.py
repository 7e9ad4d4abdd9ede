from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import make_trainer, tiny_dataset

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.networks import OpenSetNetwork
from nnunet_multimodal.trainers.base import MultimodalTrainer, TrainingStopped

NAME = "nnUNetTrainerCrossMR_openSet"


@pytest.fixture(autouse=True)
def quiet(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def started(ndim: int = 2, **settings: Any) -> MultimodalTrainer:
    trainer = make_trainer(NAME, ndim, **settings)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


@pytest.mark.parametrize("ndim", [2, 3])
def test_trains_with_more_prompts_than_organs_and_predicts_the_organs(ndim: int) -> None:
    trainer = started(ndim, prompts=5, answers=3)
    batch = next(trainer.dataloader_train)
    patch = trainer.configuration_manager.patch_size
    assert batch["data"].shape == (2, 7, *patch) and batch["target"].shape == (2, 2, *patch)
    before = copy.deepcopy(trainer.network.state_dict())
    for _ in range(2):
        assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    assert any(not torch.equal(before[key], value) for key, value in trainer.network.state_dict().items())
    trainer.on_validation_epoch_start()
    validated = next(trainer.dataloader_val)
    assert validated["data"].shape == (2, 4, *patch)
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(validated)["loss"])


def test_the_network_has_the_plans_spacing_and_the_settings() -> None:
    trainer = make_trainer(NAME, 3, key_width=12, heads=3, negative_prompts=False)
    trainer.initialize()
    network = trainer.bare_network()
    assert isinstance(network, OpenSetNetwork)
    assert network.spacing == [3.0, 1.0, 1.0] and network.heads == 3 and not network.negative_prompts
    names = {name for name, _ in network.named_parameters()}
    assert not any("seg_layers" in name for name in names)
    groups = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and sum(len(g["params"]) for g in groups) == len(names)


def test_target_and_reference_differ_in_training_and_validation() -> None:
    trainer = started()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        data = next(loader)["data"]
        assert not torch.equal(data[:, 0], data[:, 1])


def test_bfloat16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for mixed in (False, True):
        trainer = started(bfloat16_on_cpu=mixed)
        trainer.bare_network().head.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
        assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    assert seen == [torch.float32, torch.bfloat16]


def test_a_case_that_is_nan_stops_the_training_and_is_named() -> None:
    trainer = started()
    batch = next(trainer.dataloader_train)
    batch["data"][0, 0, 5, 5] = float("nan")
    with pytest.raises(TrainingStopped, match=r"loss is nan at epoch 0 step 0; cases \['case_"):
        trainer.train_step(batch)


def test_a_batch_that_asks_for_nothing_changes_nothing() -> None:
    trainer = started()
    batch = next(trainer.dataloader_train)
    batch["data"][:, 2:] = 0
    assert trainer.train_step(batch)["loss"] == 0


def test_what_it_cannot_train_on() -> None:
    with pytest.raises(DataProblem, match="ignore label"):
        make_trainer(NAME, ignore=True)
    with pytest.raises(UsageError, match=r"unknown setting 'answer'\. Did you mean 'answers'"):
        make_trainer(NAME, answer=3)
    assert tiny_dataset(NAME)["channel_names"]["1"] == "reference"
