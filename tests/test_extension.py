"""nnU-Net's own finder in a fresh process in which nothing but nnUNet_extTrainer is set (faults.md, rows 3 and 4)."""

from __future__ import annotations

import json

import pytest

from nnunet_multimodal import trainers
from nnunet_multimodal.environment import extension_folder
from nnunet_multimodal.registry import TRAINERS

NAMES = [name for entry in TRAINERS.values() for name in entry.names]

LOOKUP = """
import inspect, json, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

found = {}
for name in json.loads(sys.argv[1]):
    trainer = find(name)
    found[name] = {
        "name": trainer.__name__,
        "again": find(name) is trainer,
        "epochs": getattr(trainer, "fixed_epochs", None),
        "init": list(inspect.signature(trainer.__init__).parameters),
        "pickle": pickle.dumps(trainer).hex(),
    }
stock = find("nnUNetTrainer").__module__
unwanted = [name for name in sys.modules if name.split(".")[0] in ("tests", "conftest", "nnunet_multimodal_trainers")]
print(json.dumps({"found": found, "stock": stock, "unwanted": unwanted}))
"""


def test_the_folder_holds_the_shim_and_nothing_else() -> None:
    assert [path.name for path in extension_folder().iterdir() if path.name != "__pycache__"] == [
        "nnunet_multimodal_trainers.py"
    ]


def test_lookup_in_a_fresh_process(run_python) -> None:
    names = [*NAMES, "nnUNetTrainerCrossMR_7epochs", "nnUNetTrainerCrossMR_noPairedAug_1epoch"]
    variable = {"nnUNet_extTrainer": str(extension_folder())}
    result = run_python("-c", LOOKUP, json.dumps(names), env=variable)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["stock"] == "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    assert answer["unwanted"] == []
    for name, trainer in answer["found"].items():
        assert trainer["name"] == name
        assert trainer["again"], f"a second lookup of {name} made another class"
        assert trainer["init"] == ["self", "plans", "configuration", "fold", "dataset_json", "device"]
    assert answer["found"]["nnUNetTrainerCrossMR_7epochs"]["epochs"] == 7
    assert answer["found"]["nnUNetTrainerCrossMR_noPairedAug_1epoch"]["epochs"] == 1

    unpickle = "import pickle, sys; print([pickle.loads(bytes.fromhex(word)).__name__ for word in sys.argv[1:]])"
    # without the variable, which unpickling must not need
    result = run_python("-c", unpickle, *(trainer["pickle"] for trainer in answer["found"].values()))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(names)


@pytest.mark.parametrize("name", ["nnUNetTrainerCrosMR", "nnUNetTrainerCrossMR_0epochs", "__path__"])
def test_other_names_are_not_found(name: str, clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.setenv("nnUNet_extTrainer", str(extension_folder()))
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        recursive_find_trainer_class_by_name(name)


@pytest.mark.parametrize("name", ["importlib", "TRAINERS", "parse_trainer_name"])
def test_the_shim_hands_out_trainers_only(name: str) -> None:
    assert hasattr(trainers, name)
    with pytest.raises(AttributeError, match=name):
        trainers.__getattr__(name)  # what the shim borrows
