"""Starting from a model of other classes or channels: what goes where, by name, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import log_of, make_trainer, save_cases, tiny_dataset, tiny_plans
from torch import Tensor

from nnunet_multimodal import trainers
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.transfer import Names, fit_by_name, names_of, starting_model

NAME = "nnUNetTrainerMRSegmentator"
HEAD, OTHER = "decoder.seg_layers.0.weight", "encoder.conv.weight"


def numbered(rows: int, *rest: int, start: int = 0) -> Tensor:
    """Row k is full of start + k."""
    return (torch.arange(rows).float() + start).reshape(-1, *[1] * len(rest)).expand(rows, *rest).clone()


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_rows_go_where_their_names_are() -> None:
    source, target = Names(("background", "liver", "spleen")), Names(("background", "kidney", "spleen", "liver"))
    weights = {HEAD: numbered(3, 2, 1, 1), OTHER: torch.ones(4, 1, 3, 3)}
    own = {HEAD: numbered(4, 2, 1, 1, start=100), OTHER: torch.zeros(4, 1, 3, 3)}
    fitted, lines = fit_by_name(weights, source, own, target)
    assert fitted[HEAD][:, 0, 0, 0].tolist() == [0, 101, 2, 1]
    assert fitted[OTHER] is weights[OTHER] and own[HEAD][0, 0, 0, 0] == 100
    assert lines == ["  outputs by name: 3 from the model (background, spleen, liver), 1 new (kidney)"]


def test_as_many_classes_in_another_order_are_sorted() -> None:
    """Their shapes fit, so that without names a spleen would start as a liver."""
    source, target = Names(("background", "liver", "spleen")), Names(("background", "spleen", "liver"))
    fitted, lines = fit_by_name({HEAD: numbered(3, 2)}, source, {HEAD: torch.zeros(3, 2)}, target)
    assert fitted[HEAD][:, 0].tolist() == [0, 2, 1]
    assert lines == ["  outputs by name: 3 from the model (background, spleen, liver)"]


@pytest.mark.parametrize(
    ("source", "target", "line"),
    [
        (("background", "a"), ("background", "a"), None),
        (None, ("background", "b"), None),
        (("background", "a"), ("background", "b"), "1 from the model (background), 1 new (b), 1 not needed (a)"),
        (("a", "b"), ("c", "d"), "0 from the model (none), 2 new (c, d), 2 not needed (a, b)"),
    ],
)
def test_what_is_said_of_outputs(source: Any, target: Any, line: str | None) -> None:
    _, lines = fit_by_name({HEAD: torch.zeros(2, 3)}, Names(source), {HEAD: torch.zeros(2, 3)}, Names(target))
    assert lines == ([] if line is None else [f"  outputs by name: {line}"])


def test_a_head_of_other_features_is_left_to_be_skipped() -> None:
    names = Names(("background", "a")), Names(("a", "background"))
    fitted, lines = fit_by_name({HEAD: torch.ones(2, 3)}, names[0], {HEAD: torch.zeros(2, 4)}, names[1])
    assert fitted[HEAD].shape == (2, 3) and lines == []


def convolution(channels: int, first: float = 1.0) -> Tensor:
    """[2, channels, 3, 3], channel k is full of first + k."""
    return (torch.arange(channels).float() + first).reshape(1, -1, 1, 1).expand(2, channels, 3, 3).clone()


def test_input_channels_go_by_name() -> None:
    weights, own = {OTHER: convolution(2)}, {OTHER: convolution(3, 100)}
    fitted, lines = fit_by_name(weights, Names(None, ("CT", "MR")), own, Names(None, ("MR", "PET", "CT")))
    assert fitted[OTHER][0, :, 0, 0].tolist() == [2, 101, 1]
    assert lines == ["  inputs by name: 2 from the model (MR, CT), 1 new (PET)"]


@pytest.mark.parametrize(("before", "now", "each"), [(1, 2, 0.5), (2, 1, 3.0), (3, 2, 3.0)])
def test_input_channels_without_a_common_name_share(before: int, now: int, each: float) -> None:
    """An image given to every channel is answered as it was when it was given to every channel of the model."""
    names = [Names(None, tuple(f"{kind}{i}" for i in range(n))) for kind, n in (("a", before), ("b", now))]
    weights, own = convolution(before), convolution(now, 100)
    fitted, lines = fit_by_name({OTHER: weights}, names[0], {OTHER: own}, names[1])
    assert fitted[OTHER][0, :, 0, 0].tolist() == [each] * now
    torch.testing.assert_close(fitted[OTHER].sum(1), weights.sum(1))
    assert lines == [f"  inputs: {before} in the model, {now} here: each gets an equal part of their sum"]


def test_both_names_of_the_first_convolution_get_it() -> None:
    own = convolution(2, 100)
    fitted, _ = fit_by_name(
        {"encoder.conv": convolution(1), "decoder.encoder.conv": convolution(1), "other": convolution(1)},
        Names(None, ("MR",)),
        {"encoder.conv": own, "decoder.encoder.conv": own, "other": convolution(2)},
        Names(None, ("T1", "T2")),
    )
    assert fitted["encoder.conv"] is fitted["decoder.encoder.conv"]
    assert fitted["other"].shape[1] == 1, "of another layer nothing is known"


def test_names_of_a_data_set() -> None:
    dataset = {"channel_names": {"1": "b", "0": "a"}, "labels": {"background": 0, "x": 2, "y": 1, "ignore": 3}}
    assert names_of(dataset) == Names(("background", "y", "x"), ("a", "b"))
    assert names_of({"modality": {"0": "CT"}, "labels": {"liver": 1}}) == Names(None, ("CT",))
    assert names_of(None) == names_of({}) == Names()


# --- in the trainer --------------------------------------------------------------------------------------------------


def trainer_of(labels: dict[str, int], channels: tuple[str, ...] = ("CT_or_MR",), name: str = NAME, **settings: Any):
    dataset = {
        **tiny_dataset(name),
        "labels": {"background": 0, **labels},
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
    }
    plans = tiny_plans(2, len(channels), settings)
    trainer: MultimodalTrainer = getattr(trainers, name)(plans, "2d", 0, dataset, torch.device("cpu"))
    folder = Path(trainer.preprocessed_dataset_folder)
    if not folder.exists():
        save_cases(folder, len(channels), 2)
    return trainer


@pytest.fixture
def source(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[MultimodalTrainer, Path]:
    """A model with liver, spleen and kidney, and its checkpoint."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = trainer_of({"liver": 1, "spleen": 2, "kidney": 3}, name="nnUNetTrainerContrastAug")
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    return trainer, path


def test_a_model_of_other_classes(source: tuple[MultimodalTrainer, Path]) -> None:
    model, path = source
    torch.manual_seed(1)
    trainer = trainer_of({"spleen": 1, "liver": 2}, starting_model=str(path.parents[1]))
    trainer.initialize()
    fresh = {key: value.clone() for key, value in trainer.bare_network().state_dict().items()}
    trainer.on_train_start()
    theirs, ours = model.bare_network().state_dict(), trainer.bare_network().state_dict()
    for key, value in ours.items():
        expected = theirs[key][[0, 2, 1]] if "seg_layers" in key else theirs[key]
        assert torch.equal(value, expected), key
    assert not torch.equal(
        fresh["encoder.stages.0.0.convs.0.conv.weight"], ours["encoder.stages.0.0.convs.0.conv.weight"]
    )
    log = log_of(trainer)
    assert f"starting model: {len(ours)} tensors loaded, 0 new, 0 skipped" in log
    assert "outputs by name: 3 from the model (background, spleen, liver), 1 not needed (kidney)" in log


def test_the_same_image_gives_the_same_logits_for_the_classes_that_are_known(source) -> None:
    model, path = source
    trainer = trainer_of({"kidney": 1, "pancreas": 2, "liver": 3}, starting_model=str(path))
    trainer.on_train_start()
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, now = model.bare_network().eval()(image)[0], trainer.bare_network().eval()(image)[0]
    torch.testing.assert_close(now[:, [0, 1, 3]], before[:, [0, 3, 1]], atol=1e-6, rtol=0)
    assert not torch.allclose(now[:, 2], before[:, 2], atol=1e-3), "the pancreas is new"


def test_more_channels_answer_the_repeated_image_as_before(source) -> None:
    model, path = source
    trainer = trainer_of(
        {"liver": 1, "spleen": 2, "kidney": 3},
        ("T1", "T2"),
        "nnUNetTrainerContrastAug_5epochs",
        starting_model=str(path),
    )
    for case in Path(trainer.preprocessed_dataset_folder).iterdir():
        case.unlink()
    save_cases(Path(trainer.preprocessed_dataset_folder), 2)
    trainer.on_train_start()
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.bare_network().eval()(image)[0]
        now = trainer.bare_network().eval()(image.repeat(1, 2, 1, 1))[0]
    torch.testing.assert_close(now, before, atol=1e-5, rtol=0)
    assert "inputs: 1 in the model, 2 here" in log_of(trainer)


def test_a_checkpoint_names_its_classes(source) -> None:
    _, path = source
    assert starting_model(path).names == Names(("background", "liver", "spleen", "kidney"), ("CT_or_MR",))


@pytest.mark.usefixtures("nnunet_folders")
def test_make_trainer_is_still_what_it_was() -> None:
    assert make_trainer(NAME).settings["starting_model"] is None
