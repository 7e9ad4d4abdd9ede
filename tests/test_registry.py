from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunet_multimodal import registry, trainers
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.registry import TRAINERS, TrainerEntry, parse_trainer_name, require_trainer, suggest

CROSSMR = "nnUNetTrainerCrossMR"


@pytest.mark.parametrize(
    ("name", "ablation", "epochs"),
    [
        (CROSSMR, None, None),
        (f"{CROSSMR}_50epochs", None, 50),
        (f"{CROSSMR}_1epoch", None, 1),
        (f"{CROSSMR}_1epochs", None, 1),
        (f"{CROSSMR}_noPairedAug", "noPairedAug", None),
        (f"{CROSSMR}_noPairedAug_1000epochs", "noPairedAug", 1000),
    ],
)
def test_names_that_are_ours(name: str, ablation: str | None, epochs: int | None) -> None:
    assert parse_trainer_name(name) == (TRAINERS[CROSSMR], ablation, epochs)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "__path__",
        "nnUNetTrainer",
        "nnUNetTrainer_50epochs",
        "nnUNetTrainerCrossMRI",
        "nnunettrainercrossmr",
        f"{CROSSMR}_",
        f"{CROSSMR}_0epochs",
        f"{CROSSMR}_050epochs",
        f"{CROSSMR}_-5epochs",
        f"{CROSSMR}_5epoch",
        f"{CROSSMR}_epochs",
        f"{CROSSMR}_²epochs",
        f"{CROSSMR}_5epochs\n",
        f"{CROSSMR}_5epochs_noPairedAug",
        f"{CROSSMR}_5epochs_5epochs",
        f"{CROSSMR}_noPairedAug_noOrganMatch",
        f"{CROSSMR}_nopairedaug",
        "nnUNetTrainerScribble_noPairedAug",
        f"{CROSSMR}_{'9' * 5000}epochs",
    ],
)
def test_names_that_are_not_ours(name: str) -> None:
    assert parse_trainer_name(name) is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("nnUNetTrainerCrosMR", CROSSMR),
        ("nnunettrainercrossmr", CROSSMR),
        ("nnUNetTrainerCrossMRI_50epochs", f"{CROSSMR}_50epochs"),
        ("nnUNetTrainerCrossMR_noPairAug", f"{CROSSMR}_noPairedAug"),
        ("nnUNetTrainerContrast", "nnUNetTrainerContrastAug"),
        ("liver", None),
    ],
)
def test_suggest(typed: str, meant: str | None) -> None:
    assert suggest(typed) == meant


def test_require_trainer_names_the_nearest() -> None:
    assert require_trainer(f"{CROSSMR}_noVisualTokens_3epochs").name == CROSSMR
    with pytest.raises(UsageError, match=r"Unknown trainer .*Scribbel'\. Did you mean nnUNetTrainerScribble\?"):
        require_trainer("nnUNetTrainerScribbel")


def test_entries_are_complete() -> None:
    for name, entry in TRAINERS.items():
        assert name == entry.name
        assert entry.module.startswith("nnunet_multimodal.trainers.")
        assert entry.paper and entry.dataset and entry.differs
        assert all(
            word.replace("_", "").isalnum() and sentence.endswith(".") for word, sentence in entry.ablations.items()
        )


# The lookup of classes, with a trainer that is none: what is tested is the naming, caching and pickling.


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A registered trainer whose module, toy_trainer, a test may rewrite before it is first imported."""
    (tmp_path / "toy_trainer.py").write_text(
        "class nnUNetTrainerToy:\n"
        "    def __init__(self, plans, configuration): self.plans = plans\n"
        "class nnUNetTrainerToy_noFun(nnUNetTrainerToy): pass\n"
    )
    entry = TrainerEntry("nnUNetTrainerToy", "toy_trainer", "none", "none", "none", {"noFun": "No.", "gone": "No."})
    monkeypatch.setitem(registry.TRAINERS, entry.name, entry)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(vars(trainers))
    yield entry.name
    sys.modules.pop("toy_trainer", None)
    for name in set(vars(trainers)) - known:
        delattr(trainers, name)


def test_classes_come_from_the_module_of_the_entry(toy: str) -> None:
    assert "toy_trainer" not in sys.modules
    assert trainers.nnUNetTrainerToy is sys.modules["toy_trainer"].nnUNetTrainerToy
    assert trainers.nnUNetTrainerToy_noFun is sys.modules["toy_trainer"].nnUNetTrainerToy_noFun


def test_a_length_makes_one_class_that_pickles(toy: str) -> None:
    made = trainers.nnUNetTrainerToy_noFun_7epochs
    assert made.__name__ == made.__qualname__ == "nnUNetTrainerToy_noFun_7epochs"
    assert made.fixed_epochs == 7
    assert made.__bases__ == (trainers.nnUNetTrainerToy_noFun,)
    assert "__init__" not in vars(made)
    assert not hasattr(made.__bases__[0], "fixed_epochs")
    assert trainers.nnUNetTrainerToy_noFun_7epochs is made
    assert trainers.__getattr__("nnUNetTrainerToy_noFun_7epochs") is made  # the way the shim asks
    assert pickle.loads(pickle.dumps(made)) is made


def test_foreign_names_are_attribute_errors(toy: str) -> None:
    for name in ("nnUNetTrainer", "nnUNetTrainerToy_0epochs", "nnUNetTrainerToy_fun"):
        with pytest.raises(AttributeError, match=name):
            getattr(trainers, name)
    assert "toy_trainer" not in sys.modules


@pytest.mark.parametrize("line", ["import no_such_package", "import sys; sys.no_such_thing"])
def test_a_trainer_module_that_does_not_import_says_so(toy: str, tmp_path: Path, line: str) -> None:
    (tmp_path / "toy_trainer.py").write_text(line)
    with pytest.raises(ImportError, match="no_such"):
        hasattr(trainers, "nnUNetTrainerToy_5epochs")


def test_an_ablation_without_a_class_is_no_silent_absence(toy: str) -> None:
    with pytest.raises(ImportError, match="nnUNetTrainerToy_gone"):
        hasattr(trainers, "nnUNetTrainerToy_gone")


def test_dir_lists_every_name_without_importing(toy: str) -> None:
    assert {"nnUNetTrainerToy", "nnUNetTrainerToy_noFun", CROSSMR} <= set(dir(trainers))
    assert "toy_trainer" not in sys.modules
