"""Trainers that learn from scribbles: what is drawn counts, what is not never becomes background."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_training import (
    NAMES,
    SMALL,
    configuration_name,
    is_weak,
    log_of,
    make_trainer,
    save_cases,
    tiny_dataset,
    tiny_plans,
)

from nnunet_multimodal import trainers
from nnunet_multimodal.data.drawn import DrawnBackground
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.trainers.dense import dense_validation
from nnunet_multimodal.trainers.weak import WeakTrainer

CPU = torch.device("cpu")
SINGLE = [name for name in NAMES if is_weak(name) and "CmFNet" not in name]
IGNORE = 3


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, nnunet_folders: dict[str, str]) -> Iterator[None]:
    """Data loading in this process, reproducible."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def weak(name: str, ndim: int = 2, **arguments: Any) -> WeakTrainer:
    trainer = make_trainer(name, ndim, **arguments)
    assert isinstance(trainer, WeakTrainer)
    return trainer


def started(name: str, ndim: int = 2, **arguments: Any) -> WeakTrainer:
    trainer = weak(name, ndim, **arguments)
    start(trainer)
    return trainer


def start(trainer: WeakTrainer) -> None:
    """The beginning of the next epoch."""
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()


def one_epoch(trainer: WeakTrainer) -> None:
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


# --- nothing drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_a_batch_in_which_nothing_is_drawn_is_counted_and_teaches_nothing_of_labels(name: str) -> None:
    trainer = started(name, num_epochs=4)
    batch = next(trainer.dataloader_train)
    batch["target"][:] = IGNORE
    result = trainer.train_step(batch)
    assert result["partial"] == 0.0 and np.isfinite(result["loss"]) and result["undrawn"] == 1.0
    if name == "nnUNetTrainerPartialCE":
        assert result["loss"] == 0.0  # exactly, and with a gradient: the step was taken
    assert all(torch.isfinite(parameter).all() for parameter in trainer.bare_network().parameters())
    drawn = trainer.train_step(next(trainer.dataloader_train))
    assert drawn["undrawn"] == 0.0 and drawn["partial"] > 0
    trainer.on_train_epoch_end([result, drawn])
    assert "nothing was drawn in 1 of 2 training batches" in log_of(trainer)


def test_validation_counts_them_too_and_its_loss_is_that_of_what_is_drawn() -> None:
    trainer = started("nnUNetTrainerPartialCE_CRF")
    trainer.on_validation_epoch_start()
    batch = next(trainer.dataloader_val)
    with torch.no_grad():
        logits = trainer.network(batch["data"])
        expected = torch.nn.functional.cross_entropy(logits, batch["target"][:, 0].long(), ignore_index=IGNORE)
        assert trainer.validation_step(batch)["loss"] == pytest.approx(float(expected), abs=1e-6)
        batch["target"][:] = IGNORE
        empty = trainer.validation_step(batch)
    assert empty["loss"] == 0.0 and empty["undrawn"] == 1.0
    trainer.on_validation_epoch_end([empty])
    assert "nothing was drawn in 1 of 1 validation batches" in log_of(trainer)


def test_deep_supervision_survives_maps_without_a_drawn_voxel() -> None:
    trainer = started("nnUNetTrainerPartialCE_EM", supervise_deep=True)
    batch = next(trainer.dataloader_train)
    assert isinstance(batch["target"], list) and len(batch["target"]) == 2
    batch["target"][1][:] = IGNORE
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer.set_deep_supervision_enabled(True)
    assert trainer.bare_network().decoder.deep_supervision


def test_without_deep_supervision_nobody_switches_it_on() -> None:
    trainer = started("nnUNetTrainerPartialCE")
    trainer.set_deep_supervision_enabled(True)  # nnU-Net does so after its validation
    assert not trainer.bare_network().decoder.deep_supervision


@pytest.mark.parametrize("name", SINGLE)
def test_no_parameter_waits_for_a_gradient_that_never_comes(name: str) -> None:
    """Distributed training would."""
    trainer = started(name)
    trainer.train_step(next(trainer.dataloader_train))
    waiting = [n for n, p in trainer.bare_network().named_parameters() if p.requires_grad and p.grad is None]
    assert waiting == []


# --- padding and drawn background ------------------------------------------------------------------------------------


def save_uniform(folder: Path, label: int, shape: tuple[int, ...] = (3, 9, 9)) -> None:
    """Cases smaller than a patch, with one label everywhere."""
    folder.mkdir(parents=True)
    (folder.parent / "dataset_fingerprint.json").write_text("{}")
    for case in "abcde":
        segmentation = np.full((1, *shape), label, dtype=np.int16)
        places = np.argwhere(segmentation == label)
        locations: dict[Any, Any] = {1: places if label == 1 else [], 2: [], (-1, 0, 1, 2): places}
        properties = {"spacing": [3.0, 1.0, 1.0], "class_locations": locations}
        data = np.full((1, *shape), 5.0, dtype=np.float32)
        nnUNetDatasetBlosc2.save_case(data, segmentation, properties, str(folder / case))


@pytest.mark.parametrize("ndim", [2, 3])
def test_padding_is_ignored_in_training_and_validation(ndim: int) -> None:
    name = "nnUNetTrainerPartialCE"
    trainer = getattr(trainers, name)(
        tiny_plans(ndim, 1), configuration_name(ndim), 0, tiny_dataset(name), CPU
    )  # fmt: skip
    save_uniform(Path(trainer.preprocessed_dataset_folder), label=1)
    trainer.on_train_start()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        batches = [next(loader) for _ in range(12)]
        found = torch.cat([batch["target"].flatten() for batch in batches])
        assert set(found.tolist()) == {1, IGNORE}
    plain = next(trainer.dataloader_val)
    outside = plain["data"] == 0
    assert outside.any() and (plain["target"][outside] == IGNORE).all() and (plain["target"][~outside] == 1).all()


def test_background_drawn_on_black_stays_drawn() -> None:
    """nnU-Net's preprocessing makes it -1, which is also what padding is."""
    trainer = trainers.nnUNetTrainerPartialCE(tiny_plans(2, 1), "2d", 0, tiny_dataset("nnUNetTrainerPartialCE"), CPU)
    save_uniform(Path(trainer.preprocessed_dataset_folder), label=-1)
    trainer.on_train_start()
    batch = next(trainer.dataloader_val)
    assert (batch["target"][batch["data"] != 0] == 0).all() and (batch["target"][batch["data"] == 0] == IGNORE).all()


def test_what_nnunet_makes_of_drawn_and_undrawn_black_voxels() -> None:
    image = np.zeros((1, 1, 6, 6), dtype=np.float32)
    image[0, 0, 0, :] = image[0, 0, -1, :] = 1.0  # the box is the whole image, its middle is black
    image[0, 0, 3, 0] = 1.0
    scribble = np.full(image.shape, IGNORE, dtype=np.int8)
    scribble[0, 0, 2, 3:5] = 0
    _, cropped, _ = crop_to_nonzero(image, scribble)
    assert (cropped[0, 0, 2, 3:5] == -1).all() and (cropped == IGNORE).sum() == 34


@pytest.mark.parametrize("stored", [np.asarray, blosc2.asarray])
def test_drawn_background_reads_piece_by_piece(stored: Any) -> None:
    labels = np.array([[[[-1, 0, 1], [2, 3, -1]]]], dtype=np.int8)
    drawn = DrawnBackground(stored(labels))
    assert drawn.shape == (1, 1, 2, 3) and drawn.dtype == np.int8
    assert drawn[:, :, 0:1].tolist() == [[[[0, 0, 1]]]] and drawn[:].tolist() == [[[[0, 0, 1], [2, 3, 0]]]]
    assert labels[0, 0, 0, 0] == -1


def test_patches_are_drawn_where_somebody_drew() -> None:
    """Five of six slices have no label; none of them is seen."""
    trainer = started("nnUNetTrainerPartialCE")
    folder = Path(trainer.preprocessed_dataset_folder)
    for path in folder.glob("*_seg.b2nd"):
        case = path.name.removesuffix("_seg.b2nd")
        data, labels, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
        data, drawn = data[:], np.full(labels.shape, IGNORE, dtype=np.int16)
        drawn[:, 2] = labels[:, 2]
        places = {k: np.argwhere(np.isin(drawn, k)) for k in (1, 2, (-1, 0, 1, 2))}
        for old in folder.glob(f"{case}*"):
            old.unlink()
        nnUNetDatasetBlosc2.save_case(data, drawn, {**properties, "class_locations": places}, str(folder / case))
    loader, _ = trainer.get_dataloaders()
    assert not any(trainer.nothing_drawn(next(loader)["target"][one : one + 1]) for _ in range(20) for one in (0, 1))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("PartialCE", {"optimizer": "adam"}, "optimizer: expected 'sgd' or 'adamw', found 'adam'"),
        ("PartialCE", {"reduction": "median"}, "reduction: expected 'mean' or 'sum'"),
        ("PartialCE", {"ramp_up": 1.5}, "ramp_up: expected a share"),
        ("PartialCE_CRF", {"crf_weight": -1.0}, "crf_weight: expected at least 0"),
        ("PartialCE_CRF", {"crf_kernels": []}, "crf_kernels and crf_radius: kernels is empty"),
        ("PartialCE_CRF", {"crf_kernels": [{"sigma": 1}]}, "unknown keys"),
        ("PartialCE_CRF", {"crf_radius": 0}, "radius must be at least 1"),
        ("PartialCE_EM", {"entropy_weights": 1.0}, "unknown setting 'entropy_weights'. Did you mean 'entropy_weight'"),
        ("DMSPS", {"pseudo_weight": -8.0}, "pseudo_weight: expected at least 0"),
        ("DMSPS", {"decoder_dropout": 1.0}, "decoder_dropout: expected 0 to below 1"),
        ("USTM", {"teacher_decay": 1.0}, "teacher_decay: expected 0 to below 1"),
        ("USTM", {"teacher_passes": 0}, "teacher_passes: expected at least 1"),
        ("USTM", {"teacher_noise": -0.1}, "teacher_noise: expected at least 0"),
        ("Scribble2Label", {"ensemble_every": 0}, "ensemble_every: expected at least 1 epoch"),
        ("Scribble2Label", {"ensemble_share": 0.0}, "ensemble_share: expected a share"),
        ("Scribble2Label", {"pseudo_label_weight": -0.5}, "pseudo_label_weight: expected at least 0"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weak(f"nnUNetTrainer{name}", **settings)


def test_data_sets_that_are_no_scribbles() -> None:
    def build(labels: dict[str, Any], masked: bool = False, **content: Any) -> None:
        plans = tiny_plans(2, 1)
        plans["configurations"]["2d"]["use_mask_for_norm"] = [masked]
        dataset = {**tiny_dataset("nnUNetTrainerPartialCE"), "labels": labels, **content}
        trainers.nnUNetTrainerPartialCE(plans, "2d", 0, dataset, CPU)

    with pytest.raises(DataProblem, match=r"no label named 'ignore'.*scribbles import"):
        build({"background": 0, "liver": 1})
    with pytest.raises(DataProblem, match="has regions"):
        build({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, regions_class_order=[1, 2])
    with pytest.raises(DataProblem, match=r"use_mask_for_norm to false in nnUNetPlans\.json"):
        build({"background": 0, "liver": 1, "ignore": 2}, masked=True)


# --- the methods -----------------------------------------------------------------------------------------------------


def residual(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans' network as a residual encoder's."""
    (configuration,) = plans["configurations"].values()
    architecture = configuration["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    return plans


@pytest.mark.parametrize("name", ["PartialCE_CRF", "DMSPS", "USTM", "Scribble2Label"])
def test_with_a_residual_encoder_by_the_stock_predictor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, saved, and read by nnU-Net's predictor, which takes no weight too many and none too few."""
    name = f"nnUNetTrainer{name}"
    weak(name)  # makes the cases
    plans = residual(tiny_plans(2, 1, {**SMALL, "num_epochs": 1, "teacher_passes": 2}))
    trainer = getattr(trainers, name)(plans, "2d", 0, tiny_dataset(name), CPU)
    start(trainer)
    one_epoch(trainer)
    trainer.on_train_end()
    from nnunet_multimodal.environment import use_own_trainers

    monkeypatch.setenv("nnUNet_extTrainer", "")  # put back after the test
    use_own_trainers()
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, [0], "checkpoint_final.pth")
    image = torch.randn(1, 2, 16, 16)
    found = predictor.predict_logits_from_preprocessed_data(image)
    with torch.no_grad():
        trainer.network.eval()
        expected = torch.cat([trainer.network(image[:, [z]]) for z in (0, 1)])
    assert torch.allclose(found.transpose(0, 1).float(), expected, atol=5e-2)  # added up in half precision


def test_adamw_warms_up_and_falls() -> None:
    trainer = started("nnUNetTrainerPartialCE", optimizer="adamw", initial_lr=1e-3, num_epochs=20)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.train_step(next(trainer.dataloader_train))
    # warm-up: a tenth of 20 epochs of 2 steps is 4 steps
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


def test_the_regulariser_grows_with_the_training() -> None:
    trainer = started("nnUNetTrainerPartialCE_TV", num_epochs=4, ramp_up=0.5)
    assert trainer.ramp == pytest.approx(np.exp(-5))
    trainer.step = 1  # half an epoch of the two in which it grows
    assert trainer.ramp == pytest.approx(np.exp(-5 * 0.75**2))
    trainer.current_epoch, trainer.step = 2, 0
    assert trainer.ramp == 1.0


def test_in_a_cascade_the_regulariser_sees_the_image_alone() -> None:
    plans = tiny_plans(3, 1)
    plans["configurations"] |= {
        "3d_lowres": copy.deepcopy(plans["configurations"]["3d_fullres"]),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    name = "nnUNetTrainerPartialCE_CRF"
    trainer = getattr(trainers, name)(plans, "3d_cascade_fullres", 0, tiny_dataset(name), CPU)
    save_cases(Path(trainer.preprocessed_dataset_folder), 1, scribbles=True)
    trainer.initialize()
    seen = []
    trainer.loss.regulariser = lambda probabilities, image: seen.append(image) or probabilities.sum()
    batch = torch.randn(1, 3, 4, 16, 16)  # the image and the previous stage's two organs
    trainer.training_loss(batch, torch.full((1, 1, 4, 16, 16), IGNORE), {})
    assert torch.equal(seen[0], batch[:, :1])


def test_the_teacher_follows_and_comes_back() -> None:
    trainer = started("nnUNetTrainerUSTM", num_epochs=3, teacher_passes=2, save_every=1, teacher_decay=0.9)
    first = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    assert all(torch.equal(value, first[key]) for key, value in trainer.network.state_dict().items())
    result = trainer.train_step(next(trainer.dataloader_train))
    assert result["consistency"] >= 0
    # first step: the average of one is the network itself
    key = next(name for name, p in trainer.network.named_parameters() if p.requires_grad)
    one = trainer.network.state_dict()[key].clone()
    assert torch.equal(trainer.teacher.state_dict()[key], one)
    trainer.train_step(next(trainer.dataloader_train))  # second: decay 1 - 1/2
    two = trainer.network.state_dict()[key]
    assert torch.allclose(trainer.teacher.state_dict()[key], (one + two) / 2, atol=1e-7)

    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    again = weak("nnUNetTrainerUSTM", num_epochs=3, teacher_passes=2, teacher_decay=0.9)
    again.load_checkpoint(str(path))
    again.on_train_start()
    kept = again.teacher.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in trainer.teacher.state_dict().items())
    assert not torch.equal(kept[key], again.network.state_dict()[key])
    assert set(again.bare_network().state_dict()) == set(first)  # the network's own weights alone

    content = torch.load(path, weights_only=False)
    del content["nnunet_multimodal"]
    torch.save(content, path)  # of another trainer
    again.load_checkpoint(str(path))
    assert torch.equal(again.teacher.state_dict()[key], again.network.state_dict()[key])


def test_the_teacher_turns_with_the_patch_unless_labels_have_sides() -> None:
    square, wide = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 12)
    trainer = weak("nnUNetTrainerUSTM")
    assert {trainer.draw_turns(square) for _ in range(60)} == {0, 1, 2, 3}
    assert {trainer.draw_turns(wide) for _ in range(60)} == {0, 2}
    sided = weak("nnUNetTrainerUSTM", organs={"kidney_left": 1, "kidney_right": 2})
    assert {sided.draw_turns(square) for _ in range(20)} == {0}


def test_the_second_decoder_is_heard_in_training_only() -> None:
    trainer = started("nnUNetTrainerDMSPS")
    image = torch.randn(1, 1, 16, 16)
    first, second = trainer.network(image)
    assert first.shape == second.shape == (1, 3, 16, 16) and not torch.equal(first, second)
    _, other = trainer.network(image)
    assert not torch.equal(second, other)  # other channels were dropped
    trainer.network.eval()
    assert torch.equal(trainer.network(image), first)
    trainer.network.train()
    result = trainer.train_step(next(trainer.dataloader_train))
    assert result["loss"] == pytest.approx(result["partial"] + result["pseudo"], rel=1e-5)


def test_pseudo_labels_are_made_read_kept_and_deleted() -> None:
    settings = {"num_epochs": 4, "ensemble_every": 1, "ensemble_confidence": 0.3, "pseudo_label_start": 0.25}
    trainer = started("nnUNetTrainerScribble2Label", save_every=1, **settings)
    batch = next(trainer.dataloader_train)
    assert batch["target"].shape == (2, 2, 16, 16) and (batch["target"][:, 1] == IGNORE).all()
    assert next(trainer.dataloader_val)["target"].shape == (2, 1, 16, 16)
    assert "pseudo" not in trainer.train_step(batch)
    one_epoch(trainer)
    folder = Path(trainer.output_folder) / "pseudo_labels"
    cases = trainer.do_split()[0]
    assert sorted(path.name for path in folder.glob("*.npy")) == sorted(
        f"{case}.{kind}.npy" for case in cases for kind in ("average", "labels")
    )
    assert "pseudo labels: " in log_of(trainer)
    assert trainer.network.decoder.deep_supervision is False

    again = weak("nnUNetTrainerScribble2Label", **settings)  # --c
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    start(again)
    batch = next(again.dataloader_train)
    assert (batch["target"][:, 1] != IGNORE).any()
    drawn, pseudo = batch["target"][:, :1].clone(), batch["target"][:, 1:].clone()
    result = again.train_step(batch)
    assert result["pseudo"] > 0
    assert ((drawn != IGNORE) & (pseudo != IGNORE)).any()  # where somebody drew, the pseudo label does not count
    again.on_train_end()
    assert not folder.exists()


def test_a_training_stopped_before_its_look_makes_up_for_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net saves the checkpoint first, so --c begins behind the end of that epoch."""
    name, settings = "nnUNetTrainerScribble2Label", {"num_epochs": 4, "ensemble_every": 1}
    trainer = started(name, save_every=1, **settings)

    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "look_again", killed)
        one_epoch(trainer)
    for _ in range(2):
        again = weak(name, **settings)
        again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
        start(again)
        assert again.pseudo.looked_at() == 1
        monkeypatch.setattr(type(again), "look_again", killed)  # the second time there is nothing to do


def test_a_new_training_forgets_the_pseudo_labels_of_an_earlier_one() -> None:
    trainer = weak("nnUNetTrainerScribble2Label")
    trainer.pseudo.add("case_a", np.ones((3, 6, 20, 18), dtype=np.float32))
    start(trainer)
    assert not trainer.pseudo.folder.exists()


# --- honest validation -----------------------------------------------------------------------------------------------


def save_map(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.array(values, dtype=np.uint8).reshape(1, 2, 4), np.eye(4)), path)


def test_dense_validation_by_hand(tmp_path: Path) -> None:
    predicted, dense = tmp_path / "validation", tmp_path / "dense"
    save_map(predicted / "a.nii.gz", [1, 1, 0, 0, 2, 2, 2, 0])
    save_map(dense / "a.nii.gz", [1, 1, 1, 1, 2, 2, 2, 0])  # Dice 2/3 and 1
    save_map(predicted / "b.nii.gz", [0, 0, 0, 0, 0, 0, 0, 0])
    save_map(dense / "b.nii.gz", [1, 0, 0, 0, 0, 0, 0, 0])  # 0, and nowhere
    save_map(predicted / "c.nii.gz", [0] * 8)
    save_map(predicted / "d.nii.gz", [0] * 8)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), dtype=np.uint8), np.eye(4)), dense / "d.nii.gz")
    found = dense_validation(predicted, dense, ["a", "b", "c", "d"], ".nii.gz", [1, 2], NibabelIO())
    assert found.of_class == pytest.approx({1: 1 / 3, 2: 1.0}) and found.mean == pytest.approx(2 / 3)
    assert found.cases == ["a", "b"] and set(found.left_out) == {"c", "d"}
    assert found.left_out["c"] == "has no dense labels"
    summary = json.loads((predicted / "summary_dense.json").read_text(encoding="utf-8"))
    assert summary["foreground_mean"]["Dice"] == pytest.approx(2 / 3)
    assert summary["mean"]["1"]["Dice"] == pytest.approx(1 / 3) and len(summary["metric_per_case"]) == 2


@pytest.mark.parametrize("content", [b"", b"no image at all " * 30], ids=["empty", "garbage"])
def test_dense_labels_that_cannot_be_read_are_left_out(content: bytes, tmp_path: Path) -> None:
    """With the reader of our data sets, whose errors are no OSError: a long training has just ended."""
    predicted, dense = tmp_path / "validation", tmp_path / "dense"
    for case in "ab":
        save_map(predicted / f"{case}.nii.gz", [1] * 8)
        save_map(dense / f"{case}.nii.gz", [1] * 8)
    (dense / "b.nii.gz").write_bytes(content)
    found = dense_validation(predicted, dense, ["a", "b"], ".nii.gz", [1], NibabelIOWithReorient())
    assert found.cases == ["a"] and "b.nii.gz" in found.left_out["b"]


def test_labels_as_lists_of_one_id_are_named_in_the_log(
    nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net takes them for plain labels; the log of a training that has just ended is no place to fail."""
    name = "nnUNetTrainerPartialCE"
    dataset = tiny_dataset(name)
    dataset["labels"] |= {"liver": [1], "spleen": [2]}
    trainer = getattr(trainers, name)(tiny_plans(2, 1), "2d", 0, dataset, CPU)
    save_cases(Path(trainer.preprocessed_dataset_folder), 1, scribbles=True)
    trainer.initialize()
    case = trainer.do_split()[1][0]
    for folder in (
        Path(trainer.output_folder, "validation"),
        Path(nnunet_folders["nnUNet_raw"], trainer.plans_manager.dataset_name, "labelsTr_dense"),
    ):
        save_map(folder / f"{case}.nii.gz", [1, 1, 2, 2, 0, 0, 0, 0])
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, *_: None)
    trainer.perform_actual_validation()
    assert "Dense Dice: 1.0000 (liver 1.0000, spleen 1.0000) of 1 cases" in log_of(trainer)


def test_no_dense_labels_at_all(tmp_path: Path) -> None:
    found = dense_validation(tmp_path, tmp_path / "dense", ["a"], ".nii.gz", [1], NibabelIO())
    assert found.cases == [] and found.left_out == {"a": "has no dense labels"}
    assert not (tmp_path / "summary_dense.json").exists()


def test_settings_are_in_the_plans_that_prediction_reads() -> None:
    trainer = started("nnUNetTrainerDMSPS", decoder_dropout=0.25)
    plans = PlansManager(json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8")))
    assert plans.get_configuration("2d").configuration["nnunet_multimodal"]["decoder_dropout"] == 0.25
