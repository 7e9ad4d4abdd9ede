"""One training: settings on stock trainers too, and interruption that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_trainer
from train_one import build, describe, watch


class Stopped(Exception):
    """The power went off."""


@pytest.fixture(autouse=True)
def one_process(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")


def run(epochs: int, seconds: list[float], checkpoint: Path | None = None) -> Any:
    """A tiny training of three epochs that ends after ``epochs`` of them."""
    torch.manual_seed(0)
    trainer = make_trainer("nnUNetTrainerCrossMR", num_epochs=3, save_every=1)
    trainer.fold, trainer.plot_network_architecture = "all", lambda: None
    if checkpoint is not None:
        trainer.load_checkpoint(str(checkpoint))

    def stop_there() -> None:
        if trainer.current_epoch == epochs < 3:
            raise Stopped

    watch(trainer, 7, seconds, stop_there)
    if epochs == 3:
        trainer.run_training()
    else:
        with pytest.raises(Stopped):
            trainer.run_training()
    return trainer


def test_an_interrupted_training_that_goes_on_is_the_same_as_one_that_never_stopped() -> None:
    straight = run(3, [])
    expected = {key: value.clone() for key, value in straight.network.state_dict().items()}
    for path in Path(straight.output_folder).glob("checkpoint_*"):
        path.unlink()
    seconds: list[float] = []
    stopped = run(2, seconds)
    assert len(seconds) == 2
    finished = run(3, seconds, Path(stopped.output_folder) / "checkpoint_latest.pth")
    assert len(seconds) == 3 and all(second > 0 for second in seconds)
    found = finished.network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    told = describe(finished, 7, seconds)
    assert told["iterations"] == 6 and told["epochs_done"] == 3 and told["initial_lr"] == 1e-3


@pytest.mark.parametrize(("asked", "fold"), [("all", "all"), ("2", 2)])
def test_the_fold_is_nnunets(monkeypatch: pytest.MonkeyPatch, asked: str, fold: str | int) -> None:
    class Built(Exception):
        """It was asked for."""

    def stand_in(dataset: str, configuration: str, fold: str | int, *more: Any, **options: Any) -> Any:
        raise Built(repr(fold))

    monkeypatch.setattr("nnunetv2.run.run_training.get_trainer_from_args", stand_in)
    with pytest.raises(Built, match=f"^{fold!r}$"):  # a number is no string: nnU-Net prints it with %d
        build("Dataset705_Scribbles", "2d", "nnUNetTrainer", "nnUNetPlans", "cpu", fold=asked)
