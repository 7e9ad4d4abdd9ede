"""Every trainer through nnU-Net's own hooks, and what all of them do when something is wrong."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_training import CASES, NAMES_2D, SMALL, configuration_name, log_of, make_trainer, save_cases, tiny_plans

from nnunet_multimodal.data.intensity import Sometimes
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.networks import CrossMRNetwork, PromptedUNet
from nnunet_multimodal.trainers.base import MultimodalTrainer, TrainingStopped, is_intensity
from nnunet_multimodal.trainers.checkpoints import is_complete

CPU = torch.device("cpu")
STOCK_NAMES = ["nnUNetTrainerContrastAug", "nnUNetTrainerScribble"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, nnunet_folders: dict[str, str]) -> Iterator[None]:
    """Data loading in this process, reproducible."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def first_batch(trainer: MultimodalTrainer) -> dict[str, Any]:
    """What the training loop would get first."""
    batch: dict[str, Any] = next(trainer.dataloader_train)
    return batch


def batch_with_organs(loader: Any) -> dict[str, Any]:
    """A slice may show none of them, whatever the fold."""
    while True:
        batch: dict[str, Any] = next(loader)
        target = batch["target"]
        if (target[0] if isinstance(target, list) else target)[:, 0].eq(1).any():
            return batch


def started(name: str, ndim: int = 2, **arguments: Any) -> MultimodalTrainer:
    """A trainer at the beginning of its first epoch."""
    trainer = make_trainer(name, ndim, **arguments)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def weights_of(trainer: MultimodalTrainer) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in trainer.bare_network().state_dict().items()}


def changed(before: dict[str, torch.Tensor], trainer: MultimodalTrainer) -> bool:
    return any(not torch.equal(value, before[key]) for key, value in weights_of(trainer).items())


# --- every trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["", "_3epochs"])
@pytest.mark.parametrize("name", NAMES_2D)
def test_every_trainer_trains_validates_and_is_built_again_by_the_predictor(name: str, length: str) -> None:
    check_a_trainer(name + length, 2)


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerCrossMR",
        "nnUNetTrainerContrastAug",
        "nnUNetTrainerScribble",
        "nnUNetTrainerMulModSeg",
        "nnUNetTrainerPartialCE_CRF",
        "nnUNetTrainerDMSPS",
        "nnUNetTrainerUSTM",
        "nnUNetTrainerScribble2Label",
        "nnUNetTrainerSegVol",
        "nnUNetTrainerLoRA",
        "nnUNetTrainerMoA",
    ],
)
def test_in_3d(name: str) -> None:
    check_a_trainer(name, 3)


def check_a_trainer(name: str, ndim: int) -> None:
    trainer = started(name, ndim, num_epochs=4)
    assert isinstance(trainer, nnUNetTrainer) and type(trainer).__name__ == name
    assert Path(trainer.output_folder_base).name == f"{name}__nnUNetPlans__{configuration_name(ndim)}"
    assert trainer.num_epochs == (3 if name.endswith("_3epochs") else 4)
    batch = first_batch(trainer)
    channels = len(trainer.dataset_json["channel_names"])
    assert batch["data"].shape == (2, channels, *trainer.configuration_manager.patch_size)
    assert batch["data"].dtype == torch.float32 and torch.isfinite(batch["data"]).all()
    drawn = batch["data"][:, [c for c in trainer.prompt_channels]]
    assert ((drawn == 0) | (drawn == 1)).all()

    before = weights_of(trainer)
    for _ in range(2):  # the very first step of a warm-up is small, but it is a step
        result = trainer.train_step(first_batch(trainer))
        assert np.isfinite(result["loss"])
    assert changed(before, trainer)
    assert trainer.step == 2

    trainer.on_validation_epoch_start()
    with torch.no_grad():
        validated = trainer.validation_step(batch_with_organs(trainer.dataloader_val))
    assert np.isfinite(validated["loss"])
    assert validated["tp_hard"].shape == (2,) and (validated["tp_hard"] + validated["fn_hard"]).sum() > 0

    # the predictor knows plans.json, dataset.json and the checkpoint
    plans = PlansManager(json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8")))
    configuration = plans.get_configuration(configuration_name(ndim))
    builder = type(trainer).build_network_architecture
    assert "plans_manager" in inspect.signature(builder).parameters
    network = builder(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, trainer.dataset_json),
        plans.get_label_manager(trainer.dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    network.load_state_dict(trainer.network.state_dict(), strict=True)
    trainer.set_deep_supervision_enabled(False)
    if hasattr(trainer.bare_network(), "tell"):
        trainer.bare_network().tell(None)  # nobody says of which modality a new case is
    with torch.no_grad():
        expected = trainer.bare_network().eval()(batch["data"])
        found = network.eval()(batch["data"])
    assert torch.equal(found, expected)
    assert found.shape == (2, 3, *trainer.configuration_manager.patch_size)


def test_an_epoch_of_nnunets_own_loop_and_one_more_after_an_interruption() -> None:
    trainer = make_trainer("nnUNetTrainerCrossMR", num_epochs=3, save_every=1)
    trainer.on_train_start()
    for stop_after in range(2):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(first_batch(trainer)) for _ in range(2)])
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
        assert trainer.current_epoch == stop_after + 1
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    assert is_complete(latest) and is_complete(latest.with_name("checkpoint_best.pth"))
    # two epochs of two steps: the next rate, of five, is at 4/6 of the way
    expected = 1e-3 * (1 - 4 / 6) ** 0.9

    again = make_trainer("nnUNetTrainerCrossMR", num_epochs=3, save_every=1)
    again.load_checkpoint(str(latest))
    assert again.current_epoch == 2 and not changed(weights_of(trainer), again)
    again.on_train_start()
    again.on_epoch_start()
    again.on_train_epoch_start()
    assert [group["lr"] for group in again.optimizer.param_groups] == pytest.approx([expected] * 2)
    moments = again.optimizer.state_dict()["state"]
    assert moments and all(state["step"] == 4 for state in moments.values())
    assert np.isfinite(again.train_step(first_batch(again))["loss"])


def test_networks_are_what_the_trainers_say() -> None:
    crossmr = make_trainer("nnUNetTrainerCrossMR")
    crossmr.initialize()
    assert isinstance(crossmr.bare_network(), CrossMRNetwork) and crossmr.bare_network().mask_stage == 2
    assert crossmr.bare_network().encoder.stages[0][0].convs[0].conv.in_channels == 1
    in_3d = make_trainer("nnUNetTrainerCrossMR", 3)
    in_3d.initialize()
    assert in_3d.bare_network().mask_stage == 2
    assert not crossmr.enable_deep_supervision


@pytest.mark.parametrize(
    ("ablation", "attribute"),
    [
        ("noVisualTokens", ("visual_tokens", False)),
        ("noOrganMatch", ("organ_queries", False)),
        ("visualAcrossBatch", ("pool_batch_tokens", True)),
    ],
)
def test_an_ablation_reaches_the_network(ablation: str, attribute: tuple[str, bool]) -> None:
    name, value = attribute
    for trainer_name, expected in (("nnUNetTrainerCrossMR", not value), (f"nnUNetTrainerCrossMR_{ablation}", value)):
        trainer = make_trainer(trainer_name)
        trainer.initialize()
        assert getattr(trainer.bare_network(), name) is expected
    assert trainer.loss.referring.organ_match is (ablation != "noOrganMatch")


# --- what a batch looks like -----------------------------------------------------------------------------------------


def test_crossmr_makes_two_appearances_of_one_image_and_scribbles_the_reference() -> None:
    trainer = started("nnUNetTrainerCrossMR")
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        for _ in range(5):
            batch = next(loader)
            target, reference, scribbles = batch["data"][:, 0], batch["data"][:, 1], batch["data"][:, 2:]
            assert not torch.equal(target, reference)
            labels = batch["target"][:, 0]
            for organ in (1, 2):
                scribbled, there = scribbles[:, organ - 1].flatten(1).sum(1) > 0, (labels == organ).flatten(1).sum(1)
                assert (scribbled[there > 60]).all()  # jitter can push only a sliver of an organ out of the patch
                assert scribbles[:, organ - 1].sum() <= (labels == organ).sum() + 60


def test_no_paired_augmentation_gives_the_network_one_image_twice() -> None:
    trainer = started("nnUNetTrainerCrossMR_noPairedAug")
    for _ in range(5):
        batch = first_batch(trainer)
        assert torch.equal(batch["data"][:, 0], batch["data"][:, 1])
        for organ in (1, 2):  # nothing is jittered: each scribble lies inside its organ
            scribbles = batch["data"][:, 1 + organ] > 0
            assert (batch["target"][:, 0][scribbles] == organ).all()


def test_scribbles_are_drawn_anew_on_the_label_or_kept_as_stored() -> None:
    simulated = started("nnUNetTrainerScribble")
    for _ in range(5):
        batch = first_batch(simulated)
        for organ in (1, 2):
            scribbles = batch["data"][:, organ] > 0
            labels = batch["target"][0][:, 0]
            assert (labels[scribbles] == organ).all()
            present = (labels == organ).flatten(1).any(1)
            assert torch.equal(scribbles.flatten(1).any(1), present)
    stored = started("nnUNetTrainerScribble", scribbles="stored")
    empty = sum(int((first_batch(stored)["data"][:, 1:].flatten(2).sum(-1) == 0).sum()) for _ in range(10))
    assert empty > 10  # a stored scribble lies on one of six slices


def test_contrast_augmentation_takes_the_place_of_nnunets() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    arguments = ([16, 16], (-0.1, 0.1), None, (0, 1), False)
    ours = trainer.get_training_transforms(*arguments).transforms
    stock = nnUNetTrainer.get_training_transforms(*arguments).transforms
    assert sum(is_intensity(t) for t in stock) >= 6
    assert not any(is_intensity(t) for t in ours)
    assert [type(t).__name__ for t in ours if type(t).__name__ == "TargetContrast"] == ["TargetContrast"]
    # geometry, mirroring and labels are as they were
    rest = [type(t).__name__ for t in stock if not is_intensity(t)]
    assert [type(t).__name__ for t in ours if type(t).__name__ != "TargetContrast"] == rest
    assert not any(isinstance(t, Sometimes) for t in stock)


def intensities_of(transforms: list[Any]) -> list[str]:
    return [type(t.transform).__name__ for t in transforms if isinstance(t, RandomTransform) and is_intensity(t)]


def test_prompts_are_out_of_reach_of_intensities() -> None:
    """Stored scribbles: whatever nnU-Net's intensities do, what comes out is 0 or 1 and follows the label."""
    trainer = make_trainer("nnUNetTrainerScribble", scribbles="stored")
    transform = trainer.get_training_transforms([16, 16], (-3.0, 3.0), None, (0, 1), False)
    assert len(intensities_of(transform.transforms)) >= 6
    labels = torch.zeros(1, 16, 16, dtype=torch.int16)
    labels[0, 2:8, 3:9], labels[0, 9:14, 4:15] = 1, 2
    image = torch.cat((torch.randn(1, 16, 16), labels == 1, labels == 2)).float()  # the prompt is the whole organ
    for _ in range(40):
        out = transform(image=image.clone(), segmentation=labels.clone())
        for organ in (1, 2):
            assert torch.equal(out["image"][organ] == 1, out["segmentation"][0] == organ)
        assert ((out["image"][1:] == 0) | (out["image"][1:] == 1)).all()


# --- sides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES_2D)
@pytest.mark.parametrize("sided", [True, False])
def test_labels_with_sides_are_not_mirrored(name: str, sided: bool) -> None:
    organs = {"left_kidney": 1, "right_kidney": 2} if sided else {"liver": 1, "spleen": 2}
    trainer = make_trainer(name, organs=organs)
    rotation, dummy_2d, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    never = name == "nnUNetTrainerMRSegmentator"
    assert axes == (None if sided or never else (0, 1))
    # A kept reference is not mirrored with the target; a mixture is mirrored as its starting model, and here is none.
    alone = name.startswith(("nnUNetTrainerCrossMR", "nnUNetTrainerMoA")) and name != "nnUNetTrainerMoA_learned"
    assert trainer.inference_allowed_mirroring_axes == (None if sided or alone or never else (0, 1))
    transforms = trainer.get_training_transforms([16, 16], rotation, None, axes, dummy_2d).transforms
    assert any(isinstance(t, MirrorTransform) for t in transforms) is not (sided or never)
    assert ("no mirroring: labels have sides, left_kidney and right_kidney" in log_of(trainer)) is sided


def test_the_mirroring_axes_are_kept_in_the_checkpoint() -> None:
    trainer = started("nnUNetTrainerContrastAug", organs={"left_kidney": 1, "right_kidney": 2})
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    assert torch.load(path, weights_only=False)["inference_allowed_mirroring_axes"] is None


# --- unlabelled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK_NAMES)
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_unlabelled_where_there_is_an_ignore_label(name: str, ignore: bool, training: bool) -> None:
    trainer = make_trainer(name, ignore=ignore)
    label = trainer.label_manager.ignore_label
    assert label == (3 if ignore else None)
    if training:
        transform = trainer.get_training_transforms([16, 16], (0.0, 0.0), None, None, False, ignore_label=label)
    else:
        transform = trainer.get_validation_transforms(None, ignore_label=label)
    segmentation = torch.full((1, 16, 16), -1, dtype=torch.int16)
    segmentation[:, 4:12, 4:12] = 1
    image = torch.zeros(len(trainer.channel_names), 16, 16)
    found = transform(image=image, segmentation=segmentation)["segmentation"]
    assert set(found.unique().tolist()) == {1, 3 if ignore else 0}


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_a_batch_without_any_label_does_no_harm(name: str) -> None:
    trainer = started(name, ignore=True)
    batch = first_batch(trainer)
    batch["target"] = [torch.full_like(t, 3) for t in batch["target"]]
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_crossmr_needs_dense_labels() -> None:
    with pytest.raises(DataProblem, match="ignore label"):
        make_trainer("nnUNetTrainerCrossMR", ignore=True)


# --- the data set must fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "needs"),
    [
        ("nnUNetTrainerCrossMR", ["MR"], "convert crossmr"),
        ("nnUNetTrainerCrossMR", ["target", "reference", "noNorm"], "convert crossmr"),
        ("nnUNetTrainerCrossMR", ["reference", "target", "noNorm", "noNorm"], "convert crossmr"),
        ("nnUNetTrainerScribble", ["MR"], "convert scribble"),
        ("nnUNetTrainerScribble", ["noNorm", "noNorm", "MR"], "convert scribble"),
    ],
)
def test_a_data_set_of_another_kind_is_refused(name: str, channels: list[str], needs: str) -> None:
    dataset = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    from nnunet_multimodal import trainers

    with pytest.raises(DataProblem, match=f"Dataset601_Tiny has channels .*{needs}") as error:
        getattr(trainers, name)(tiny_plans(2, len(channels)), "2d", 0, dataset, CPU)
    assert str(channels) in str(error.value)


def test_an_unknown_kind_of_scribbles_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 'simulated' or 'stored', found 'drawn'"):
        make_trainer("nnUNetTrainerScribble", scribbles="drawn")


# --- splits ----------------------------------------------------------------------------------------------------------


def write_splits(trainer: MultimodalTrainer, train: list[str], val: list[str]) -> Path:
    path = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    path.write_text(json.dumps([{"train": train, "val": val}]))
    return path


def test_splits_that_name_a_missing_case_stop_before_training() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    path = write_splits(trainer, ["case_a", "case_gone"], ["case_b", "case_lost"])
    with pytest.raises(DataProblem, match="2 cases that are not preprocessed: case_gone, case_lost") as error:
        trainer.on_train_start()
    assert str(path) in str(error.value) and error.value.exit_code == 4
    assert "Epoch 0" not in log_of(trainer)


def test_cases_in_no_split_are_named() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    write_splits(trainer, ["case_a", "case_c"], ["case_b"])
    assert trainer.do_split() == (["case_a", "case_c"], ["case_b"])
    assert "WARNING: 2 cases are in no split and will not be used: case_d, case_e." in log_of(trainer)


def test_splits_that_fit_need_no_word() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    write_splits(trainer, list(CASES[:3]), list(CASES[3:]))
    trainer.do_split()
    assert "no split" not in log_of(trainer)


def test_splits_that_are_no_splits_are_named() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    path = write_splits(trainer, ["case_a"], ["case_b"])
    path.write_text('{"train": ["case_a"]}', encoding="utf-8")
    with pytest.raises(DataProblem, match="has to be a list with one"):
        trainer.do_split()


def test_fold_all_and_first_trainings_need_no_splits() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    train, val = trainer.do_split()  # nnU-Net makes the splits
    assert sorted(train + val) == list(CASES) and len(val) == 1
    write_splits(trainer, ["case_gone"], [])
    trainer.fold = "all"
    assert sorted(trainer.do_split()[0]) == list(CASES)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nnUNetTrainerCrossMR", *STOCK_NAMES])
def test_a_loss_that_is_nan_stops_and_says_where(name: str) -> None:
    trainer = started(name)
    trainer.train_step(first_batch(trainer))
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()
    trainer.current_epoch = 3
    batch = first_batch(trainer)
    batch["data"][0, 0, 5, 5] = float("nan")
    with pytest.raises(TrainingStopped) as error:
        trainer.train_step(batch)
    assert error.value.exit_code == 1
    message = str(error.value)
    rate = f"{trainer.optimizer.param_groups[0]['lr']:.3g}"
    assert message.startswith("loss is nan at epoch 3 step 1; cases [")
    assert all(f"'{case}'" in message for case in batch["keys"]) and f"learning rate {rate}" in message
    assert f"Last good checkpoint: {latest}." in message and "--c" in message
    assert message in log_of(trainer)
    assert latest.read_bytes() == before
    again = make_trainer(name)
    again.load_checkpoint(str(latest))
    assert all(torch.isfinite(value).all() for value in weights_of(again).values())


@pytest.mark.parametrize("part", ["mask_projection.bias", "answer_embedding.4.bias", "query_key.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whatever_part_of_the_referring_network_breaks_the_message_is_the_same(part: str, value: float) -> None:
    trainer = started("nnUNetTrainerCrossMR")
    with torch.no_grad():
        trainer.bare_network().get_parameter(part)[0] = value
    with pytest.raises(TrainingStopped, match=r"loss is (nan|-?inf) at epoch 0 step 0; cases \['case_.*No checkpoint"):
        trainer.train_step(first_batch(trainer))


@pytest.mark.parametrize("part", ["answer", "scores", "masks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflow_is_a_loss_that_is_not_finite_not_an_error_of_matching(part: str, value: float) -> None:
    """Under mixed precision the scaler then skips the step; an exception would end the training."""
    trainer = started("nnUNetTrainerCrossMR")
    batch = first_batch(trainer)
    output = trainer.network(batch["data"])
    assert torch.isfinite(trainer.loss(output, batch["target"]))
    tensor = getattr(output, part)
    tensor = tensor[0] if part == "masks" else tensor
    with torch.no_grad():
        tensor.view(-1)[0], tensor.view(-1)[1] = value, -value
    loss = trainer.loss(output, batch["target"])
    assert loss.ndim == 0 and not torch.isfinite(loss)
    loss.backward()


class Scaler:
    """AMP's scaler, which skips steps whose gradient is not finite; here it steps never."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    step = unscale_

    def update(self) -> None:
        pass


def test_mixed_precision_forgives_gradients_not_the_loss() -> None:
    """A case with NaN voxels would be skipped for ever, and never named."""
    trainer = started("nnUNetTrainerContrastAug")
    trainer.grad_scaler = Scaler()
    batch = first_batch(trainer)
    trainer.train_step(batch)
    batch["data"][:] = float("nan")
    with pytest.raises(TrainingStopped, match="step 1"):
        trainer.train_step(batch)


def outputs(tp: float, fp: float, fn: float) -> list[dict[str, Any]]:
    """Validation of one patch; both classes alike."""
    counts = {"tp_hard": tp, "fp_hard": fp, "fn_hard": fn}
    return [{"loss": np.array(0.5), **{key: np.full(2, value) for key, value in counts.items()}}]


def test_an_epoch_that_saw_no_class_leaves_the_moving_average() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    averages = []
    # Dice 2/(2+1+1) = .5; none; 2*4/(8+1+1) = .8: .9 * .5 + .1 * .8 = .53
    for epoch, counts in enumerate([(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (4.0, 1.0, 1.0)]):
        trainer.current_epoch = epoch
        trainer.on_validation_epoch_end(outputs(*counts))
        averages.append(trainer.logger.get_value("ema_fg_dice", step=-1))
    assert averages == pytest.approx([0.5, 0.5, 0.53])
    assert np.isfinite(trainer.logger.get_value("mean_fg_dice", step=None)).all()
    assert log_of(trainer).count("no class was seen") == 1


def test_a_first_epoch_that_saw_no_class_counts_as_zero() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.on_validation_epoch_end(outputs(0.0, 0.0, 0.0))
    assert trainer.logger.get_value("ema_fg_dice", step=None) == [0.0]
    trainer.current_epoch = 1
    trainer.on_validation_epoch_end(outputs(1.0, 1.0, 1.0))
    assert trainer.logger.get_value("ema_fg_dice", step=-1) == pytest.approx(0.05)


def test_one_absent_class_is_left_out_of_the_mean_as_in_nnunet() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    one_class = outputs(1.0, 1.0, 1.0)
    for key in ("tp_hard", "fp_hard", "fn_hard"):
        one_class[0][key][1] = 0
    trainer.on_validation_epoch_end(one_class)
    assert trainer.logger.get_value("ema_fg_dice", step=-1) == pytest.approx(0.5)
    assert "no class was seen" not in log_of(trainer)


# --- starting model --------------------------------------------------------------------------------------------------


def stock_model() -> tuple[MultimodalTrainer, Path]:
    """A trained U-Net of the same plans for one channel, and its checkpoint."""
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.5)
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    return trainer, path


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_starting_model_gives_encoder_and_decoder_and_a_tenth_of_the_rate(whole_folder: bool) -> None:
    model, path = stock_model()
    for case in Path(model.preprocessed_dataset_folder).iterdir():
        case.unlink()
    save_cases(Path(model.preprocessed_dataset_folder), 4)  # CrossMR's channels of the same cases
    trainer = started("nnUNetTrainerCrossMR", starting_model=str(path.parents[1] if whole_folder else path))
    source, found = weights_of(model), weights_of(trainer)
    shared = [key for key in source if "seg_layers" not in key]
    assert shared and all(torch.equal(found[key], source[key]) for key in shared)
    new = len(found) - len(shared)
    heads = len(source) - len(shared)
    assert f"starting model: {len(shared)} tensors loaded, {new} new, {heads} skipped" in log_of(trainer)
    encoder, rest = trainer.optimizer.param_groups
    assert encoder["lr"] == pytest.approx(0.1 * rest["lr"]) and rest["lr"] > 0
    assert sum(p.numel() for p in encoder["params"]) == sum(p.numel() for p in trainer.network.encoder.parameters())
    trainer.train_step(first_batch(trainer))
    assert encoder["lr"] == pytest.approx(0.1 * rest["lr"])
    every = [id(p) for group in (encoder, rest) for p in group["params"]]
    assert len(every) == len(set(every)) == len(list(trainer.network.parameters()))


def test_from_scratch_the_encoder_has_the_same_rate() -> None:
    encoder, rest = started("nnUNetTrainerCrossMR").optimizer.param_groups
    assert encoder["lr"] == rest["lr"] > 0


def test_a_starting_model_is_not_loaded_over_a_training_that_goes_on() -> None:
    _, path = stock_model()
    trainer = make_trainer("nnUNetTrainerContrastAug", starting_model=str(path))
    trainer.initialize()
    own = weights_of(trainer)
    trainer.current_epoch = 5
    trainer.on_train_start()
    assert not changed(own, trainer)
    assert "starting model" not in log_of(trainer)


def test_a_starting_model_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug", starting_model=str(tmp_path / "gone.pth"))
    with pytest.raises(DataProblem, match=r"gone\.pth is missing"):
        trainer.on_train_start()


# --- progress bar ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.is_one = is_one

    def isatty(self) -> bool:
        return self.is_one


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_terminals_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug", num_epochs=7)
    trainer.on_train_start()
    stderr = Terminal(terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    assert trainer.bar is not None
    trainer.bar.mininterval = 0  # else nothing is drawn in the first tenth of a second
    trainer.on_train_epoch_end([trainer.train_step(first_batch(trainer)) for _ in range(2)])
    if terminal:
        assert "epoch 1/7" in stderr.getvalue() and "loss=" in stderr.getvalue() and "2/2" in stderr.getvalue()
    else:
        assert stderr.getvalue() == ""


def test_the_other_ranks_show_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.initialize()
    trainer.local_rank = 1
    stderr = Terminal(True)
    monkeypatch.setattr("sys.stderr", stderr)
    trainer.on_train_epoch_start()
    assert stderr.getvalue() == ""


def test_names_of_channels_and_prompts_are_read_in_numerical_order() -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    names = {str(i): "noNorm" if i > 9 else f"image{i}" for i in (10, 2, 0, 11, 1, *range(3, 10))}
    trainer.dataset_json = {**trainer.dataset_json, "channel_names": names}
    assert trainer.channel_names == [f"image{i}" for i in range(10)] + ["noNorm", "noNorm"]
    assert trainer.prompt_channels == [10, 11]


def test_the_scribble_trainers_network_keeps_the_stock_keys() -> None:
    scribble = make_trainer("nnUNetTrainerScribble")
    scribble.initialize()
    assert isinstance(scribble.bare_network(), PromptedUNet)
    stock = nnUNetTrainer.build_network_architecture(
        scribble.plans_manager, scribble.configuration_manager, 3, 3, enable_deep_supervision=True
    )
    assert list(scribble.network.state_dict()) == list(stock.state_dict())
    assert set(SMALL) - set(type(scribble).settings_defaults)  # CrossMR's settings did no harm
