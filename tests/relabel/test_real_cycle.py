"""Two cycles with nnU-Net's real programs, one of them killed in the middle of a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

SHAPE = (32, 30, 8)  # x, y, z
AFFINE = np.array([[-1.0, 0, 0, 12], [0, 1.0, 0, -7], [0, 0, 3, 5], [0, 0, 0, 1.0]])
TRAIN = ("-tr", "nnUNetTrainerMRSegmentator_2epochs", "-c", "2d", "--folds", "0", "-device", "cpu", "--processes", "0")
pytestmark = pytest.mark.slow


def make_cases(folder: Path, count: int) -> None:
    x, y, z = np.indices(SHAPE)
    for number in range(count):
        labels = np.zeros(SHAPE, dtype=np.uint8)
        for label, centre in enumerate([(10, 14 + number % 3, 3), (22, 15, 4)], start=1):
            labels[((x - centre[0]) / 6) ** 2 + ((y - centre[1]) / 6) ** 2 + ((z - centre[2]) / 2.2) ** 2 < 1] = label
        image = (300 - 60.0 * labels + np.random.default_rng(number).normal(0, 8, SHAPE)).astype(np.float32)
        for kind, array in (("images", image), ("labels", labels)):
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / kind / f"p{number}.nii.gz")


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    return {
        **inherited,
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
    }


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "nnunet_multimodal.cli", "relabel", *map(str, words)]


def run(*words: object) -> str:
    result = subprocess.run(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-5000:]}"
    return result.stdout


def left_behind(place: Path) -> list[str]:
    """Trainings of this project that still run; told by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"nnUNet_raw={place}/nnunet/raw".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # gone, or somebody else's
            continue
    return found


def test_two_cycles(tmp_path: Path) -> None:
    make_cases(tmp_path, 9)
    start = tmp_path / "start"
    start.mkdir()
    for number in range(6):
        (start / f"p{number}.nii.gz").write_bytes((tmp_path / f"labels/p{number}.nii.gz").read_bytes())
    place = tmp_path / "P"
    run("init", place, "--images", tmp_path / "images", "--labels", start, "--label-names", "liver=1", "spleen=2")
    run("train", place, *TRAIN, "--prepare-only", "--plan", "-gpu_memory_target", "1")
    plans_file = place / "plans.json"
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = 2
    network = configuration["architecture"]["arch_kwargs"]
    network |= {"n_stages": 3, "features_per_stage": [8, 8, 8], "n_conv_per_stage_decoder": [1, 1]}
    network |= {key: network[key][:3] for key in ("kernel_sizes", "strides")} | {"n_conv_per_stage": [1, 1, 1]}
    configuration["nnunet_multimodal"] = {
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
        "save_every": 1,
    }
    plans_file.write_text(json.dumps(plans), encoding="utf-8")

    log = place / "logs/cycle_001_fold_0.log"
    process = subprocess.Popen(command("train", place, *TRAIN), env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 1800
    while not (log.exists() and "Epoch 1" in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    if sys.platform.startswith("linux"):  # elsewhere a killed command leaves its training behind
        assert not left_behind(place)
    out = run("train", place, *TRAIN)
    assert " --c" in out and "cycle 1 is trained" in out
    text = log.read_text(encoding="utf-8")
    assert text.count("Training done.") == 1
    fold = next(place.glob("nnunet/results/Dataset001_P/*/fold_0"))
    assert (fold / "validation/summary.json").is_file(), "nnU-Net found the true labels"

    assert "2 cases" in run("propose", place, "-n", "2", "-device", "cpu")
    names = [path.name for path in (place / "batches/batch_001").iterdir() if path.is_dir()]
    given = tmp_path / "given"
    given.mkdir()
    for name in names:
        (given / f"{name}.nii.gz").write_bytes((tmp_path / f"labels/{name}.nii.gz").read_bytes())
    run("accept", place, given)
    out = run("train", place, *TRAIN)
    assert "2 cases preprocessed, 6 kept from before" in out
    text = (place / "logs/cycle_002_fold_0.log").read_text(encoding="utf-8")
    assert "0 new, 0 skipped" in text, "all weights are taken over"
    assert "This split has" in text
    assert "cycle 1: 2 cases" in run("report", place)
    assert "verified: nothing is wrong" in run("status", place, "--verify")
