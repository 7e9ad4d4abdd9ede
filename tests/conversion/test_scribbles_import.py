"""``scribbles import``: values, names, coverage, links, channels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import make_label, save
from tiny_scribbles import Scribbled, make_scribbled, make_scribbles

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scribbled(tmp_path: Path, nnunet_folders: dict[str, str]) -> Scribbled:
    return make_scribbled(tmp_path / "in", Path(nnunet_folders["nnUNet_raw"]))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_dataset_and_coverage(scribbled: Scribbled, call: Call) -> None:
    names = ["--label-names", "liver=1", "spleen=2"]
    code, text, error = call(scribbled.arguments(*names, "--dense", str(scribbled.dense().parent)))
    assert code == 0, error
    folder = scribbled.dataset
    content = read_json(folder / "dataset.json")
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert content["channel_names"] == {"0": "MR"} and content["numTraining"] == 2
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert (voxels(folder / "labelsTr" / "a.nii.gz") == make_scribbles(unlabelled=3)).all()
    assert (folder / "imagesTr" / "a_0000.nii.gz").is_symlink()
    assert (folder / "labelsTr_dense" / "b.nii.gz").resolve() == scribbled.dense("b").resolve()

    report = read_json(folder / "coverage.json")
    liver = report["cases"]["a"]["liver"]
    assert liver == {"voxels": 3, "of_all": round(3 / (16 * 14 * 6), 6), "of_class": 3 / 120, "right": 1.0}
    assert report["classes"]["spleen"]["voxels"] == 4 and report["classes"]["background"]["voxels"] == 24
    assert "liver: 6 voxels drawn, 0.223% of all, 2.5% of the class; 100.0% of them as in the dense labels" in text


def test_itk_snap_style(scribbled: Scribbled, call: Call) -> None:
    """0 is where nobody drew, 9 is background; the classes are numbered from 1 whatever their values."""
    for case in "ab":
        drawn = make_scribbles(unlabelled=0, background=9)
        drawn[drawn == 2] = 5
        save(scribbled.scribbles(case), drawn)
    save(scribbled.dense(), np.where(make_label() == 2, 5, make_label()))
    scribbled.dense("b").unlink()
    words = [
        "--background-label",
        "9",
        "--label-names",
        "liver=1",
        "spleen=5",
        "--dense",
        str(scribbled.dense().parent),
    ]
    code, _, error = call(scribbled.arguments(*words, unlabelled="0"))
    assert code == 0, error
    assert (voxels(scribbled.dataset / "labelsTr" / "b.nii.gz") == make_scribbles(unlabelled=3)).all()
    assert [path.name for path in (scribbled.dataset / "labelsTr_dense").iterdir()] == ["a.nii.gz"]
    assert (voxels(scribbled.dataset / "labelsTr_dense" / "a.nii.gz") == make_label()).all()
    report = read_json(scribbled.dataset / "coverage.json")
    assert report["cases"]["a"]["background"]["right"] == 1.0
    assert report["classes"]["spleen"]["of_class"] == pytest.approx(2 / 48, abs=1e-6)
    assert "of_class" not in report["cases"]["b"]["liver"]
