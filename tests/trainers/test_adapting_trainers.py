"""nnUNetTrainerLoRA and nnUNetTrainerMoA: what is loaded, frozen, learned, continued and refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_training import (
    CASES,
    TABLE,
    configuration_name,
    log_of,
    make_trainer,
    save_starting_model,
    tiny_dataset,
    tiny_plans,
)

from nnunet_multimodal import trainers
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.networks.lora import plain_names

LORA, MOA = "nnUNetTrainerLoRA", "nnUNetTrainerMoA"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    np.random.seed(0)
    torch.manual_seed(0)
    yield


def started(name: str, ndim: int = 2, **settings: Any) -> Any:
    trainer: Any = make_trainer(name, ndim, **settings)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def stock_network(weights: dict[str, torch.Tensor], dataset: dict[str, Any]) -> torch.nn.Module:
    """The network of nnUNetTrainer with these weights, as it predicts."""
    trainer = nnUNetTrainer(tiny_plans(2, 1), "2d", 0, dataset, CPU)
    network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, False
    )
    network.load_state_dict(weights)
    return network.eval()


@pytest.mark.parametrize("name", [LORA, MOA, f"{MOA}_learned"])
def test_the_model_is_inside_and_stays_while_the_factors_learn(name: str) -> None:
    trainer = started(name)
    base = torch.load(trainer.settings["starting_model"], weights_only=False)["network_weights"]
    network = trainer.bare_network()
    names = plain_names(network)
    before = weights_of(network)
    assert set(base) <= set(names.values())
    assert all(torch.equal(before[own], base[stock]) for own, stock in names.items() if stock in base)
    log = log_of(trainer)
    assert f"starting model: {trainer.settings['starting_model']} (nnUNetTrainer)" in log
    assert f"starting model: {len(base)} tensors loaded" in log and "0 skipped" in log
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert f"trainable: {trainable:,} parameters" in log
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in network.parameters() if p.requires_grad}

    for _ in range(4):
        trainer.train_step(next(trainer.dataloader_train))
    frozen = {key for key, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad}
    after = weights_of(network)
    assert frozen and all(torch.equal(after[key], before[key]) for key in frozen), "bit by bit"
    factors = [key for key in after if key.endswith("up.weight")]
    assert any(after[key].abs().sum() > 0 for key in factors)


def test_the_base_modality_is_answered_as_before_after_training() -> None:
    trainer = started(MOA, initial_lr=0.01)
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    checkpoint = torch.load(trainer.settings["starting_model"], weights_only=False)
    base = stock_network(checkpoint["network_weights"], trainer.dataset_json)
    network = trainer.bare_network().eval()
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        network.tell(0)
        assert network.modalities == ("CT", "MR") and torch.equal(network(x), base(x))
        network.tell(1)
        assert not torch.equal(network(x), base(x))


@pytest.mark.parametrize("base", [None, (0,), (0, 1)])
def test_predictions_are_mirrored_as_the_starting_models(base: tuple[int, ...] | None) -> None:
    """Else its own images would be answered otherwise; also once the training has been continued."""
    path = save_starting_model(2, tiny_dataset(MOA))
    content = torch.load(path, weights_only=False)
    torch.save(content | {"inference_allowed_mirroring_axes": base}, path)
    trainer = started(MOA, starting_model=str(path))
    assert trainer.inference_allowed_mirroring_axes == base
    latest = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(latest)
    again: Any = make_trainer(MOA, starting_model=str(path))
    again.load_checkpoint(latest)
    again.on_train_start()
    assert again.inference_allowed_mirroring_axes == base


def test_a_starting_model_that_is_mirrored_where_sides_are_not() -> None:
    sides = {"kidney_left": 1, "kidney_right": 2}
    path = save_starting_model(2, tiny_dataset(MOA, sides))
    content = torch.load(path, weights_only=False)
    torch.save(content | {"inference_allowed_mirroring_axes": (0, 1)}, path)
    trainer = started(MOA, organs=sides, starting_model=str(path))
    assert trainer.inference_allowed_mirroring_axes is None
    assert "images of CT are answered alike with --disable_tta" in log_of(trainer)


def test_images_are_told_by_the_table() -> None:
    trainer = started(MOA)
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    expected = [["CT", "MR"].index(TABLE["case_modality"][str(case)]) for case in batch["keys"]]
    assert trainer.bare_network().told.tolist() == expected
    trainer.tell(None)
    assert trainer.bare_network().told is None


@pytest.mark.parametrize("name", [LORA, MOA])
def test_continued_without_the_starting_model(name: str) -> None:
    trainer = started(name, num_epochs=3)
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    before = weights_of(trainer.bare_network())
    os.unlink(trainer.settings["starting_model"])
    again: Any = make_trainer(name, num_epochs=3, starting_model=trainer.settings["starting_model"])
    again.initialize()
    again.load_checkpoint(path)
    again.on_train_start()
    assert again.current_epoch == 1
    found = weights_of(again.bare_network())
    assert found.keys() == before.keys() and all(torch.equal(found[key], before[key]) for key in found)
    again.on_epoch_start()
    again.on_train_epoch_start()
    again.train_step(next(again.dataloader_train))
    frozen = [k for k, p in again.bare_network().named_parameters() if not p.requires_grad]
    assert frozen and all(torch.equal(again.bare_network().state_dict()[key], before[key]) for key in frozen)


def test_continued_with_another_scale_is_refused() -> None:
    trainer = started(LORA)
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    other: Any = make_trainer(LORA, starting_model=trainer.settings["starting_model"], rank_stabilised=False)
    with pytest.raises(UsageError, match="was trained with rank_stabilised True; now it is False"):
        other.load_checkpoint(path)


def test_folds_of_one_result_folder_have_one_scale() -> None:
    """Its plans.json has one, by which all of them are predicted."""
    trainer = started(LORA)
    path = trainer.settings["starting_model"]
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    plans = (Path(trainer.output_folder_base) / "plans.json").read_bytes()
    for fold, message in ((1, "fold_0 was trained with alpha 8.0; now it is 16.0"), (0, None)):
        other: Any = make_trainer(LORA, starting_model=path, alpha=16.0, fold=fold)
        if message is None:
            other.on_train_start()  # the same fold anew
            continue
        with pytest.raises(UsageError, match=message):
            other.on_train_start()
        assert (Path(trainer.output_folder_base) / "plans.json").read_bytes() == plans


def test_classes_are_found_by_their_names_and_new_ones_are_trained() -> None:
    dataset = tiny_dataset(LORA, {"spleen": 1, "kidney": 2})
    path = save_starting_model(2, dataset)
    base = torch.load(path, weights_only=False)["network_weights"]
    trainer = started(LORA, starting_model=str(path))  # liver 1, spleen 2
    heads = weights_of(trainer.bare_network().decoder.seg_layers)
    for key in ("0.weight", "1.weight"):
        assert torch.equal(heads[key][0], base[f"decoder.seg_layers.{key}"][0])
        assert torch.equal(heads[key][2], base[f"decoder.seg_layers.{key}"][1])
        assert not torch.equal(heads[key][1], base[f"decoder.seg_layers.{key}"][2])
    assert "outputs by name: 2 from the model (background, spleen), 1 new (liver), 1 not needed (kidney)" in log_of(
        trainer
    )
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    after = weights_of(trainer.bare_network().decoder.seg_layers)
    assert not torch.equal(after["1.weight"][1], heads["1.weight"][1])


def test_a_new_class_of_a_mixture_is_no_answer_of_the_base() -> None:
    dataset = tiny_dataset(MOA, {"spleen": 1, "kidney": 2})
    trainer = started(MOA, starting_model=str(save_starting_model(2, dataset)))  # liver 1, spleen 2
    trainer.set_deep_supervision_enabled(False)
    network = trainer.bare_network().eval()
    with torch.no_grad():
        network.tell(0)
        assert (network(torch.randn(1, 1, 16, 16))[:, 1] == -100).all()
        network.tell(1)
        assert (network(torch.randn(1, 1, 16, 16))[:, 1] > -100).all()


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LORA, MOA])
def test_without_a_starting_model_everything_would_stay_random(name: str) -> None:
    trainer = make_trainer(name, starting_model=None)
    with pytest.raises(UsageError, match="adapts a trained model, and the plans nnUNetPlans name none") as error:
        trainer.on_train_start()
    assert "nnunet_multimodal adapt --from" in str(error.value) and error.value.exit_code == 2


def test_a_model_of_another_architecture_is_refused_with_what_differs() -> None:
    path = save_starting_model(2, tiny_dataset(LORA), features_per_stage=[4, 6, 10])
    with pytest.raises(UsageError, match=r"does not fit the network .* found \[10, 6, 3, 3\], expected \[8, 6, 3, 3\]"):
        started(LORA, starting_model=str(path))


def test_a_model_of_other_channels_is_refused() -> None:
    dataset = {**tiny_dataset(LORA), "channel_names": {"0": "T1", "1": "T2"}}
    path = save_starting_model(2, dataset)
    shutil.rmtree(Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny"))
    with pytest.raises(UsageError, match=r"does not fit the network .* found \[4, 2, 3, 3\], expected \[4, 1, 3, 3\]"):
        started(LORA, starting_model=str(path))


def test_an_adapted_model_has_to_be_merged_first() -> None:
    trainer = started(LORA)
    path = str(Path(trainer.output_folder) / "checkpoint_final.pth")
    trainer.save_checkpoint(path)
    with pytest.raises(UsageError, match=r"is an adapted model itself.*adapt --merge"):
        started(LORA, starting_model=path)


@pytest.mark.parametrize("name", [LORA, MOA])
@pytest.mark.parametrize("layers", [{}, {"adapted_layers": "."}])
def test_a_new_class_for_frozen_output_layers_is_refused(name: str, layers: dict[str, Any]) -> None:
    """Factors beside them do not make them learn: the new class's row stays random."""
    path = str(save_starting_model(2, tiny_dataset(LORA, {"spleen": 1})))
    with pytest.raises(UsageError, match="does not know liver, and its output layers are frozen"):
        started(name, starting_model=path, trained_layers="", **layers)


@pytest.mark.parametrize("name", [LORA, MOA])
def test_layers_that_are_trained_whole_are_found_by_the_same_name(name: str) -> None:
    trainer: Any = make_trainer(name, trained_layers=r"seg_layers\.1$")
    trainer.initialize()
    learned = {n for n, p in trainer.network.named_parameters() if "seg_layers" in n and p.requires_grad}
    inside = "" if name == LORA else "heads.MR."
    assert {f"decoder.seg_layers.1.{inside}{part}" for part in ("weight", "bias")} <= learned
    assert not any(n.startswith("decoder.seg_layers.0") for n in learned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapted_layers": "transformer"}, "settings of LoRA in the plans: no convolution or linear layer"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, r"\['rank'\]: expected int"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        started(LORA, **settings)


def moa(
    dataset: dict[str, Any] | None = None, scheme: str = "ZScoreNormalization", fold: int = 0, **settings: Any
) -> Any:
    """A mixture's trainer, not yet started."""
    plans = tiny_plans(2, 1, settings)
    plans["configurations"]["2d"]["normalization_schemes"] = [scheme]
    return getattr(trainers, MOA)(plans, configuration_name(2), fold, dataset or tiny_dataset(MOA), CPU)


def test_what_a_mixture_has_to_know() -> None:
    no_table = tiny_dataset(LORA)
    with pytest.raises(UsageError, match=r"'base_modalities' .* is empty"):
        moa()
    with pytest.raises(DataProblem, match="has no case of another modality than CT, MR"):
        moa(base_modalities=["CT", "MR"])
    with pytest.raises(DataProblem, match="normalise as CT"):
        moa(scheme="CTNormalization", base_modalities=["CT"])
    with pytest.raises(DataProblem, match="nobody says of which modality the cases are"):
        moa(no_table, base_modalities=["CT"])
    with pytest.raises(UsageError, match="gate has to be one of modality, learned; found 'best'"):
        moa(base_modalities=["CT"], gate="best")
    alone = moa(no_table, base_modalities=["CT"], new_modality="MR")
    assert alone.settings["modalities"] == ["CT", "MR"] and alone.settings["trained_modality"] == "MR"
    with pytest.raises(UsageError, match=r"the cases are PET by 'new_modality' .* and CT, MR by the modality table"):
        moa(base_modalities=["CT"], new_modality="PET")
    with pytest.raises(UsageError, match=r"top_k is 1: .* the gate would learn nothing"):
        moa(gate="learned", top_k=1)
    two = tiny_dataset(MOA)
    two["nnunet_multimodal"] = {"modalities": ["CT", "T1", "T2"], "case_modality": {CASES[0]: "T1", CASES[1]: "T2"}}
    mixed = moa(two, base_modalities=["CT"]).settings
    assert (mixed["modalities"], mixed["trained_modality"], mixed["unseen_modalities"]) == (
        ["CT", "T1", "T2"], None, ["CT"],
    )  # fmt: skip
    two["nnunet_multimodal"]["case_modality"] = {CASES[0]: "T2"}
    single = moa(two, base_modalities=["CT"]).settings
    assert (single["modalities"], single["trained_modality"]) == (["CT", "T2"], "T2"), "no adapter that nothing trains"
    spelled = moa(base_modalities=["ct"], new_modality="MRI")
    assert spelled.settings["modalities"] == ["CT", "MR"] and spelled.settings["base_modalities"] == ["CT"]
    both = moa(base_modalities=["CT"])
    assert both.settings["modalities"] == ["CT", "MR"] and both.settings["trained_modality"] is None


def test_a_case_that_is_not_in_the_table_is_named() -> None:
    """faults.md row 32."""
    dataset = tiny_dataset(MOA)
    table = {case: "MR" for case in CASES[:-1]}
    dataset["nnunet_multimodal"] = {"modalities": ["CT", "MR"], "case_modality": table}
    path = save_starting_model(2, dataset)
    trainer = moa(dataset, base_modalities=["CT"], starting_model=str(path))
    with pytest.raises(DataProblem, match=f"1 cases are not in the modality table: {CASES[-1]}"):
        trainer.on_train_start()


def test_a_modality_that_a_fold_does_not_train_on_is_named() -> None:
    """faults.md row 31: its adapter stays as it began."""
    dataset = tiny_dataset(MOA)
    table = {**dict.fromkeys(CASES[:-1], "T1"), CASES[-1]: "T2"}
    dataset["nnunet_multimodal"] = {"modalities": ["T1", "T2"], "case_modality": table}
    path = save_starting_model(2, dataset)
    splits = Path(os.environ["nnUNet_preprocessed"], "Dataset601_Tiny", "splits_final.json")
    splits.write_text(json.dumps([{"train": CASES[:-1], "val": CASES[-1:]}, {"train": CASES, "val": CASES[:1]}]))
    for fold, named in ((0, True), (1, False)):
        trainer = moa(dataset, fold=fold, base_modalities=["CT"], starting_model=str(path))
        trainer.do_split()
        assert (f"fold {fold} trains on no case of T2" in log_of(trainer)) == named


class Touch:
    """What a checkpoint could hold that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_starting_model_that_would_run_code_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    """faults.md row 37."""
    sentinel, path = tmp_path / "touched", tmp_path / "evil.pth"
    content = {"network_weights": {}, "extra": Touch(sentinel)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataProblem, match=r"refused: it holds more than weights|incomplete") as error:
        started(LORA, starting_model=str(path))
    assert not sentinel.exists() and error.value.exit_code == 4
    if zipped:
        torch.load(path, weights_only=False)
        assert sentinel.exists(), "it would have"


def test_a_truncated_starting_model_is_replaced_by_the_next_best_and_that_is_said() -> None:
    """faults.md row 35."""
    path = save_starting_model(2, tiny_dataset(LORA))
    folder = Path(os.environ["nnUNet_results"], "model", "fold_0")
    folder.mkdir(parents=True)
    whole = path.read_bytes()
    (folder / "checkpoint_final.pth").write_bytes(whole[: len(whole) // 2])
    path.rename(folder / "checkpoint_best.pth")
    trainer = started(LORA, starting_model=str(folder.parent))
    log = log_of(trainer)
    assert "checkpoint_final.pth is incomplete; using checkpoint_best.pth" in log
    assert f"starting model: {folder / 'checkpoint_best.pth'} (nnUNetTrainer)" in log
