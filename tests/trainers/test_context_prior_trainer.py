"""Context priors' trainer: what it starts from and tells the network, partially labelled cases, what it refuses."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tiny_training import (
    CASES,
    TABLE,
    configuration_name,
    log_of,
    save_cases,
    tiny_dataset,
    tiny_plans,
)

from nnunet_multimodal import trainers
from nnunet_multimodal.data.case_labels import CaseLabels
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses import MarginalLoss, MaskedTaskLoss
from nnunet_multimodal.networks import ContextPriorUNet
from nnunet_multimodal.trainers.context_prior import annotated_counts, annotated_dice

NAME = "nnUNetTrainerContextPrior"
# case_a has the liver alone, case_b the spleen alone; the others have both.
PARTIAL = {"case_a": ["liver"], "case_b": ["spleen"]}


@pytest.fixture(autouse=True)
def quiet(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def dataset_of(
    case_labels: Any = None, labels: dict[str, Any] | None = None, table: dict[str, Any] | None = None
) -> dict[str, Any]:
    dataset = copy.deepcopy(tiny_dataset(NAME))
    section = dict(TABLE if table is None else table)
    dataset["nnunet_multimodal"] = section | ({} if case_labels is None else {"case_labels": case_labels})
    if labels is not None:
        dataset["labels"] = labels
        if any(isinstance(value, list) for value in labels.values()):
            dataset["regions_class_order"] = [1, 2]
    return dataset


def built(dataset: dict[str, Any], name: str = NAME, ndim: int = 2, **settings: Any) -> Any:
    """A trainer with this dataset.json, and its cases."""
    small = {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "fused_stages": [1, 2], **settings}
    trainer = getattr(trainers, name)(
        tiny_plans(ndim, 1, small), configuration_name(ndim), 0, dataset, torch.device("cpu")
    )
    folder = Path(trainer.preprocessed_dataset_folder)
    if not folder.exists():
        save_cases(folder, 1)
        splits = [{"train": list(CASES), "val": list(CASES)}]
        (folder.parent / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    return trainer


def started(dataset: dict[str, Any], name: str = NAME, ndim: int = 2, **settings: Any) -> Any:
    trainer = built(dataset, name, ndim, **settings)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def batch_of(trainer: Any, *cases: str) -> dict[str, Any]:
    """A batch that has been augmented, under other names."""
    return next(trainer.dataloader_train) | {"keys": list(cases)}


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_it_begins_with_the_answers_of_the_model_that_it_starts_from(ndim: int) -> None:
    """A stock nnU-Net of another data set: the same classes in another order."""
    labels = {"background": 0, "spleen": 1, "liver": 2}
    source = {**tiny_dataset("nnUNetTrainer"), "labels": labels}
    stock = nnUNetTrainer(tiny_plans(ndim, 1), configuration_name(ndim), 0, source, torch.device("cpu"))
    save_cases(Path(stock.preprocessed_dataset_folder), 1)
    stock.initialize()
    for parameter in stock.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock.save_checkpoint(str(Path(stock.output_folder, "checkpoint_final.pth")))
    trainer = started(dataset_of(), ndim=ndim, starting_model=stock.output_folder_base)
    assert "spleen" in log_of(trainer) and "tensors loaded" in log_of(trainer)
    network = trainer.bare_network()
    assert isinstance(network, ContextPriorUNet)
    network.tell(torch.tensor([0, 1]))
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        found, wanted = network(image).segmentation, stock.network(image)
        for mine, theirs in zip(found, wanted):
            assert torch.equal(mine, theirs[:, [0, 2, 1]])
        batch = next(trainer.dataloader_train)
        trainer.tell(batch)
        loss = trainer.loss.segmentation(network(batch["data"]).segmentation, batch["target"])
        swapped = [torch.tensor([0.0, 2.0, 1.0])[each.long()] for each in batch["target"]]
        torch.testing.assert_close(loss, stock.loss(stock.network(batch["data"]), swapped))


def test_a_model_with_priors_gives_its_unet_alone() -> None:
    first = started(dataset_of())
    first.train_step(next(first.dataloader_train))
    file = Path(first.output_folder_base, "checkpoint_final.pth")
    first.save_checkpoint(str(file))
    again = started(dataset_of(), f"{NAME}_sharedTokens", starting_model=str(file))
    before, now = first.bare_network().state_dict(), again.bare_network().state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items() if "coder." in key)
    for layer in again.bare_network().prototypes.outs:
        assert not layer.weight.any()


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        (NAME, {"fused_stages": []}, [2]),
        (NAME, {"fused_stages": [2, 1]}, [2, 1]),
        (f"{NAME}_multiplicative", {"fused_stages": []}, [2]),
    ],
)
def test_the_fused_stages_are_written_down_for_prediction(name: str, settings: Any, found: list[int]) -> None:
    trainer = started(dataset_of(), name, **settings)
    plans = json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8"))
    section = plans["configurations"]["2d"]["nnunet_multimodal"]
    assert section["fused_stages"] == found and section["modalities"] == ["CT", "MR"]
    assert trainer.bare_network().multiplicative is name.endswith("multiplicative")
    assert f"context priors at stages {found}" in log_of(trainer)


def test_a_frozen_unet_stays_as_it_is() -> None:
    first = started(dataset_of())
    file = Path(first.output_folder_base, "base.pth")
    first.save_checkpoint(str(file))
    trainer = started(dataset_of(), freeze_unet=True, starting_model=str(file))
    before = copy.deepcopy(trainer.bare_network().state_dict())
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    changed = {key for key, value in trainer.bare_network().state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith("fusions.") for key in changed) and any(key.startswith("tokens.") for key in changed)
    assert {key for key in changed if "coder." in key} == {
        f"decoder.seg_layers.{scale}.{part}" for scale in (1,) for part in ("weight", "bias")
    }


def test_a_frozen_unet_has_to_come_from_the_model() -> None:
    first = started(dataset_of())
    file = Path(first.output_folder_base, "base.pth")
    first.save_checkpoint(str(file))
    checkpoint = torch.load(file, weights_only=False)
    for key in list(checkpoint["network_weights"]):
        if "encoder.stages.1." in key:
            del checkpoint["network_weights"][key]
    torch.save(checkpoint, file)
    with pytest.raises(DataProblem, match=r"freeze_unet: .* would stay random: encoder.stages.1.*adapt --from MODEL"):
        started(dataset_of(), freeze_unet=True, starting_model=str(file))


# --- the modality ----------------------------------------------------------------------------------------------------


def test_each_image_is_told_and_the_head_learns_with_a_hundredth() -> None:
    trainer = started(dataset_of())
    batch = batch_of(trainer, "case_b", "case_a")
    trainer.tell(batch)
    assert trainer.bare_network().told.tolist() == [1, 0] and trainer.bare_network().asked is None
    torch.manual_seed(3)
    output = trainer.network(batch["data"])
    told = torch.nn.functional.cross_entropy(output.modality_logits, torch.tensor([1, 0]))
    loss = trainer.loss(output, batch["target"])
    torch.testing.assert_close(loss - trainer.loss.segmentation(output.segmentation, batch["target"]), 0.01 * told)


def test_a_case_of_unknown_modality() -> None:
    table = {"modalities": ["CT", "MR"], "case_modality": dict(list(TABLE["case_modality"].items())[:-1])}
    with pytest.raises(DataProblem, match=r"1 cases are not in the modality table: case_e"):
        started(dataset_of(table=table))
    splits = Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny/splits_final.json")
    everything = splits.read_text(encoding="utf-8")
    splits.unlink()
    built(dataset_of(table=table), allow_unknown_modality=True).do_split()
    made = json.loads(splits.read_text(encoding="utf-8"))
    assert sorted(case for fold in made for case in fold["val"]) == list(CASES)
    splits.write_text(everything, encoding="utf-8")
    trainer = started(dataset_of(table=table), allow_unknown_modality=True)
    assert "1 training cases of unknown modality: case_e" in log_of(trainer)
    assert np.isfinite(trainer.train_step(batch_of(trainer, "case_e", "case_a"))["loss"])
    assert trainer.bare_network().told.tolist() == [-1, 0]
    batch = batch_of(trainer, "case_e", "case_e")  # nobody to learn the modality from, and no NaN
    trainer.tell(batch)
    output = trainer.network(batch["data"])
    assert trainer.loss(output, batch["target"]) == trainer.loss.segmentation(output.segmentation, batch["target"])


def test_a_modality_without_a_training_case_is_named() -> None:
    table = {"modalities": ["CT", "MR", "PET"], "case_modality": TABLE["case_modality"]}
    trainer = started(dataset_of(table=table))
    assert "fold 0 trains on 3 CT, 2 MR, 0 PET" in log_of(trainer)
    assert "WARNING: no training case of PET: its tokens learn nothing" in log_of(trainer)


def test_without_modality_no_table_is_needed() -> None:
    trainer = started(tiny_dataset("nnUNetTrainer"), f"{NAME}_noModality")
    assert trainer.settings["modalities"] == [] and trainer.bare_network().modality_head is None
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_validation_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started(dataset_of())
    trainer.train_step(next(trainer.dataloader_train))
    told = []
    monkeypatch.setattr(
        nnUNetTrainer, "perform_actual_validation", lambda self, *_: told.append(self.bare_network().told)
    )
    trainer.perform_actual_validation()
    assert told == [None]


# --- partially labelled cases ----------------------------------------------------------------------------------------

REGIONS = {"background": 0, "both": [1, 2], "spleen": [2]}
LISTED = {"background": 0, "liver": [1], "spleen": [2]}  # plain labels to nnU-Net, for all the brackets


@pytest.mark.parametrize(
    ("name", "labels", "case_labels", "kind"),
    [
        (NAME, None, None, DC_and_CE_loss),
        (NAME, None, {"case_a": ["liver", "spleen"]}, DC_and_CE_loss),
        (NAME, None, PARTIAL, MarginalLoss),
        (f"{NAME}_sigmoid", None, None, MaskedTaskLoss),
        (f"{NAME}_sigmoid", None, PARTIAL, MaskedTaskLoss),
        (NAME, REGIONS, None, DC_and_BCE_loss),
        (f"{NAME}_sigmoid", REGIONS, {"case_a": ["both"]}, MaskedTaskLoss),
        (f"{NAME}_sigmoid", LISTED, PARTIAL, MaskedTaskLoss),
        (NAME, REGIONS, {"case_a": ["both"]}, MaskedTaskLoss),
    ],
)
def test_which_loss(name: str, labels: Any, case_labels: Any, kind: type) -> None:
    trainer = started(dataset_of(case_labels, labels), name)
    assert isinstance(trainer.loss.segmentation.loss, kind)
    assert trainer.bare_network().subtract_background is (name.endswith("sigmoid") and labels is not REGIONS)
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        validated = trainer.validation_step(next(trainer.dataloader_val))
    assert np.isfinite(validated["loss"]) and validated["tp_hard"].shape == (2,)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_of_a_case_that_lacks_a_class_that_class_learns_nothing(ndim: int, regions: bool) -> None:
    """Cross-check 21 through the trainer: no gradient to its token and its weights, at no scale; others have one."""
    labels = {"background": 0, "liver": [1], "spleen": [1, 2]} if regions else None
    trainer = started(dataset_of(PARTIAL, labels), f"{NAME}_sigmoid", ndim)
    for parameter in trainer.network.parameters():  # fusions and prototypes are past their beginning at zero
        torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(trainer, "case_a", "case_a")
    trainer.tell(batch)
    assert trainer.bare_network().asked.tolist() == [[True, False] if regions else [True, True, False]] * 2
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    network = trainer.bare_network()
    liver, spleen = (0, 1) if regions else (1, 2)
    gradients = [network.decoder.seg_layers[-1].weight.grad, network.decoder.seg_layers[-1].bias.grad]
    gradients += [tokens.pool.task.grad for tokens in network.tokens.values()]
    assert len(gradients) == 5  # on the way down twice, and up once
    for gradient in gradients:
        assert gradient[liver].any() and not gradient[spleen].any()
    # and from a case that has both, it does learn
    trainer.network.zero_grad()
    batch = batch_of(trainer, "case_c", "case_a")
    trainer.tell(batch)
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    assert all(gradient[spleen].any() for gradient in [network.decoder.seg_layers[-1].weight.grad])


def test_a_softmax_asks_for_everything_and_counts_what_is_annotated() -> None:
    trainer = started(dataset_of(PARTIAL))
    batch = batch_of(trainer, "case_a", "case_c")
    trainer.tell(batch)
    assert trainer.bare_network().asked is None
    assert trainer.partial.annotated.tolist() == [[True, True, False], [True, True, True]]
    assert "annotated, of 5 training cases: liver in 4, spleen in 4" in log_of(trainer)


def test_without_null_tasks_every_token_is_seen() -> None:
    trainer = started(dataset_of(PARTIAL), f"{NAME}_sigmoid", null_tasks=False)
    batch = batch_of(trainer, "case_a", "case_a")
    annotated = trainer.tell(batch)
    assert trainer.bare_network().asked is None and trainer.partial.annotated is annotated
    assert annotated.tolist() == [[True, True, False]] * 2


def test_at_prediction_every_class_is_asked_for() -> None:
    trainer = started(dataset_of(PARTIAL), f"{NAME}_sigmoid")
    trainer.tell(batch_of(trainer, "case_a", "case_b"))
    assert trainer.bare_network().asked is not None
    trainer.tell(None)
    assert trainer.bare_network().asked is None and trainer.bare_network().told is None


def test_pseudo_dice_counts_annotated_classes_alone() -> None:
    trainer = started(dataset_of(PARTIAL))
    network = trainer.bare_network()
    with torch.no_grad():
        for layer in network.decoder.seg_layers:  # spleen everywhere
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    network.eval()
    target = [torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 8, 8)]
    target[0][:, :, :4] = 2
    batch = {"data": torch.randn(2, 1, 16, 16), "target": target, "keys": ["case_a", "case_b"]}
    found = trainer.validation_step(batch)
    # of case_b alone, and its label says nothing of liver
    assert found["tp_hard"].tolist() == [0, 64] and found["fp_hard"].tolist() == [0, 192]
    assert found["fn_hard"].tolist() == [0, 0]
    full = started(dataset_of())
    full.bare_network().load_state_dict(network.state_dict())
    full.bare_network().eval()
    both = full.validation_step(batch)
    assert both["tp_hard"].tolist() == [0, 128] and both["fp_hard"].tolist() == [0, 384]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_counts_with_all_annotated_are_nnunets(regions: bool, ignore: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: dict[str, Any] = REGIONS if regions else {"background": 0, "liver": 1, "spleen": 2}
    trainer = started(dataset_of(None, {**labels, "ignore": 3} if ignore else dict(labels)))
    heads = 2 if regions else 3
    torch.manual_seed(1)
    logits = torch.randn(2, heads, 16, 16)
    drawn = torch.randint(0, 3 + ignore, (2, 1, 16, 16))
    target: torch.Tensor = drawn
    if regions:
        parts = [(drawn == 1) | (drawn == 2), drawn == 2, *([drawn == 3] if ignore else [])]
        target = torch.cat(parts, dim=1)
    counts = annotated_counts(logits, target, torch.ones(2, heads, dtype=torch.bool), trainer.label_manager)
    monkeypatch.setattr(trainer, "network", lambda data: [logits])
    monkeypatch.setattr(trainer, "loss", lambda output, target: torch.zeros(()))
    given = {"data": torch.zeros(2, 1, 16, 16), "target": [target.clone()]}
    wanted = nnUNetTrainer.validation_step(trainer, given)
    for name, count in zip(("tp_hard", "fp_hard", "fn_hard"), counts):
        np.testing.assert_array_equal(count.numpy(), wanted[name])


@pytest.mark.parametrize(
    ("labels", "keys"),
    [
        ({"background": 0, "liver": 1, "spleen": 2}, ("1", "2")),
        ({"spleen": 2, "background": 0, "liver": 1}, ("1", "2")),
        (LISTED, ("1", "2")),
        ({"background": 0, "liver": [1, 2], "spleen": 2}, ("(1, 2)", "2")),
    ],
)
def test_dice_of_the_validation_leaves_out_what_is_not_annotated(labels: dict[str, Any], keys: tuple[str, str]) -> None:
    """The keys are nnU-Net's: str() of a label or of a region's tuple."""
    case_labels = CaseLabels.from_dataset_json(dataset_of(PARTIAL, labels))
    summary = {
        "metric_per_case": [
            {"prediction_file": f"/out/{case}.nii.gz", "metrics": {keys[0]: {"Dice": liver}, keys[1]: {"Dice": spleen}}}
            for case, liver, spleen in (("case_a", 0.8, 0.0), ("case_b", 0.0, 0.6), ("case_c", 0.4, float("nan")))
        ]
    }
    found = annotated_dice(summary, case_labels, LabelManager(labels, [1, 2]), ".nii.gz")
    assert found["classes"] == {
        "liver": {"Dice": pytest.approx(0.6), "cases": 2},
        "spleen": {"Dice": pytest.approx(0.6), "cases": 1},
    }
    assert found["mean"] == pytest.approx(0.6)


def test_other_trainers_would_teach_background() -> None:
    with pytest.raises(DataProblem, match=r"has \"case_labels\".*Take nnUNetTrainerContextPrior"):
        built(dataset_of(PARTIAL), "nnUNetTrainerMulModSeg")
    alone = {**tiny_dataset("nnUNetTrainer"), "nnunet_multimodal": {"case_labels": PARTIAL}}
    with pytest.raises(DataProblem, match=r"Take nnUNetTrainerContextPrior_noModality: there is no modality table"):
        built(alone, "nnUNetTrainerContrastAug")
    trainer = started(alone, f"{NAME}_noModality")
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_a_class_that_no_training_case_has() -> None:
    with pytest.raises(DataProblem, match=r"spleen is annotated in no training case of fold 0"):
        started(dataset_of({case: ["liver"] for case in CASES}))


def test_case_labels_of_a_case_that_does_not_exist() -> None:
    with pytest.raises(DataProblem, match=r"names 1 cases that are not in the data set: case_z"):
        started(dataset_of({"case_z": ["liver"]}))


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer has to be one of adamw, sgd; found 'adam'"),
        ({"prototypes": "both"}, "prototypes has to be one of additive, multiplicative"),
        ({"task_loss": "bce"}, "task_loss has to be one of softmax, sigmoid"),
        ({"modality_tokens": 0}, "modality_tokens has to be at least 1"),
        ({"fused_stages": [0, 1]}, r"fused_stages has to list stages from 1 to 2, once each; found \[0, 1\]"),
        ({"fused_stages": [1, 1]}, r"once each; found \[1, 1\]"),
        ({"fused_stages": ["a"]}, r"once each; found \['a'\]"),
        ({"fused_stages": [[1, 2]]}, r"once each; found \[\[1, 2\]\]"),
        ({"freeze_unet": True}, "freeze_unet needs a starting_model"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        built(dataset_of(), **settings)


def test_plans_of_another_network() -> None:
    plans = tiny_plans(2, 1, {})
    del plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(UsageError, match=r"needs a U-Net of nnU-Net's .*the plans have .*PlainConvUNet"):
        getattr(trainers, NAME)(plans, "2d", 0, dataset_of(), torch.device("cpu"))


def test_plans_that_clip_as_ct() -> None:
    plans = tiny_plans(2, 1, {})
    plans["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    with pytest.raises(DataProblem, match=r"'CT' turns on CT clipping for MR"):
        getattr(trainers, NAME)(plans, "2d", 0, dataset_of(), torch.device("cpu"))


def test_nnunets_own_optimiser_on_request() -> None:
    trainer = built(dataset_of(), optimizer="sgd", initial_lr=0.01)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.SGD) and trainer.optimizer.param_groups[0]["lr"] == 0.01


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_continued_training_is_where_it_was() -> None:
    settings: dict[str, Any] = {"num_epochs": 3, "save_every": 1}
    first = built(dataset_of(PARTIAL), **settings)
    first.on_train_start()
    first.on_epoch_start()
    first.on_train_epoch_start()
    first.on_train_epoch_end([first.train_step(next(first.dataloader_train)) for _ in range(2)])
    first.on_validation_epoch_start()
    with torch.no_grad():
        first.on_validation_epoch_end([first.validation_step(next(first.dataloader_val))])
    first.on_epoch_end()
    latest = str(Path(first.output_folder, "checkpoint_latest.pth"))

    again = built(dataset_of(PARTIAL), **settings)
    again.initialize()
    again.load_checkpoint(latest)
    again.on_train_start()
    again.on_epoch_start()
    again.on_train_epoch_start()
    assert again.current_epoch == 1
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * (1 - 2 / 6) ** 0.9)
    assert {int(state["step"]) for state in again.optimizer.state.values()} == {2}
    for mine, theirs in zip(again.network.parameters(), first.network.parameters()):
        assert torch.equal(mine, theirs)
    assert np.isfinite(again.train_step(next(again.dataloader_train))["loss"])


def test_a_checkpoint_of_other_settings_is_refused() -> None:
    first = started(dataset_of())
    file = str(Path(first.output_folder, "checkpoint_latest.pth"))
    first.save_checkpoint(file)
    turned = dataset_of(table={**TABLE, "modalities": ["MR", "CT"]})
    with pytest.raises(UsageError, match=r"modalities \['CT', 'MR'\]; now it is \['MR', 'CT'\]"):
        built(turned).load_checkpoint(file)
