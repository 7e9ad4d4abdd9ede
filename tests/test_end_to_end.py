"""The whole way with the real commands, each in a fresh process: convert, plan, train, continue, predict (check 24).

Nothing but nnU-Net's own variables and the line of ``nnunet_multimodal env`` is set.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

BIN = Path(sys.executable).parent
SHAPE = (32, 30, 6)  # x, y, z
AFFINE = np.array([[-1.0, 0, 0, 12], [0, 1.0, 0, -7], [0, 0, 3, 5], [0, 0, 0, 1.0]])  # stored left to right: L, A, S
CASES = [f"p{number:02}" for number in range(6)]
ORGANS = ["liver", "spleen"]
MODALITIES = ("CT", "MR")
SETTINGS = {
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "queries": 3,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "layers": 2,
    "levels": 2,
}


@dataclass
class Workshop:
    """nnU-Net's three folders, and a shell that has evaluated ``nnunet_multimodal env``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        folders = {f"nnUNet_{kind}": str(self.folder / kind) for kind in ("raw", "preprocessed", "results")}
        quiet = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        return {**inherited, **folders, **quiet, **path, "PYTHONIOENCODING": "utf-8"}

    def run(self, *words: str | Path, fails: bool = False, **variables: str) -> str:
        """A command in a fresh shell; its output, or a failure that shows it."""
        command = self.line(*words)
        result = subprocess.run(
            ["bash", "-c", command],
            env={**self.environment, **variables},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert (result.returncode != 0) == fails, f"{command}\n{result.stdout[-6000:]}"
        return result.stdout

    def line(self, *words: str | Path) -> str:
        """What the user types, after the line of ``nnunet_multimodal env``."""
        return 'eval "$(nnunet_multimodal env --shell bash)" && exec ' + shlex.join(map(str, words))

    def train(self, dataset: int, trainer: str, *more: str, configuration: str = "2d") -> str:
        return self.run("nnUNetv2_train", str(dataset), configuration, "0", "-tr", trainer, "-device", "cpu", *more)

    def fold(self, dataset: str, trainer: str, configuration: str = "2d") -> Path:
        return self.folder / "results" / dataset / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"

    def predict(self, dataset: str, trainer: str, cases: Iterable[str], configuration: str = "2d") -> Path:
        """Stock prediction of prepared cases; the folder of the results."""
        given = self.folder / f"in_{dataset}_{trainer}"
        given.mkdir()
        for case in cases:
            for path in (self.folder / "raw" / dataset / "imagesTr").glob(f"{case}_*.nii.gz"):
                os.link(path, given / path.name)
        out = self.folder / f"out_{dataset}_{trainer}"
        self.run(
            "nnUNetv2_predict", "-i", given, "-o", out, "-d", dataset, "-c", configuration, "-f", "0", "-tr", trainer,
            "-device", "cpu", "-npp", "0", "-nps", "0",
        )  # fmt: skip
        return out

    def change_plans(self, dataset: str, **settings: Any) -> None:
        """Smallest network that has everything, and the trainers' settings."""
        path = self.folder / "preprocessed" / dataset / "nnUNetPlans.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        for configuration in plans["configurations"].values():
            if "architecture" not in configuration:
                continue
            configuration["batch_size"] = 2
            arguments = configuration["architecture"]["arch_kwargs"]
            arguments["n_stages"] = 3
            arguments["features_per_stage"] = [8, 8, 8]
            for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
                arguments[key] = arguments[key][:3]
            arguments["n_conv_per_stage"] = [1, 1, 1]
            arguments["n_conv_per_stage_decoder"] = [1, 1]
            configuration["nnunet_multimodal"] = {**SETTINGS, **settings}
        path.write_text(json.dumps(plans))

    def prepare(self, kind: str, dataset: int, configuration: str = "2d") -> str:
        """Converts, plans and preprocesses; the data set's name."""
        flag = "--reference-images" if kind == "crossmr" else "--images"
        if kind == "mixed":
            images = [f"{name}={self.folder / 'images' / name}" for name in MODALITIES]
            labels = [f"{name}={self.folder / 'labels' / name}" for name in MODALITIES]
        else:
            images, labels = [str(self.folder / "images")], [str(self.folder / "labels")]
        self.run(
            "nnunet_multimodal", "convert", kind, flag, *images, "--labels", *labels,
            "-d", str(dataset), "--label-names", *(f"{name}={i}" for i, name in enumerate(ORGANS, start=1)),
        )  # fmt: skip
        self.run(
            "nnUNetv2_plan_and_preprocess", "-d", str(dataset), "-c", configuration, "--verify_dataset_integrity",
            "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1",  # the planner asks for that many threads
        )  # fmt: skip
        (name,) = (path.name for path in (self.folder / "raw").glob(f"Dataset{dataset}_*"))
        self.change_plans(name)
        return name


def modality_of(case: str) -> str:
    return MODALITIES[CASES.index(case) % 2]


def make_cases(folder: Path) -> None:
    """Two blobs in a noisy body, bright in the CT of some patients and dark in the MR of others."""
    for modality in MODALITIES:
        (folder / "images" / modality).mkdir(parents=True)
        (folder / "labels" / modality).mkdir(parents=True)
    x, y, z = np.indices(SHAPE)
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(number)
        labels = np.zeros(SHAPE, dtype=np.uint8)
        for label, centre in enumerate([(10, 14 + number % 3, 2), (22, 15, 3)], start=1):
            distance = ((x - centre[0]) / 6) ** 2 + ((y - centre[1]) / 6) ** 2 + ((z - centre[2]) / 2.2) ** 2
            labels[distance < 1] = label
        modality = modality_of(case)
        image = 300.0 + (60.0 if modality == "CT" else -60.0) * labels + rng.normal(0, 8, SHAPE)
        for kind, array in (("images", image.astype(np.float32)), ("labels", labels)):
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / kind / modality / f"{case}.nii.gz")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("end to end")  # a blank in a path is nothing special
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir()
    make_cases(folder)
    return Workshop(folder)


@pytest.fixture(scope="module")
def crossmr(workshop: Workshop) -> str:
    """The data set of CrossMR, planned and preprocessed."""
    return workshop.prepare("crossmr", 601)


def check_predictions(out: Path, cases: list[str]) -> None:
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{case}.nii.gz" for case in cases]
    for case in cases:
        image = nibabel.load(out / f"{case}.nii.gz")
        assert image.shape == SHAPE
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
        assert set(np.unique(np.asanyarray(image.dataobj))) <= {0, 1, 2}


def test_the_converted_data_set_is_what_the_trainer_needs(workshop: Workshop, crossmr: str) -> None:
    dataset = json.loads((workshop.folder / "raw" / crossmr / "dataset.json").read_text(encoding="utf-8"))
    assert list(dataset["channel_names"].values()) == ["target", "reference", "noNorm", "noNorm"]
    assert dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    plans = json.loads((workshop.folder / "preprocessed" / crossmr / "nnUNetPlans.json").read_text(encoding="utf-8"))
    schemes = plans["configurations"]["2d"]["normalization_schemes"]
    assert schemes == ["ZScoreNormalization"] * 2 + ["NoNormalization"] * 2


def test_train_and_predict_with_the_stock_commands(workshop: Workshop, crossmr: str) -> None:
    trainer = "nnUNetTrainerCrossMR_1epochs"
    output = workshop.train(601, trainer)
    assert "Epoch 0" in output and "Epoch 1" not in output and "Training done." in output
    fold = workshop.fold(crossmr, trainer)
    assert (fold / "checkpoint_final.pth").is_file()
    assert not list(fold.glob(".*"))  # no temporary file
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["mean"]) == {"1", "2"}
    settings = json.loads((fold.parent / "plans.json").read_text(encoding="utf-8"))["configurations"]["2d"][
        "nnunet_multimodal"
    ]
    assert settings["queries"] == 3 and settings["tokens_first"] is True  # complete, with the changes

    check_predictions(workshop.predict(crossmr, trainer, CASES[:2]), CASES[:2])


@pytest.mark.slow
def test_a_training_goes_on_where_it_was(workshop: Workshop, crossmr: str) -> None:
    trainer = "nnUNetTrainerCrossMR"
    workshop.change_plans(crossmr, num_epochs=1)
    assert "Epoch 1" not in workshop.train(601, trainer)
    workshop.change_plans(crossmr, num_epochs=2)
    output = workshop.train(601, trainer, "--c")
    assert "Epoch 1" in output and "Epoch 0" not in output
    # four steps in all, two done, and a warm-up of 50 steps: 1e-3 * (1/2)^.9 * 3/50
    assert f"Current learning rate: {np.round(1e-3 * 0.5**0.9 * 3 / 50, 5)}" in output


@pytest.mark.slow
def test_crossmr_in_3d(workshop: Workshop) -> None:
    dataset = workshop.prepare("crossmr", 602, "3d_fullres")
    trainer = "nnUNetTrainerCrossMR_1epochs"
    workshop.train(602, trainer, configuration="3d_fullres")
    check_predictions(workshop.predict(dataset, trainer, CASES[:1], "3d_fullres"), CASES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "trainer"),
    [("plain", 603, "nnUNetTrainerContrastAug_1epochs"), ("scribble", 604, "nnUNetTrainerScribble_1epoch")],
)
def test_the_other_trainers(workshop: Workshop, kind: str, number: int, trainer: str) -> None:
    dataset = workshop.prepare(kind, number)
    workshop.train(number, trainer)
    check_predictions(workshop.predict(dataset, trainer, CASES[:2]), CASES[:2])


@pytest.mark.slow
def test_crossmr_starts_from_a_model_of_contrast_augmentation(workshop: Workshop, crossmr: str) -> None:
    dataset = workshop.prepare("plain", 605)
    trainer = "nnUNetTrainerContrastAug_1epochs"
    workshop.train(605, trainer, "--disable_checkpointing")
    assert not (workshop.fold(dataset, trainer) / "checkpoint_final.pth").exists()
    workshop.train(605, trainer)
    workshop.change_plans(crossmr, starting_model=str(workshop.fold(dataset, trainer).parent))
    output = workshop.train(601, "nnUNetTrainerCrossMR_noVisualTokens_1epochs")
    assert "starting model: " in output and " 0 tensors loaded" not in output


def check_mixed(workshop: Workshop, number: int, configuration: str) -> tuple[str, str]:
    """One model for both modalities by the stock commands; the data set and the trainer."""
    dataset = workshop.prepare("mixed", number, configuration)
    trainer = "nnUNetTrainerMulModSeg_1epoch"
    output = workshop.train(number, trainer, configuration=configuration)
    assert "new splits, stratified by modality" in output and "fold 0 trains on" in output
    assert "Pseudo dice" in output and "modality recognised in" in output and "Training done." in output
    check_predictions(workshop.predict(dataset, trainer, CASES[:2], configuration), CASES[:2])
    return dataset, trainer


def test_one_model_for_ct_and_mr_with_the_stock_commands_and_ours(workshop: Workshop) -> None:
    dataset, trainer = check_mixed(workshop, 606, "2d")
    given, out = workshop.folder / f"in_{dataset}_{trainer}", workshop.folder / "told"
    workshop.run(
        "nnunet_multimodal", "predict", "-i", given, "-o", out, "-d", "606", "-c", "2d", "-f", "0", "-tr", trainer,
        "-device", "cpu", "--modality", "MR",
    )  # fmt: skip
    check_predictions(out, CASES[:2])
    cases = json.loads((out / "predictions.json").read_text(encoding="utf-8"))["cases"]
    assert {case: (entry["modality"], entry["how"]) for case, entry in cases.items()} == dict.fromkeys(
        CASES[:2], ("MR", "told")
    )

    # faults.md 31 and 32: nothing is trained, and what is there stays
    folder = workshop.folder / "preprocessed" / dataset
    fold = workshop.fold(dataset, trainer)
    before = (fold / "checkpoint_final.pth").stat().st_mtime_ns
    train = ("nnUNetv2_train", "606", "2d", "0", "-tr", trainer, "-device", "cpu")
    splits = (folder / "splits_final.json").read_text(encoding="utf-8")
    only_ct = [{"train": CASES[0::2], "val": CASES[1::2]}]
    (folder / "splits_final.json").write_text(json.dumps(only_ct), encoding="utf-8")
    output = workshop.run(*train, fails=True)
    assert f"fold 0 has 3 CT, 0 MR training cases; {trainer} needs CT and MR" in output
    (folder / "splits_final.json").write_text(splits, encoding="utf-8")
    table = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    table["nnunet_multimodal"]["case_modality"][CASES[1]] = "PET"
    (folder / "dataset.json").write_text(json.dumps(table), encoding="utf-8")
    output = workshop.run(*train, fails=True)
    assert f"1 cases have an unknown modality (PET): {CASES[1]}. Allowed: CT, MR." in output
    assert (fold / "checkpoint_final.pth").stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_and_continued(workshop: Workshop) -> None:
    dataset, trainer = workshop.prepare("mixed", 608), "nnUNetTrainerMulModSeg"
    workshop.change_plans(dataset, save_every=1, num_epochs=1000)
    command = workshop.line("nnUNetv2_train", "608", "2d", "0", "-tr", trainer, "-device", "cpu")
    latest = workshop.fold(dataset, trainer) / "checkpoint_latest.pth"
    with (workshop.folder / "killed.log").open("wb") as log:
        training = subprocess.Popen(["bash", "-c", command], env=workshop.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while not latest.exists() and training.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        training.kill()  # SIGKILL; the shell has become the training
        assert training.wait() == -signal.SIGKILL
    saved = torch.load(latest, map_location="cpu", weights_only=False)
    done = saved["current_epoch"]
    steps = {int(state["step"]) for state in saved["optimizer_state"]["state"].values()}
    assert steps == {2 * done}
    workshop.change_plans(dataset, save_every=1, num_epochs=done + 1)
    output = workshop.train(608, trainer, "--c")
    assert f"Epoch {done}" in output and f"Epoch {done - 1}" not in output and "train_loss nan" not in output
    final = torch.load(latest.with_name("checkpoint_final.pth"), map_location="cpu", weights_only=False)
    assert {int(state["step"]) for state in final["optimizer_state"]["state"].values()} == {2 * done + 2}


@pytest.mark.slow
def test_one_model_for_ct_and_mr_in_3d(workshop: Workshop) -> None:
    check_mixed(workshop, 607, "3d_fullres")
