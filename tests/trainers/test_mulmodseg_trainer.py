"""MulModSeg's trainer: alternation, per-modality Dice, text, what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_training import CASES, TABLE, configuration_name, log_of, make_trainer, tiny_dataset, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.networks import TextConditionedNetwork, TextSwinUNETR, TextUNet
from nnunet_multimodal.text import FILE_NAME, TextEmbeddings
from nnunet_multimodal.trainers.mulmodseg import dice_of_modalities

NAME = "nnUNetTrainerMulModSeg"
LABELS = ("background", "liver", "spleen")


@pytest.fixture(autouse=True)
def quiet(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def started(name: str = NAME, ndim: int = 2, **settings: Any) -> Any:
    trainer: Any = make_trainer(name, ndim, **settings)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def modalities_of(batch: dict[str, Any]) -> set[str]:
    return {TABLE["case_modality"][str(case)] for case in batch["keys"]}


def built(dataset: dict[str, Any], name: str = NAME, **settings: Any) -> Any:
    """A trainer with this dataset.json."""
    return getattr(trainers, name)(tiny_plans(2, 1, settings), configuration_name(2), 0, dataset, torch.device("cpu"))


# --- alternation -----------------------------------------------------------------------------------------------------


def test_whole_batches_of_one_modality_in_turn_each_a_step_of_its_own() -> None:
    trainer = started(num_iterations_per_epoch=6)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    trainer.optimizer.register_step_post_hook(count)
    order = []
    for _ in range(6):
        batch = next(trainer.dataloader_train)
        order.append(modalities_of(batch))
        assert np.isfinite(trainer.train_step(batch)["loss"])
    assert order == [{"CT"}, {"MR"}] * 3
    assert steps == 6


def test_the_order_follows_from_the_epoch() -> None:
    trainer = started(num_iterations_per_epoch=3)
    assert modalities_of(next(trainer.dataloader_train)) == {"CT"}
    trainer.current_epoch = 1  # three steps are done: CT MR CT
    trainer.on_train_epoch_start()
    assert modalities_of(next(trainer.dataloader_train)) == {"MR"}


def test_the_ratio_is_a_setting() -> None:
    trainer = started(sampling_ratio={"MR": 2})
    assert [modalities_of(next(trainer.dataloader_train)) for _ in range(6)] == [{"CT"}, {"MR"}, {"MR"}] * 2


def test_without_alternation_batches_are_mixed_and_each_image_is_told() -> None:
    trainer = started(f"{NAME}_noALT")
    batches = [next(trainer.dataloader_train) for _ in range(20)]
    assert {"CT", "MR"} in [modalities_of(batch) for batch in batches]
    mixed = next(batch for batch in batches if modalities_of(batch) == {"CT", "MR"})
    trainer.train_step(mixed)
    wanted = [["CT", "MR"].index(TABLE["case_modality"][str(case)]) for case in mixed["keys"]]
    assert trainer.bare_network().told.tolist() == wanted


@pytest.mark.parametrize("only", ["CT", "MR"])
def test_one_modality_alone(only: str) -> None:
    trainer = started(f"{NAME}_{only}only")
    assert {frozenset(modalities_of(next(trainer.dataloader_train))) for _ in range(5)} == {frozenset({only})}
    assert trainer.bare_network().only == TABLE["modalities"].index(only)


def test_any_number_of_modalities() -> None:
    dataset = tiny_dataset(NAME)
    names = ("PET", "CT", "MR", "PET", "CT")
    dataset["nnunet_multimodal"] = {
        "modalities": ["PET", "CT", "MR"],
        "case_modality": dict(zip(CASES, names)),
        "case_patient": dict.fromkeys(CASES[:3], "p1"),
    }
    make_trainer(NAME).initialize()  # brings the cases
    folder = Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny")
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES, "val": CASES}]), encoding="utf-8")
    trainer = built(dataset, num_iterations_per_epoch=3, num_val_iterations_per_epoch=3)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batches = [next(trainer.dataloader_train) for _ in range(4)]
    assert [{dict(zip(CASES, names))[str(case)] for case in batch["keys"]} for batch in batches] == [
        {"PET"}, {"CT"}, {"MR"}, {"PET"},
    ]  # fmt: skip
    assert np.isfinite(trainer.train_step(batches[2])["loss"])
    assert trainer.bare_network().told.tolist() == [2, 2]


def test_workers_are_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    before = set(multiprocessing.active_children())
    trainer = started(num_epochs=1)
    assert modalities_of(next(trainer.dataloader_train)) == {"CT"}
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 3  # two for training, one for validation: the fold has one modality to judge
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    trainer.current_epoch += 1
    trainer.on_train_end()
    for process in mine:
        process.join(10)
        assert not process.is_alive()


def test_killed_in_the_middle_of_an_epoch_and_continued() -> None:
    settings = dict(num_epochs=4, num_iterations_per_epoch=3, save_every=1)
    first: Any = make_trainer(NAME, **settings)
    child = os.fork()
    if child == 0:
        steps = 0

        def until_killed(batch: dict[str, Any], step: Any = first.train_step) -> Any:
            nonlocal steps
            steps += 1
            if steps == 5:  # epoch 0 has three steps: this is the second one of epoch 1
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batch)

        first.train_step = until_killed
        first.run_training()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    again: Any = make_trainer(NAME, **settings)
    again.initialize()
    again.load_checkpoint(str(Path(again.output_folder, "checkpoint_latest.pth")))
    saved = torch.load(Path(again.output_folder, "checkpoint_latest.pth"), weights_only=False)
    moments = [state["exp_avg"].abs().sum() for state in again.optimizer.state.values()]
    assert again.current_epoch == 1 and len(moments) == len(saved["optimizer_state"]["state"]) and sum(moments) > 0
    assert {int(state["step"]) for state in again.optimizer.state.values()} == {3}
    again.on_train_start()
    again.on_epoch_start()
    again.on_train_epoch_start()
    order = []
    for _ in range(3):
        batch = next(again.dataloader_train)
        order.append(modalities_of(batch))
        assert np.isfinite(again.train_step(batch)["loss"])
    assert order == [{"MR"}, {"CT"}, {"MR"}]  # steps 3, 4, 5 of CT MR CT MR CT MR
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 5 / 12)) / 2)


# --- pseudo Dice -----------------------------------------------------------------------------------------------------


def counts(modality: int, tp: list[int], fp: list[int], fn: list[int]) -> dict[str, Any]:
    arrays = {f"{key}_hard": np.array(value, float) for key, value in (("tp", tp), ("fp", fp), ("fn", fn))}
    return {"modality": modality, "known": 1.0, "loss": np.array(0.5), **arrays}


def test_dice_of_a_modality_is_over_all_its_patches() -> None:
    outputs = [counts(0, [1, 0], [1, 0], [0, 0]), counts(0, [2, 0], [0, 0], [1, 0]), counts(1, [0, 4], [0, 0], [2, 4])]
    dice = dice_of_modalities([(o["modality"], 1.0, o["tp_hard"], o["fp_hard"], o["fn_hard"]) for o in outputs], 2)
    np.testing.assert_allclose(dice, [[6 / 8, np.nan], [0, 8 / 12]])


def test_the_best_checkpoint_follows_the_mean_over_modalities() -> None:
    trainer = started()
    # CT: 0.8 in 100 voxels; MR: 0.2 in 10. Pooled it would be about .75.
    outputs = [counts(0, [40, 40], [10, 10], [10, 10]), counts(1, [1, 1], [4, 4], [4, 4])]
    trainer.on_validation_epoch_end(outputs)
    assert trainer.logger.get_value("mean_fg_dice", step=-1) == pytest.approx(0.5)
    assert trainer.logger.get_value("ema_fg_dice", step=-1) == pytest.approx(0.5)
    assert "Pseudo dice CT 0.8000 [0.8, 0.8]" in log_of(trainer)
    assert "Pseudo dice MR 0.2000 [0.2, 0.2]" in log_of(trainer)
    assert "modality recognised in 100.0 % of the validation patches" in log_of(trainer)
    trainer.current_epoch = 1
    trainer.on_validation_epoch_end([counts(0, [1, 1], [0, 0], [0, 0]), counts(1, [0, 0], [0, 0], [0, 0])])
    assert trainer.logger.get_value("mean_fg_dice", step=-1) == pytest.approx(1)  # no MR organ was in the patches
    assert trainer.logger.get_value("ema_fg_dice", step=-1) == pytest.approx(0.55)


# --- text ------------------------------------------------------------------------------------------------------------


def test_one_hot_unless_there_is_a_file(tmp_path: Path) -> None:
    trainer = make_trainer(NAME)
    trainer.initialize()
    network = trainer.bare_network()
    assert isinstance(network, TextUNet)
    assert torch.equal(network.text_embeddings, TextEmbeddings.one_hot(("CT", "MR"), LABELS).embeddings)
    torch.manual_seed(1)
    made = TextEmbeddings(
        torch.randn(2, 3, 7),
        ("CT", "MR"),
        LABELS,
        template="A {modality} of a {organ}.",
        encoder="test",
        normalised=False,
    )
    beside = Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", FILE_NAME)
    made.save(beside)
    trainer = make_trainer(NAME)
    trainer.initialize()
    assert torch.equal(trainer.bare_network().text_embeddings, made.embeddings)
    assert trainer.settings["text_dimension"] == 7
    assert trainer.settings["text_source"]["checksum"] == made.checksum
    one_hot = make_trainer(NAME, text="one_hot")
    assert one_hot.settings["text_dimension"] == 6
    # the checkpoint brings its own
    trainer.on_train_start()
    file = tmp_path / "checkpoint.pth"
    trainer.save_checkpoint(str(file))
    state = torch.load(file, weights_only=False)["network_weights"]
    assert torch.equal(state["text_embeddings"], made.embeddings)


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match=r"text embeddings .*mine.npz not found.*embed Dataset601_Tiny"):
        make_trainer(NAME, text="mine.npz")


def made_up(seed: int, length: int = 6) -> TextEmbeddings:
    rows = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed))
    return TextEmbeddings(rows, ("CT", "MR"), LABELS, template="V3", encoder=f"test {seed}", normalised=False)


def beside_the_plans() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", FILE_NAME)


def trained(fold: int = 0, **settings: Any) -> Any:
    """A trainer with a checkpoint on disk."""
    trainer: Any = make_trainer(NAME, **settings)
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    return trainer


def test_folds_that_predict_together_have_one_text() -> None:
    trained()
    made_up(1).save(beside_the_plans())
    assert make_trainer(NAME).settings["text_source"]["encoder"] == "one_hot"  # auto is what it was
    with pytest.raises(UsageError, match=r"trained with text of one_hot .*now it would be test 1"):
        make_trainer(NAME, text=FILE_NAME)


def test_embeddings_that_were_replaced_are_noticed() -> None:
    make_trainer(NAME).initialize()
    made_up(1).save(beside_the_plans())
    trained()
    beside_the_plans().unlink()
    made_up(2).save(beside_the_plans())
    with pytest.raises(UsageError, match=r"trained with text of test 1 .*now it would be test 2"):
        make_trainer(NAME)


def test_a_checkpoint_of_another_order_of_modalities_is_refused() -> None:
    """Every image would get another modality's text."""
    checkpoint = str(Path(trained(text="one_hot").output_folder, "checkpoint_latest.pth"))
    turned = {**TABLE, "modalities": ["MR", "CT"]}
    trainer = built({**tiny_dataset(NAME), "nnunet_multimodal": turned}, f"{NAME}_noText")
    with pytest.raises(UsageError, match=r"modalities \['CT', 'MR'\]; now it is \['MR', 'CT'\]"):
        trainer.load_checkpoint(checkpoint)


def test_a_starting_model_brings_no_text() -> None:
    first = trained()
    made_up(3).save(beside_the_plans())
    name = f"{NAME}_noALT"  # another model, so another folder
    trainer: Any = make_trainer(name, starting_model=first.output_folder)
    trainer.on_train_start()
    assert torch.equal(trainer.bare_network().text_embeddings, made_up(3).embeddings)
    for mine, theirs in zip(trainer.bare_network().encoder.parameters(), first.bare_network().encoder.parameters()):
        assert torch.equal(mine, theirs)


def test_without_text_it_is_the_stock_network() -> None:
    ours: Any = make_trainer(f"{NAME}_noText")
    ours.initialize()
    plans = tiny_plans(2, 1)
    stock = nnUNetTrainer(plans, "2d", 0, tiny_dataset("nnUNetTrainer"), torch.device("cpu"))
    stock.initialize()
    stock.network.load_state_dict(ours.network.state_dict(), strict=True)
    image = torch.randn(2, 1, 16, 16)
    target = [torch.randint(0, 3, (2, 1, 16, 16)), torch.randint(0, 3, (2, 1, 8, 8))]
    found, wanted = ours.network(image), stock.network(image)
    for mine, theirs in zip(found, wanted):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.loss(found, target), stock.loss(wanted, target))


def test_the_modality_head_learns_with_a_hundredth() -> None:
    trainer = started()
    batch = next(trainer.dataloader_train)
    trainer.tell(batch)
    torch.manual_seed(3)
    output = trainer.network(batch["data"])
    told = torch.nn.functional.cross_entropy(output.modality_logits, torch.zeros(2, dtype=torch.long))
    loss = trainer.loss(output, batch["target"])
    torch.testing.assert_close(loss - trainer.loss.segmentation(output.segmentation, batch["target"]), 0.01 * told)


def test_validation_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started()
    trainer.train_step(next(trainer.dataloader_train))
    told = []
    monkeypatch.setattr(
        nnUNetTrainer, "perform_actual_validation", lambda self, *_: told.append(self.bare_network().told)
    )
    trainer.perform_actual_validation()
    assert told == [None]


@pytest.mark.parametrize("ndim", [2, 3])
def test_swin_unetr_as_backbone(ndim: int) -> None:
    trainer: Any = make_trainer(NAME, ndim, backbone="swin_unetr", feature_size=12)
    trainer.initialize()
    network = trainer.bare_network()
    assert isinstance(network, TextSwinUNETR) and isinstance(network, TextConditionedNetwork)
    assert trainer.enable_deep_supervision is False and trainer._get_deep_supervision_scales() is None
    trainer.configuration_manager.configuration["patch_size"] = [4, 40, 40][-ndim:]  # its bottleneck needs two voxels
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


def test_nnunets_own_optimiser_on_request() -> None:
    trainer = make_trainer(NAME, optimizer="sgd", initial_lr=0.01)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.SGD) and trainer.optimizer.param_groups[0]["lr"] == 0.01


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_data_set_without_a_table() -> None:
    with pytest.raises(DataProblem, match=r"no modality table.*convert table"):
        built({**tiny_dataset(NAME), "nnunet_multimodal": {}})


@pytest.mark.parametrize("channel", ["CT", "ct", "CT_or_MR"])
def test_plans_that_clip_as_ct(channel: str) -> None:
    """Also where the channel was renamed after planning."""
    plans = tiny_plans(2, 1)
    plans["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    dataset = {**tiny_dataset(NAME), "channel_names": {"0": channel}}
    with pytest.raises(DataProblem, match=r"'CT' turns on CT clipping for MR.*'CT_or_MR'"):
        getattr(trainers, NAME)(plans, "2d", 0, dataset, torch.device("cpu"))


def test_two_channels() -> None:
    with pytest.raises(DataProblem, match=r"has 2 channels \(CT_or_MR, PET\)"):
        built({**tiny_dataset(NAME), "channel_names": {"0": "CT_or_MR", "1": "PET"}})


def test_a_backbone_that_needs_the_text() -> None:
    with pytest.raises(UsageError, match="backbone has to be 'unet'"):
        make_trainer(NAME, text_head=False, backbone="swin_unetr")


def test_settings_without_effect_are_named() -> None:
    trainer = make_trainer(f"{NAME}_noALT", sampling_ratio={"CT": 2}, optimizer="sgd", gradient_clip=1.0)
    trainer.initialize()
    assert "WARNING: without effect in this training: sampling_ratio, gradient_clip" in log_of(trainer)


def test_one_modality() -> None:
    table = {"modalities": ["CT"], "case_modality": dict.fromkeys(CASES, "CT")}
    with pytest.raises(DataProblem, match="has one modality, CT; nnUNetTrainerMulModSeg needs two"):
        built({**tiny_dataset(NAME), "nnunet_multimodal": table})


def test_only_an_unknown_modality() -> None:
    with pytest.raises(DataProblem, match="trains on PET; Dataset601_Tiny has CT, MR"):
        make_trainer(NAME, only_modality="PET")


@pytest.mark.parametrize(("setting", "value"), [("backbone", "vgg"), ("optimizer", "adam")])
def test_an_unknown_choice(setting: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{setting} has to be one of .*'{value}'"):
        make_trainer(NAME, **{setting: value})


def test_a_case_that_is_not_in_the_table() -> None:
    make_trainer(NAME)
    table = {
        "modalities": ["CT", "MR"],
        "case_modality": {c: m for c, m in TABLE["case_modality"].items() if c != "case_d"},
    }
    trainer = built({**tiny_dataset(NAME), "nnunet_multimodal": table})
    with pytest.raises(DataProblem, match="1 cases are not in the modality table: case_d"):
        trainer.on_train_start()


def test_a_fold_without_mr() -> None:
    trainer = make_trainer(NAME)
    train = [case for case in CASES if TABLE["case_modality"][case] == "CT"]
    splits = [{"train": train, "val": [case for case in CASES if case not in train]}]
    Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", "splits_final.json").write_text(
        json.dumps(splits), encoding="utf-8"
    )
    with pytest.raises(
        DataProblem, match="fold 0 has 3 CT, 0 MR training cases; nnUNetTrainerMulModSeg needs CT and MR"
    ):
        trainer.on_train_start()


def test_a_fold_without_a_validation_case() -> None:
    trainer = make_trainer(NAME)
    file = Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", "splits_final.json")
    file.write_text(json.dumps([{"train": CASES, "val": []}]), encoding="utf-8")
    with pytest.raises(DataProblem, match="fold 0 has no validation case"):
        trainer.on_train_start()


def without_spleen_in_mr(trainer: Any) -> None:
    for case, modality in TABLE["case_modality"].items():
        if modality == "MR":
            file = Path(trainer.preprocessed_dataset_folder, f"{case}.pkl")
            properties = load_pickle(file)
            properties["class_locations"][2] = np.zeros((0, 4), int)
            write_pickle(properties, file)


def test_a_class_that_a_modality_lacks() -> None:
    trainer = make_trainer(NAME)
    without_spleen_in_mr(trainer)
    with pytest.raises(DataProblem, match="spleen is in no MR training case of fold 0"):
        trainer.on_train_start()
    trainer = make_trainer(NAME, allow_absent_classes=True)
    trainer.on_train_start()
    assert modalities_of(next(trainer.dataloader_train)) == {"CT"}


def test_new_splits_have_both_modalities_in_every_fold_that_can() -> None:
    trainer = make_trainer(NAME)
    trainer.do_split()
    splits = json.loads(
        Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", "splits_final.json").read_text(encoding="utf-8")
    )
    assert sorted(case for split in splits for case in split["val"]) == list(CASES)
    for split in splits:
        assert {TABLE["case_modality"][case] for case in split["train"]} == {"CT", "MR"}
