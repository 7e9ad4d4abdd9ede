"""The plans' section nnunet_multimodal: defaults, what a user may write there, and what he is told."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_training import NAMES, VOLUMES_ONLY, configuration_name, make_trainer, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.trainers.settings import SECTION, fill_settings, read_settings

DEFAULTS: dict[str, Any] = {"epochs": 50, "rate": 1e-3, "mask": True, "kind": "free", "model": None}


def plans_with(section: dict[str, Any] | None) -> dict[str, Any]:
    configuration: dict[str, Any] = {"architecture": {}}
    if section is not None:
        configuration[SECTION] = section
    return {"configurations": {"2d": configuration}}


def fill(section: dict[str, Any] | None, foreign: set[str] | None = None) -> dict[str, Any]:
    return fill_settings(plans_with(section), "2d", DEFAULTS, foreign or set())


@pytest.mark.parametrize("section", [None, {}])
def test_without_a_section_all_defaults_hold_and_are_written(section: dict[str, Any] | None) -> None:
    plans = plans_with(section)
    assert fill_settings(plans, "2d", DEFAULTS, set()) == DEFAULTS
    assert plans["configurations"]["2d"][SECTION] == DEFAULTS
    assert PlansManager(plans).get_configuration("2d").configuration[SECTION] == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 3), ("rate", 0.5), ("rate", 1), ("mask", False), ("kind", "x"), ("model", "file.pth"), ("model", None)],
)
def test_a_value_of_the_right_kind_replaces_the_default(key: str, value: Any) -> None:
    assert fill({key: value}) == {**DEFAULTS, key: value}
    assert DEFAULTS["epochs"] == 50  # the class's own dictionary is left alone


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "50"), ("epochs", 5.5), ("epochs", True), ("epochs", None), ("epochs", [50]),
        ("rate", "0.1"), ("rate", None), ("rate", False),
        ("mask", 1), ("mask", "true"), ("mask", None),
        ("kind", 3), ("kind", None),
        ("model", 7), ("model", False), ("model", ["a"]),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_place_and_value(key: str, value: Any) -> None:
    with pytest.raises(UsageError) as error:
        fill({key: value})
    message = str(error.value)
    assert f'"2d"]["{SECTION}"][{key!r}]' in message
    assert f"found {value!r}" in message
    assert ("string or null" if key == "model" else f"default {DEFAULTS[key]!r}") in message
    assert error.value.exit_code == 2


def test_an_unknown_key_is_refused_with_the_nearest_and_all_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        fill({"epoch": 3})
    message = str(error.value)
    assert "unknown setting 'epoch'" in message and "Did you mean 'epochs'?" in message
    assert all(key in message for key in DEFAULTS)
    with pytest.raises(UsageError, match=r"'zzzzzz'\. Known: epochs, kind"):
        fill({"zzzzzz": 3})


def test_another_trainers_key_is_tolerated_and_left_out() -> None:
    assert fill({"queries": 11, "epochs": 2}, foreign={"queries"}) == {**DEFAULTS, "epochs": 2}


def test_settings_of_the_configuration_it_inherits_from_count() -> None:
    plans = plans_with({"epochs": 7, "kind": "parent"})
    plans["configurations"]["2d_bs32"] = {"inherits_from": "2d", "batch_size": 32}
    expected = {**DEFAULTS, "epochs": 7, "kind": "parent"}
    assert fill_settings(plans, "2d_bs32", DEFAULTS, set()) == expected
    assert plans["configurations"]["2d_bs32"][SECTION] == expected
    assert plans["configurations"]["2d"][SECTION] == {"epochs": 7, "kind": "parent"}  # not ours to change
    assert PlansManager(plans).get_configuration("2d_bs32").configuration[SECTION] == expected


def test_filling_twice_changes_nothing() -> None:
    plans = plans_with({"epochs": 7})
    fill_settings(plans, "2d", DEFAULTS, set())
    once = copy.deepcopy(plans)
    fill_settings(plans, "2d", DEFAULTS, set())
    assert plans == once


def test_plans_that_no_trainer_of_ours_wrote_are_named() -> None:
    assert read_settings({SECTION: {"a": 1}}) == {"a": 1}
    with pytest.raises(UsageError, match="no section 'nnunet_multimodal'"):
        read_settings({"patch_size": [1, 2]})


# --- in the trainers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_section_is_complete_and_json_once_a_trainer_is_made(name: str, nnunet_folders: dict[str, str]) -> None:
    ndim = 3 if name in VOLUMES_ONLY else 2
    trainer = make_trainer(name, ndim, num_epochs=17)
    section = trainer.plans_manager.plans["configurations"][configuration_name(ndim)][SECTION]
    assert set(section) == set(type(trainer).settings_defaults)
    assert section == trainer.settings and section["num_epochs"] == trainer.num_epochs == 17
    assert trainer.configuration_manager.configuration[SECTION] == section
    assert json.loads(json.dumps(section)) == section
    assert trainer.num_iterations_per_epoch == section["num_iterations_per_epoch"] == 2
    assert trainer.initial_lr == section["initial_lr"] and trainer.weight_decay == section["weight_decay"]
    assert trainer.save_every == section["save_every"]


def test_a_length_in_the_name_beats_the_setting(nnunet_folders: dict[str, str]) -> None:
    assert make_trainer("nnUNetTrainerContrastAug_3epochs", num_epochs=9).num_epochs == 3
    assert make_trainer("nnUNetTrainerContrastAug", num_epochs=9).num_epochs == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"querys": 5}, r"unknown setting 'querys'. Did you mean 'queries'\?"),
        ({"initial_lr": "fast"}, r"\['initial_lr'\]: expected float \(default 0.001\), found 'fast'"),
    ],
)
def test_a_trainer_refuses_a_wrong_section(
    settings: dict[str, Any], message: str, nnunet_folders: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer("nnUNetTrainerCrossMR", **settings)


def test_plans_are_shared_between_trainers(nnunet_folders: dict[str, str]) -> None:
    """CrossMR's keys in the plans do not stop ContrastAug, and scribble's do not stop CrossMR."""
    assert "queries" not in make_trainer("nnUNetTrainerContrastAug", queries=4).settings
    assert "scribbles" not in make_trainer("nnUNetTrainerCrossMR", scribbles="stored").settings
    with pytest.raises(UsageError, match="unknown setting 'nonsense'"):
        make_trainer("nnUNetTrainerContrastAug", nonsense=1)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("noVisualTokens", "visual_tokens"),
        ("noOrganMatch", "organ_queries"),
        ("noPairedAug", "paired_augmentation"),
        ("visualAcrossBatch", "pool_batch_tokens"),
    ],
)
def test_an_ablation_differs_in_one_setting(name: str, setting: str) -> None:
    full, ablation = trainers.nnUNetTrainerCrossMR, getattr(trainers, f"nnUNetTrainerCrossMR_{name}")
    assert ablation.settings_defaults == full.settings_defaults and not full.fixed_settings
    assert ablation.fixed_settings == {setting: not full.settings_defaults[setting]}


def test_plans_of_another_result_folder_do_not_undo_an_ablation(nnunet_folders: dict[str, str]) -> None:
    full = make_trainer("nnUNetTrainerCrossMR").settings
    assert full["visual_tokens"] is True
    ablation = make_trainer("nnUNetTrainerCrossMR_noVisualTokens", visual_tokens=True)
    assert ablation.settings["visual_tokens"] is False
    section = ablation.plans_manager.plans["configurations"]["2d"][SECTION]
    assert section["visual_tokens"] is False, "prediction builds the network from there"


def test_the_plans_that_a_test_makes_are_new_each_time() -> None:
    first = tiny_plans(2, 1)
    first["configurations"]["2d"][SECTION]["queries"] = 99
    assert tiny_plans(2, 1)["configurations"]["2d"][SECTION]["queries"] == 3
