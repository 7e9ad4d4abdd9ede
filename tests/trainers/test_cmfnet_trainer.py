"""CmFNet's trainer: branches as deep as the plans allow, one geometry for both images, settings, ablations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_training import configuration_name, make_trainer, tiny_dataset, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses import GatedCRFLoss, MultiViewCRFLoss
from nnunet_multimodal.networks import CmFNet
from nnunet_multimodal.trainers.base import is_intensity
from nnunet_multimodal.trainers.cmfnet import layout_of, nnUNetTrainerCmFNet

NAME = "nnUNetTrainerCmFNet"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, nnunet_folders: dict[str, str]) -> Iterator[None]:
    """Data loading in this process, reproducible."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def built(
    channels: list[str], section: dict[str, Any] | None = None, stages: int = 3, ndim: int = 2, name: str = NAME
) -> nnUNetTrainerCmFNet:
    """A trainer on a data set with these channels and plans of so many resolutions."""
    dataset = {**tiny_dataset(NAME), "channel_names": {str(index): name for index, name in enumerate(channels)}}
    plans = tiny_plans(ndim, len(channels), section or {})
    network = plans["configurations"][configuration_name(ndim)]["architecture"]["arch_kwargs"]
    network |= {
        "n_stages": stages,
        "features_per_stage": [4] * stages,
        "kernel_sizes": [[3] * ndim] * stages,
        "strides": [[1] * ndim] + [[2] * ndim] * (stages - 1),
    }
    trainer: nnUNetTrainerCmFNet = getattr(trainers, name)(plans, configuration_name(ndim), 0, dataset, CPU)
    return trainer


def network_of(trainer: nnUNetTrainerCmFNet) -> Any:
    """What nnU-Net builds for it."""
    plans, heads = trainer.plans_manager, trainer.label_manager.num_segmentation_heads
    return trainer.build_network_architecture(
        plans, trainer.configuration_manager, len(trainer.channel_names), heads, False
    )


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "depths"), [(3, [1, 2]), (4, [2, 3]), (5, [3, 4]), (6, [3, 4])])
def test_branches_are_the_papers_where_the_plans_are_deep_enough(stages: int, depths: list[int]) -> None:
    trainer = built(["CT", "MR"], stages=stages)
    assert trainer.settings["downsamplings"] == depths
    network = network_of(trainer)
    assert isinstance(network, CmFNet)
    assert [len(encoder.down) for encoder in (network.ct_encoder, network.mr_encoder)] == depths


def test_the_users_depths_are_taken() -> None:
    trainer = built(["CT", "MR"], {"downsamplings": [3, 2]}, stages=4)
    network = network_of(trainer)
    assert len(network.ct_encoder.down) == 3 and len(network.mr_encoder.down) == 2


@pytest.mark.parametrize("wrong", [[2, 3], [1], [0, 1], [1, 2, 2], [1.0, 2], [True, 2], [2, 2], ["1", "2"]])
def test_depths_that_do_not_fit_are_refused(wrong: list) -> None:
    with pytest.raises(UsageError, match=r"downsamplings: expected two numbers .* plans have 3 resolutions"):
        built(["CT", "MR"], {"downsamplings": wrong})


def test_plans_of_two_resolutions_are_too_shallow() -> None:
    with pytest.raises(UsageError, match="plans have 2 resolutions"):
        built(["CT", "MR"], stages=2)


@pytest.mark.parametrize(
    ("names", "channels"),
    [(["CT", "MR"], [0, 1]), (["MR", "ct"], [1, 0]), (["FLAIR", "T1c"], [0, 1]), (["MR"], [0, 0]), (["CT"], [0, 0])],
)
def test_which_channel_is_whose(names: list[str], channels: list[int]) -> None:
    trainer = built(names)
    assert trainer.settings["channels"] == channels
    network = network_of(trainer)
    assert network.channels == tuple(channels)
    assert [each.shape for each in network(torch.zeros(1, len(names), 16, 16))] == [(1, 3, 16, 16)] * 3


@pytest.mark.parametrize("names", [["CT", "MR", "PET"], ["MR", "noNorm"]])
def test_other_channels_are_refused(names: list[str]) -> None:
    with pytest.raises(DataProblem, match=f"channels {', '.join(names)}; .* fuses two registered images"):
        built(names)


def test_a_cascade_is_refused() -> None:
    plans = tiny_plans(3, 2)
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(UsageError, match="nnUNetTrainerCmFNet has no cascade"):
        nnUNetTrainerCmFNet(plans, "3d_cascade_fullres", 0, tiny_dataset(NAME), CPU)


def test_plans_of_thick_slices_are_taken_as_they_are() -> None:
    plans = PlansManager(tiny_plans(3, 2))
    layout = layout_of(plans.get_configuration("3d_fullres"))
    assert layout.strides == ((1, 1, 1), (2, 2, 2), (1, 2, 2)) and layout.features == (4, 6, 8) and layout.ndim == 3


def test_numbers_for_all_axes_are_taken_too() -> None:
    plans = tiny_plans(3, 2)
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"kernel_sizes": [3, 3, 3], "strides": [1, 2, 2]}
    layout = layout_of(PlansManager(plans).get_configuration("3d_fullres"))
    assert layout.kernels == ((3, 3, 3),) * 3 and layout.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lambda_ct": -0.1}, "lambda_ct: expected a weight of 0 or more; found -0.1"),
        ({"alpha_mr": -1}, "alpha_mr: expected"),
        ({"dropout": 1.0}, "dropout: expected a share from 0 to below 1; found 1.0"),
        ({"crf_resize": 0}, "crf_resize: expected 1"),
        ({"crf_radius": 0}, "crf_kernels and crf_radius: radius must be at least 1"),
        ({"crf_kernels": []}, "crf_kernels and crf_radius: kernels is empty"),
        ({"lambda": 0.1}, "unknown setting 'lambda'. Did you mean 'lambda_"),
        ({"optimizer": "adam"}, "optimizer: expected 'sgd' or 'adamw', found 'adam'"),
    ],
)
def test_wrong_settings(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        built(["CT", "MR"], section)
    assert message in str(error.value)


def test_labels_without_ignore_are_refused() -> None:
    dataset = tiny_dataset(NAME)
    del dataset["labels"]["ignore"]
    with pytest.raises(DataProblem, match="no label named 'ignore'"):
        nnUNetTrainerCmFNet(tiny_plans(2, 2, {}), "2d", 0, dataset, CPU)


@pytest.mark.parametrize(
    ("word", "lambdas", "alphas", "parts"),
    [
        ("", (0.2, 0.2), (0.8, 0.8), {"ssl", "imr", "imc"}),
        ("_SSL", (0.0, 0.0), (0.0, 0.0), {"ssl"}),
        ("_SSL_IMR", (0.2, 0.2), (0.0, 0.0), {"ssl", "imr"}),
        ("_SSL_IMC", (0.0, 0.0), (0.8, 0.8), {"ssl", "imc"}),
        ("_noCFE", (0.2, 0.2), (0.8, 0.8), {"ssl", "imr", "imc"}),
        ("_noCFF", (0.2, 0.2), (0.8, 0.8), {"ssl", "imr", "imc"}),
    ],
)
def test_what_the_ablations_are_made_of(word: str, lambdas: tuple, alphas: tuple, parts: set[str]) -> None:
    trainer = make_trainer(f"{NAME}{word}")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    assert (trainer.loss.lambdas, trainer.loss.alphas) == (lambdas, alphas)
    network = trainer.bare_network()
    assert (network.mm.extraction is None) == (word == "_noCFE")
    assert (len(list(network.mm.fusion.parameters())) == 0) == (word == "_noCFF")
    result = trainer.train_step(next(trainer.dataloader_train))
    assert set(result) == {"loss", "undrawn"} | parts
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert idle == []  # or distributed training stops


def test_an_ablation_cannot_be_undone_in_the_plans() -> None:
    assert built(["CT", "MR"], {"lambda_ct": 0.5, "cff": True}, name=f"{NAME}_SSL").settings["lambda_ct"] == 0
    assert built(["CT", "MR"], {"cff": True}, name=f"{NAME}_noCFF").settings["cff"] is False


def test_the_paper_in_settings() -> None:
    """Defaults are the paper's but for the optimiser's rate and the mean, which belong together, and the ramp."""
    settings = built(["CT", "MR"]).settings
    assert (settings["lambda_ct"], settings["lambda_mr"], settings["alpha_ct"], settings["alpha_mr"]) == (
        0.2, 0.2, 0.8, 0.8,
    )  # fmt: skip
    assert settings["dropout"] == 0.5 and settings["detach"] is False
    paper = built(["CT", "MR"], {"initial_lr": 1e-5, "reduction": "sum", "ramp_up": 0.0})
    assert paper.initial_lr == 1e-5 and paper.partial_loss().reduction == "sum" and paper.ramp == 1.0


# --- the loss's grid --------------------------------------------------------------------------------------------------


def test_the_crf_is_coarser_within_slices() -> None:
    flat = built(["CT", "MR"]).coarser_crf()
    assert flat.factors == (2, 2) and isinstance(flat.regulariser, GatedCRFLoss)
    thick = make_trainer(NAME, 3).coarser_crf()  # 3 x 1 x 1 mm
    assert thick.factors == (1, 2, 2) and isinstance(thick.regulariser, MultiViewCRFLoss)
    assert make_trainer(NAME, 3, crf_resize=1).coarser_crf().factors == (1, 1, 1)


def test_distances_in_millimetres_are_those_of_the_coarser_grid() -> None:
    kernels = [{"sigma_xy": 2.0}]
    crf = make_trainer(NAME, 3, crf_spacing_aware=True, crf_kernels=kernels, crf_radius=1).coarser_crf()
    expected = MultiViewCRFLoss(kernels, 1, (1.5, 1.0, 1.0))  # 3 x 2 x 2 mm
    p, image = torch.rand(1, 2, 3, 6, 6).softmax(1), torch.zeros(1, 1, 3, 6, 6)
    torch.testing.assert_close(crf.regulariser(p, image), expected(p, image))


# --- data -------------------------------------------------------------------------------------------------------------


def test_both_images_go_through_one_geometry() -> None:
    """Whatever the labels do, both channels do: both channels are a copy of the labels here."""
    trainer = make_trainer(NAME)
    rotation, dummy_2d, patch, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    whole = trainer.get_training_transforms([16, 16], rotation, None, mirror_axes, dummy_2d, ignore_label=3)
    geometry = ComposeTransforms([each for each in whole.transforms if not is_intensity(each)])
    moved = 0
    for _ in range(12):
        labels = torch.zeros(1, *map(int, patch), dtype=torch.int16)
        labels[:, :9, 4:11] = 1
        image = labels.float().expand(2, -1, -1).clone()
        found = geometry(image=image.clone(), segmentation=labels)
        assert torch.equal(found["image"][0], found["image"][1])
        moved += not torch.equal(found["image"][0], image[0, :16, :16])
        inside = found["segmentation"][0] < 3  # not padding
        assert ((found["image"][0] - found["segmentation"][0]).abs()[inside] <= 0.75).all()
    assert moved > 3


# --- steps ------------------------------------------------------------------------------------------------------------


def test_the_fused_branch_is_validated() -> None:
    trainer = make_trainer(NAME)
    trainer.on_train_start()
    trainer.on_validation_epoch_start()
    network, batch = trainer.bare_network(), next(trainer.dataloader_val)
    with torch.no_grad():
        network.mm.decoder.segmentation.weight.zero_()
        network.mm.decoder.segmentation.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # liver everywhere
        result = trainer.validation_step({**batch, "target": torch.ones_like(batch["target"])})
    assert result["tp_hard"].tolist() == [2 * 16 * 16, 0]
    assert result["loss"] == pytest.approx(float(np.log(1 + 2 * np.exp(-5))), abs=1e-5)


def test_in_3d_and_a_continued_training() -> None:
    trainer = make_trainer(NAME, 3, num_epochs=2, save_every=1)
    for _ in range(2):
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
        assert all(np.isfinite(each["loss"]) and each["imr"] > 0 for each in outputs)
        trainer.on_train_epoch_end(outputs)
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
        if trainer.current_epoch < 2:  # a power cut
            path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
            trainer = make_trainer(NAME, 3, num_epochs=2, save_every=1)
            trainer.load_checkpoint(path)
    assert trainer.current_epoch == 2
    steps = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {4}


def test_unlike_settings_do_not_go_on() -> None:
    trainer = make_trainer(NAME)
    trainer.on_train_start()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    other = make_trainer(NAME, cff=False)
    with pytest.raises(UsageError, match="was trained with cff True; now it is False"):
        other.load_checkpoint(str(path))


def test_plans_json_holds_all_that_prediction_needs() -> None:
    trainer = make_trainer(NAME)
    trainer.on_train_start()
    plans = json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8"))
    section = plans["configurations"]["2d"]["nnunet_multimodal"]
    assert section["channels"] == [0, 1] and section["downsamplings"] == [1, 2]
