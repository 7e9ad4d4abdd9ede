"""train: the data set, what is kept from cycle to cycle, and the commands; nnU-Net's own programs are stood in for.

Preprocessing is nnU-Net's. The whole with the real programs is in test_real_cycle.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from tiny_model import tiny_plans
from tiny_project import LABELS, Workshop, anatomy, save

from nnunet_multimodal.data.splits import read_splits
from nnunet_multimodal.errors import MultimodalError
from nnunet_multimodal.relabel import training

TRAINER = "nnUNetTrainerMRSegmentator_2epochs"


class Programs:
    """Stand-ins for nnU-Net's programs: they write what those write, and remember how they were called."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fails: set[str] = set()

    def __call__(self, words: tuple[str, ...], environment: dict[str, str], log: Path, *more: Any) -> None:
        self.lines.append(shlex.join(words))
        if words[0] == "nnUNetv2_train":
            dataset, configuration, fold = words[1:4]
            if fold in self.fails:
                raise MultimodalError("nnUNetv2_train failed with exit code 1.")
            (name,) = (path.name for path in Path(environment["nnUNet_raw"]).glob(f"Dataset{int(dataset):03d}_*"))
            trainer = words[words.index("-tr") + 1]
            folder = Path(
                environment["nnUNet_results"], name, f"{trainer}__nnUNetPlans__{configuration}", f"fold_{fold}"
            )
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "checkpoint_final.pth").write_bytes(f"{name} {fold}".encode())
            return
        (folder,) = Path(environment["nnUNet_raw"]).glob("Dataset001_*")
        planned = Path(environment["nnUNet_preprocessed"], folder.name)
        planned.mkdir(parents=True, exist_ok=True)
        if words[0] == "nnUNetv2_extract_fingerprint":
            (planned / "dataset_fingerprint.json").write_text("{}", encoding="utf-8")
        else:
            plans = tiny_plans(3)
            del plans["continue_training"]
            configuration = plans["configurations"]["3d_fullres"]
            configuration |= {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
            configuration["spacing"] = [4.0, 2.0, 2.0]
            del configuration["nnunet_multimodal"]
            (planned / "nnUNetPlans.json").write_text(json.dumps(plans), encoding="utf-8")

    @property
    def trained(self) -> list[str]:
        return [line for line in self.lines if line.startswith("nnUNetv2_train")]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    stand_ins = Programs()
    monkeypatch.setattr(training, "run_program", stand_ins)
    return stand_ins


@pytest.fixture
def labelled(tmp_path: Path, clean_environment: None) -> Workshop:
    """Twelve images, six of them labelled."""
    made = Workshop(tmp_path)
    made.make_images(12)
    made.init(labelled=6)
    return made


def train(call, workshop: Workshop, *more: object) -> tuple[int, str, str]:
    return call("train", workshop.place, "-tr", TRAINER, "--folds", 0, 1, "-device", "cpu", "--processes", 0, *more)


def accept(call, workshop: Workshop, *names: str) -> None:
    given = workshop.folder / f"given_{'_'.join(names)}"
    for name in names:
        save(given / f"{name}.nii.gz", anatomy(int(name[1:])))
    assert call("accept", workshop.place, given)[0] == 0


def preprocessed(workshop: Workshop, cycle: int) -> Path:
    return workshop.place / f"nnunet/preprocessed/Dataset{cycle:03d}_P"


def stored(workshop: Workshop) -> int:
    return len(list(workshop.place.glob("cache/preprocessed/*/*")))


def test_the_first_cycle(call, labelled: Workshop, programs: Programs) -> None:
    code, out, err = train(call, labelled, "--plan", "-gpu_memory_target", 1)
    assert code == 0, err
    assert "cycle 1: 6 cases" in out and "6 cases preprocessed, 0 kept" in out
    assert programs.lines == [
        "nnUNetv2_extract_fingerprint -d 1 -np 1",
        "nnUNetv2_plan_experiment -d 1 -gpu_memory_target 1",
        f"nnUNetv2_train 1 3d_fullres 0 -tr {TRAINER} -p nnUNetPlans -device cpu",
        f"nnUNetv2_train 1 3d_fullres 1 -tr {TRAINER} -p nnUNetPlans -device cpu",
    ]
    raw = labelled.place / "nnunet/raw/Dataset001_P"
    dataset = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    assert dataset["labels"] == {"background": 0, **LABELS}
    assert "modality" not in dataset and dataset["channel_names"] == {"0": "CT_or_MR"}
    assert dataset["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert set(dataset["nnunet_multimodal"]["case_modality"].values()) == {"MR"}
    assert (raw / "imagesTr/p0_0000.nii.gz").resolve() == labelled.images / "p0.nii.gz"
    assert (raw / "labelsTr/p0.nii.gz").resolve().is_relative_to(labelled.place / "masks")
    assert not Path((raw / "labelsTr/p0.nii.gz").readlink()).is_absolute(), "the project can be moved"
    folder = preprocessed(labelled, 1)
    data = folder / "tiny"
    assert sorted(path.name for path in data.glob("*.pkl")) == [f"p{i}.pkl" for i in range(6)]
    segmentation = np.asarray(blosc2.open(str(data / "p0_seg.b2nd"), mode="r")[:])[0]
    assert {int(value) for value in np.unique(segmentation)} == {0, 1, 2, 3}
    assert sorted(path.name for path in (folder / "gt_segmentations").iterdir()) == [f"p{i}.nii.gz" for i in range(6)]
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    assert plans["dataset_name"] == "Dataset001_P" and plans["plans_name"] == "nnUNetPlans"
    assert "nnunet_multimodal" not in plans["configurations"]["3d_fullres"], "from scratch"
    splits = read_splits(folder / "splits_final.json")
    assert len(splits) == 5 and sorted(len(split["val"]) for split in splits) == [1, 1, 1, 1, 2]
    state = json.loads(call("status", labelled.place, "--json")[1])
    assert state["model"]["cycle"] == 1 and state["cycles"][0]["trained_folds"] == ["0", "1"]
    assert state["stale"] == {"cycle": 1, "changed": [], "new": []}


def test_what_stays_from_cycle_to_cycle(call, labelled: Workshop, programs: Programs) -> None:
    """Folds, plans, weights and preprocessed cases; a changed label is preprocessed again, and it alone."""
    train(call, labelled)
    before = read_splits(preprocessed(labelled, 1) / "splits_final.json")
    plans_file = labelled.place / "plans.json"
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = {"num_iterations_per_epoch": 7}
    plans_file.write_text(json.dumps(plans), encoding="utf-8")  # the user's edit
    accept(call, labelled, "p6", "p7", "p8")
    corrected = anatomy(0)
    corrected[1, 3, 3] = 0
    save(labelled.folder / "again" / "p0.nii.gz", corrected)
    assert call("accept", labelled.place, labelled.folder / "again")[0] == 0
    state = json.loads(call("status", labelled.place, "--json")[1])
    assert state["stale"] == {"cycle": 1, "changed": ["p0"], "new": ["p6", "p7", "p8"]}
    assert "1 labels changed and 3 new since the data of cycle 1" in call("status", labelled.place)[1]

    code, out, _ = train(call, labelled)
    assert code == 0 and "4 cases preprocessed, 5 kept from before" in out
    assert stored(labelled) == 10
    assert programs.lines[4:] == [
        f"nnUNetv2_train 2 3d_fullres {fold} -tr {TRAINER} -p nnUNetPlans -device cpu" for fold in (0, 1)
    ], "planned once"
    for fold, (old, new) in enumerate(zip(before, read_splits(preprocessed(labelled, 2) / "splits_final.json"))):
        assert set(old["val"]) <= set(new["val"]), fold
        assert not set(old["val"]) & set(new["train"])
    plans = json.loads((preprocessed(labelled, 2) / "nnUNetPlans.json").read_text(encoding="utf-8"))
    section = plans["configurations"]["3d_fullres"]["nnunet_multimodal"]
    assert section["num_iterations_per_epoch"] == 7
    for fold in (0, 1):
        weights = Path(section["starting_model"]) / f"fold_{fold}" / "checkpoint_final.pth"
        assert weights.read_bytes() == f"Dataset001_P {fold}".encode(), "each fold its own"
    from nnunet_multimodal.trainers.checkpoints import starting_file

    assert starting_file(Path(section["starting_model"]), 1).parent.name == "fold_1"
    seg = preprocessed(labelled, 2) / "tiny/p0_seg.b2nd"
    assert int((np.asarray(blosc2.open(str(seg), mode="r")[:]) == 1).sum()) == int((corrected == 1).sum())


def test_an_interrupted_cycle_goes_on_and_finishes_once(call, labelled: Workshop, programs: Programs) -> None:
    programs.fails = {"1"}
    code, _, err = train(call, labelled)
    assert code == 1 and "failed with exit code 1" in err
    assert json.loads(call("status", labelled.place, "--json")[1])["open_cycle"] == 1
    accept(call, labelled, "p6")
    programs.fails = set()
    code, out, _ = train(call, labelled)
    assert code == 0
    assert "1 new cases are in no split of cycle 1: p6" in out
    assert [line.split()[3] for line in programs.trained] == ["0", "1", "1"], "fold 0 is not trained twice"
    assert train(call, labelled)[0] == 0  # cycle 2, because of p6
    code, _, err = train(call, labelled)
    assert code == 2 and "was trained on all that is accepted" in err
    assert train(call, labelled, "--again")[0] == 0
    state = json.loads(call("status", labelled.place, "--json")[1])
    assert [each["cycle"] for each in state["cycles"]] == [1, 2, 3]


def test_a_half_trained_fold_goes_on_with_c(call, labelled: Workshop, programs: Programs) -> None:
    programs.fails = {"0"}
    train(call, labelled)
    fold = labelled.place / f"nnunet/results/Dataset001_P/{TRAINER}__nnUNetPlans__3d_fullres/fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    frozen = (preprocessed(labelled, 1) / "nnUNetPlans.json").read_text(encoding="utf-8")
    plans = json.loads((labelled.place / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["batch_size"] = 99
    (labelled.place / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    programs.fails = set()
    assert train(call, labelled)[0] == 0
    assert programs.trained[1].endswith(" --c") and not programs.trained[2].endswith(" --c")
    assert (preprocessed(labelled, 1) / "nnUNetPlans.json").read_text(encoding="utf-8") == frozen


def test_other_options_in_the_middle(call, labelled: Workshop, programs: Programs) -> None:
    programs.fails = {"0"}
    train(call, labelled)
    programs.fails = set()
    code, _, err = call("train", labelled.place, "-tr", TRAINER, "--folds", 0, "-device", "cpu")
    assert code == 2 and "cycle 1 was begun with" in err and "--restart" in err
    code, out, _ = call(
        "train", labelled.place, "-tr", TRAINER, "--folds", 0, "-device", "cpu", "--restart", "--processes", 0
    )
    assert code == 0 and "cycle 2: 6 cases" in out and "0 cases preprocessed, 6 kept" in out
    state = json.loads(call("status", labelled.place, "--json")[1])
    assert [each["state"] for each in state["cycles"]] == ["abandoned", "trained"]


def test_dry_run_prints_what_a_job_array_needs(call, labelled: Workshop, programs: Programs) -> None:
    """And changes nothing; the lines, run as they are, train the cycle."""
    before = sorted(str(path) for path in labelled.place.rglob("*") if not path.name.startswith("relabel.sqlite"))
    code, out, _ = train(call, labelled, "--dry-run")
    lines = [line.partition("  #")[0] for line in out.splitlines()]
    assert code == 0
    assert before == sorted(
        str(path) for path in labelled.place.rglob("*") if not path.name.startswith("relabel.sqlite")
    )
    assert [line.split()[0] for line in lines[:4]] == ["export"] * 4
    prepare, jobs, collect = lines[4], lines[5:7], lines[7]
    assert call(*shlex.split(prepare)[2:], "--processes", 0)[0] == 0
    assert jobs == [f"nnUNetv2_train 1 3d_fullres {fold} -tr {TRAINER} -p nnUNetPlans -device cpu" for fold in (0, 1)]
    code, _, err = call(*shlex.split(collect)[2:])
    assert code == 1 and "folds 0, 1 have no checkpoint_final.pth" in err
    environment = dict(line.removeprefix("export ").split("=", 1) for line in lines[:4])
    for job in jobs:
        programs(tuple(shlex.split(job)), environment, Path())
    assert call(*shlex.split(collect)[2:])[0] == 0
    assert json.loads(call("status", labelled.place, "--json")[1])["model"]["cycle"] == 1


def test_a_fold_that_was_never_trained_says_where_it_starts(call, labelled: Workshop, programs: Programs) -> None:
    train(call, labelled)
    accept(call, labelled, "p6")
    words = ("train", labelled.place, "-tr", TRAINER, "--folds", 1, 2, "-device", "cpu", "--processes", 0)
    code, out, _ = call(*words)
    assert code == 0
    assert "warning: fold 2 was never trained and starts from fold 0, which has seen its validation cases" in out


def test_stock_trainers_get_their_weights_by_nnunets_own_option(call, labelled: Workshop, programs: Programs) -> None:
    words = ("train", labelled.place, "-tr", "nnUNetTrainer", "--folds", 0, "-device", "cpu", "--processes", 0)
    assert call(*words)[0] == 0
    assert "-pretrained_weights" not in programs.trained[0]
    accept(call, labelled, "p6")
    assert call(*words)[0] == 0
    assert programs.trained[1].endswith("nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth")
    assert " -pretrained_weights " in programs.trained[1]


def test_undo_of_a_training_brings_the_model_before_back(call, labelled: Workshop, programs: Programs) -> None:
    train(call, labelled)
    accept(call, labelled, "p6")
    train(call, labelled)
    assert call("undo", labelled.place)[1].startswith("undone: train")
    state = json.loads(call("status", labelled.place, "--json")[1])
    assert state["model"]["cycle"] == 1 and state["states"]["accepted"] == 7
    assert call("status", labelled.place, "--verify")[0] == 0


def test_too_little_to_train_on(call, tmp_path: Path, programs: Programs, clean_environment) -> None:
    made = Workshop(tmp_path)
    made.make_images(4)
    made.init()
    code, _, err = train(call, made)
    assert code == 4 and "fold 0 has 0 of 0 accepted cases" in err
    made.init(labelled=3)
    code, _, err = call("train", made.place, "-tr", TRAINER, "-device", "cpu")
    assert code == 4 and "Accept at least 5 cases" in err
    project = made.project
    assert project.ledger.value("SELECT count(*) FROM cases WHERE fold IS NOT NULL") == 0, "nothing was changed"
    project.ledger.close()
    assert call("train", made.place, "-tr", TRAINER, "--folds", "all", 0, "-device", "cpu")[0] == 2


def test_a_label_that_was_tampered_with_is_not_trained_on(call, labelled: Workshop, programs: Programs) -> None:
    mask = labelled.place / "masks"
    path = next(mask.glob("*/*.nii.gz"))
    path.chmod(0o644)
    save(path, anatomy(11))
    code, _, err = train(call, labelled)
    assert code == 4 and "was changed since it was accepted" in err
    assert not programs.trained


@pytest.fixture
def from_model(tmp_path: Path, clean_environment: None) -> Workshop:
    """As ``labelled``, started from a model that was planned otherwise: three stages of other features, 5 mm slices."""
    folder = tmp_path / "ct_model"
    plans = tiny_plans(3)
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False]}
    configuration["spacing"] = [5.0, 2.0, 2.0]
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 6, 10]
    dataset = {"channel_names": {"0": "CT"}, "labels": {**LABELS, "background": 0}, "file_ending": ".nii.gz"}
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset}
    checkpoint = {"network_weights": {}, "init_args": arguments, "trainer_name": "nnUNetTrainer", "current_epoch": 1}
    (folder / "fold_0").mkdir(parents=True)
    torch.save(checkpoint, folder / "fold_0/checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    made = Workshop(tmp_path)
    made.make_images(12)
    made.init(labelled=6, model=folder)
    return made


def test_the_plans_of_the_starting_model(call, from_model: Workshop, programs: Programs) -> None:
    code, out, err = train(call, from_model, "--model-plans")
    assert code == 0, err
    assert not any("plan_experiment" in line for line in programs.lines)
    assert "CTNormalization in the model, ZScoreNormalization" in out
    for path in (from_model.place / "plans.json", preprocessed(from_model, 1) / "nnUNetPlans.json"):
        plans = json.loads(path.read_text(encoding="utf-8"))
        configuration = plans["configurations"]["3d_fullres"]
        assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 6, 10]
        assert configuration["spacing"] == [5.0, 2.0, 2.0]
        assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["nnunet_multimodal"]["starting_model"].endswith("starting/Dataset001_P")
    accept(call, from_model, "p6")
    code, _, err = train(call, from_model, "--model-plans")
    assert code == 0 and "--model-plans changes nothing" in err  # the plans are the same in all cycles


def test_another_network_than_the_starting_models(call, from_model: Workshop, programs: Programs) -> None:
    code, out, err = train(call, from_model)
    assert code == 0, err
    assert "warning: the network planned for these images is not the starting model's" in out


def test_model_plans_that_cannot_be(call, labelled: Workshop, programs: Programs) -> None:
    code, _, err = train(call, labelled, "--model-plans")
    assert code == 2 and "no model to start from" in err
    code, _, err = train(call, labelled, "--model-plans", "--plan", "-gpu_memory_target", 1)
    assert code == 2 and "leave one of them out" in err
    code, _, err = train(call, labelled)  # and goes on without
    assert code == 0, err
