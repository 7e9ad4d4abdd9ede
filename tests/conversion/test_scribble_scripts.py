"""The scripts for data sets with scribbles and for paired folders, on made-up trees of the layouts they describe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from test_dataset_scripts import load
from test_mixed_scripts import ct_image, end
from tiny_data import SHAPE, make_image, make_label, save
from tiny_scribbles import make_scribbles


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def made(folders: dict[str, str], name: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(folders["nnUNet_raw"]) / name
    return folder, json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def hearts(unlabelled: int = 4) -> np.ndarray:
    """Scribbles of three classes."""
    drawn = make_scribbles(unlabelled)
    drawn[12, 6:8, 2] = 3
    return drawn


def dense_hearts(values: tuple[int, int, int] = (1, 2, 3)) -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.int16)
    organs = make_label()
    organs[12] = np.where(organs[12] == 2, 3, organs[12])
    for number, value in enumerate(values, start=1):
        label[organs == number] = value
    return label


# --- ACDC ------------------------------------------------------------------------------------------------------------


def write_acdc(root: Path, scribbles: Path) -> None:
    for patient in ("patient001", "patient002"):
        for seed, frame in enumerate(("frame01", "frame12")):
            save(root / patient / f"{patient}_{frame}.nii.gz", make_image(seed))
            save(root / patient / f"{patient}_{frame}_gt.nii.gz", dense_hearts())
            save(scribbles / patient / f"{patient}_{frame}_scribble.nii.gz", hearts())
        (root / patient / f"{patient}_4d.nii.gz").write_bytes(b"not read")


def test_acdc(tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    write_acdc(tmp_path / "ACDC", tmp_path / "drawn")
    (tmp_path / "drawn/patient002/patient002_frame12_scribble.nii.gz").unlink()
    words = [str(tmp_path / "ACDC"), "--scribbles", str(tmp_path / "drawn"), "-d", "603"]
    assert load("acdc_scribbles").main(words) == 0
    folder, content = made(nnunet_folders, "Dataset603_ACDCScribbles")
    assert [*content["labels"]] == ["background", "right_ventricle", "myocardium", "left_ventricle", "ignore"]
    assert content["numTraining"] == 3
    patients = content["nnunet_multimodal"]["case_patient"]
    assert patients["patient001_frame01"] == patients["patient001_frame12"] == "patient001"
    assert (voxels(folder / "labelsTr/patient001_frame12.nii.gz") == hearts()).all()
    assert (voxels(folder / "labelsTr_dense/patient001_frame12.nii.gz") == dense_hearts()).all()
    text = capsys.readouterr().out
    assert "passed over: 1 images without scribbles" in text
    assert "left_ventricle: 6 voxels drawn" in text


def test_acdc_without_scribbles(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    write_acdc(tmp_path / "ACDC", tmp_path / "elsewhere")
    assert end("acdc_scribbles", tmp_path / "ACDC", "-d", "603") == 4
    assert end("acdc_scribbles", tmp_path / "nowhere", "-d", "603") == 2
    assert not any(Path(nnunet_folders["nnUNet_raw"]).iterdir())


# --- MSCMR -----------------------------------------------------------------------------------------------------------


def test_mscmr(tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """CycleMix's folders: a copy of the scribbles in two of them, dense labels in MSCMR's own values."""
    root = tmp_path / "MSCMR_dataset"
    for number in (7, 14):
        save(root / f"train/images/subject{number}_DE.nii.gz", make_image(number))
        for place in ("train/labels", "MSCMR_scribbles"):
            save(root / f"{place}/subject{number}_DE_scribble.nii.gz", hearts())
    save(root / "dense/subject7_DE_manual.nii.gz", dense_hearts((600, 200, 500)))
    save(root / "val/images/subject1_DE.nii.gz", make_image())
    save(root / "val/labels/subject1_DE_manual.nii.gz", dense_hearts((600, 200, 500)))
    assert load("mscmr_scribbles").main([str(root), "-d", "608"]) == 0
    folder, content = made(nnunet_folders, "Dataset608_MSCMRScribbles")
    assert content["numTraining"] == 2
    assert (voxels(folder / "labelsTr_dense/subject7_DE.nii.gz") == dense_hearts()).all()
    assert "passed over: 1 images without scribbles" in capsys.readouterr().out

    save(root / "MSCMR_scribbles/subject7_DE_scribble.nii.gz", make_scribbles())
    assert end("mscmr_scribbles", root, "-d", "608", "--overwrite") == 4
    assert "which differ" in capsys.readouterr().err


# --- WORD ------------------------------------------------------------------------------------------------------------


def write_word(root: Path, unlabelled: int = 255) -> None:
    """Organs 1 (liver) and 10 (colon) in every case; every organ of the paper drawn in one."""
    for number in (2, 3):
        drawn = make_scribbles(unlabelled)
        drawn[drawn == 2] = 10
        if number == 3:
            for organ in range(1, 17):
                drawn[2 + organ % 12, 3 + organ // 12, 4] = organ
        save(root / f"imagesTr/word_{number:04d}.nii.gz", ct_image(number))
        save(root / f"scribblesTr/word_{number:04d}.nii.gz", drawn)
        save(root / f"labelsTr/word_{number:04d}.nii.gz", np.where(make_label() == 2, 10, make_label()))


def test_word(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    write_word(tmp_path / "WORD" / "WORD-V0.1.0")
    assert load("word_scribbles").main([str(tmp_path / "WORD"), "-d", "609"]) == 0
    folder, content = made(nnunet_folders, "Dataset609_WORDScribbles")
    assert content["channel_names"] == {"0": "CT"}
    assert content["labels"]["pancreas"] == 7 and content["labels"]["ignore"] == 8
    label = voxels(folder / "labelsTr/word_0002.nii.gz")
    assert (label == 0).sum() == 12 + 2  # drawn background, and the colon
    assert (label == 8).sum() == (make_scribbles(255) == 255).sum()
    assert set(np.unique(voxels(folder / "labelsTr_dense/word_0002.nii.gz"))) == {0, 1}


def test_word_with_other_values(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    write_word(tmp_path, unlabelled=17)
    assert end("word_scribbles", tmp_path, "-d", "609") == 4  # found 17, which is no organ
    assert end("word_scribbles", tmp_path, "-d", "609", "--unlabelled", "16") == 2
    assert end("word_scribbles", tmp_path / "imagesTr", "-d", "609") == 4
    assert not any(Path(nnunet_folders["nnUNet_raw"]).iterdir())
    words = [str(tmp_path), "-d", "609", "--unlabelled", "17", "--organs", "colon", "liver"]
    assert load("word_scribbles").main(words) == 0
    _, content = made(nnunet_folders, "Dataset609_WORDScribbles")
    assert content["labels"] == {"background": 0, "liver": 1, "colon": 2, "ignore": 3}


# --- paired folders --------------------------------------------------------------------------------------------------

CHANNELS = ["--images", "CT={case}/ct.nii.gz", "MR={case}/mr.nii.gz"]
SIMULATED = ["--dense", "{case}/seg.nii.gz", "--simulate", "skeleton", "--label-names", "tumour=1,2"]


def write_pairs(root: Path) -> Path:
    for seed, case in enumerate(("p1", "p2")):
        save(root / case / "ct.nii.gz", ct_image(seed))
        save(root / case / "mr.nii.gz", make_image(seed))
        save(root / case / "seg.nii.gz", make_label())
        save(root / case / "scribbles.nii.gz", make_scribbles(255))
    return root


def test_paired_with_scribbles(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    root = write_pairs(tmp_path / "pairs")
    words = ["--scribbles", "{case}/scribbles.nii.gz", "--unlabelled", "255", "--label-names", "a=1", "b=2"]
    assert load("paired_folder").main([str(root), "-d", "604", *CHANNELS, *words]) == 0
    folder, content = made(nnunet_folders, "Dataset604_Paired")
    assert content["channel_names"] == {"0": "CT", "1": "MR"}
    assert (folder / "imagesTr/p2_0001.nii.gz").resolve() == root / "p2/mr.nii.gz"
    assert (voxels(folder / "labelsTr/p1.nii.gz") == make_scribbles(3)).all()
    assert not (folder / "labelsTr_dense").exists()


def test_paired_with_simulated_scribbles(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    root = write_pairs(tmp_path / "pairs")
    assert load("paired_folder").main([str(root), "-d", "604", *CHANNELS, *SIMULATED]) == 0
    folder, content = made(nnunet_folders, "Dataset604_Paired")
    assert content["labels"] == {"background": 0, "tumour": 1, "ignore": 2}
    assert (voxels(folder / "labelsTr_dense/p1.nii.gz") == (make_label() > 0)).all()
    assert set(np.unique(voxels(folder / "labelsTr/p1.nii.gz"))) == {0, 1, 2}
    assert len([*Path(nnunet_folders["nnUNet_raw"]).iterdir()]) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: save(root / "p2/mr.nii.gz", np.roll(make_image(), 7, 0)),
            r"case p2: the bodies in CT and MR .*0\.",
        ),
        (lambda root: save(root / "p2/mr.nii.gz", make_image()[:-1]), r"channel .*p2/mr\.nii\.gz has shape 15x14x6"),
        (
            lambda root: save(root / "p2/mr.nii.gz", make_image(), np.diag([1.5, 1.5, 6, 1])),
            r"mr\.nii\.gz does not lie",
        ),
        (lambda root: (root / "p2/mr.nii.gz").unlink(), "1 cases lack an image or their scribbles: p2"),
        (lambda root: (root / "p1/seg.nii.gz").write_bytes(b""), r"Cannot read .*p1/seg\.nii\.gz"),
    ],
)
def test_paired_faults(
    spoil: Any, message: str, tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_pairs(tmp_path / "pairs")
    spoil(root)
    assert end("paired_folder", root, "-d", "604", *CHANNELS, *SIMULATED) == 4
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not any(Path(nnunet_folders["nnUNet_raw"]).iterdir())


def test_paired_on_demand_and_usage(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    root = write_pairs(tmp_path / "pairs")
    scribbles = ["--scribbles", "{case}/scribbles.nii.gz", "--label-names", "a=1", "b=2"]
    for words in (
        [*CHANNELS[:2], *SIMULATED],  # one channel
        [*CHANNELS, *scribbles],  # unlabelled not told
        ["--images", "ct.nii.gz", "mr.nii.gz", *SIMULATED],
        [*CHANNELS, "--simulate", "skeleton", "--label-names", "a=1"],
        [*CHANNELS, *SIMULATED, "--every", "0"],
    ):
        assert end("paired_folder", root, "-d", "604", *words) == 2, words
    save(root / "p2/mr.nii.gz", np.roll(make_image(), 7, 0))
    assert load("paired_folder").main([str(root), "-d", "604", *CHANNELS, *SIMULATED, "--allow-unregistered"]) == 0


def test_real_pairs(data_dir: Path, tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    """One patient of BraTS 2013, whose labels leave the skull-stripped images by a few voxels."""
    for part, name in (("images", "pat0006_Flair"), ("images", "pat0006_T1c"), ("labels", "pat0006")):
        (tmp_path / part).mkdir(exist_ok=True)
        source = data_dir / "brain_tumour_paired" / part / f"{name}.nii.gz"
        (tmp_path / part / f"{name}.nii.gz").symlink_to(source.resolve())
    words = ["--images", "FLAIR=images/{case}_Flair.nii.gz", "T1c=images/{case}_T1c.nii.gz"]
    words += ["--dense", "labels/{case}.nii.gz", "--label-names", "tumour=1,2,3,4"]
    assert (
        load("paired_folder").main([str(tmp_path), "-d", "604", *words, "--simulate", "contour", "--every", "9"]) == 0
    )
    folder, _ = made(nnunet_folders, "Dataset604_Paired")
    report = json.loads((folder / "coverage.json").read_text(encoding="utf-8"))
    assert report["body_overlap"]["pat0006"]["T1c"] > 0.95
    assert 0 < report["classes"]["tumour"]["of_class"] < 0.05
